"""grad, vjp and linearize: reverse mode as transforms of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuad.autograd.gradients import grad as _gradients
from gpuad.autograd.modes import enable_grad, state
from gpuad.autograd.pytree import aligned, flatten, tree_map, unflatten
from gpuad.autograd.variables import depends_on_others, moves, settled, variable
from gpuad.errors import AutogradError, ShapeError
from gpuad.tensor import Tensor


def call(function: Callable, args: tuple, kwargs: dict, numbers: tuple[int, ...]) -> tuple[Any, list[Any], list[Any]]:
    """(result, variables, structures) of function with new variables for the arguments `numbers`."""
    inputs = list(args)
    variables: list[Any] = []
    structures = []
    for i in numbers:
        if not -len(args) <= i < len(args):
            raise ValueError(f"argnums has {i}, but the function was called with {len(args)} positional arguments.")
        leaves, structure = flatten(args[i])
        with enable_grad():
            own = [variable(x) for x in leaves]
        inputs[i] = unflatten(structure, own)
        variables += own
        structures.append(structure)
    with enable_grad():
        result = function(*inputs, **kwargs)
    return result, variables, structures


def regrouped(values: list[Any] | tuple, structures: list[Any], single: bool) -> Any:
    """Values for variables, in the structures of their arguments: one, or a tuple."""
    rest = iter(values)
    trees = tuple(unflatten(structure, rest) for structure in structures)
    return trees[0] if single else trees


def numbers_of(argnums: Any) -> tuple[int, ...]:
    """argnums as a tuple."""
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def split_aux(result: Any, has_aux: bool, who: str) -> tuple[Any, Any]:
    """(output, aux) of what a function returned."""
    if not has_aux:
        return result, None
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{who}(has_aux=True) needs a function that returns a pair (output, aux), got {result!r}.")
    return result


def vjp(function: Callable, *primals: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """function(*primals), and the function that takes cotangents of the result to those of the primals.

    Returns (result, pull_back), with has_aux (result, pull_back, aux). pull_back(cotangents) takes what is structured
    like the result and returns a tuple with one entry for each primal, structured like it; it can be called often.
    """
    result, variables, structures = call(function, primals, {}, tuple(range(len(primals))))
    result, aux = split_aux(result, has_aux, "vjp")
    outputs, out_structure = flatten(result)
    others = depends_on_others(outputs, variables)

    def pull_back(cotangents: Any) -> tuple[Any, ...]:
        weights = aligned(cotangents, out_structure)
        if weights is None:
            structure = flatten(cotangents)[1]
            raise ShapeError(
                f"The cotangents of vjp are structured like the result, {out_structure!r}; got {structure!r}."
            )
        pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if moves(o)]
        record = state.enabled and (others or depends_on_others(weights, variables))
        found: Any = [None] * len(variables)
        if pairs:
            found = _gradients([o for o, _ in pairs], variables, [w for _, w in pairs], True, record, True)
        zeros = (x.new_zeros(x.shape) if g is None else g for g, x in zip(found, variables, strict=True))
        return regrouped(list(zeros), structures, False)

    shown = result if others else tree_map(settled, result)
    return (shown, pull_back, aux if others else tree_map(settled, aux)) if has_aux else (shown, pull_back)


def value_and_grad(function: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function that returns (value, gradient) of `function`, which returns one number.

    With has_aux, `function` returns (number, aux) and the new function ((value, aux), gradient). The gradient is that
    of argument argnums, structured like it, and a tuple where argnums is one.
    """

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        result, variables, structures = call(function, args, kwargs, numbers_of(argnums))
        value, aux = split_aux(result, has_aux, "grad")
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise AutogradError(
                f"grad() needs a function that returns one number, got {value!r}; reduce it, e.g. y.sum()."
                if not isinstance(value, Tensor)
                else f"grad() needs a function that returns one number, got a tensor of shape {tuple(value.shape)}; "
                "reduce it, e.g. y.sum(), or take jacrev."
            )
        others = depends_on_others([value], variables)
        found: Any = [None] * len(variables)
        if moves(value):
            found = _gradients(value, variables, None, others, others and state.enabled, True)
        zeros = [x.new_zeros(x.shape) if g is None else g for g, x in zip(found, variables, strict=True)]
        if not others:
            value, aux = settled(value), tree_map(settled, aux)
        gradient = regrouped(zeros, structures, isinstance(argnums, int))
        return ((value, aux), gradient) if has_aux else (value, gradient)

    return evaluate


def grad(function: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function that returns the gradient of `function`, with has_aux (gradient, aux); see value_and_grad."""
    evaluate = value_and_grad(function, argnums, has_aux)

    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, found = evaluate(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def grad_and_value(function: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function that returns (gradient, value), in PyTorch's order; with has_aux (gradient, (value, aux))."""
    evaluate = value_and_grad(function, argnums, has_aux)
    return lambda *args, **kwargs: tuple(reversed(evaluate(*args, **kwargs)))


def linearize(function: Callable, *primals: Any) -> tuple[Any, Callable]:
    """function(*primals), and the function that takes tangents of the primals to that of the result.

    The second is linear and runs `function` no more: J v is the derivative of u ↦ Jᵀ u, transposed.
    Source: Townsend, "A new trick for calculating Jacobian vector products", 2017.
    """
    result, variables, structures = call(function, primals, {}, tuple(range(len(primals))))
    outputs, out_structure = flatten(result)
    others = depends_on_others(outputs, variables)
    with enable_grad():
        cotangents = [variable(o.new_zeros(o._data.shape)) for o in outputs]
        moving = [(o, u) for o, u in zip(outputs, cotangents, strict=True) if moves(o)]
        pulled: Any = [None] * len(variables)
        if moving:
            pulled = _gradients([o for o, _ in moving], variables, [u for _, u in moving], True, True, True)

    def push_forward(*tangents: Any) -> Any:
        leaves = aligned(tangents, tuple(structures))
        if leaves is None:
            raise ShapeError("The tangents of linearize are structured like the primals, one for each.")
        pairs = [(g, v) for g, v in zip(pulled, leaves, strict=True) if g is not None and moves(g)]
        found: Any = [None] * len(cotangents)
        record = state.enabled and (others or depends_on_others(leaves, variables))
        if pairs:
            found = _gradients([g for g, _ in pairs], cotangents, [v for _, v in pairs], True, record, True)
        zeros = [u.new_zeros(u.shape) if t is None else t for t, u in zip(found, cotangents, strict=True)]
        return unflatten(out_structure, zeros)

    return (result if others else tree_map(settled, result)), push_forward
