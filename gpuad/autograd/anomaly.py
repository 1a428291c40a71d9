"""Anomaly detection: which line of the forward pass is behind a gradient that is not finite.

While it is on, every new node notes where it was made (node.watch), every operation's result is looked at, and the walk
looks at every gradient. While it is off, none of this is there: the operations' methods are wrapped on entering.
"""

from __future__ import annotations

import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from gpuad.array.device import of_array
from gpuad.array.dtypes import FLOATING
from gpuad.autograd.modes import state
from gpuad.autograd.node import WRITTEN, Node, OutputNode, unwatch, watch
from gpuad.autograd.variables import plain
from gpuad.errors import AnomalyError
from gpuad.tensor import Tensor


class _Settings:
    """Of the whole process, as in PyTorch. first: the first operation of the forward pass that gave no number."""

    def __init__(self) -> None:
        self.enabled = False
        self.check_nan = True
        self.first: tuple[str, str, traceback.StackSummary] | None = None
        self.classes: list[type] = []  # whose calls are looked at; filled by gpuad/autograd/__init__.py


settings = _Settings()
_switching = threading.Lock()


def _users_frames() -> traceback.StackSummary:
    """Where we are, without gpuad's own frames, the innermost last."""
    frames = [
        (frame, line)
        for frame, line in traceback.walk_stack(sys._getframe(1))
        if (frame.f_globals.get("__name__") or "").partition(".")[0] != "gpuad" and "__name__" in frame.f_globals
    ]
    frames.reverse()
    return traceback.StackSummary.extract(frames)


def _note(node: Node) -> None:
    """Leave in a new node's metadata where it was made, and the node whose gradient it computes, if it does."""
    if not isinstance(node, OutputNode):
        node.metadata["traceback"] = _users_frames()
        if state.walk is not None and state.walk.at is not None:
            node.metadata["parent"] = state.walk.at


def _bad(array: Any) -> str:
    """What an array has that is no number: "NaN", "inf" or nothing. Waits for the device."""
    if array.dtype.char not in FLOATING:
        return ""

    backend = of_array(array).backend
    xp = backend.xp
    if bool(backend.to_host(xp.all(xp.isfinite(array)))):
        return ""
    return "NaN" if bool(backend.to_host(xp.any(xp.isnan(array)))) else "inf"


def _seen(method: Callable) -> Callable:
    """An operation's method that notes the first result with NaN or inf of operands without."""

    def call(self: Any, *inputs: Any, **named: Any) -> Any:
        looking = settings.first is None and state.walk is None
        before = [_bad(plain(x)._data) for x in inputs if isinstance(x, Tensor)] if looking else []
        result = method(self, *inputs, **named)
        if looking and settings.first is None and not any(before):
            for out in result if isinstance(result, tuple) else (result,):
                kind = _bad(plain(out)._data) if isinstance(out, Tensor) else ""
                if kind:
                    settings.first = (kind, self.name, _users_frames())
                    break
        return result

    call.__wrapped__ = method  # type: ignore[attr-defined]
    return call


def _switch(enabled: bool) -> None:
    """Turn the looking on or off."""
    if enabled == settings.enabled:
        return
    settings.enabled, settings.first = enabled, None
    (watch if enabled else unwatch)(_note)
    for cls in settings.classes:
        for name in ("__call__", "in_place"):
            if name in cls.__dict__:
                method = cls.__dict__[name]
                setattr(cls, name, _seen(method) if enabled else method.__wrapped__)


class detect_anomaly:  # noqa: N801  (PyTorch's name)
    """Inside, a gradient with NaN or inf raises AnomalyError, which names the line of the forward pass behind it.

        with gpuad.autograd.detect_anomaly():
            loss = model(x)
            loss.backward()

    The error also names the first operation of the forward pass that gave NaN or inf out of finite operands. Enter it
    before the forward pass: only nodes made inside know their lines. An error in a backward rule is accompanied by a
    warning with the same traceback. check_nan=False: only that, gradients are not looked at.
    Slow, and waits for the device at every operation: for finding bugs, not for training.
    """

    def __init__(self, check_nan: bool = True) -> None:
        self._wanted = (True, check_nan)
        self._before: list[tuple[bool, bool]] = []

    def __enter__(self) -> None:
        with _switching:
            self._before.append((settings.enabled, settings.check_nan))
            _switch(self._wanted[0])
            settings.check_nan = self._wanted[1]

    def __exit__(self, *exc: object) -> None:
        with _switching:
            enabled, settings.check_nan = self._before.pop()
            _switch(enabled)


class set_detect_anomaly(detect_anomaly):  # noqa: N801
    """Turn anomaly detection on or off: at once when called as a function, until the block's end as a context."""

    def __init__(self, mode: bool, check_nan: bool = True) -> None:
        self._wanted = (bool(mode), check_nan)
        self._before = []
        super().__enter__()

    def __enter__(self) -> None:
        """It is on already."""


def checked(rule: Callable[..., list[Any]], node: Node, gradient: Any, walk: Any) -> list[Any]:
    """A node's rule with its gradients looked at; `walk` must not hand out leaves' buffers."""
    outer, walk.at = walk.at, node
    try:
        results = rule(node, gradient, walk)
    except AnomalyError:
        raise
    except Exception:
        warnings.warn(f"Error in the gradient of {_story(node)}", stacklevel=2)
        raise
    finally:
        walk.at = outer
    if settings.check_nan:
        _check(node, gradient, results)
    return results


def _check(node: Node, gradient: Any, results: list[Any]) -> None:
    incoming = gradient if isinstance(gradient, list) else [gradient]
    for i, result in enumerate(results):
        kind = "" if result is None or result is WRITTEN else _bad(_array(result))
        if not kind:
            continue
        came = [_bad(_array(g)) for g in incoming if g is not None]
        text = f"The gradient that {node.op.name} computed for its input {i} has {kind}"
        text += ", and so had the one it was given. " if any(came) else ". "
        text += f"This is {_story(node)}"
        if settings.first is not None:
            what, name, frames = settings.first
            text += (
                f"\nIn the forward pass, {name} was the first operation whose result had {what} while its operands had "
                f"not, at {_line(frames)}"
            )
        raise AnomalyError(text)


def _array(gradient: Any) -> Any:
    return plain(gradient)._data if isinstance(gradient, Tensor) else gradient


def _line(frames: traceback.StackSummary) -> str:
    """The innermost line of the user's: file, number, function, source."""
    if not frames:
        return "a line of gpuad's own."
    last = frames[-1]
    return f"{last.filename}:{last.lineno} in {last.name}:\n    {last.line}"


def _story(node: Node) -> str:
    """Where a node was made, and where the node was whose gradient made it."""
    frames = node.metadata.get("traceback")
    if frames is None:
        return (
            f"{node.op.name}, which was computed outside detect_anomaly, so its line is not known. Enter "
            "detect_anomaly before the forward pass."
        )
    text = f"{node.op.name} at {_line(frames)}\nTraceback of that call (most recent call last):\n"
    text += "".join(frames.format()).rstrip()
    parent = node.metadata.get("parent")
    if parent is not None:
        text += f"\nIt computes the gradient of {_story(parent)}"
    return text
