"""Forward mode: dual numbers, value and tangent in one pass.

A Dual is a Tensor that carries its tangent at a level. An operation on duals applies the op to the primals (recorded on
the tape as ever, or duals of a lower level themselves) and the op's jvp to the tangents. Each nested use opens its own
level and the highest level is interpreted first, so tangents of different levels never mix.
Source: Griewank & Walther, section 3.1; levels as in Radul et al., "You Only Linearize Once", and JAX's autodidax.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from gpuad.autograd.modes import state
from gpuad.autograd.op import Interpreters, Op, check_in_place
from gpuad.errors import AutogradError, ShapeError
from gpuad.tensor import Tensor, wrap

_counting = threading.Lock()


class _Levels(threading.local):
    depth = 0


_levels = _Levels()


class Dual(Tensor):
    """A primal and its tangent at one level; everything a Tensor can do, differentiated forwards."""

    __slots__ = ("primal", "tangent", "level")

    primal: Tensor
    tangent: Tensor
    level: int


def make_dual(primal: Tensor, tangent: Tensor, level: int) -> Dual:
    """primal + ε tangent at `level`; shapes, dtypes and devices must be equal."""
    if primal._data.shape != tangent._data.shape:
        raise ShapeError(f"A tangent has the shape of its primal, {tuple(primal.shape)}; got {tuple(tangent.shape)}.")
    made = wrap(primal._data, primal._device, Dual)
    made._cell = primal._cell
    made._requires_grad, made._node = primal._requires_grad, primal._node
    made.primal, made.tangent, made.level = primal, tangent, level  # type: ignore[attr-defined]
    return made  # type: ignore[return-value]


def counted(change: int) -> None:
    """Count a level or an autocast region that is entered (+1) or left (−1), in any thread."""
    with _counting:
        Interpreters.active += change


class Level:
    """A context in which one level of forward differentiation is open; gives its number."""

    def __enter__(self) -> int:
        counted(1)
        _levels.depth += 1
        self.number = _levels.depth
        return self.number

    def __exit__(self, *exc: object) -> None:
        _levels.depth -= 1
        counted(-1)


class Reopened:
    """A context in which the levels that were open at a `depth()` are open again, for what ran there to run again."""

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def __enter__(self) -> None:
        with _counting:
            Interpreters.active += 1
        self._before, _levels.depth = _levels.depth, self._depth

    def __exit__(self, *exc: object) -> None:
        _levels.depth = self._before
        with _counting:
            Interpreters.active -= 1


def depth() -> int:
    """How many levels are open in this thread."""
    return _levels.depth


def unpack(x: Any, level: int) -> tuple[Any, Any]:
    """(primal, tangent) of x at `level`; the tangent is None where x does not depend on that level's inputs."""
    if isinstance(x, Dual) and x.level == level:
        return x.primal, x.tangent
    return x, None


def apply(op: Op, inputs: Sequence[Any], params: dict) -> Any:
    """The op on operands some of which may be duals: the highest level is taken apart, the rest is left inside."""
    level = max((x.level for x in inputs if isinstance(x, Dual)), default=0)
    if level == 0:
        return NotImplemented
    pairs = [unpack(x, level) for x in inputs]
    value, tangent = op.tangent([p for p, _ in pairs], [t for _, t in pairs], params)
    if isinstance(value, tuple):
        return tuple(v if t is None else make_dual(v, t, level) for v, t in zip(value, tangent, strict=True))
    if tangent is None:
        return value
    made = make_dual(value, tangent, level)
    if getattr(op, "view", False):
        made._view = (op, inputs[0], params)
    return made


def write(name: str, target: Tensor, result: Tensor) -> Tensor:
    """An operation in place on duals: the target takes over what the operation gave out of place."""
    recording = state.enabled and result._requires_grad
    check_in_place(name, target, result._data.dtype, result._data.shape, recording)
    if not isinstance(target, Dual) or not isinstance(result, Dual) or target._view is not None:
        raise AutogradError(
            f"{name}_ would store a tangent of forward mode in a tensor that has none of its own (a view, or a tensor "
            "from outside). Use the operation out of place."
        )
    if result._data.dtype != target._data.dtype:
        result = result.to(target._data.dtype)
    for slot in ("_data", "_cell", "_node", "_requires_grad", "primal", "tangent", "level"):
        setattr(target, slot, getattr(result, slot))
    return target


def gradient(roots: list[Tensor], targets: list[Tensor], weights: list[Any], create_graph: bool) -> Any:
    """Reverse mode on duals (forward over reverse): the gradient of the primals, and how it changes along the tangents.

    With y = y₀ + ε ẏ recorded as functions of x₀, the gradient is ∂y₀/∂x₀ᵀ w₀ + ε (∂ẏ/∂x₀ᵀ w₀ + ∂y₀/∂x₀ᵀ ẇ), because
    derivatives in x₀ and in ε commute.
    """
    from gpuad.autograd.walk import grad

    everything = [*roots, *targets, *(w for w in weights if w is not None)]
    level = max((x.level for x in everything if isinstance(x, Dual)), default=0)
    if level == 0:
        return NotImplemented
    primal_roots, primal_targets = [unpack(r, level)[0] for r in roots], [unpack(t, level)[0] for t in targets]
    primal_weights = [None if w is None else unpack(w, level)[0] for w in weights]
    values = grad(primal_roots, primal_targets, primal_weights, True, True, True)
    moving: list[tuple[Tensor, Any]] = []
    for root, primal_root, weight in zip(roots, primal_roots, weights, strict=True):
        tangent = unpack(root, level)[1]
        weight_primal, weight_tangent = (None, None) if weight is None else unpack(weight, level)
        if tangent is not None and tangent._requires_grad:
            moving.append((tangent, weight_primal))
        if weight_tangent is not None:
            moving.append((primal_root, weight_tangent))
    changes: Sequence[Any] = [None] * len(targets)
    if moving:
        changes = grad([m for m, _ in moving], primal_targets, [w for _, w in moving], True, True, True)
    results = []
    for i, (value, change) in enumerate(zip(values, changes, strict=True)):
        if value is None:
            raise AutogradError(f"The outputs do not depend on input {i}, so it has no gradient.")
        results.append(value if change is None else make_dual(value, change, level))
    return tuple(results)


def jvp(function: Callable, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Any, Any]:
    """function(*primals) and its derivative along `tangents`, computed in one pass.

    Returns (value, tangent), each shaped like what `function` returns: a Tensor or a tuple of them. A result that does
    not depend on the primals has a tangent of zeros.
    """
    if len(primals) != len(tangents):
        raise ShapeError(
            f"jvp takes one tangent for each primal, got {len(primals)} primals, {len(tangents)} tangents."
        )
    with Level() as level:
        result = function(*[make_dual(p, t, level) for p, t in zip(primals, tangents, strict=True)])
        several = isinstance(result, (tuple, list))
        values, derivatives = [], []
        for r in result if several else [result]:
            value, tangent = unpack(r, level)
            values.append(value)
            derivatives.append(value.new_zeros(value.shape) if tangent is None else tangent)
    return (tuple(values), tuple(derivatives)) if several else (values[0], derivatives[0])


Interpreters.dual = staticmethod(apply)
Interpreters.write = staticmethod(write)
Interpreters.grad = staticmethod(gradient)
