"""New variables for the tape, and what is and is not theirs: what the transforms of functions are made of."""

from __future__ import annotations

from typing import Any

from gpuad.autograd.levels import Batched, Dual, level_of, make_batched, make_dual, open_batches
from gpuad.tensor import Tensor


def variable(x: Any) -> Tensor:
    """x as a new variable: a leaf for the tape, with the tangents and examples that transforms outside gave it.

    Inside vmap each example gets a variable of its own, also of what all of them share: gradients are those of one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"Derivatives are taken for Tensors, got a {type(x).__name__}; wrap it in gpuad.tensor(…), or leave its "
            "argument out of argnums."
        )
    for number, level in open_batches():
        x = _repeated(x, number, level.size)
    return _fresh(x)


def _repeated(x: Any, number: int, size: Any) -> Tensor:
    """x for each of `size` examples of a level, which goes below the higher levels of x; itself where it has that."""
    if level_of(x) == number:
        return x
    if level_of(x) < number:
        return make_batched(x.expand((size, *x._data.shape)), number)
    if isinstance(x, Batched):
        return make_batched(_repeated(x.value, number, size), x.level)
    return make_dual(_repeated(x.primal, number, size), _repeated(x.tangent, number, size), x.level)


def _fresh(x: Any) -> Any:
    if isinstance(x, Dual):
        return make_dual(_fresh(x.primal), x.tangent, x.level)
    if isinstance(x, Batched):
        return make_batched(_fresh(x.value), x.level)
    made = x.view(x.shape) if x._requires_grad else x.detach()
    made.requires_grad_()
    return made


def plain(x: Any) -> Any:
    """The tensor on the tape below all levels."""
    while isinstance(x, (Dual, Batched)):
        x = x.primal if isinstance(x, Dual) else x.value
    return x


def depends_on_others(results: list[Any], variables: list[Any]) -> bool:
    """Whether something else than our own variables requires grad below the results, so that gradients are recorded."""
    bases = [plain(v) for v in variables]
    if any(b._node is not None for b in bases):
        return True
    own = {id(b) for b in bases}
    seen: set[Any] = set()
    stack: list[Any] = []
    for r in results:
        stack.extend(_places(r))
    while stack:
        place = stack.pop()
        if place is None or place in seen:
            continue
        seen.add(place)
        if isinstance(place, Tensor):
            if place._requires_grad and id(place) not in own:
                return True
        else:
            stack.extend(place.parents)
    return False


def _places(x: Any) -> list[Any]:
    """Where x and its tangents are on the tape."""
    if isinstance(x, Dual):
        return [*_places(x.primal), *_places(x.tangent)]
    if isinstance(x, Batched):
        return _places(x.value)
    if not isinstance(x, Tensor):
        return []
    return [x if x._node is None else x._node]


def settled(x: Any) -> Any:
    """x outside the graph of variables that nobody else knows, with its tangents."""
    if isinstance(x, Dual):
        return make_dual(settled(x.primal), settled(x.tangent), x.level)
    if isinstance(x, Batched):
        return make_batched(settled(x.value), x.level)
    return x.detach() if isinstance(x, Tensor) and x._requires_grad else x


def moves(x: Any) -> bool:
    """Whether a derivative for variables can be taken of x: it, or a tangent of it, was computed from one."""
    return plain(x)._requires_grad or any(p is not None and not isinstance(p, Tensor) for p in _places(x))
