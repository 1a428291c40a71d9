"""Indexing: basic, advanced, boolean; reading and assignment; gather, scatter, sorting."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuad.array.dtypes import FLOATING, HALF, float32
from gpuad.autograd.batching import shift
from gpuad.autograd.levels import as_index, whole
from gpuad.autograd.modes import state
from gpuad.autograd.op import NUMBERS, Interpreters, check_devices, check_in_place, function, writable
from gpuad.autograd.primitive import Primitive, linear, primitive
from gpuad.autograd.views import moved
from gpuad.errors import DtypeError, ShapeError
from gpuad.ops import index_batching
from gpuad.ops.reduction import Extreme, axis_of, sum_to_size
from gpuad.ops.samples import Array, S
from gpuad.tensor import Tensor, wrap


def _array_key(key: Any, input: Tensor) -> tuple[tuple, bool]:
    """An index as a tuple of slices, ints, None, Ellipsis and bare index arrays, and whether it is basic (a view)."""
    parts = key if isinstance(key, tuple) else (key,)
    basic = True
    converted: list[Any] = []
    for part in parts:
        if isinstance(part, Tensor):
            if part._device is not input._device and (part._data.ndim or part._device.type != "cpu"):
                check_devices("indexing", (input, part), ("input", "index"))
            if part._data.dtype.char in FLOATING:
                raise DtypeError(f"An index must be integers or bools, got a {part.dtype} tensor; convert: i.long().")
            part = as_index(part)
            basic = False
        elif isinstance(part, (list, np.ndarray, range)):
            part = np.asarray(part)
            if part.dtype.char in FLOATING and part.size:
                raise DtypeError(f"An index must be integers or bools, got {part.dtype} values.")
            if not part.size and part.dtype.char in FLOATING:
                part = part.astype(np.int64)
            part = input._device.backend.asarray(part)
            basic = False
        elif isinstance(part, (bool, np.bool_)):
            part = np.bool_(part)
            basic = False
        elif isinstance(part, np.integer):
            part = int(part)
        elif not (part is None or part is Ellipsis or isinstance(part, (int, slice))):
            raise TypeError(f"A tensor cannot be indexed with a {type(part).__name__}; use ints, slices, None, …, "
                            "integer or bool tensors.")  # fmt: skip
        if isinstance(part, slice) and part.step is not None and int(part.step) < 0:
            raise ValueError("A slice of a tensor cannot have a negative step; use flip().")
        if isinstance(part, slice):
            part = slice(*(None if v is None else int(v) for v in (part.start, part.stop, part.step)))
        converted.append(part)
    return tuple(converted), basic


def _read(backend: Any, input: Any, *, key: Any) -> Any:
    found = input[key]
    # NumPy reads a single element as a number, which is no view of it.
    return found if isinstance(found, backend.array_type) else input[(*key, Ellipsis)]


def _scatter_add(backend: Any, input: Any, *, shape: tuple[int, ...], key: Any, basic: bool) -> Any:
    out = backend.full(shape, 0, input.dtype)
    if basic:
        out[key] = input
    else:
        backend.add_at(out, key, input)
    return out


# Zeros of a shape with the input added at an index: the transpose of reading at that index.
scatter_back = primitive(
    "index_add",
    _scatter_add,
    vjp={"input": lambda g, key, basic: (slice_ if basic else take)(g, key=key)},
    jvp=linear,
    samples=[
        (S((3, 2)), {"shape": (3, 4), "key": (slice(None), slice(1, 3)), "basic": True}),
        (S((3, 4)), {"shape": (2, 4), "key": (Array([1, 0, 1]),), "basic": False}),
        (S((2,)), {"shape": (3, 4), "key": (Array([2, 2]), Array([1, 1])), "basic": False}),
        (S(()), {"shape": (3,), "key": (1,), "basic": True}),
    ],
    doc="Zeros with the input added at an index; repeated places add up.",
    batch=index_batching.scatter_back,
)
slice_: Primitive = primitive(
    "slice", _read, vjp={"input": lambda g, input_shape, key: scatter_back(g, shape=input_shape, key=key, basic=True)},
    jvp=linear, doc="A basic index: ints and slices, a view.", view=True, batch=index_batching.read_slice,
    samples=[(S((3, 4)), {"key": (1,)}), (S((3, 4)), {"key": (slice(None, None, 2), None, slice(1, 3))}),
             (S((2, 3, 4)), {"key": (Ellipsis, 2)}), (S((3, 4)), {"key": (slice(2, 2),)}), (S(()), {"key": ()})],
)  # fmt: skip
take: Primitive = primitive(
    "index", lambda backend, input, *, key: backend.read_at(input, key),
    vjp={"input": lambda g, input_shape, key: scatter_back(g, shape=input_shape, key=key, basic=False)},
    jvp=linear, doc="An advanced index: integer or bool arrays, a copy.", batch=index_batching.take,
    samples=[(S((3, 4)), {"key": (Array([2, 0, 2]),)}), (S((3, 4)), {"key": (slice(None), Array([[0, 1], [-1, 0]]))}),
             (S((3, 4)), {"key": (Array([0, 1]), Array([3, 3]))}), (S((3,)), {"key": (Array([True, False, True]),)})],
)  # fmt: skip


def getitem(self: Tensor, key: Any) -> Tensor:
    """self[key]: a view for ints and slices, a copy for integer and bool tensors; NumPy's rules."""
    found, basic = _array_key(key, self)
    _check_bounds(self, found)
    try:
        return slice_(self, key=found) if basic else take(self, key=found)
    except IndexError as error:
        raise _refused(self, error) from error


def _refused(self: Tensor, error: IndexError) -> IndexError:
    """What an array library says of an index, in the words of one of them."""
    text = str(error)
    if text.startswith("boolean index"):
        text = "a bool index must have the lengths of the dimensions that it selects from"
    return IndexError(f"{text[:1].lower()}{text[1:]} (the tensor has shape {tuple(self.shape)})")


def _check_bounds(self: Tensor, key: tuple) -> None:
    """Index arrays are checked before they are used (on CUDA, CuPy would wrap them around silently)."""
    if all(not hasattr(k, "dtype") or k.dtype.kind == "b" for k in key):
        return
    consumed = sum(getattr(k, "ndim", 1) if getattr(k, "dtype", None) is not None and k.dtype.kind == "b" else 1
                   for k in key if k is not None and k is not Ellipsis)  # fmt: skip
    axis = 0
    for k in key:
        if k is None:
            continue
        if k is Ellipsis:
            axis += self._data.ndim - consumed
            continue
        if hasattr(k, "dtype") and k.dtype.kind in "iu" and axis < self._data.ndim:
            array = whole(k) if isinstance(k, Tensor) else k
            self._device.backend.check_index(array, self._data.shape[axis], "index")
        axis += k.ndim if hasattr(k, "dtype") and k.dtype.kind == "b" else 1


def _write(backend: Any, input: Any, value: Any, *, key: Any) -> Any:
    out = backend.copy(input)
    out[key] = value
    return out


def _zero_at(g: Any, key: Any) -> Any:
    if isinstance(g, Tensor):
        return index_put_(g, g.new_zeros(()), key=key, basic=False)
    out = g.copy()
    out[key] = 0
    return out


def _value_rule(g: Any, value_shape: Any, key: Any, basic: bool) -> Any:
    picked = (slice_ if basic else take)(g, key=key)
    return sum_to_size(picked, value_shape)


# input with value at an index; recorded for assignments.
index_put_ = primitive(
    "index_put",
    lambda backend, input, value, *, key, basic: _write(backend, input, value, key=key),
    vjp={"input": lambda g, key: _zero_at(g, key), "value": _value_rule},
    jvp={
        "input": lambda t, key: _zero_at(t, key),
        "value": lambda t, input_shape, key, basic: scatter_back(
            _fit(t, key, input_shape), shape=input_shape, key=key, basic=basic
        ),
    },
    samples=[
        (S((3, 4)), S((4,)), {"key": (1,), "basic": True}),
        (S((3, 4)), S(()), {"key": (slice(1, 3),), "basic": True}),
        (S((3, 4)), S((2, 1)), {"key": (Array([2, 0]),), "basic": False}),
        (S((3, 4)), 0.5, {"key": (Array([2, 0]), Array([1, 1])), "basic": False}),
    ],
    doc="The input with a value written at an index.",
    batch=index_batching.index_put,
)


def _fit(t: Tensor, key: Any, shape: Any) -> Tensor:
    picked = np.empty(shape, np.int8)[_host_key(key)]
    return t.expand(picked.shape)


def _host_key(key: Any) -> Any:
    return tuple(k.get() if hasattr(k, "get") else k for k in key)


def setitem(self: Tensor, key: Any, value: Any) -> None:
    """self[key] = value, in place, recorded on the tape; value broadcasts to the place."""
    found, basic = _array_key(key, self)
    _check_bounds(self, found)
    if not isinstance(value, (Tensor, *NUMBERS)):
        value = wrap(self._device.backend.asarray(np.asarray(value, self._data.dtype)), self._device)
    check_devices("assignment", (self, value), ("tensor", "value"))
    try:
        shape = self._data[found].shape if basic else None
    except IndexError as error:
        raise _refused(self, error) from error
    if isinstance(value, Tensor):
        if basic and value._data.ndim > len(shape):  # type: ignore[arg-type]
            value = value.reshape(value._data.shape[value._data.ndim - len(shape) :])  # type: ignore[arg-type]
        value = value.to(self._data.dtype)
    if Interpreters.active:
        result = Interpreters.apply(index_put_, (self, value), {"key": found, "basic": basic})
        if result is not NotImplemented:
            Interpreters.write("setitem", self, result)
            return
    grad_wanted = self._requires_grad or (isinstance(value, Tensor) and value._requires_grad)
    recording = state.enabled and grad_wanted
    check_in_place("setitem", self, self._data.dtype, self._data.shape, recording)
    data = writable("setitem", self)
    array = value._data if isinstance(value, Tensor) else value
    if isinstance(value, Tensor) and value._cell is self._cell:
        array = self._device.backend.copy(array)
    try:
        self._device.backend.inside(data.__setitem__, found, array)
    except ValueError as error:
        given = tuple(value.shape) if isinstance(value, Tensor) else value
        place = tuple(self._data[found].shape)
        raise ShapeError(f"A value of shape {given} does not fit the indexed place of a {tuple(self.shape)} tensor, "
                         f"which has shape {place}.") from error  # fmt: skip
    self._cell[0] += 1
    if recording:
        before = wrap(data, self._device)
        before._node, before._requires_grad, before._cell = self._node, self._requires_grad, self._cell
        operand = value if isinstance(value, Tensor) else None
        wanted = tuple(i for i, x in enumerate((before, operand)) if x is not None and x._requires_grad)
        params = {"key": found, "basic": basic}
        index_put_._record((before, operand), (data, None if operand is None else array), self, wanted, params)
        moved(self)


Tensor.__getitem__ = getitem  # type: ignore[method-assign]
Tensor.__setitem__ = setitem  # type: ignore[method-assign]


@function
def index_select(input: Any, dim: int, index: Tensor) -> Any:
    """The entries `index` (1-d, integers) along `dim`."""
    at = axis_of("index_select", dim, input.ndim)
    return input[(slice(None),) * at + (index,)]


@function
def masked_fill(input: Any, mask: Tensor, value: Any) -> Any:
    """input, but value where mask (bool) holds."""
    from gpuad.ops.arithmetic import where

    return where(mask, value, input)


@function
def masked_select(input: Any, mask: Tensor) -> Any:
    """The elements where mask holds, one-dimensional; waits for the device to know how many."""
    return input.expand(np.broadcast_shapes(tuple(input.shape), tuple(mask.shape)))[
        mask.expand(np.broadcast_shapes(tuple(input.shape), tuple(mask.shape)))
    ]


def _gather_key(backend: Any, index: Any, dim: int) -> tuple:
    grid = backend.xp.ogrid[tuple(slice(n) for n in index.shape)] if index.ndim else []
    key = list(grid)
    key[dim] = index
    return tuple(key)


gather_ = primitive(
    "gather",
    lambda backend, input, *, index, dim: backend.contiguous(
        backend.xp.take_along_axis(input, index, dim)
        if input.shape[:dim] + input.shape[dim + 1 :] == index.shape[:dim] + index.shape[dim + 1 :]
        else input[_gather_key(backend, index, dim)]
    ),
    vjp={"input": lambda g, input_shape, index, dim: scatter_add_(g, shape=input_shape, index=index, dim=dim)},
    jvp=linear,
    samples=[
        (S((3, 2)), {"index": Array([[0, 2], [1, 2]]), "dim": 0}),
        (S((2, 3)), {"index": Array([[0, 0], [2, 1]]), "dim": 1}),
    ],
    doc="Elements picked along a dimension.",
    batch=index_batching.along_dim,
)


def _scatter(backend: Any, input: Any, *, shape: Any, index: Any, dim: int) -> Any:
    out = backend.full(shape, 0, input.dtype)
    backend.add_at(out, _gather_key(backend, index, dim), input)
    return out


scatter_add_: Primitive = primitive(
    "gather_transpose",
    _scatter,
    vjp={"input": lambda g, index, dim: gather_(g, index=index, dim=dim)},
    jvp=linear,
    samples=[
        (S((2, 2)), {"shape": (3, 2), "index": Array([[0, 2], [0, 1]]), "dim": 0}),
        (S((2, 2)), {"shape": (2, 3), "index": Array([[0, 0], [2, 1]]), "dim": 1}),
    ],
    doc="Zeros with elements added along a dimension.",
    batch=index_batching.along_dim,
)


@function
def gather(input: Any, dim: int, index: Tensor) -> Any:
    """out[i][j] = input[index[i][j]][j] for dim 0, and so on; index (int64) has as many dimensions as input."""
    if index.ndim != input.ndim:
        raise ShapeError(f"gather() needs an index with {input.ndim} dimensions, got {index.ndim}.")
    check_devices("gather", (input, index), ("input", "index"))
    at = axis_of("gather", dim, input.ndim)
    input._device.backend.check_index(whole(index), input._data.shape[at], "gather index")
    return gather_(input, index=as_index(index), dim=at)


@function
def scatter_add(input: Any, dim: int, index: Tensor, src: Any) -> Any:
    """input with src added at index along `dim`; repeated places add up."""
    at = axis_of("scatter_add", dim, input.ndim)
    input._device.backend.check_index(whole(index), input._data.shape[at], "scatter index")
    if src._data.shape != index._data.shape:
        src = src[tuple(slice(n) for n in index.shape)]
    return input + scatter_add_(src, shape=input._data.shape, index=as_index(index), dim=at)


@function
def scatter(input: Any, dim: int, index: Tensor, src: Any) -> Any:
    """input with src (a tensor or number) written at index along `dim`."""
    at = axis_of("scatter", dim, input.ndim)
    input._device.backend.check_index(whole(index), input._data.shape[at], "scatter index")
    if isinstance(src, Tensor):
        src = src[tuple(slice(n) for n in index.shape)]
    else:
        src = input.new_full((), src)
    key = _gather_key(input._device.backend, as_index(index), at)
    return index_put_(input, src, key=key, basic=False)


@function
def nonzero(input: Any, as_tuple: bool = False) -> Any:
    """The indices of nonzero elements, (n, ndim) int64; waits for the device to know how many."""
    backend = input._device.backend
    found = [wrap(backend.xp.asarray(i, dtype=np.int64), input._device) for i in backend.xp.nonzero(input._data)]
    if as_tuple:
        return tuple(found)
    from gpuad.ops.shape import stack

    return stack(found, 1) if found else input.new_zeros((0, 0), dtype="int64")


def _argsort(backend: Any, input: Any, *, dim: int, descending: bool) -> Any:
    xp = backend.xp
    input = backend.cast(input, float32) if input.dtype.char in HALF else input  # CuPy does not sort bfloat16
    if descending:
        order = xp.argsort(xp.flip(input, dim), axis=dim, kind="stable")
        found = xp.flip(xp.subtract(input.shape[dim] - 1, order), dim)
    else:
        found = xp.argsort(input, axis=dim, kind="stable")
    return backend.contiguous(backend.cast(found, np.dtype(np.int64)))


argsort_ = primitive(
    "argsort", _argsort, doc="The order that sorts a dimension.", batch=shift,
    samples=[(S((3, 4)), {"dim": 0, "descending": False}), (S((2, 3, 4)), {"dim": 1, "descending": True})],
)  # fmt: skip


@function
def argsort(input: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    """The order that sorts `dim`, int64; always stable."""
    at = axis_of("argsort", dim, input.ndim)
    if not input.ndim:
        return input.new_zeros((), dtype="int64")
    return argsort_(input, dim=at, descending=descending)


@function
def sort(input: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    """(values, indices) sorted along `dim`."""
    order = argsort(input, dim, descending)
    if not input.ndim:
        return Extreme((input, order))
    return Extreme((gather(input, dim, order), order))


@function
def topk(input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """(values, indices) of the k largest (or smallest) entries along `dim`."""
    at = axis_of("topk", dim, input.ndim)
    if input.ndim and not 0 <= k <= input.shape[at]:
        raise ShapeError(f"topk() of {k} entries, but dimension {dim} has length {input.shape[at]}.")
    order = argsort(input, at, descending=largest)
    order = order.narrow(at, 0, k) if input.ndim else order
    return Extreme((gather(input, at, order) if input.ndim else input, order))


@function(nn=True)
def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """For each class index a row of zeros with a one at that class, int64; −1 takes the largest index + 1."""
    n = int(tensor.max().item()) + 1 if num_classes < 0 else num_classes
    backend = tensor._device.backend
    backend.check_index(whole(tensor), n, "class index", wrap_negative=False)
    return (tensor.unsqueeze(-1) == wrap(backend.xp.arange(n), tensor._device)).long()


embedding_ = primitive(
    "embedding",
    lambda backend, weight, *, index, padding: backend.read_at(weight, (index,)),
    vjp={"weight": lambda g, weight_shape, index, padding: _rows_back(g, weight_shape, index, padding)},
    jvp={"weight": lambda t, index, padding: take(t, key=(index,))},
    samples=[(S((4, 3)), {"index": Array([[0, 2], [2, 1]]), "padding": None})],
    doc="Rows of a matrix picked by their numbers.",
    batch=index_batching.embedding,
)


def _rows_back(g: Any, shape: Any, index: Any, padding: int | None) -> Any:
    if padding is not None:
        counted = (index != padding)[..., None]
        g = g * (wrap(counted).to(g.dtype) if isinstance(g, Tensor) else counted.astype(g.dtype))
    return scatter_back(g, shape=shape, key=(index,), basic=False)


@function(nn=True)
def embedding(input: Tensor, weight: Any, padding_idx: int | None = None) -> Any:
    """The rows of weight (n, d) that the integers in input (*) name: (*, d).

    Rows named several times add up their gradients; the row padding_idx gets none. Errors: IndexError for a number
    outside [0, n).
    """
    check_devices("embedding", (input, weight), ("input", "weight"))
    if input._data.dtype.kind not in "iu":
        raise DtypeError(f"embedding() takes integers, got {input.dtype}; convert them first: input.long().")
    rows = weight._data.shape[0]
    weight._device.backend.check_index(whole(input), rows, "embedding index", wrap_negative=False)
    padding = padding_idx + rows if padding_idx is not None and padding_idx < 0 else padding_idx
    return embedding_(weight, index=as_index(input), padding=padding)
