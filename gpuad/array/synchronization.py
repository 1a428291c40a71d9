"""Waits of the host for a device: counted, and made to warn or raise on demand (gpuad.cuda.set_sync_debug_mode)."""

from __future__ import annotations

import linecache
import sys
import warnings
from typing import Any

from gpuad.errors import SynchronizationError

MODES = ("default", "warn", "error")
_PACKAGE = __name__.partition(".")[0]


class _State:
    """mode: what a wait does besides waiting. count: how many there were in this process."""

    mode = "default"
    count = 0


state = _State()


def set_mode(mode: Any) -> None:
    """Let a wait pass ("default", 0), warn ("warn", 1) or raise ("error", 2)."""
    if not isinstance(mode, bool) and mode in (0, 1, 2):
        mode = MODES[mode]
    if mode not in MODES:
        raise ValueError(f"set_sync_debug_mode got {mode!r}; the modes are 'default', 'warn' and 'error' (0, 1, 2).")
    state.mode = mode


def waits(what: str, device: Any) -> None:
    """Say that the host is about to wait for `device`: counts, and warns or raises as the mode has it."""
    if state.mode != "default":
        level, place = _caller()
        text = (
            f"{what} waits for {device} to finish all work given to it{place}. Keep the value on the device, or do "
            "this less often; gpuad.cuda.set_sync_debug_mode('default') allows it."
        )
        if state.mode == "error":
            raise SynchronizationError(text)
        warnings.warn(text, UserWarning, stacklevel=level)
    state.count += 1


def _caller() -> tuple[int, str]:
    """The first frame outside gpuad: its stack level, counted from `waits`, and its line as `, at file:line: source`.

    A frame is told by the name of its module, which gpuad.nn and gpuad.optim share wherever their files lie; what
    gpuad has written itself (gradients, preludes) has none.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", _PACKAGE).partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    source = linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals).strip()
    return level, f", at {frame.f_code.co_filename}:{frame.f_lineno}" + (f": {source}" if source else "")
