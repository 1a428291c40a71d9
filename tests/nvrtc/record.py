"""A pytest plugin that writes down every CUDA source that the tests give CuPy to compile, and which test was the first.

    PYTHONPATH=tests/nvrtc tests/cudasim/run pytest -p record --record units.json tests/test_sums_cuda.py
    python tests/nvrtc/missing.py collected.json units.json

The file is one that compile.py takes, as collect.py's is. In one process only: pytest without -n.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cupy.cuda import compiler

units: dict[tuple, dict] = {}


def recording(compile: Callable) -> Callable:
    """CuPy's compile function, that also keeps gpuad's sources."""

    def recorded(source, options=(), **named):
        if "gpuad_" in source:
            test = os.environ.get("PYTEST_CURRENT_TEST", "")
            units.setdefault((source, options), {"source": source, "options": options, "of": [test]})
        return compile(source, options, **named)

    return recorded


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that says where the file goes."""
    parser.addoption("--record", type=Path, required=True, help="the file for the sources")


def pytest_configure() -> None:
    """Begin to record."""
    compiler._compile_module_with_cache = recording(compiler._compile_module_with_cache)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the file."""
    session.config.getoption("--record").write_text(json.dumps(list(units.values())))
