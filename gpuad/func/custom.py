"""Functions with derivative rules of their own, in JAX's form: custom_vjp and custom_jvp."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from gpuad.autograd.function import Function
from gpuad.autograd.gradients import grad
from gpuad.autograd.modes import enable_grad
from gpuad.autograd.pytree import flatten, unflatten
from gpuad.autograd.variables import moves, variable
from gpuad.errors import AutogradError, ShapeError
from gpuad.tensor import Tensor


class _Custom:
    """What both kinds have in common: arguments by position, some of them not differentiated."""

    rules = ""

    def __init__(self, function: Callable, nondiff_argnums: Sequence[int] = ()) -> None:
        self.function = function
        self.nondiff_argnums = tuple(nondiff_argnums)
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    def _bound(self, args: tuple, kwargs: dict) -> tuple:
        """All arguments by position, defaults filled in."""
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def _split(self, args: tuple) -> tuple[list[Any], list[Any]]:
        """The arguments that are not differentiated, and those that are."""
        fixed = [args[i] for i in self.nondiff_argnums]
        return fixed, [a for i, a in enumerate(args) if i not in self.nondiff_argnums]

    def _joined(self, fixed: Sequence[Any], moving: Sequence[Any]) -> list[Any]:
        rest = iter(moving)
        places = {n: a for n, a in zip(self.nondiff_argnums, fixed, strict=True)}
        return [places[i] if i in places else next(rest) for i in range(len(fixed) + len(moving))]

    def _missing(self) -> AutogradError:
        return AutogradError(
            f"{getattr(self.function, '__name__', 'The function')} was made a {type(self).__name__}, but has no rule "
            f"yet; give it one with {self.rules}."
        )


class custom_vjp(_Custom):  # noqa: N801  (JAX's name)
    """A function whose reverse derivative is given; a decorator.

        @custom_vjp
        def f(x, y): ...

        f.defvjp(fwd, bwd)

    fwd takes f's arguments and returns (result, residuals); bwd(residuals, cotangent) returns a tuple with a cotangent
    for each argument, None for zeros. nondiff_argnums: arguments that are passed first to bwd and take none. Arguments,
    results and residuals may be nested. Rules made of gpuad's operations are differentiated again, go through vmap, and
    give forward mode too: the derivative of bwd, transposed (JAX has none there).
    """

    rules = "f.defvjp(fwd, bwd)"
    fwd: Callable | None = None
    bwd: Callable | None = None

    def defvjp(self, fwd: Callable, bwd: Callable) -> None:
        """Set the rule."""
        self.fwd, self.bwd = fwd, bwd

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fwd is None:
            raise self._missing()
        args = self._bound(args, kwargs)
        fixed, moving = self._split(args)
        leaves, structure = flatten(moving)
        shape: list[Any] = []
        outs = _ruled(self, fixed, structure, shape).apply(*leaves)
        return unflatten(shape[0], outs if isinstance(outs, tuple) else (outs,))


def _ruled(custom: custom_vjp, fixed: list[Any], structure: Any, shape: list[Any]) -> type[Function]:
    """The Function of one call; `shape` takes the structure of the result."""

    class Rule(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(ctx: Any, *leaves: Any) -> Any:
            args = custom._joined(fixed, unflatten(structure, leaves))
            result, residuals = custom.fwd(*args)  # type: ignore[misc]
            outs, out_structure = flatten(result)
            shape[:] = [out_structure]
            kept, ctx.residuals = flatten(residuals)
            ctx.plain = [None if isinstance(x, Tensor) else x for x in kept]
            ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in kept])
            return outs[0] if len(outs) == 1 else tuple(outs)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            kept = [p if s is None else s for s, p in zip(ctx.saved_tensors, ctx.plain, strict=True)]
            cotangents = custom.bwd(  # type: ignore[misc]
                *fixed, unflatten(ctx.residuals, kept), unflatten(shape[0], gradients)
            )
            if not isinstance(cotangents, (tuple, list)) or len(cotangents) != len(structure):
                raise ShapeError(
                    f"bwd of {custom.__name__} returns a tuple with a cotangent for each of the {len(structure)} "  # type: ignore[attr-defined]
                    f"differentiated arguments, got {cotangents!r}."
                )
            found: list[Any] = []
            for part, given in zip(structure, cotangents, strict=True):
                count = len(flatten(part)[0])
                found += [None] * count if given is None else flatten(given)[0]
            return tuple(found)

    Rule.__name__ = Rule.__qualname__ = getattr(custom, "__name__", "custom_vjp")
    return Rule


class custom_jvp(_Custom):  # noqa: N801
    """A function whose forward derivative is given; a decorator.

        @custom_jvp
        def f(x, y): ...

        @f.defjvp
        def f_jvp(primals, tangents):
            return result, tangent

    The tangent is linear in the tangents; reverse mode is its transpose, and is found by itself. nondiff_argnums:
    arguments that are passed first to the rule and have no tangent. f.defjvps(rule, …) takes a rule for each argument,
    rule(tangent, result, *primals), or None where the result does not depend on it.
    """

    rules = "f.defjvp(rule)"
    rule: Callable | None = None

    def defjvp(self, jvp: Callable) -> Callable:
        """Set the rule; a decorator."""
        self.rule = jvp
        return jvp

    def defjvps(self, *jvps: Callable | None) -> None:
        """Set a rule for each argument; their tangents are added."""

        def rule(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
            result = self(*primals)
            total: Any = result.new_zeros(result.shape)
            for each, tangent in zip(jvps, tangents, strict=True):
                if each is not None:
                    total = total + each(tangent, result, *primals)
            return result, total

        self.rule = rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.rule is None:
            raise self._missing()
        args = self._bound(args, kwargs)
        fixed, moving = self._split(args)
        leaves, structure = flatten(moving)
        shape: list[Any] = []
        outs = _transposed(self, fixed, structure, shape).apply(*leaves)
        return unflatten(shape[0], outs if isinstance(outs, tuple) else (outs,))


def _transposed(custom: custom_jvp, fixed: list[Any], structure: Any, shape: list[Any]) -> type[Function]:
    """The Function of one call: forward mode by the rule, reverse mode by its transpose."""

    def moved(leaves: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        primals, directions = unflatten(structure, leaves), unflatten(structure, tangents)
        _, tangent = custom.rule(*fixed, tuple(primals), tuple(directions))  # type: ignore[misc]
        return flatten(tangent)[0]

    class Rule(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(ctx: Any, *leaves: Any) -> Any:
            result = custom.function(*custom._joined(fixed, unflatten(structure, leaves)))
            outs, out_structure = flatten(result)
            shape[:] = [out_structure]
            ctx.plain = [None if isinstance(x, Tensor) else x for x in leaves]
            ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in leaves])
            return outs[0] if len(outs) == 1 else tuple(outs)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            leaves = [p if s is None else s for s, p in zip(ctx.saved_tensors, ctx.plain, strict=True)]
            with enable_grad():
                directions = [
                    variable(x.new_zeros(x.shape)) if isinstance(x, Tensor) and x.is_floating_point() else None
                    for x in leaves
                ]
                pairs = [(t, g) for t, g in zip(moved(leaves, directions), gradients, strict=True) if moves(t)]
                wanted = [d for d in directions if d is not None]
                found = iter(
                    grad([t for t, _ in pairs], wanted, [g for _, g in pairs], True, True, materialize_grads=True)
                    if pairs
                    else [d.new_zeros(d.shape) for d in wanted]
                )
            return tuple(None if d is None else next(found) for d in directions)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            leaves = [p if s is None else s for s, p in zip(ctx.saved_tensors, ctx.plain, strict=True)]
            found = moved(leaves, tangents)
            return found[0] if len(found) == 1 else tuple(found)

    Rule.__name__ = Rule.__qualname__ = getattr(custom, "__name__", "custom_jvp")
    return Rule
