"""Grad modes: whether operations are recorded. Each thread has its own."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class _State(threading.local):
    enabled = True
    inference = False
    autocast: Any = None  # what gpuad.autocast does here; see gpuad/autograd/autocast.py
    walk: Any = None  # the reverse pass that is under way


state = _State()


def is_grad_enabled() -> bool:
    """Whether operations of this thread are recorded."""
    return state.enabled


def is_inference_mode_enabled() -> bool:
    """Whether this thread is inside inference_mode."""
    return state.inference


class _Mode:
    """A context manager and decorator that sets the grad mode inside and restores it after."""

    _enabled = True

    def __init__(self) -> None:
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(state.enabled)
        state.enabled = self._enabled

    def __exit__(self, *exc: object) -> None:
        state.enabled = self._before.pop()

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with type(self)() if type(self) is not set_grad_enabled else set_grad_enabled(self._enabled):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]


class no_grad(_Mode):  # noqa: N801  (PyTorch's name)
    """Record nothing inside; also a decorator, with or without parentheses."""

    _enabled = False

    def __new__(cls, function: Callable | None = None) -> Any:
        made = super().__new__(cls)
        if function is None:
            return made
        made.__init__()  # type: ignore[misc]
        return made(function)


class enable_grad(no_grad):  # noqa: N801
    """Record inside, whatever is outside."""

    _enabled = True


class set_grad_enabled(_Mode):  # noqa: N801
    """Set the grad mode: at once when called as a function, until the block's end as a context manager."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self._enabled = bool(mode)
        self._outside = state.enabled
        state.enabled = self._enabled

    def __enter__(self) -> None:
        self._before.append(self._outside)
        state.enabled = self._enabled

    def __call__(self, function: F) -> F:
        state.enabled = self._outside  # as a decorator it sets nothing until the function runs
        return super().__call__(function)


class inference_mode(_Mode):  # noqa: N801
    """no_grad, and is_inference_mode_enabled() says so; `inference_mode(False)` records."""

    def __init__(self, mode: bool = True) -> None:
        super().__init__()
        self._enabled = not mode
        self._inference: list[bool] = []

    def __enter__(self) -> None:
        super().__enter__()
        self._inference.append(state.inference)
        state.inference = not self._enabled

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        state.inference = self._inference.pop()

    def __call__(self, function: F) -> F:
        mode = not self._enabled

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with inference_mode(mode):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]
