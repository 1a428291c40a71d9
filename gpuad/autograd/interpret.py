"""Operations, gradients and random numbers on tensors with levels: the highest level is taken apart first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from gpuad.array.device import Device
from gpuad.autograd.batching import Batch
from gpuad.autograd.levels import (
    Batched,
    Dual,
    expose,
    hide,
    is_open,
    level_of,
    make_batched,
    make_dual,
    open_batches,
    pack,
    suspended,
    unpack,
)
from gpuad.autograd.op import Interpreters, Op
from gpuad.autograd.views import prune
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor, wrap


def _alive(x: Any) -> Any:
    """x without the tangents of levels that are closed."""
    while isinstance(x, Dual) and not is_open(x.level):
        x = x.primal
    return x


def _in_parameters(params: dict) -> list[Tensor]:
    """Tensors among the parameters: indices that stand for many."""
    found = []
    for value in params.values():
        for part in value if type(value) is tuple else (value,):
            if isinstance(part, Tensor):
                found.append(part)
    return found


def apply(op: Op, inputs: Sequence[Any], params: dict) -> Any:
    """The op on operands some of which have levels: the highest level is taken apart, the rest is left inside."""
    inputs = [_alive(x) for x in inputs]
    everything = [*inputs, *_in_parameters(params)]
    level = max(map(level_of, everything), default=0)
    if level == 0:
        return NotImplemented
    outer = next(x for x in everything if level_of(x) == level)
    if isinstance(outer, Batched):
        return _apply_batched(op, inputs, params, outer)
    pairs = [unpack(x, level) for x in inputs]
    value, tangent = op.tangent([p for p, _ in pairs], [t for _, t in pairs], params)
    if isinstance(value, tuple):
        return tuple(v if t is None else make_dual(v, t, level) for v, t in zip(value, tangent, strict=True))
    if tangent is None:
        return value
    made = make_dual(value, tangent, level)
    return _view_of(made, op, inputs[0], params) if getattr(op, "view", False) else made


def _view_of(made: Tensor, op: Op, source: Tensor, params: dict) -> Tensor:
    """A result as a view of the operand, so that a change in place of one reaches the other (level_writes.py)."""
    made._view, made._cell = (op, source, params), source._cell
    source._cell.append(ref(made))
    if len(source._cell) > 64:
        prune(source._cell)
    return made


def _apply_batched(op: Op, inputs: Sequence[Any], params: dict, outer: Batched) -> Any:
    if not is_open(outer.level):
        outer._data.elements  # noqa: B018  (says that a tensor of vmap was used after it)
    result = op.batch(Batch(op, outer.level, outer.value._data.shape[0]), inputs, params)
    if isinstance(result, tuple):
        return tuple(make_batched(r, outer.level) for r in result)
    made = make_batched(result, outer.level)
    return _view_of(made, op, inputs[0], params) if getattr(op, "view", False) else made


def gradient(roots: list[Any], targets: list[Any], weights: list[Any], create_graph: bool) -> Any:
    """Reverse mode on tensors with levels; NotImplemented where neither roots nor targets have any.

    Of a dual, the gradient of the primals and how it changes along the tangents. With y = y₀ + ε ẏ recorded as
    functions of x₀ it is ∂y₀/∂x₀ᵀ w₀ + ε (∂ẏ/∂x₀ᵀ w₀ + ∂y₀/∂x₀ᵀ ẇ), because derivatives in x₀ and in ε commute.
    Of many examples, which do not depend on each other, the gradient of all of them at once. None for targets that the
    roots do not depend on.
    """
    roots, targets = [_alive(x) for x in roots], [_alive(x) for x in targets]
    level = max(map(level_of, [*roots, *targets]), default=0)
    if level == 0:
        return NotImplemented
    outer = next(x for x in [*roots, *targets] if level_of(x) == level)
    through = _through_batch if isinstance(outer, Batched) else _through_dual
    return through(level, outer, roots, targets, weights, create_graph)


def _through_batch(
    level: int, outer: Any, roots: list[Any], targets: list[Any], weights: list[Any], create_graph: bool
) -> Any:
    from gpuad.autograd.gradients import grad, require_scalar

    size = outer.value._data.shape[0]
    if any(level_of(t) != level for t in targets):
        raise AutogradError(
            "autograd.grad() inside vmap was asked for the gradient of a tensor from outside, which all examples "
            "share. Use gpuad.func.grad, vjp or jacrev inside vmap: they take a gradient for each example; or call "
            "autograd.grad outside vmap."
        )
    seeds = []
    for root, weight in zip(roots, weights, strict=True):
        if weight is None:
            require_scalar(root)
            weight = root.new_ones(root._data.shape)
        seeds.append(expose(weight, level, size))
    exposed = [expose(r, level, size) for r in roots]
    with suspended(level):
        found = grad(exposed, [t.value for t in targets], seeds, True, create_graph, True)
    return [None if g is None else hide(g, level) for g in found]


def _through_dual(
    level: int, outer: Any, roots: list[Any], targets: list[Any], weights: list[Any], create_graph: bool
) -> Any:
    from gpuad.autograd.gradients import grad

    primal_roots, primal_targets = [unpack(r, level)[0] for r in roots], [unpack(t, level)[0] for t in targets]
    primal_weights = [None if w is None else unpack(w, level)[0] for w in weights]
    values = grad(primal_roots, primal_targets, primal_weights, True, create_graph, True)
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
        changes = grad([m for m, _ in moving], primal_targets, [w for _, w in moving], True, create_graph, True)
    results: list[Any] = []
    for value, change in zip(values, changes, strict=True):
        if change is not None and value is None:
            value = change.new_zeros(change._data.shape)
        results.append(value if change is None else pack(value, change, level))
    return results


def draw(make: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...], device: Device) -> Tensor:
    """Random numbers inside vmap: of each example its own, or the same of all, as its `randomness` says."""
    batches = open_batches()
    if any(level.randomness == "error" for _, level in batches):
        raise AutogradError(
            "Random numbers were drawn inside vmap, which was not told what that means: pass randomness='different' "
            "for each example its own, or randomness='same' for the same numbers in all of them."
        )
    own = [(number, level.size) for number, level in batches if level.randomness == "different"]
    drawn: Tensor = wrap(make((*[size for _, size in own], *shape)), device)  # type: ignore[arg-type]
    for number, _ in own:
        drawn = make_batched(drawn, number)
    return drawn


Interpreters.dual = staticmethod(apply)
Interpreters.grad = staticmethod(gradient)
Interpreters.draw = staticmethod(draw)
