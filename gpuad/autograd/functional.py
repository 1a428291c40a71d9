"""Derivatives of a function at a point, with torch.autograd.functional's names, arguments and results.

`inputs` is a Tensor or a tuple of them; results are structured like the inputs (or outputs), those of jacobian and
hessian by output and input. strict=True makes independence of an input an error; else it gives zeros. With
create_graph the results can be differentiated again. gpuad.func has the same as transforms of functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuad.autograd import forward
from gpuad.autograd.gradients import grad
from gpuad.autograd.modes import enable_grad
from gpuad.autograd.op import functions
from gpuad.autograd.variables import settled, variable
from gpuad.autograd.vmap import vmap
from gpuad.errors import AutogradError, ShapeError
from gpuad.tensor import Tensor

__all__ = ["hessian", "hvp", "jacobian", "jvp", "vhp", "vjp"]


def _as_tuple(x: Any, what: str) -> tuple[tuple, bool]:
    several = isinstance(x, (tuple, list))
    parts = tuple(x) if several else (x,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"{what} must be a Tensor or a tuple of Tensors, got a {type(part).__name__}.")
    return parts, several


def _one(parts: Any, several: bool) -> Any:
    return tuple(parts) if several else parts[0]


def _evaluated(func: Callable, inputs: tuple) -> tuple[list[Tensor], tuple, bool]:
    """New variables, the outputs for them, and whether these are several."""
    with enable_grad():
        variables = [variable(x) for x in inputs]
        outputs, several = _as_tuple(func(*variables), "The result of func")
    return variables, outputs, several


def _gradients(
    outputs: Any, variables: list[Tensor], weights: Any, record: bool, strict: bool, many: bool = False
) -> Any:
    live = [(o, w) for o, w in zip(outputs, weights, strict=True) if o._requires_grad]
    found: Any = [None] * len(variables)
    if live:
        found = grad([o for o, _ in live], variables, [w for _, w in live], True, record, True, many)
    if strict and any(g is None for g in found):
        raise AutogradError("strict=True: an output does not depend on an input, so that derivative is 0 everywhere.")
    count = (weights[0]._data.shape[0],) if many else ()
    zeros = [x.new_zeros((*count, *x._data.shape)) if g is None else g for g, x in zip(found, variables, strict=True)]
    return zeros if record else [settled(g) for g in zeros]


def _directions(v: Any, like: tuple, what: str) -> tuple:
    if v is None:
        if len(like) != 1 or like[0].numel() != 1:
            raise ShapeError(f"v may be left out only for one {what} with one element.")
        return (like[0].new_ones(like[0]._data.shape),)
    parts, _ = _as_tuple(v, "v")
    if len(parts) != len(like) or any(a._data.shape != b._data.shape for a, b in zip(parts, like, strict=False)):
        raise ShapeError(
            f"v has the shapes of the {what}, {[tuple(x.shape) for x in like]}; got {[tuple(x.shape) for x in parts]}."
        )
    return parts


def vjp(
    func: Callable, inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    """(func(*inputs), vᵀ J): v has the shapes of the outputs."""
    given, several = _as_tuple(inputs, "inputs")
    variables, outputs, many = _evaluated(func, given)
    found = _gradients(outputs, variables, _directions(v, outputs, "output"), create_graph, strict)
    return _one(outputs if create_graph else [settled(y) for y in outputs], many), _one(found, several)


def jvp(
    func: Callable, inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    """(func(*inputs), J v) by forward mode: v has the shapes of the inputs."""
    given, _ = _as_tuple(inputs, "inputs")
    value, tangent = forward.jvp(func, given, _directions(v, given, "input"), strict=strict)
    if create_graph:
        return value, tangent
    parts, several = _as_tuple(value, "The result of func")
    return _one([settled(y) for y in parts], several), _one([settled(t) for t in _as_tuple(tangent, "")[0]], several)


def jacobian(
    func: Callable, inputs: Any, create_graph: bool = False, strict: bool = False, vectorize: bool = False,
    strategy: str = "reverse-mode",
) -> Any:  # fmt: skip
    """The Jacobian, of shape output + input, by output and input where there are several.

    strategy: "reverse-mode" or "forward-mode". All rows (columns) are computed at once whatever `vectorize` says.
    """
    given, several = _as_tuple(inputs, "inputs")
    if strategy not in ("reverse-mode", "forward-mode"):
        raise ValueError(f"strategy is 'reverse-mode' or 'forward-mode', got {strategy!r}.")
    if strategy == "forward-mode":
        return _forward_jacobian(func, given, several, create_graph, strict)
    variables, outputs, many = _evaluated(func, given)
    rows = []
    for y in outputs:
        n = y.numel()
        weights = functions["eye"](n, dtype=y.dtype, device=y.device).reshape((n, *y._data.shape))
        found = _gradients([y], variables, [weights], create_graph, strict, many=True)
        rows.append(_one([g.reshape((*y._data.shape, *g._data.shape[1:])) for g in found], several))
    return _one(rows, many)


def _forward_jacobian(func: Callable, given: tuple, several: bool, create_graph: bool, strict: bool) -> Any:
    columns, many = [], False
    for k, x in enumerate(given):
        n = x.numel()
        basis = functions["eye"](n, dtype=x.dtype, device=x.device).reshape((n, *x._data.shape))

        def along(v: Tensor, k: int = k) -> Any:
            tangents = tuple(v if i == k else z.new_zeros(z._data.shape) for i, z in enumerate(given))
            return forward.jvp(func, given, tangents, strict=strict)[1]

        parts, many = _as_tuple(vmap(along, out_dims=-1)(basis), "The result of func")
        blocks = [t.reshape((*t._data.shape[:-1], *x._data.shape)) for t in parts]
        columns.append(blocks if create_graph else [settled(b) for b in blocks])
    return _one([_one(row, several) for row in zip(*columns, strict=True)], many)


def _gradient_of(func: Callable, strict: bool) -> Callable:
    def gradient(*inputs: Tensor) -> tuple:
        variables, outputs, many = _evaluated(func, inputs)
        if many or outputs[0].numel() != 1:
            raise ShapeError("The function must return one number; reduce its result, e.g. y.sum().")
        one = outputs[0].new_ones(outputs[0]._data.shape)
        return tuple(_gradients(outputs, variables, [one], True, strict))

    return gradient


def hessian(
    func: Callable, inputs: Any, create_graph: bool = False, strict: bool = False, vectorize: bool = False,
    outer_jacobian_strategy: str = "reverse-mode",
) -> Any:  # fmt: skip
    """The second derivatives of a function to one number, of shape input + input; a tuple of tuples of several."""
    given, several = _as_tuple(inputs, "inputs")
    blocks = jacobian(_gradient_of(func, strict), given, create_graph, False, vectorize, outer_jacobian_strategy)
    return blocks if several else blocks[0][0]


def hvp(
    func: Callable, inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    """(func(*inputs), H v), of a function to one number, by forward mode over reverse."""
    given, several = _as_tuple(inputs, "inputs")
    directions = _directions(v, given, "input")
    _, found = forward.jvp(_gradient_of(func, strict), given, directions)
    value = func(*given)
    if create_graph:
        return value, _one(found, several)
    return settled(value), _one([settled(g) for g in found], several)


def vhp(
    func: Callable, inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    """(func(*inputs), vᵀ H), of a function to one number, by reverse mode over reverse."""
    given, several = _as_tuple(inputs, "inputs")
    directions = _directions(v, given, "input")
    variables, outputs, _ = _evaluated(func, given)
    first = _gradient_of(func, strict)(*variables)
    found = _gradients(first, variables, directions, create_graph, False)
    return (outputs[0] if create_graph else settled(outputs[0])), _one(found, several)
