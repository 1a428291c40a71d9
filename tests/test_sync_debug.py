"""set_sync_debug_mode names the line of the user's that waited for the device."""

from __future__ import annotations

import linecache
import sys
import warnings

import pytest

import gpuad
from gpuad import nn
from gpuad.array import synchronization
from gpuad.errors import SynchronizationError


@pytest.fixture(autouse=True)
def _default_mode():
    yield
    gpuad.cuda.set_sync_debug_mode("default")


def here() -> int:
    """The number of the caller's line."""
    return sys._getframe(1).f_lineno


def error_of(function) -> str:
    gpuad.cuda.set_sync_debug_mode("error")
    with pytest.raises(SynchronizationError) as caught:
        function()
    return str(caught.value)


def item(x):
    return x.item()  # the line that waits


ITEM_LINE = here() - 3


@pytest.mark.cuda
def test_the_error_names_file_line_and_source():
    text = error_of(lambda: item(gpuad.ones(1, device="cuda")))
    assert f"waits for cuda:0 to finish all work given to it, at {__file__}:{ITEM_LINE}: return x.item()" in text
    assert "set_sync_debug_mode('default')" in text


@pytest.mark.cuda
def test_the_warning_is_of_the_same_line():
    gpuad.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match=rf":{ITEM_LINE}: return x\.item\(\)") as caught:
        item(gpuad.ones(1, device="cuda"))
    assert (caught[0].filename, caught[0].lineno) == (__file__, ITEM_LINE)


@pytest.mark.cuda
@pytest.mark.parametrize("wait", ["if", "print", "format", "float", "mask", "clip", "nonzero", "tolist", "cpu"])
def test_every_wait_names_this_file(wait):
    """However deep in gpuad or gpuad.nn the host waits, the line is that of the caller."""
    x = gpuad.tensor([1.0, 2.0], device="cuda")
    x.grad = x * 2
    waits = {
        "if": lambda: 1 if x.sum() > 0 else 2, "print": lambda: str(x), "format": lambda: f"{x.sum():.2f}",
        "float": lambda: float(x.sum()), "mask": lambda: x[x > 1], "nonzero": lambda: x.nonzero(),
        "clip": lambda: nn.utils.clip_grad_norm_([x], 1.0, error_if_nonfinite=True),
        "tolist": lambda: x.tolist(), "cpu": lambda: x.cpu(),
    }  # fmt: skip
    text = error_of(waits[wait])
    assert f", at {__file__}:{waits[wait].__code__.co_firstlineno}: " in text


def test_code_without_a_file_is_named_without_its_source():
    gpuad.cuda.set_sync_debug_mode("error")
    code = compile("\n\nwaits('Reading', 'cuda:0')", "<typed in>", "exec")
    with pytest.raises(SynchronizationError, match=r"at <typed in>:3\. Keep"):
        exec(code, {"__name__": "__main__", "waits": synchronization.waits})


def test_code_that_gpuad_wrote_is_passed_over():
    """The functions that gpuad makes of strings belong to no module; the line is that of their caller."""
    gpuad.cuda.set_sync_debug_mode("error")
    namespace = {"waits": synchronization.waits}
    exec("def prelude():\n    waits('Reading', 'cuda:0')", namespace)
    with pytest.raises(SynchronizationError) as caught:
        namespace["prelude"]()
    line = linecache.getline(__file__, caught.tb.tb_lineno).strip()
    assert f"{__file__}:{caught.tb.tb_lineno}: {line}" in str(caught.value)


def test_a_wait_passes_by_default_and_is_counted():
    before = gpuad.cuda.synchronization_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        synchronization.waits("Reading", "cuda:0")
    assert gpuad.cuda.synchronization_count() == before + 1
