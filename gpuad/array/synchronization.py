"""Waits of the host for a device: counted, and made to warn or raise on demand (gpuad.cuda.set_sync_debug_mode)."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from gpuad.errors import SynchronizationError

MODES = ("default", "warn", "error")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


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
        text = (
            f"{what} waits for {device} to finish all work given to it. Keep the value on the device, or do this less "
            "often; gpuad.cuda.set_sync_debug_mode('default') allows it."
        )
        if state.mode == "error":
            raise SynchronizationError(text)
        warnings.warn(text, UserWarning, stacklevel=_callers_level())
    state.count += 1


def _callers_level() -> int:
    """The stack level, counted from `waits`, of the first frame outside gpuad."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
