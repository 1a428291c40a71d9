"""The simulator's own tests run under the simulator only."""

import pytest


def pytest_configure(config):
    try:
        import cudasim  # noqa: F401
    except ImportError:
        raise pytest.UsageError("run these tests under the simulator: tests/cudasim/run pytest tests/cudasim") from None


@pytest.fixture
def cp():
    import cupy

    return cupy
