"""Shapes and views: reshape, transpose, expand, join. Views share memory on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.autograd.batching import Batch, shift
from gpuad.autograd.levels import Logical
from gpuad.autograd.op import check_devices, describe, function
from gpuad.autograd.primitive import Primitive, linear, primitive
from gpuad.autograd.views import follow, put
from gpuad.errors import ShapeError
from gpuad.ops.reduction import axis_of, sum_to_size
from gpuad.ops.samples import S
from gpuad.tensor import Tensor, wrap


def _sizes(size: Sequence[Any]) -> tuple[int, ...]:
    if len(size) == 1 and not isinstance(size[0], (int, np.integer)):
        size = tuple(size[0])
    return tuple(int(n) for n in size)


def _resolve(name: str, size: Sequence[int], input: Any) -> tuple[int, ...]:
    """A shape with at most one −1, which is found from the number of elements."""
    size = list(size)
    count = math.prod(input.shape)
    if any(n < -1 for n in size) or size.count(-1) > 1:
        raise ShapeError(f"{name}() takes lengths and at most one -1 (to be found out), got {tuple(size)}.")
    if -1 in size:
        known = math.prod(n for n in size if n != -1)
        if known == 0 or count % known:
            raise ShapeError(f"{name}() cannot make {tuple(size)} of {count} elements, shape {tuple(input.shape)}.")
        size[size.index(-1)] = count // known
    if math.prod(size) != count:
        raise ShapeError(
            f"{name}() cannot make shape {tuple(size)} ({math.prod(size)} elements) of shape {tuple(input.shape)} "
            f"({count} elements); the numbers of elements must be equal."
        )
    return tuple(size)


reshape_ = primitive(
    "reshape",
    lambda backend, input, *, shape: input.reshape(shape),
    vjp={"input": lambda g, input_shape: g.reshape(input_shape)},
    jvp=linear,
    samples=[
        (S((3, 4)), {"shape": (2, 6)}),
        (S((2, 3, 4)), {"shape": (6, 4)}),
        (S(()), {"shape": (1, 1)}),
        (S((0, 3)), {"shape": (3, 0)}),
    ],
    doc="The same elements in another shape.",
    batch=shift,
    view=True,
)


@function
def reshape(input: Any, *shape: Any) -> Any:
    """The same elements, in C order, in another shape; one length may be −1. A view where strides allow."""
    size = _resolve("reshape", _sizes(shape), input)
    if isinstance(input, Tensor) and input._data.shape == size:
        return alias(input)
    out = reshape_(input, shape=size)
    if isinstance(input, Tensor) and not _shares(out._data, input._data):
        out._cell = [0]  # a copy: its version is its own
        out._view = None
    return out


def _shares(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return np.may_share_memory(a, b)
    if isinstance(a, Logical):
        return True  # inside vmap: what is shared is the business of the tensor of all examples
    return a.data.mem is b.data.mem


alias = primitive("alias", lambda backend, input: input[...], vjp={"input": lambda g: g}, jvp=linear, view=True,
                  samples=[(S((3, 4)),), (S(()),), (S((0, 3)),)], doc="The same memory as another tensor.",
                  batch=shift)  # fmt: skip


@function
def view(input: Any, *shape: Any) -> Any:
    """reshape() that never copies; a dtype instead of a shape reinterprets the bytes (no gradient)."""
    if len(shape) == 1 and not isinstance(shape[0], (int, tuple, list, np.integer)):
        return wrap(input._data.view(shape[0]), input._device)
    out = reshape(input, *shape)
    if not _shares(out._data, input._data) and input._data.size:
        raise ShapeError(
            f"view() cannot make {tuple(out.shape)} of shape {tuple(input.shape)} with strides {input.stride()} "
            "without a copy; use reshape(), or contiguous() first."
        )
    return out


@function
def view_as(input: Any, other: Any) -> Any:
    """view() in the shape of `other`."""
    return view(input, other.shape)


@function
def reshape_as(input: Any, other: Any) -> Any:
    """reshape() to the shape of `other`."""
    return reshape(input, other.shape)


@function
def flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """The dimensions from start_dim to end_dim as one."""
    a, b = axis_of("flatten", start_dim, input.ndim), axis_of("flatten", end_dim, input.ndim)
    if a > b:
        raise ShapeError(f"flatten() needs start_dim before end_dim, got {start_dim} and {end_dim}.")
    shape = tuple(input.shape)
    return reshape(input, (*shape[:a], math.prod(shape[a : b + 1]), *shape[b + 1 :]))


@function
def unflatten(input: Any, dim: int, sizes: Sequence[int]) -> Any:
    """Dimension `dim` as several of lengths `sizes` (one may be −1)."""
    at = axis_of("unflatten", dim, input.ndim)
    shape = tuple(input.shape)
    sizes = list(sizes)
    if -1 in sizes:
        known = math.prod(n for n in sizes if n != -1)
        sizes[sizes.index(-1)] = shape[at] // known if known else 0
    return reshape(input, (*shape[:at], *sizes, *shape[at + 1 :]))


@function
def ravel(input: Any) -> Any:
    """All elements in one dimension."""
    return reshape(input, (-1,)) if input._data.size else reshape(input, (0,))


permute_ = primitive(
    "permute",
    lambda backend, input, *, dims: input.transpose(dims),
    vjp={"input": lambda g, dims: permute(g, tuple(int(i) for i in np.argsort(dims)))},
    jvp=linear,
    samples=[(S((3, 4)), {"dims": (1, 0)}), (S((2, 3, 4)), {"dims": (2, 0, 1)}), (S(()), {"dims": ()})],
    doc="The dimensions in another order.",
    batch=lambda batch, op, inputs, params: op(inputs[0].value, dims=(0, *(d + 1 for d in params["dims"]))),
    view=True,
)


@function
def permute(input: Any, *dims: Any) -> Any:
    """The dimensions in the order `dims`: a view."""
    order = _sizes(dims)
    found = tuple(axis_of("permute", d, input.ndim) for d in order)
    if sorted(found) != list(range(input.ndim)):
        raise ShapeError(f"permute() takes each of the {input.ndim} dimensions once, got {order}.")
    return permute_(input, dims=found)


@function(aliases=["swapaxes", "swapdims"])
def transpose(input: Any, dim0: int, dim1: int) -> Any:
    """Dimensions dim0 and dim1 swapped: a view."""
    if not input.ndim:
        return input
    a, b = axis_of("transpose", dim0, input.ndim), axis_of("transpose", dim1, input.ndim)
    order = list(range(input.ndim))
    order[a], order[b] = b, a
    return permute_(input, dims=tuple(order))


@function
def t(input: Any) -> Any:
    """The transpose of a matrix; vectors and scalars as they are."""
    if input.ndim > 2:
        raise ShapeError(f"t() takes at most 2 dimensions, got shape {tuple(input.shape)}; use .mT or transpose(a, b).")
    return transpose(input, 0, 1) if input.ndim == 2 else input


@function
def movedim(input: Any, source: Any, destination: Any) -> Any:
    """Dimension(s) `source` moved to the place(s) `destination`; the others keep their order."""
    from_, to = np.atleast_1d(source).tolist(), np.atleast_1d(destination).tolist()
    from_ = [axis_of("movedim", d, input.ndim) for d in from_]
    to = [axis_of("movedim", d, input.ndim) for d in to]
    if len(from_) != len(to):
        raise ShapeError(f"movedim() takes as many destinations as sources, got {source} and {destination}.")
    order = [d for d in range(input.ndim) if d not in from_]
    for place, d in sorted(zip(to, from_, strict=True)):
        order.insert(place, d)
    return permute(input, tuple(order))


Tensor.T = property(lambda self: permute(self, tuple(range(self.ndim))[::-1]))  # type: ignore[attr-defined]
Tensor.mT = property(lambda self: transpose(self, -2, -1))  # type: ignore[attr-defined]

expand_ = primitive(
    "expand",
    lambda backend, input, *, shape: backend.xp.broadcast_to(input, shape),
    vjp={"input": lambda g, input_shape: _unexpand(g, input_shape)},
    jvp=linear,
    samples=[
        (S((3, 1)), {"shape": (3, 4)}),
        (S((4,)), {"shape": (2, 3, 4)}),
        (S(()), {"shape": (2,)}),
        (S((1, 3)), {"shape": (0, 3)}),
    ],
    doc="Dimensions of length 1 repeated without a copy.",
    batch=lambda batch, op, inputs, params: op(
        batch.aligned(inputs[0], len(params["shape"])), shape=(batch.size, *params["shape"])
    ),
    view=True,
)


def _unexpand(g: Any, shape: tuple[int, ...]) -> Any:
    return sum_to_size(g, shape)


@function
def expand(input: Any, *sizes: Any) -> Any:
    """Dimensions of length 1 (and new ones in front) repeated to `sizes`, −1 leaving one as it is: a view."""
    size = list(_sizes(sizes))
    own = tuple(input.shape)
    extra = len(size) - len(own)
    if extra < 0:
        raise ShapeError(f"expand() cannot drop dimensions: shape {own} to {tuple(size)}.")
    for i, n in enumerate(own):
        if size[i + extra] == -1:
            size[i + extra] = n
        elif n not in (1, size[i + extra]):
            raise ShapeError(
                f"expand() cannot make {tuple(size)} of shape {own}: dimension {i} has length {n}, and only length 1 "
                "can be repeated."
            )
    if any(n < 0 for n in size):
        raise ShapeError(f"expand() needs a length for new dimensions, got {tuple(size)} for shape {own}.")
    if size[extra:] == list(own) and math.prod(size[:extra]) == 1:
        return reshape(input, tuple(size))  # nothing is repeated, so it can be written to
    return expand_(input, shape=tuple(size))


@function
def expand_as(input: Any, other: Any) -> Any:
    """expand() to the shape of `other`."""
    return expand(input, other.shape)


@function
def broadcast_to(input: Any, size: Sequence[int]) -> Any:
    """expand() to the shape `size`."""
    return expand(input, size)


@function(method=False)
def broadcast_tensors(*tensors: Any) -> tuple[Any, ...]:
    """All tensors expanded to their common shape."""
    shape = broadcast_shapes(*[tuple(t.shape) for t in tensors])
    return tuple(expand(t, shape) for t in tensors)


@function(method=False)
def broadcast_shapes(*shapes: Any) -> tuple[int, ...]:
    """The shape that shapes broadcast to."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise ShapeError(f"Shapes {', '.join(str(tuple(s)) for s in shapes)} do not broadcast.") from error


@function
def squeeze(input: Any, dim: Any = None) -> Any:
    """Without its dimensions of length 1, or without `dim` (one or several) where they have length 1: a view."""
    shape = tuple(input.shape)
    if dim is None:
        return reshape(input, tuple(n for n in shape if n != 1))
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    drop = {axis_of("squeeze", d, len(shape)) for d in dims}
    return reshape(input, tuple(n for i, n in enumerate(shape) if not (i in drop and n == 1)))


@function
def unsqueeze(input: Any, dim: int) -> Any:
    """With a new dimension of length 1 at `dim`: a view."""
    at = axis_of("unsqueeze", dim, input.ndim + 1)
    shape = tuple(input.shape)
    return reshape(input, (*shape[:at], 1, *shape[at:]))


@function
def contiguous(input: Any) -> Any:
    """The tensor itself where it is C-contiguous, else a copy that is."""
    return input if input._data.flags.c_contiguous else clone(input)


clone_ = primitive("clone", lambda backend, input: backend.copy(input), vjp={"input": lambda g: g}, jvp=linear,
                   samples=[(S((3, 4)),), (S(()),), (S((0, 3)),)],
                   doc="A copy that is differentiated through.", batch=shift)  # fmt: skip
function(clone_, name="clone")
clone = clone_


@function
def repeat(input: Any, *sizes: Any) -> Any:
    """Copies of the tensor side by side, `sizes` times along each dimension."""
    size = _sizes(sizes)
    own = (1,) * (len(size) - input.ndim) + tuple(input.shape)
    if len(own) > len(size):
        raise ShapeError(f"repeat() needs a number for each of the {input.ndim} dimensions, got {size}.")
    x = reshape(input, tuple(m for n in own for m in (1, n)))
    x = expand(x, tuple(m for r, n in zip(size, own, strict=True) for m in (r, n)))
    return reshape(x, tuple(r * n for r, n in zip(size, own, strict=True)))


@function
def tile(input: Any, *dims: Any) -> Any:
    """repeat() with ones for leading dimensions that `dims` leaves out."""
    size = _sizes(dims)
    return repeat(input, (1,) * (input.ndim - len(size)) + size)


@function
def repeat_interleave(input: Any, repeats: int, dim: Any = None) -> Any:
    """Each element `repeats` times in a row, along `dim` (or flattened)."""
    x = ravel(input) if dim is None else input
    at = axis_of("repeat_interleave", 0 if dim is None else dim, x.ndim)
    shape = tuple(x.shape)
    x = expand(unsqueeze(x, at + 1), (*shape[: at + 1], repeats, *shape[at + 1 :]))
    return reshape(x, (*shape[:at], shape[at] * repeats, *shape[at + 1 :]))


def _slices(shape: Sequence[int], dim: int, start: int, length: int) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, slice(start, start + length))


narrow_ = primitive(
    "narrow",
    lambda backend, input, *, dim, start, length: input[_slices(input.shape, dim, start, length)],
    vjp={"input": lambda g, input_shape, dim, start, length: pad_(g, shape=input_shape, dim=dim, start=start)},
    jvp=linear,
    samples=[(S((3, 4)), {"dim": 1, "start": 1, "length": 2}), (S((3, 4)), {"dim": 0, "start": 3, "length": 0})],
    doc="A stretch of one dimension.",
    batch=shift,
    view=True,
)


def _pad(backend: Any, input: Any, *, shape: tuple[int, ...], dim: int, start: int) -> Any:
    out = backend.full(shape, 0, input.dtype)
    out[_slices(shape, dim, start, input.shape[dim])] = input
    return out


pad_: Primitive = primitive(
    "embed",
    _pad,
    vjp={"input": lambda g, input_shape, dim, start: narrow_(g, dim=dim, start=start, length=input_shape[dim])},
    jvp=linear,
    samples=[
        (S((3, 2)), {"shape": (3, 4), "dim": 1, "start": 1}),
        (S((0, 4)), {"shape": (3, 4), "dim": 0, "start": 1}),
    ],
    doc="Zeros of a shape with the input as a stretch of one dimension.",
    batch=shift,
)


@function
def narrow(input: Any, dim: int, start: int, length: int) -> Any:
    """`length` entries of dimension `dim` from `start`: a view."""
    at = axis_of("narrow", dim, input.ndim)
    n = input.shape[at]
    begin = start + n if start < 0 else start
    if not 0 <= begin <= n or length < 0 or begin + length > n:
        raise ShapeError(f"narrow() of {length} entries from {start} does not fit dimension {dim} of length {n}.")
    return narrow_(input, dim=at, start=begin, length=length)


def _cat_rule(g: Any, shapes: Sequence[Any], wanted: Sequence[bool], dim: int) -> list[Any]:
    out, start = [], 0
    for shape, want in zip(shapes, wanted, strict=True):
        out.append(narrow_(g, dim=dim, start=start, length=shape[dim]) if want else None)
        start += shape[dim]
    return out


cat_ = primitive(
    "cat",
    lambda backend, *inputs, dim: backend.contiguous(backend.xp.concatenate(inputs, axis=dim)),
    vjp={"inputs": _cat_rule},
    jvp=linear,
    samples=[
        (S((3, 4)), S((3, 2)), {"dim": 1}),
        (S((2,)), S((0,)), S((3,)), {"dim": 0}),
        (S((3, 4)), {"dim": 0}),
        (S((2, 3, 4)), S((2, 1, 4)), {"dim": 1}),
    ],
    doc="Tensors joined along a dimension.",
    batch=shift,
    variadic=True,
)


def _joined(name: str, tensors: Any) -> list[Tensor]:
    tensors = list(tensors)
    if not tensors:
        raise ShapeError(f"{name}() needs at least one tensor.")
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}() takes a sequence of Tensors, got a {type(x).__name__} in it.")
    check_devices(name, tensors)
    if len({x._data.dtype for x in tensors}) > 1:
        from gpuad.array.dtypes import result_type

        dtype = result_type([x._data.dtype for x in tensors], (), ())
        tensors = [x.to(dtype) for x in tensors]
    return tensors


@function(method=False, aliases=["concat", "concatenate"])
def cat(tensors: Any, dim: int = 0, *, axis: int | None = None) -> Any:
    """The tensors one after another along `dim`; the other lengths must be equal."""
    tensors = _joined("cat", tensors)
    dim = dim if axis is None else axis
    if not tensors[0].ndim:
        raise ShapeError("cat() of 0-d tensors: they have no dimension; use stack().")
    kept = [x for x in tensors if x._data.shape != (0,)] or tensors[:1]
    at = axis_of("cat", dim, kept[0].ndim)
    first = kept[0]._data.shape
    for i, x in enumerate(kept):
        own = x._data.shape
        if len(own) != len(first) or any(a != b for j, (a, b) in enumerate(zip(own, first, strict=True)) if j != at):
            raise ShapeError(
                f"cat() along dimension {dim} needs equal lengths in the others:\n  tensor 0  {describe(kept[0])}\n"
                f"  tensor {i}  {describe(x)}"
            )
    return cat_(*kept, dim=at)


@function(method=False)
def stack(tensors: Any, dim: int = 0, *, axis: int | None = None) -> Any:
    """The tensors, all of one shape, along a new dimension `dim`."""
    tensors = _joined("stack", tensors)
    dim = dim if axis is None else axis
    for i, x in enumerate(tensors):
        if x._data.shape != tensors[0]._data.shape:
            raise ShapeError(
                f"stack() needs equal shapes:\n  tensor 0  {describe(tensors[0])}\n  tensor {i}  {describe(x)}"
            )
    return cat([unsqueeze(x, dim) for x in tensors], axis_of("stack", dim, tensors[0].ndim + 1))


@function(method=False)
def vstack(tensors: Any) -> Any:
    """The tensors as rows, one after another."""
    return cat([x.reshape(1, -1) if x.ndim < 2 else x for x in tensors], 0)


@function(method=False)
def hstack(tensors: Any) -> Any:
    """The tensors side by side."""
    tensors = [x.reshape(1) if not x.ndim else x for x in tensors]
    return cat(tensors, 0 if tensors[0].ndim == 1 else 1)


flip_: Primitive = primitive(
    "flip",
    lambda backend, input, *, dims: backend.copy(backend.xp.flip(input, dims)),
    vjp={"input": lambda g, dims: flip_(g, dims=dims)},
    jvp=linear,
    samples=[(S((3, 4)), {"dims": (0,)}), (S((2, 3, 4)), {"dims": (0, 2)})],
    doc="The order of entries reversed.",
    batch=shift,
)


@function
def flip(input: Any, *dims: Any) -> Any:
    """The entries along `dims` in reversed order: a copy."""
    return flip_(input, dims=tuple(axis_of("flip", d, input.ndim) for d in _sizes(dims)))


roll_: Primitive = primitive(
    "roll",
    lambda backend, input, *, shifts, dims: backend.xp.roll(input, shifts, dims),
    vjp={"input": lambda g, shifts, dims: roll_(g, shifts=tuple(-s for s in shifts), dims=dims)},
    jvp=linear,
    samples=[(S((3, 4)), {"shifts": (1,), "dims": (0,)}), (S((3, 4)), {"shifts": (2, -1), "dims": (0, 1)})],
    doc="Entries shifted around.",
    batch=shift,
)


@function
def roll(input: Any, shifts: Any, dims: Any = None) -> Any:
    """The entries shifted by `shifts` along `dims`, coming back in at the other end."""
    if dims is None:
        return reshape(roll(ravel(input), shifts, 0), tuple(input.shape))
    moves = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    along = (dims,) if isinstance(dims, int) else tuple(dims)
    return roll_(input, shifts=moves, dims=tuple(axis_of("roll", d, input.ndim) for d in along))


def _triangle(name: str, other: str, doc: str) -> Any:
    made = primitive(
        name + "angle",
        lambda backend, input, *, diagonal: backend.contiguous(
            backend.cast(getattr(backend.xp, name)(input, diagonal), input.dtype)
        ),
        vjp={"input": lambda g, diagonal: made(g, diagonal=diagonal)},
        jvp=linear,
        samples=[(S((3, 4)), {"diagonal": 0}), (S((2, 3, 3)), {"diagonal": -1}), (S((4, 3)), {"diagonal": 1})],
        doc=doc,
        batch=shift,
    )

    def public(input: Any, diagonal: int = 0) -> Any:
        if input.ndim < 2:
            raise ShapeError(f"{name}() takes matrices, got shape {tuple(input.shape)}.")
        return made(input, diagonal=diagonal)

    public.__name__, public.__doc__ = name, doc
    return function(public, name=name)


tril = _triangle("tril", "triu", "The part of matrices on and below a diagonal, zeros above.")
triu = _triangle("triu", "tril", "The part of matrices on and above a diagonal, zeros below.")


diagonal_ = primitive(
    "diagonal",
    lambda backend, input, *, offset: _diagonal(backend, input, offset),
    vjp={"input": lambda g, input_shape, offset: diagonal_scatter_(g, shape=input_shape, offset=offset)},
    jvp=linear,
    samples=[(S((3, 4)), {"offset": 0}), (S((2, 3, 4)), {"offset": 1}), (S((4, 3)), {"offset": -2})],
    doc="The diagonal of matrices.",
    view=True,
    batch=shift,
)


def _diagonal(backend: Any, input: Any, offset: int) -> Any:
    """xp.diagonal, but writable in NumPy too."""
    part = input[..., max(-offset, 0) :, max(offset, 0) :]
    shape, strides = (*part.shape[:-2], min(part.shape[-2:])), part.strides
    return backend.xp.lib.stride_tricks.as_strided(part, shape, (*strides[:-2], strides[-2] + strides[-1]))


def _diagonal_scatter(backend: Any, input: Any, *, shape: tuple[int, ...], offset: int) -> Any:
    out = backend.full(shape, 0, input.dtype)
    i = backend.xp.arange(input.shape[-1])
    out[..., i - min(offset, 0), i + max(offset, 0)] = input
    return out


diagonal_scatter_: Primitive = primitive(
    "diagonal_embed", _diagonal_scatter,
    vjp={"input": lambda g, offset: diagonal_(g, offset=offset)}, jvp=linear, doc="Zeros with a diagonal.", batch=shift,
    samples=[(S((3,)), {"shape": (3, 4), "offset": 0}), (S((2, 3)), {"shape": (2, 3, 4), "offset": 1})],
)  # fmt: skip


@function
def diagonal(input: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """The diagonal of the matrices in dimensions dim1 and dim2, as the last dimension: a view."""
    return diagonal_(movedim(input, (dim1, dim2), (-2, -1)), offset=offset)


def _put_of_all(batch: Batch, op: Any, inputs: Any, params: dict) -> Any:
    """The places of the view in one example, as an index into the flattened rest of all."""
    from gpuad.ops.indexing import index_put_

    input, value = inputs
    shape = input._data.shape
    places = follow(np.arange(math.prod(shape)).reshape(shape), params["chain"]).reshape(-1)
    index = input._device.backend.asarray(places)
    if isinstance(value, Tensor):
        value = batch.front(value).reshape((batch.size, places.size))
    flat = batch.front(input).reshape((batch.size, math.prod(shape)))
    return index_put_(flat, value, key=(slice(None), index), basic=False).reshape((batch.size, *shape))


# What a tensor becomes when one of its views is changed in place; see gpuad/autograd/views.py.
view_put: Primitive = primitive(
    "view_put",
    put,
    vjp={
        "input": lambda g, chain, order: view_put(g, 0.0, chain=chain, order=order),
        "value": lambda g, chain: follow(g, chain),
    },
    jvp={
        "input": lambda t, chain, order: view_put(t, 0.0, chain=chain, order=order),
        "value": lambda t, input_shape, chain, order: view_put(t.new_zeros(input_shape), t, chain=chain, order=order),
    },
    samples=[
        (S((3, 4)), S((4,)), {"chain": (("slice", {"key": (1,)}),), "order": (0, 1)}),
        (S((3, 4)), S((2,)), {"chain": (("permute", {"dims": (1, 0)}), ("reshape", {"shape": (12,)}),
                                        ("slice", {"key": (slice(2, 8, 3),)})), "order": (1, 0)}),
        (S(()), S((1,)), {"chain": (("reshape", {"shape": (1,)}),), "order": ()}),
    ],
    doc="The input with a value at a view of it: what a tensor becomes when one of its views is changed in place.",
    batch=_put_of_all,
)  # fmt: skip


@function
def diag(input: Any, diagonal: int = 0) -> Any:
    """The diagonal of a matrix, or the matrix that has a vector as its diagonal."""
    if input.ndim == 1:
        n = input.shape[0] + abs(diagonal)
        return diagonal_scatter_(input, shape=(n, n), offset=diagonal)
    if input.ndim == 2:
        return clone(diagonal_(input, offset=diagonal))
    raise ShapeError(f"diag() takes a vector or a matrix, got shape {tuple(input.shape)}.")


@function
def trace(input: Any) -> Any:
    """The sum of the diagonal of a matrix."""
    return diag(input).sum()
