"""In-place changes where memory is shared: the owner of the memory and all of its views follow, on the tape too.

A view v of x, written in place with the result n, makes x a new value: x with n at the place of v (`view_put`). That
becomes x's history, and every live view of x becomes that view of the new x. Tensor._view says of what a tensor is a
view, as (op, source, parameters); the version cell that x shares with its views lists them, weakly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import numpy as np

from gpuad.array.dtypes import FLOATING
from gpuad.autograd.op import table
from gpuad.tensor import Tensor, wrap

if TYPE_CHECKING:
    from gpuad.autograd.primitive import Primitive

Chain = tuple[tuple[str, dict[str, Any]], ...]  # the view ops from an owner to a view, by name


def owner(tensor: Tensor) -> tuple[Tensor, Chain]:
    """The tensor whose memory `tensor` is a view of, and the chain of view operations that leads from it."""
    chain: list[Any] = []
    while (view := tensor._view) is not None and view[1]._cell is tensor._cell:
        op, tensor, params = view
        chain.append((op.name, params))
    return tensor, tuple(reversed(chain))


def follow(array: Any, chain: Chain) -> Any:
    """The view of an array or Tensor that a chain leads to."""
    for name, params in chain:
        array = table[name](array, **params)
    return array


def view_of(op: Primitive, source: Tensor, params: dict[str, Any], array: Any) -> Tensor:
    """A tensor around `array`, what the view operation makes of `source`, that follows changes in place."""
    made = wrap(array, source._device)
    made._cell, made._view = source._cell, (op, source, params)
    if source._node is not None or not source._requires_grad:  # others cannot be changed in place
        made._cell.append(ref(made))
        prune(made._cell)
    return made


def put(backend: Any, input: Any, value: Any, *, chain: Chain, order: tuple[int, ...]) -> Any:
    """A copy of `input` with `value` at a view of it; laid out so that the chain meets no reshape that must copy."""
    shape = tuple([input.shape[i] for i in order])
    out = backend.empty(shape, input.dtype).transpose([int(i) for i in np.argsort(order)])
    out[...] = input
    follow(out, chain)[...] = value
    return out


def moved(target: Tensor) -> None:
    """Give what shares memory with `target` its new place, after an operation in place on it was recorded."""
    if target._view is not None:
        base, chain = owner(target)
        if chain:
            _rebase(base, chain, target)
            _refresh(base)
            return
    if target._retains_grad:
        target._node.retain(target)  # type: ignore[union-attr]
    if len(target._cell) > 1:
        _refresh(target)


def _rebase(base: Tensor, chain: Chain, target: Tensor) -> None:
    """Record that `target`, a view of base, was written."""
    before, value = wrap(base._data, base._device), wrap(target._data, base._device)
    before._node, before._requires_grad = base._node, base._requires_grad
    value._node, value._requires_grad = target._node, True
    wanted = (0, 1) if base._requires_grad else (1,)
    strides, put_op = base._data.strides, cast("Primitive", table["view_put"])
    order = tuple(sorted(range(len(strides)), key=lambda i: -abs(strides[i])))
    put_op._record((before, value), (base._data, target._data), base, wanted, {"chain": chain, "order": order})
    if base._retains_grad:
        base._node.retain(base)  # type: ignore[union-attr]


def _refresh(base: Tensor) -> None:
    """Put the live views of a tensor on its new history, in the order in which they were made."""
    cell: list[Any] = base._cell
    fresh = {id(base)}
    for reference in cell[1:]:
        view = reference()
        if view is None or view._cell is not cell or view._data.dtype.char not in FLOATING:
            continue
        op, source, params = view._view
        if id(source) not in fresh or (view._requires_grad and view._node is None):
            continue
        op._record((source,), (source._data,), view, (0,), params)
        fresh.add(id(view))
        if view._retains_grad:
            view._node.retain(view)


def prune(cell: list[Any]) -> None:
    """Forget the views that are gone, each time that the list has doubled."""
    count = len(cell)
    if not count & (count - 1):
        cell[1:] = [reference for reference in cell[1:] if reference() is not None]
