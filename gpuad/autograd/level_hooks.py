"""Hooks on tensors with levels: they see gradients as the program inside the transform does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuad.autograd.hooks import RemovableHandle, register_hook
from gpuad.autograd.levels import Batched, Dual, expose, level_of, make_batched, open_levels, reopened
from gpuad.autograd.variables import plain
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor


def register_leveled_hook(self: Any, hook: Callable) -> RemovableHandle:
    """As Tensor.register_hook; inside vmap the gradient is that of one example.

    Of a tensor with a tangent (forward mode) the gradient and how it changes along the tangent are computed in separate
    passes, so a hook sees either, and may not replace them: AutogradError where it returns a tensor.
    """
    levels, batches, moving = open_levels(), [], False
    x = self
    while level_of(x):
        if isinstance(x, Batched):
            batches.append((x.level, x.value._data.shape[0]))
            x = x.value
        else:
            moving, x = True, x.primal

    def seen(gradient: Tensor) -> Any:
        with reopened({**levels, **open_levels()}):
            for level, _ in reversed(batches):
                gradient = make_batched(gradient, level)
            result = hook(gradient)
            if result is None:
                return None
            if moving:
                raise AutogradError(
                    f"The hook {getattr(hook, '__name__', hook)!r} returned a gradient for a tensor that has a tangent "
                    "(inside jvp, jacfwd, hessian or hvp), where the gradient is not computed in one piece. Return "
                    "None, or change gradients by a rule of your own: gpuad.func.custom_vjp, autograd.Function."
                )
            for level, size in batches:
                result = expose(result, level, size)
            return result

    return register_hook(plain(self), seen)


Dual.register_hook = register_leveled_hook  # type: ignore[attr-defined]
Batched.register_hook = register_leveled_hook  # type: ignore[attr-defined]
