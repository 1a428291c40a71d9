"""Reductions: sums, means, extrema, norms, cumulative sums, and what is derived from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.array import dtypes
from gpuad.array.device import of_array
from gpuad.array.dtypes import FLOATING
from gpuad.autograd.autocast import widened
from gpuad.autograd.batching import shift
from gpuad.autograd.elementwise import elementwise
from gpuad.autograd.formula_gradients import broadcast_axes
from gpuad.autograd.op import function
from gpuad.autograd.primitive import Primitive, linear, primitive
from gpuad.errors import DtypeError, ShapeError
from gpuad.kernels import scalar as f
from gpuad.ops.arithmetic import eq, maximum, minimum, mul
from gpuad.ops.samples import S, reductions
from gpuad.tensor import Tensor


def axes_of(name: str, dim: Any, ndim: int) -> tuple[int, ...]:
    """The dimensions to reduce, counted from 0; None (or an empty list) means all."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(ndim))
    axes = []
    for d in dim if isinstance(dim, (list, tuple)) else (dim,):
        axes.append(axis_of(name, d, ndim))
    if len(set(axes)) != len(axes):
        raise ShapeError(f"{name} got a dimension twice: {dim}.")
    return tuple(sorted(axes))


def axis_of(name: str, dim: Any, ndim: int) -> int:
    """One dimension, counted from 0; a 0-d tensor has dimensions 0 and −1."""
    if not isinstance(dim, (int, np.integer)) or isinstance(dim, bool):
        raise TypeError(f"{name} takes a dimension as an int, got {dim!r}.")
    n = ndim or 1
    if not -n <= dim < n:
        raise ShapeError(f"{name} got dimension {dim}, but the tensor has {ndim}: {-n} to {n - 1} exist.")
    return int(dim) % n


def _named(dim: Any, keepdim: bool, axis: Any, keepdims: Any) -> tuple[Any, bool]:
    """PyTorch's dim and keepdim, or NumPy's axis and keepdims."""
    return (axis if dim is None else dim), (keepdim if keepdims is None else bool(keepdims))


def _expand(g: Any, shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> Any:
    """A reduced gradient broadcast back: a view."""
    if not keepdims:
        kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
        g = g.reshape(kept)
    return broadcast_to(g, shape)


def broadcast_to(x: Any, shape: Sequence[int]) -> Any:
    """x broadcast to `shape`, a view; bare arrays and Tensors."""
    if isinstance(x, Tensor):
        return x.expand(shape)
    return of_array(x).backend.xp.broadcast_to(x, shape)


sum_ = primitive(
    "sum",
    lambda backend, input, *, axes, keepdims: backend.sum(input, axes, keepdims),
    vjp={"input": lambda g, input_shape, axes, keepdims: _expand(g, input_shape, axes, keepdims)},
    jvp=linear,
    samples=reductions(),
    doc="The sum over axes.",
    autocast="float32",
    batch=shift,
)
mean_ = primitive(
    "mean",
    lambda backend, input, *, axes, keepdims, scale: backend.sum(input, axes, keepdims, None, scale),
    vjp={"input": lambda g, input_shape, axes, keepdims, scale: _expand(mul(g, scale), input_shape, axes, keepdims)},
    jvp=linear,
    samples=reductions(scale=0.25),
    doc="The mean over axes.",
    batch=shift,
)


def _cast(input: Tensor, dtype: Any, to_float: bool = False) -> Tensor:
    if dtype is not None:
        return input.to(dtypes.as_dtype(dtype))
    if to_float and input._data.dtype.char not in FLOATING:
        raise DtypeError(f"This reduction takes a floating tensor, got {input.dtype}; convert it first: x.float().")
    return input


@function
def sum(
    input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None, keepdims: Any = None
) -> Any:
    """The sum over `dim` (all dimensions unless given); integers and bools are summed in int64."""
    dim, keepdim = _named(dim, keepdim, axis, keepdims)
    if isinstance(input, Tensor) and (dtype is not None or input._data.dtype.char not in FLOATING):
        input = input.to(dtypes.int64 if dtype is None else dtypes.as_dtype(dtype))
    return sum_(input, axes=axes_of("sum", dim, input.ndim), keepdims=keepdim)


@function
def mean(
    input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None, keepdims: Any = None
) -> Any:
    """The mean over `dim` (all dimensions unless given); floating tensors only."""
    dim, keepdim = _named(dim, keepdim, axis, keepdims)
    input = _cast(input, dtype, to_float=True)
    axes = axes_of("mean", dim, input.ndim)
    count = math.prod(input._data.shape[a] for a in axes) if input.ndim else 1
    return mean_(input, axes=axes, keepdims=keepdim, scale=1.0 / count if count else math.nan)


@function
def sum_to_size(input: Any, *size: Any) -> Any:
    """The sum over dimensions that `size` does not have, or has with length 1: what unbroadcasts a gradient."""
    shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
    if tuple(input.shape) == shape:
        return input
    axes = broadcast_axes(shape, tuple(input.shape))
    result = sum_(input, axes=axes, keepdims=False) if axes else input
    return result.reshape(shape)


def _extreme(name: str) -> Any:
    """amax or amin: ties share the gradient evenly, as in PyTorch."""

    def rule(g: Any, input: Any, out: Any, input_shape: Any, axes: Any, keepdims: bool) -> Any:
        chosen = eq(input, _expand(out, input_shape, axes, keepdims))
        share = chosen.to(g.dtype) if isinstance(chosen, Tensor) else chosen.astype(g.dtype)
        count = sum_(share, axes=axes, keepdims=True)
        return _expand(g, input_shape, axes, keepdims) * share / count

    def jvp_rule(t: Any, input: Any, out: Any, axes: Any, keepdims: bool) -> Any:
        share = (input == _expand(out, tuple(input.shape), axes, keepdims)).to(t.dtype)
        return sum_(t * share, axes=axes, keepdims=keepdims) / sum_(share, axes=axes, keepdims=keepdims)

    return primitive(
        name,
        lambda backend, input, *, axes, keepdims: backend.xp.asarray(
            getattr(backend.xp, name)(input, axis=axes, keepdims=keepdims), order="C"
        ),
        vjp={"input": rule},
        jvp={"input": jvp_rule},
        samples=reductions(empty=False),
        doc=f"The {'largest' if name == 'amax' else 'smallest'} element over axes.",
        batch=shift,
    )


amax_, amin_ = _extreme("amax"), _extreme("amin")


def _not_empty(name: str, input: Tensor, axes: tuple[int, ...]) -> None:
    if input._data.size == 0 and (not input._data.ndim or 0 in [input._data.shape[a] for a in axes]):
        raise ShapeError(f"{name} of no elements does not exist; the tensor has shape {tuple(input.shape)}.")


@function
def amax(input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, keepdims: Any = None) -> Any:
    """The largest element over `dim`; ties share the gradient."""
    dim, keepdim = _named(dim, keepdim, axis, keepdims)
    axes = axes_of("amax", dim, input.ndim)
    _not_empty("amax", input, axes)
    return amax_(input, axes=axes, keepdims=keepdim)


@function
def amin(input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, keepdims: Any = None) -> Any:
    """The smallest element over `dim`; ties share the gradient."""
    dim, keepdim = _named(dim, keepdim, axis, keepdims)
    axes = axes_of("amin", dim, input.ndim)
    _not_empty("amin", input, axes)
    return amin_(input, axes=axes, keepdims=keepdim)


class Extreme(tuple):
    """(values, indices), by name too."""

    __slots__ = ()

    @property
    def values(self) -> Tensor:
        """The elements."""
        return self[0]

    @property
    def indices(self) -> Tensor:
        """Where they were, int64."""
        return self[1]


def _index_of(name: str) -> Primitive:
    return primitive(
        name,
        lambda backend, input, *, dim: backend.xp.asarray(getattr(backend.xp, name)(input, axis=dim), np.int64, "C"),
        samples=[(S((3, 4)), {"dim": 0}), (S((2, 3, 4)), {"dim": 1})],
        doc=f"Where the {'largest' if name == 'argmax' else 'smallest'} element along a dimension is.",
        batch=shift,
    )


argmax_, argmin_ = _index_of("argmax"), _index_of("argmin")


def _arg(op: Primitive, input: Tensor, dim: Any, keepdim: bool) -> Tensor:
    if dim is None:
        _not_empty(op.name, input, tuple(range(input.ndim)))
        found = op(input.reshape((-1,)), dim=0)
        return found.reshape((1,) * input.ndim) if keepdim else found
    axis = axis_of(op.name, dim, input.ndim)
    _not_empty(op.name, input, (axis,))
    if not input.ndim:
        return input.new_zeros((), dtype="int64")
    found = op(input, dim=axis)
    return found.unsqueeze(axis) if keepdim else found


@function
def argmax(input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, keepdims: Any = None) -> Any:
    """The index of the (first) largest element over `dim`, or in the flattened tensor; int64."""
    dim, keepdim = _named(dim, keepdim, axis, keepdims)
    return _arg(argmax_, input, dim, keepdim)


@function
def argmin(input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, keepdims: Any = None) -> Any:
    """The index of the (first) smallest element over `dim`, or in the flattened tensor; int64."""
    dim, keepdim = _named(dim, keepdim, axis, keepdims)
    return _arg(argmin_, input, dim, keepdim)


def _select(name: str, whole: Any, arg: Any, pair: Any) -> Any:
    def select(input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, keepdims: Any = None) -> Any:
        if isinstance(dim, Tensor):
            return pair(input, dim)
        dim, keepdim = _named(dim, keepdim, axis, keepdims)
        if dim is None:
            return whole(input)
        index = arg(input, dim, True)
        values = input if not input.ndim else input.gather(axis_of(name, dim, input.ndim), index)
        if not keepdim and input.ndim:
            at = axis_of(name, dim, input.ndim)
            return Extreme((values.squeeze(at), index.squeeze(at)))
        return Extreme((values, index))

    select.__name__ = name
    select.__doc__ = (
        f"The {'largest' if name == 'max' else 'smallest'} element: of all, (values, indices) over `dim`, or "
        "elementwise of two tensors."
    )
    return function(select, name=name)


max = _select("max", amax, argmax, maximum)
min = _select("min", amin, argmin, minimum)


def _prod_rule(g: Any, input: Any, input_shape: Any, axes: Any, keepdims: bool) -> Any:
    """Σ products of the others, by sweeps from both ends: right with zeros, and differentiable again."""
    return _expand(g, input_shape, axes, keepdims) * _others(input, axes[0])


def _others(x: Any, axis: int) -> Any:
    """For each element the product of the others along `axis`."""
    n = x.shape[axis]
    xp = None if isinstance(x, Tensor) else of_array(x).backend.xp
    take = (lambda i: x.narrow(axis, i, 1)) if xp is None else (lambda i: xp.take(x, [i], axis=axis))
    parts = [take(i) for i in range(n)]
    one = parts[0] * 0 + 1
    before, after = [one], [one]
    for i in range(n - 1):
        before.append(before[-1] * parts[i])
        after.append(after[-1] * parts[n - 1 - i])
    products = [b * a for b, a in zip(before, reversed(after), strict=True)]
    if xp is None:
        from gpuad.ops.shape import cat

        return cat(products, axis)
    return xp.concatenate(products, axis=axis)


prod_ = primitive(
    "prod",
    lambda backend, input, *, axes, keepdims: backend.xp.asarray(
        backend.xp.prod(input, axis=axes[0], keepdims=keepdims, dtype=input.dtype), order="C"
    ),
    vjp={"input": _prod_rule},
    jvp={"input": lambda t, input, axes, keepdims: sum_(t * _others(input, axes[0]), axes=axes, keepdims=keepdims)},
    samples=[(S((3, 4)), {"axes": (0,), "keepdims": False}), (S((2, 3, 4)), {"axes": (1,), "keepdims": True})],
    doc="The product over one axis.",
    autocast="float32",
    batch=shift,
)


@function
def prod(
    input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None, keepdims: Any = None
) -> Any:
    """The product over `dim`, or of all elements; the derivative is right where elements are zero."""
    dim, keepdim = _named(dim, keepdim, axis, keepdims)
    if dtype is not None or input._data.dtype.char not in FLOATING:
        input = input.to(dtypes.int64 if dtype is None else dtypes.as_dtype(dtype))
    if dim is None or not input.ndim:
        flat = input.reshape((-1,))
        if not flat._data.size:
            return input.new_ones(())
        return prod_(flat, axes=(0,), keepdims=False)
    return prod_(input, axes=(axis_of("prod", dim, input.ndim),), keepdims=keepdim)


@function
def var(
    input: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float = 1,
    axis: Any = None, keepdims: Any = None,
) -> Any:  # fmt: skip
    """The variance over `dim`: Σ (x − mean)² / (n − correction); correction 0 for the biased one."""
    dim, keepdim = _named(dim, keepdim, axis, keepdims)
    if unbiased is not None:
        correction = 1 if unbiased else 0
    input = widened(input)
    axes = axes_of("var", dim, input.ndim)
    count = math.prod(input._data.shape[a] for a in axes) if input.ndim else 1
    centred = input - mean(input, list(axes) if input.ndim else None, True)
    degrees = count - correction
    return mean_(centred.square(), axes=axes, keepdims=keepdim, scale=1.0 / degrees if degrees > 0 else math.nan)


@function
def std(
    input: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: float = 1,
    axis: Any = None, keepdims: Any = None,
) -> Any:  # fmt: skip
    """The standard deviation over `dim`, the root of var()."""
    return var(input, dim, unbiased, keepdim, correction=correction, axis=axis, keepdims=keepdims).sqrt()


@function(method=False)
def var_mean(input: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
             correction: float = 1) -> tuple[Any, Any]:  # fmt: skip
    """(variance, mean) over `dim`."""
    return var(input, dim, unbiased, keepdim, correction=correction), mean(input, dim, keepdim)


@function(method=False)
def std_mean(input: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
             correction: float = 1) -> tuple[Any, Any]:  # fmt: skip
    """(standard deviation, mean) over `dim`."""
    return std(input, dim, unbiased, keepdim, correction=correction), mean(input, dim, keepdim)


@function
def norm(input: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False) -> Any:
    """The p-norm (Σ |x|ᵖ)^(1/p) over `dim`; "fro" and 2 are Euclidean, ±inf the largest and smallest |x|."""
    input = widened(input)
    if p in ("fro", 2, None):
        return safe_sqrt(sum(input.square(), dim, keepdim))
    if p == math.inf:
        return amax(input.abs(), dim, keepdim)
    if p == -math.inf:
        return amin(input.abs(), dim, keepdim)
    if p == 0:
        return sum((input != 0).to(input.dtype), dim, keepdim)
    if p == 1:
        return sum(input.abs(), dim, keepdim)
    return sum(input.abs() ** float(p), dim, keepdim) ** (1.0 / p)


safe_sqrt = elementwise(
    "safe_sqrt", lambda input: f.where(f.eq(input, 0), 0.0, f.sqrt(input)), [(S((3, 4), 0.2, 2),)],
    "The square root with derivative 0 at 0: a norm's.", method=False,
)  # fmt: skip


@function
def logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    """log Σ exp(input) over `dim`, without overflow."""
    axes = axes_of("logsumexp", dim, input.ndim)
    highest = amax_(input.detach(), axes=axes, keepdims=True)
    highest = highest.masked_fill(~highest.isfinite(), 0.0)
    result = sum_((input - highest).exp(), axes=axes, keepdims=True).log() + highest
    return result if keepdim else result.squeeze(list(axes))


def _cumsum(backend: Any, input: Any, *, dim: int, reverse: bool) -> Any:
    xp, dtype = backend.xp, input.dtype
    wide = backend.cast(input, dtypes.float32) if dtype.char in dtypes.HALF else input
    out = backend.empty(wide.shape, wide.dtype)
    if reverse:
        xp.cumsum(xp.flip(wide, dim), dim, wide.dtype, xp.flip(out, dim))
    else:
        xp.cumsum(wide, dim, wide.dtype, out)
    return backend.cast(out, dtype)


cumsum_: Primitive = primitive(
    "cumsum", _cumsum, vjp={"input": lambda g, dim, reverse: cumsum_(g, dim=dim, reverse=not reverse)}, jvp=linear,
    samples=[(S((3, 4)), {"dim": 0, "reverse": False}), (S((2, 3, 4)), {"dim": 1, "reverse": True}),
             (S((0, 3)), {"dim": 1, "reverse": False})],
    doc="Sums of all elements up to each, along a dimension.", autocast="float32", batch=shift,
)  # fmt: skip


@function
def cumsum(input: Any, dim: Any, *, dtype: Any = None) -> Any:
    """Sums of the elements up to each along `dim`; integers in int64."""
    if dtype is not None or input._data.dtype.char not in FLOATING:
        input = input.to(dtypes.int64 if dtype is None else dtypes.as_dtype(dtype))
    return input if not input.ndim else cumsum_(input, dim=axis_of("cumsum", dim, input.ndim), reverse=False)


def _test_of(name: str, doc: str) -> Primitive:
    return primitive(
        name,
        lambda backend, input, *, axes, keepdims: backend.xp.asarray(
            getattr(backend.xp, name)(input, axis=axes, keepdims=keepdims), order="C"
        ),
        samples=reductions(),
        doc=doc,
        batch=shift,
    )


all_, any_ = _test_of("all", "Whether all elements are nonzero."), _test_of("any", "Whether an element is nonzero.")


@function
def all(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Whether all elements (over `dim`) are nonzero, bool."""
    return all_(input, axes=axes_of("all", dim, input.ndim), keepdims=keepdim)


@function
def any(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Whether an element (over `dim`) is nonzero, bool."""
    return any_(input, axes=axes_of("any", dim, input.ndim), keepdims=keepdim)


@function
def count_nonzero(input: Any, dim: Any = None) -> Any:
    """How many elements (over `dim`) are not zero, int64."""
    return sum(input != 0, dim)
