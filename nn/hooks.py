"""Hooks of modules on gradients: what passes in at the outputs and out at the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuad import Tensor
from gpuad.autograd import Function
from gpuad.autograd.graph import RemovableHandle

__all__ = ["BackwardHooks", "RemovableHandle"]


class _Pass(Function):
    """The identity of several tensors: one node, whose hooks see all of their gradients together."""

    name = "module_boundary"
    generate_vmap_rule = True

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tangents


class BackwardHooks:
    """The full backward hooks of one call of a module."""

    def __init__(self, module: Any, before: list[Callable], after: list[Callable]) -> None:
        self.module, self.before, self.after = module, before, after
        self.grad_output: tuple | None = None
        self.inputs = 0
        self.through_inputs = False

    def enter(self, args: tuple) -> tuple:
        """The arguments, those that require grad behind a boundary where their gradients are seen last."""
        self.inputs = len(args)
        args, node, places = _behind_boundary(args)
        self.through_inputs = node is not None
        if node is not None:
            node.register_hook(lambda grad_inputs, grad_outputs: self._leave(grad_inputs, places))
        return args

    def leave(self, result: Any) -> Any:
        """The result behind a boundary where its gradients are seen first."""
        several = isinstance(result, tuple)
        results, node, places = _behind_boundary(result if several else (result,))
        if node is not None:
            node.register_prehook(lambda grad_outputs: self._enter(grad_outputs, places, len(results)))
        return results if several else results[0]

    def _enter(self, gradients: tuple, places: list[int], count: int) -> tuple:
        grad_output = _spread(gradients, places, count)
        for hook in self.before:
            grad_output = self._replaced(hook(self.module, grad_output), grad_output)
        self.grad_output = grad_output
        if not self.through_inputs:  # nothing flows out at the inputs, so this is the end
            nothing = (None,) * self.inputs
            for hook in self.after:
                changed = hook(self.module, nothing, grad_output)
                if changed is not None and any(g is not None for g in changed):
                    raise RuntimeError(
                        f"A full backward hook of {type(self.module).__name__} returned gradients for inputs, but no "
                        "input requires grad; return None."
                    )
            self.grad_output = None
        return tuple(grad_output[i] for i in places)

    def _leave(self, gradients: tuple, places: list[int]) -> tuple | None:
        if self.grad_output is None:  # the inputs are reached on a way around the module
            return None
        grad_input = _spread(gradients, places, self.inputs)
        for hook in self.after:
            grad_input = self._replaced(hook(self.module, grad_input, self.grad_output), grad_input)
        self.grad_output = None
        return tuple(grad_input[i] for i in places)

    def _replaced(self, changed: Any, before: tuple) -> tuple:
        if changed is None:
            return before
        changed = changed if isinstance(changed, tuple) else (changed,)
        if len(changed) != len(before):
            raise RuntimeError(
                f"A full backward hook of {type(self.module).__name__} returned {len(changed)} gradients in place of "
                f"{len(before)}; return one for each, or None to change nothing."
            )
        return changed


def _behind_boundary(values: tuple) -> tuple[tuple, Any, list[int]]:
    """The values with a boundary before those that require grad, its node (None where there are none), their places."""
    places = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
    if not places:
        return values, None, places
    passed = _Pass.apply(*[values[i] for i in places])
    made = list(values)
    for i, each in zip(places, passed, strict=True):
        made[i] = each
    return tuple(made), passed[0].grad_fn, places


def _spread(gradients: tuple, places: list[int], count: int) -> tuple:
    found: list[Any] = [None] * count
    for i, gradient in zip(places, gradients, strict=True):
        found[i] = gradient
    return tuple(found)
