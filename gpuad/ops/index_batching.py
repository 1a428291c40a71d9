"""How vmap indexes: where the dimension of the examples goes in a key, and where it comes out again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.autograd.batching import Batch, loop
from gpuad.autograd.levels import Logical, as_index
from gpuad.autograd.op import functions
from gpuad.errors import ShapeError
from gpuad.tensor import Tensor, wrap


def _is_array(k: Any) -> bool:
    return hasattr(k, "dtype") and hasattr(k, "ndim")


class Layout:
    """What an index does to the dimensions of a tensor.

    block: the shape in which the integer and bool arrays of the key (and ints beside them) broadcast. before, rest: how
    many other dimensions the result has before the block, and in all. apart: whether the arrays are separated by other
    entries, so that NumPy puts the block first.
    """

    def __init__(self, key: Sequence[Any], ndim: int) -> None:
        arrays = [k for k in key if _is_array(k)]
        advanced = [i for i, k in enumerate(key) if _is_array(k) or (arrays and isinstance(k, int))]
        self.block = np.broadcast_shapes(*[tuple(k.shape) if k.dtype.kind != "b" else (1,) for k in arrays])
        self.apart = bool(advanced) and advanced[-1] - advanced[0] + 1 != len(advanced)
        consumed = sum(k.ndim if _is_array(k) and k.dtype.kind == "b" else k is not None and k is not Ellipsis
                       for k in key)  # fmt: skip
        missing = ndim - consumed
        widths = [missing if k is Ellipsis else int(k is None or isinstance(k, slice)) for k in key]
        if not any(k is Ellipsis for k in key):
            widths.append(missing)
        self.rest = sum(widths)
        self.before = 0 if self.apart or not advanced else sum(widths[: advanced[0]])

    @property
    def ndim(self) -> int:
        """The dimensions of what the index picks."""
        return len(self.block) + self.rest


def read_slice(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """A basic index: the examples stay in front."""
    return op(batch.front(inputs[0]), **{**params, "key": (slice(None), *params["key"])})


def _of_all(batch: Batch, input: Any, key: Sequence[Any], layout: Layout, shared: bool) -> tuple[Any, tuple]:
    """(input, key) for all examples where the key differs; `shared`: the input may stay one for all.

    The block of what the key picks then has the examples in front.
    """
    depth = len(layout.block)
    parts = []
    for k in key:
        if batch.has(k):
            if k._data.dtype.kind == "b":
                raise ShapeError(
                    "Inside vmap a bool mask cannot be an index: how many elements it picks differs between examples. "
                    "Use gpuad.where(mask, a, b)."
                )
            parts.append(_bare(batch.aligned(k, depth)))
        else:
            parts.append(k)
    if shared and not batch.has(input):
        return input, tuple(parts)
    xp = input._device.backend.xp
    numbers = xp.arange(batch.size).reshape((batch.size, *(1,) * depth))
    return batch.front(input), (numbers, *parts)


def _bare(k: Tensor) -> Any:
    return k if isinstance(k._data, Logical) else k._data


def _moved(x: Any, start: int, count: int, to: int) -> Any:
    """`count` dimensions from `start` on moved to `to`."""
    return x.movedim(tuple(range(start, start + count)), tuple(range(to, to + count))) if count and start != to else x


def take(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """An advanced index, of one input by one key, or by one for each example."""
    (input,), key = inputs, params["key"]
    layout = Layout(key, input._data.ndim)
    depth = len(layout.block)
    if not any(batch.has(k) for k in key):
        out = op(batch.front(input), key=(slice(None), *key))
        return out.movedim(depth, 0) if layout.apart else out
    shared = not batch.has(input)
    given, parts = _of_all(batch, input, key, layout, True)
    out = op(given, key=parts)
    if shared:
        return out if layout.apart else out.movedim(layout.before, 0)
    contiguous = layout.before == 0 and not layout.apart
    return out if contiguous else _moved(out, 1, depth, 1 + layout.before)


def scatter_back(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """Adding at an index: the transpose of reading there."""
    key, shape = params["key"], params["shape"]
    if any(batch.has(k) for k in key):
        return loop(batch, op, inputs, params)
    value = batch.front(inputs[0])
    if not params["basic"]:
        layout = Layout(key, len(shape))
        if layout.apart:
            value = value.movedim(0, len(layout.block))
    return op(value, shape=(batch.size, *shape), key=(slice(None), *key), basic=params["basic"])


def index_put(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """Writing at an index: in a copy for each example."""
    input, value = inputs
    key, basic = params["key"], params["basic"]
    layout = Layout(key, input._data.ndim)
    depth = len(layout.block)
    several = any(batch.has(k) for k in key)
    if several and len(key) == 1 and key[0]._data.dtype.kind == "b" and not getattr(value, "ndim", 0):
        ndim = input._data.ndim
        mask = batch.aligned(key[0], key[0].ndim)
        mask = mask.reshape((*mask._data.shape, *(1,) * (ndim - key[0].ndim)))
        number = batch.aligned(value, ndim)
        return functions["where"](mask, number, batch.front(input))
    if isinstance(value, Tensor):
        if layout.apart and not batch.has(value):
            value = batch.front(value).reshape((batch.size, *(1,) * (layout.ndim - value.ndim), *value._data.shape))
        else:
            value = batch.aligned(value, layout.ndim)
    lone = not isinstance(value, Tensor) or value._data.ndim <= layout.ndim  # one value for all examples
    if not several:
        if not lone and layout.apart:
            value = value.movedim(0, depth)
        return op(batch.front(input), value, key=(slice(None), *key), basic=basic)
    given, parts = _of_all(batch, input, key, layout, False)
    if isinstance(value, Tensor) and layout.before:
        if lone:
            value = value.expand((batch.size, *(1,) * (layout.ndim - value.ndim), *value._data.shape))
        value = _moved(value, 1 + layout.before, depth, 1)
    return op(given, value, key=parts, basic=False)


def along_dim(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """gather and its transpose: an index for each example beside the inputs of each."""
    index = params["index"]
    if batch.has(index):
        index = as_index(index.value)
    else:
        front = (batch.size, *index.shape)
        index = index.expand(front) if isinstance(index, Tensor) else _broadcast(inputs[0], index, front)
    moved = {**params, "index": index, "dim": params["dim"] + 1}
    if "shape" in params:
        moved["shape"] = (batch.size, *params["shape"])
    return op(*[batch.front(x) for x in inputs], **moved)


def _broadcast(like: Tensor, index: Any, shape: tuple[int, ...]) -> Any:
    return like._device.backend.xp.broadcast_to(index, shape)


def embedding(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """Rows of one table, or of a table for each example: these are stacked, and the rows counted through."""
    (weight,), index = inputs, params["index"]
    if not batch.has(weight):
        return op(weight, index=as_index(index.value), padding=params["padding"])
    if params["padding"] is not None:
        return loop(batch, op, inputs, params)
    rows = weight._data.shape[0]
    index = index.value if batch.has(index) else index
    ndim = index.ndim if batch.has(params["index"]) else index.ndim + 1
    first = functions["arange"](batch.size, device=weight._device).reshape((batch.size, *(1,) * (ndim - 1))) * rows
    counted = first + (index if isinstance(index, Tensor) else wrap(index, weight._device))
    table = weight.value.reshape((batch.size * rows, math.prod(weight._data.shape[1:])))
    return op(table, index=as_index(counted), padding=None)
