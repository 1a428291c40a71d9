"""Jacobians and Hessians: the rows (jacrev) or columns (jacfwd) of all outputs (inputs) at once, by vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuad.autograd.forward import jvp
from gpuad.autograd.op import functions
from gpuad.autograd.pytree import flatten, unflatten
from gpuad.autograd.vmap import vmap
from gpuad.func.derivatives import grad, numbers_of, regrouped, vjp
from gpuad.tensor import Tensor


def basis(leaves: list[Any]) -> list[Tensor]:
    """For each tensor a stack of unit vectors, as many as all of them have elements: (N, *shape)."""
    count = sum(x.numel() for x in leaves)
    made, start = [], 0
    for x in leaves:
        n = x.numel()
        rows = functions["eye"](n, dtype=x.dtype, device=x.device)
        above, below = rows.new_zeros((start, n)), rows.new_zeros((count - start - n, n))
        made.append(functions["cat"]([above, rows, below], 0).reshape((count, *x._data.shape)))
        start += n
    return made


def jacrev(
    func: Callable, argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable:
    """A function that returns the Jacobian of `func` by reverse mode, all rows at once: for few outputs.

    For an output of shape (m) and an argument of shape (n) it has shape (m, n). Of a nested output and argument, it is
    structured like the output, with the structure of the argument in each place; a tuple where argnums is one. With
    has_aux (Jacobian, aux). chunk_size: how many rows at once.
    """

    def jacobian(*args: Any, **kwargs: Any) -> Any:
        numbers = numbers_of(argnums)

        def chosen(*moving: Any) -> Any:
            inputs = list(args)
            for i, x in zip(numbers, moving, strict=True):
                inputs[i] = x
            return func(*inputs, **kwargs)

        found = vjp(chosen, *[args[i] for i in numbers], has_aux=has_aux)
        outputs, out_structure = flatten(found[0])
        if not sum(y.numel() for y in outputs):
            rows: Any = tuple(args[i] for i in numbers)
            leaves, structure = flatten(rows)
            rows = unflatten(structure, [x.new_zeros((0, *x._data.shape)) for x in leaves])
        else:
            seeds = unflatten(out_structure, basis(outputs))
            rows = vmap(found[1], chunk_size=chunk_size, randomness="same")(seeds)
        blocks, structures = [], [flatten(tree)[1] for tree in rows]
        start = 0
        for y in outputs:
            part = [
                r.narrow(0, start, y.numel()).reshape((*y._data.shape, *r._data.shape[1:])) for r in flatten(rows)[0]
            ]
            blocks.append(regrouped(part, structures, isinstance(argnums, int)))
            start += y.numel()
        result = unflatten(out_structure, blocks)
        return (result, found[2]) if has_aux else result

    return jacobian


def jacfwd(
    func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, *, randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable:  # fmt: skip
    """A function that returns the Jacobian of `func` by forward mode, all columns at once: for few inputs.

    Shapes and structures as of jacrev. chunk_size: how many columns at once.
    """

    def jacobian(*args: Any, **kwargs: Any) -> Any:
        numbers = numbers_of(argnums)
        chosen = tuple(args[i] for i in numbers)
        leaves, structure = flatten(chosen)

        def along(*tangents: Any) -> Any:
            def moving(*xs: Any) -> Any:
                inputs = list(args)
                for i, x in zip(numbers, xs, strict=True):
                    inputs[i] = x
                return func(*inputs, **kwargs)

            found = jvp(moving, chosen, tangents, has_aux=has_aux)
            return (found[1], found[2]) if has_aux else found[1]

        seeds = unflatten(structure, basis(leaves))
        columns = vmap(along, out_dims=-1 if not has_aux else (-1, None), chunk_size=chunk_size,
                       randomness=randomness)(*seeds)  # fmt: skip
        columns, aux = columns if has_aux else (columns, None)
        outputs, out_structure = flatten(columns)
        structures = [flatten(tree)[1] for tree in chosen]
        blocks = []
        for y in outputs:
            start, part = 0, []
            for x in leaves:
                block = y.narrow(y.ndim - 1, start, x.numel())
                part.append(block.reshape((*y._data.shape[:-1], *x._data.shape)))
                start += x.numel()
            blocks.append(regrouped(part, structures, isinstance(argnums, int)))
        result = unflatten(out_structure, blocks)
        return (result, aux) if has_aux else result

    return jacobian


def hessian(func: Callable, argnums: int | tuple[int, ...] = 0) -> Callable:
    """A function that returns the matrix of second derivatives of `func`: jacfwd over jacrev."""
    return jacfwd(jacrev(func, argnums), argnums)


def hvp(function: Callable, primals: Any, tangents: Any) -> Any:
    """The Hessian of `function` (to one number) at primals times tangents, without making the Hessian.

    H v = ∇(∇f · v): the gradient of the derivative along v, which forward mode gives. The other order, forward mode
    over the gradient, gives the same and computes the gradient itself besides, which nobody asked for.

    primals: a Tensor or nested Tensors, the one argument of `function`; a tuple holds several arguments. Returns what
    is structured like primals. Costs less than three gradients: of the products of a network 8 instead of 3 a layer.
    """
    several = type(primals) is tuple
    points, directions = (primals, tangents) if several else ((primals,), (tangents,))

    def along(*points: Any) -> Any:
        return jvp(function, points, directions)[1]

    found = grad(along, tuple(range(len(points))))(*points)
    return found if several else found[0]
