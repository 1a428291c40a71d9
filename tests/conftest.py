"""Fixtures of the whole suite: the devices that are present, fixed seeds, and the counters of simulated devices."""

from __future__ import annotations

import importlib.util
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: BLAS threads on top of that only get in each other's way
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

import gpuad

# The module `cudasim` exists only under tests/cudasim/run. Without this, its source folder, next to the tests and so on
# sys.path, would be taken for it: a namespace package, which has no file.
_spec = importlib.util.find_spec("cudasim")
if _spec is not None and _spec.origin is None:
    sys.modules["cudasim"] = None  # type: ignore[assignment]


def _why_no_cuda() -> str | None:
    """The reason why there is no CUDA device, or None when there is one."""
    if gpuad.cuda.is_available():
        return None
    try:
        gpuad.device("cuda:0")
    except gpuad.errors.GpuadError as error:
        return f"no CUDA device: {error}"
    return "no CUDA device: gpuad.cuda.is_available() is False"


WHY_NO_CUDA = _why_no_cuda()
CUDA_DEVICES = [] if WHY_NO_CUDA else [f"cuda:{index}" for index in range(min(gpuad.cuda.device_count(), 2))]


def pytest_configure(config: pytest.Config) -> None:
    """Fail where an operation ran on another device than its operands': CuPy would switch on peer access, and warn."""
    config.addinivalue_line("filterwarnings", "error:The device where the array resides")


def pytest_report_header() -> str:
    """The devices that the generic tests run on."""
    return "gpuad devices: " + ", ".join(["cpu", *CUDA_DEVICES]) + (f" ({WHY_NO_CUDA})" if WHY_NO_CUDA else "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` where there is no CUDA device."""
    if WHY_NO_CUDA:
        skip = pytest.mark.skip(reason=WHY_NO_CUDA.partition(". ")[0])  # the header has the whole of it
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.cuda) for name in CUDA_DEVICES)])
def device(request):
    """Each device that is present: cpu, and the first two CUDA devices."""
    return gpuad.device(request.param)


@pytest.fixture
def cuda_device():
    """The first CUDA device; the test is skipped where there is none."""
    if WHY_NO_CUDA:
        pytest.skip(WHY_NO_CUDA)
    return gpuad.device("cuda:0")


@pytest.fixture
def cudasim():
    """The module with the counters of simulated devices; a test that counts is skipped on a real one."""
    return pytest.importorskip("cudasim", reason="counts need a simulated CUDA device: tests/cudasim/run pytest")


@pytest.fixture
def counts(cudasim):
    """`cudasim.record`: `with counts() as r:` counts launches, copies and synchronisations of simulated devices."""
    return cudasim.record


@pytest.fixture(autouse=True)
def _fixed_seed():
    gpuad.manual_seed(0)
