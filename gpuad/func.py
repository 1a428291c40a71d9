"""Function transforms over the tape and forward mode, with PyTorch's (torch.func) and JAX's meanings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuad.autograd.forward import Dual, jvp, make_dual
from gpuad.autograd.modes import enable_grad
from gpuad.autograd.walk import grad as _gradients
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor

__all__ = ["grad", "grad_and_value", "hvp", "jvp", "value_and_grad", "vjp"]


def _leaf(x: Tensor) -> Tensor:
    """x as a new variable: a leaf for the tape, with the tangent that forward mode outside has given it."""
    if isinstance(x, Dual):
        return make_dual(_leaf(x.primal), x.tangent, x.level)
    made = x.view(x.shape) if x._requires_grad else x.detach()
    made.requires_grad_()
    return made


def _settled(gradient: Tensor | None, variables: list[Tensor]) -> Any:
    """A gradient that depends on nothing that requires grad but our own variables, detached; others as they are."""
    if gradient is None or isinstance(gradient, Dual) or any(isinstance(v, Dual) for v in variables):
        return gradient
    if any(v._node is not None for v in variables):
        return gradient
    own = {id(v) for v in variables}
    seen: set[Any] = set()
    stack: list[Any] = [gradient if gradient._node is None else gradient._node]
    while stack:
        place = stack.pop()
        if place is None or place in seen:
            continue
        seen.add(place)
        if isinstance(place, Tensor):
            if place._requires_grad and id(place) not in own:
                return gradient
        else:
            stack.extend(place.parents)
    return gradient.detach()


def vjp(function: Callable, *primals: Tensor) -> tuple[Any, Callable]:
    """function(*primals), and the function that takes a cotangent of the result to those of the primals (a tuple)."""
    with enable_grad():
        variables = [_leaf(p) for p in primals]
        result = function(*variables)

    def pull_back(cotangent: Any) -> tuple[Tensor, ...]:
        several = isinstance(result, (tuple, list))
        outputs = list(result) if several else [result]
        weights = list(cotangent) if several else [cotangent]
        found = _gradients(outputs, variables, weights, True, True, materialize_grads=True)
        return tuple(_settled(g, variables) for g in found)

    return result, pull_back


def value_and_grad(function: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function that returns (value, gradient) of `function`, which returns a scalar (or (scalar, aux)).

    The gradient is that of argument argnums, a tuple where argnums is one.
    """

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        with enable_grad():
            inputs = list(args)
            for i in numbers:
                inputs[i] = _leaf(args[i])
            result = function(*inputs, **kwargs)
        value, aux = result if has_aux else (result, None)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise AutogradError(
                f"grad() needs a function that returns one number, got {value!r}; reduce it, e.g. y.sum()."
            )
        variables = [inputs[i] for i in numbers]
        found = _gradients(value, variables, None, True, True, materialize_grads=True)
        found = tuple(_settled(g, variables) for g in found)
        value = _settled(value, variables)
        gradient = found[0] if isinstance(argnums, int) else found
        return ((value, aux), gradient) if has_aux else (value, gradient)

    return evaluate


def grad(function: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function that returns the gradient of `function` (or (gradient, aux))."""
    evaluate = value_and_grad(function, argnums, has_aux)

    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, found = evaluate(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def grad_and_value(function: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function that returns (gradient, value), in PyTorch's order."""
    evaluate = value_and_grad(function, argnums, has_aux)
    return lambda *args, **kwargs: tuple(reversed(evaluate(*args, **kwargs)))


def hvp(function: Callable, primal: Tensor, tangent: Tensor) -> Tensor:
    """The Hessian of `function` at primal times tangent: forward mode over reverse mode."""
    return jvp(grad(function), (primal,), (tangent,))[1]
