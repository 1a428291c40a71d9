"""In-place changes of tensors with levels: out of place below, in place for whoever looks.

The operation runs out of place, and its target takes over what it gave. Where the target is a view, the tensor that it
is a view of gets a new value, with the result at the view's place, and all views of that become views of the new one.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

from gpuad.autograd.levels import Batched, Dual, batches_of, become, level_of, make_dual, open_levels, whole
from gpuad.autograd.modes import state
from gpuad.autograd.op import Interpreters, check_in_place, functions, table, writable
from gpuad.autograd.variables import settled, variable
from gpuad.autograd.views import follow, owner
from gpuad.errors import AutogradError, ShapeError
from gpuad.tensor import Tensor, wrap


def write(name: str, target: Tensor, result: Tensor) -> Tensor:
    """`target` with the value, and the levels, of an operation's result."""
    recording = state.enabled and result._requires_grad
    check_in_place(name, target, result._data.dtype, result._data.shape, recording)
    if result._data.dtype != target._data.dtype:
        result = result.to(target._data.dtype)
    base, chain = owner(target)
    if any(op == "expand" for op, _ in chain):
        raise ShapeError(f"{name}_ would write to an expanded tensor, whose elements share memory; clone() it first.")
    if chain:
        size, shape = base._data.size, base._data.shape
        numbers = whole(follow(functions["arange"](size, device=base._device).reshape(shape), chain))
        params = {"key": (numbers.reshape(-1),), "basic": False}
        result = table["index_put"](base.reshape(-1), result.reshape(-1), **params).reshape(shape)
    if not batches_of([result]) <= batches_of([base]):
        raise AutogradError(
            f"{name}_ would store many examples of vmap (or of jacfwd, jacrev, hessian) in a tensor that has none of "
            "its own. Use the operation out of place, or start from one that has them: gpuad.zeros_like(x), or "
            "gpuad.zeros(shape) + 0 * x.sum()."
        )
    views = [view for view in (reference() for reference in base._cell[1:]) if view is not None]
    was = level_of(base)
    if not was:
        result = _through_memory(name, base, result)
    become(base, result)
    base._cell, base._view = [base._cell[0]], None
    fresh = {id(base)}
    for view in views:
        op, source, params = view._view
        if id(source) in fresh and op is not None:
            become(view, op(source, **params))
            view._cell, view._view = base._cell, (op, source, params)
            base._cell.append(ref(view))
            fresh.add(id(view))
    if was < level_of(result):
        for level in open_levels().values():
            level.moved += [ref(x) for x in (base, *views)]
    return target


def _through_memory(name: str, target: Tensor, result: Any) -> Any:
    """A result with tangents for a tensor that had none: the value goes to that tensor's memory."""
    data = writable(name, target)
    tangents = []
    while level_of(result):
        tangents.append((result.tangent, result.level))
        result = result.primal
    target._device.backend.inside(data.__setitem__, ..., result._data)
    target._cell[0] += 1
    made = wrap(data, target._device)
    made._cell, made._node, made._requires_grad = target._cell, result._node, result._requires_grad
    for tangent, level in reversed(tangents):
        made = make_dual(made, tangent, level)
    return made


def _require(self: Any, requires_grad: bool) -> None:
    """Set requires_grad: the tensor becomes a leaf of its own; what it was made of, outside, is left alone."""
    if requires_grad == self._requires_grad or self._node is not None:
        Tensor.requires_grad.fset(self, requires_grad)  # type: ignore[attr-defined]
    else:
        become(self, variable(self) if requires_grad else settled(self))


Interpreters.write = staticmethod(write)
for kind in (Dual, Batched):
    kind.requires_grad = property(Tensor.requires_grad.fget, _require)  # type: ignore[assignment, attr-defined]
