"""vmap: a function of one example, applied to many at once.

Inside, a tensor stands for all examples (levels.py: Batched) and looks like one; each operation is run once for all of
them by its batching rule (batching.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gpuad.autograd.levels import Batched, Level, make_batched
from gpuad.autograd.op import functions
from gpuad.autograd.pytree import flatten, spread, unflatten
from gpuad.errors import ShapeError
from gpuad.tensor import Tensor

RANDOMNESS = ("error", "different", "same")


def vmap(
    func: Callable, in_dims: Any = 0, out_dims: Any = 0, randomness: str = "error", *, chunk_size: int | None = None
) -> Callable:
    """A function that applies `func` to each example along a dimension of its arguments, all at once.

    in_dims: the dimension of the examples in each argument: one int for all, or a tuple (nested like the arguments);
    None for what all examples share. out_dims: where it is put in each result. randomness: random numbers inside are an
    "error", "different" for each example, or the "same". chunk_size: how many examples at once, all unless given.
    Raises ShapeError where lengths differ, TypeError where a result is no Tensor, AutogradError where a value is needed
    on the host (`if`, item(), shapes that depend on values).
    Source: the rules are those of torch.func.vmap and jax.vmap.
    """
    if randomness not in RANDOMNESS:
        raise ValueError(f"randomness is one of {', '.join(RANDOMNESS)}, got {randomness!r}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is a positive number or None, got {chunk_size}.")

    @functools.wraps(func, updated=())
    def batched(*args: Any, **kwargs: Any) -> Any:
        leaves, structure, dims, size = _examples(args, kwargs, in_dims)
        if chunk_size is None or chunk_size >= size:
            return _run(func, leaves, structure, dims, size, out_dims, randomness)
        parts = []
        for start in range(0, size, chunk_size):
            count = min(chunk_size, size - start)
            chunk = [x if d is None else x.narrow(d, start, count) for x, d in zip(leaves, dims, strict=True)]
            parts.append(_run(func, chunk, structure, dims, count, out_dims, randomness))
        return _joined(parts, out_dims)

    return batched


def _examples(args: tuple, kwargs: dict, in_dims: Any) -> tuple[list[Any], Any, list[int | None], int]:
    """The leaves of the arguments, their structure, the dimension of the examples in each, and how many there are."""
    if isinstance(in_dims, list):
        in_dims = tuple(in_dims)
    leaves, structure = flatten((args, kwargs))
    dims = [*spread(in_dims, args, "in_dims of vmap"), *[0] * len(flatten(kwargs)[0])]
    sizes: dict[int, str] = {}
    for i, (x, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(
                f"vmap got in_dims={dim!r} for a {type(x).__name__}, which has no dimensions; give None for what all "
                "examples share."
            )
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"in_dims of vmap holds ints and None, got {dim!r}.")
        if not -x.ndim <= dim < x.ndim:
            raise ShapeError(f"vmap got in_dims={dim} for a tensor of shape {tuple(x.shape)}, which has no such one.")
        dims[i] = dim % x.ndim
        sizes.setdefault(x.shape[dims[i]], f"dimension {dims[i]} of a tensor of shape {tuple(x.shape)}")
    if not sizes:
        raise ValueError("vmap needs at least one argument with examples: in_dims is None for all of them.")
    if len(sizes) > 1:
        found = ", ".join(f"{size} ({where})" for size, where in sizes.items())
        raise ShapeError(f"vmap needs as many examples in every argument, got {found}.")
    return leaves, structure, dims, next(iter(sizes))


def _run(
    func: Callable, leaves: list[Any], structure: Any, dims: list[Any], size: int, out_dims: Any, randomness: str
) -> Any:
    with Level(size, randomness) as level:
        given = [
            x if d is None else make_batched(x.movedim(d, 0) if d else x, level)
            for x, d in zip(leaves, dims, strict=True)
        ]
        args, kwargs = unflatten(structure, given)
        result = func(*args, **kwargs)
        outs, out_structure = flatten(result)
        places = spread(tuple(out_dims) if isinstance(out_dims, list) else out_dims, result, "out_dims of vmap")
        collected = [_collected(x, d, level, size) for x, d in zip(outs, places, strict=True)]
    return unflatten(out_structure, collected)


def _collected(x: Any, dim: Any, level: int, size: int) -> Any:
    """One result of all examples, with them along `dim`."""
    if not isinstance(x, Tensor):
        if dim is None:
            return x
        raise TypeError(
            f"vmap of a function that returns a {type(x).__name__}: it must return Tensors (nested in dicts, lists and "
            "tuples); return numbers that all examples share some other way."
        )
    mine = isinstance(x, Batched) and x.level == level
    if dim is None:
        if mine:
            raise ValueError("out_dims of vmap is None for a result that differs between examples; give a dimension.")
        return x
    value = x.value if mine else x.expand((size, *x._data.shape))
    if not -value.ndim <= dim < value.ndim:
        raise ShapeError(f"vmap got out_dims={dim} for results of shape {tuple(x.shape)} for each example.")
    return value.movedim(0, dim) if dim % value.ndim else value


def _joined(parts: list[Any], out_dims: Any) -> Any:
    """The results of chunks, one after another."""
    structure = flatten(parts[0])[1]
    places = spread(out_dims, parts[0], "out_dims of vmap")
    columns = zip(places, *[flatten(p)[0] for p in parts], strict=True)
    return unflatten(structure, [each[0] if d is None else functions["cat"](each, d) for d, *each in columns])
