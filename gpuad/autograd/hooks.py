"""Hooks: functions of the user that see, and may replace, gradients on their way.

The order at a node, PyTorch's: hooks of its output tensors, what retain_grad() keeps, prehooks of the node, its rule,
hooks of the node. Hooks of one kind run in the order in which they were registered.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpuad.errors import AutogradError, DeviceError, DtypeError, ShapeError
from gpuad.tensor import Tensor

if TYPE_CHECKING:
    from gpuad.autograd.node import Node


class RemovableHandle:
    """What registering a hook returns: `remove()` takes the hook away, as does leaving a `with` block."""

    _numbers = itertools.count()

    def __init__(self, hooks: dict[int, Any], hook: Any, prepend: bool = False) -> None:
        self._hooks = hooks
        self.id = next(self._numbers)
        others = dict(hooks) if prepend else {}
        if prepend:
            hooks.clear()
        hooks[self.id] = hook
        hooks.update(others)

    def remove(self) -> None:
        """Take the hook away; a second call does nothing."""
        self._hooks.pop(self.id, None)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


# The leaves that have had post-accumulate hooks: while there are none, no walk counts how often a leaf was used.
hooked_leaves: weakref.WeakSet[Tensor] = weakref.WeakSet()


class NodeHooks:
    """The hooks of one node. output: of its output tensor. retained: whose .grad keeps the output's gradient.

    before, after: of the node itself; `watching` says whether there are any.
    """

    __slots__ = ("output", "retained", "before", "after")

    def __init__(self) -> None:
        self.output: dict[int, Callable] = {}
        self.retained: weakref.ref[Tensor] | None = None
        self.before: dict[int, Callable] = {}
        self.after: dict[int, Callable] = {}

    @property
    def watching(self) -> bool:
        """Whether the node itself has hooks."""
        return bool(self.before or self.after)


def hooks_of(node: Node) -> NodeHooks:
    """The node's hooks, made on first use."""
    if node.hooks is None:
        node.hooks = NodeHooks()
    return node.hooks


def _called(hook: Any) -> str:
    return repr(getattr(hook, "__name__", type(hook).__name__))


def run_output_hooks(hooks: Sequence[Callable], gradient: Tensor) -> Tensor:
    """The gradient after hooks that each take one and may return another in its place."""
    for hook in hooks:
        result = hook(gradient)
        if result is not None:
            gradient = _checked(hook, gradient, result)
    return gradient


def run_tuple_hooks(hooks: Sequence[Callable], gradients: tuple, *others: tuple) -> tuple:
    """Gradients after hooks that each take all of them (and `others`) and may return a tuple in their place."""
    for hook in hooks:
        result = hook(gradients, *others)
        if result is None:
            continue
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(gradients):
            raise AutogradError(
                f"The hook {_called(hook)} returned {len(results)} gradients in place of {len(gradients)}; return a "
                "tuple with one for each (None where there is none), or None to change nothing."
            )
        gradients = tuple(
            [None if r is None else _checked(hook, g, r) for g, r in zip(gradients, results, strict=True)]
        )
    return gradients


def _checked(hook: Any, before: Tensor | None, after: Any) -> Tensor:
    """`after`, where it can stand in place of `before`."""
    name = _called(hook)
    if not isinstance(after, Tensor):
        raise TypeError(
            f"The hook {name} returned a {type(after).__name__}; a hook returns a Tensor, or None to change nothing."
        )
    if before is None:
        raise AutogradError(f"The hook {name} returned a gradient where there was none; return None in its place.")
    if after._data.shape != before._data.shape:
        raise ShapeError(
            f"The hook {name} returned a gradient of shape {tuple(after.shape)} in place of one of shape "
            f"{tuple(before.shape)}; they must be equal."
        )
    if after._device is not before._device:
        raise DeviceError(
            f"The hook {name} returned a gradient on {after._device} in place of one on {before._device}; return "
            f'g.to("{before._device}").'
        )
    if after._data.dtype != before._data.dtype:
        raise DtypeError(
            f"The hook {name} returned a {after.dtype} gradient in place of a {before.dtype} one; return "
            f"g.to(gpuad.{before.dtype})."
        )
    return after


def register_hook(self: Tensor, hook: Callable) -> RemovableHandle:
    """Call `hook(gradient)` whenever the gradient of this tensor is computed; a Tensor it returns takes its place.

    Returns a handle with remove(). The gradient must not be written to. Errors: AutogradError when the tensor requires
    no grad, and at the backward when what the hook returns has another shape, dtype or device.
    """
    if not self._requires_grad:
        raise AutogradError("register_hook() needs a tensor that requires grad; call requires_grad_() first.")
    if self._node is not None:
        return RemovableHandle(hooks_of(self._node).output, hook)
    if self._hooks is None:
        self._hooks = {}
    return RemovableHandle(self._hooks, hook)


def register_post_accumulate_grad_hook(self: Tensor, hook: Callable) -> RemovableHandle:
    """Call `hook(tensor)` when backward has accumulated this leaf's gradient; returns a handle with remove().

    That is as soon as the last operation that used the leaf has been walked, so a hook that steps an optimiser and sets
    tensor.grad to None keeps no more than a few gradients alive at a time.
    """
    if self._node is not None or not self._requires_grad:
        raise AutogradError(
            "register_post_accumulate_grad_hook() needs a leaf that requires grad; only leaves accumulate gradients. "
            "Use register_hook() on what an operation computed."
        )
    if self._post_hooks is None:
        self._post_hooks = {}
        hooked_leaves.add(self)
    return RemovableHandle(self._post_hooks, hook)


Tensor.register_hook = register_hook  # type: ignore[attr-defined]
Tensor.register_post_accumulate_grad_hook = register_post_accumulate_grad_hook  # type: ignore[attr-defined]
