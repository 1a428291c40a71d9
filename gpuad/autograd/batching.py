"""Batching rules: how an operation on one example becomes one operation on many, for vmap.

A rule is called as `rule(batch, op, inputs, params)`; of the inputs, `batch.has(x)` says which stand for many examples.
It returns the output(s) with the examples along the first dimension. An op declares its rule as `batch=`; most are
`shift`. What has none is looped over, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from gpuad.autograd.levels import Batched
from gpuad.autograd.op import Op, functions, promoted_dtype
from gpuad.tensor import Tensor

Rule = Callable[["Batch", Any, Sequence[Any], dict], Any]


class Batch:
    """The examples of one level of vmap, as a rule sees them."""

    def __init__(self, op: Op, level: int, size: int) -> None:
        self.op, self.level, self.size = op, level, size

    def has(self, x: Any) -> bool:
        """Whether x stands for many examples."""
        return isinstance(x, Batched) and x.level == self.level

    def front(self, x: Any) -> Any:
        """All examples along the first dimension, repeated where they share x; numbers and None as they are."""
        if self.has(x):
            return x.value
        return x.expand((self.size, *x._data.shape)) if isinstance(x, Tensor) else x

    def aligned(self, x: Any, ndim: int) -> Any:
        """All examples of x with `ndim` dimensions each, so that they broadcast; what they share as it is."""
        if not self.has(x):
            return x
        value = x.value
        missing = ndim - x._data.ndim
        if missing <= 0:
            return value
        return value.reshape((self.size, *(1,) * missing, *x._data.shape))

    def example(self, x: Any, i: int) -> Any:
        """Example i of x; of a tuple, that of each part."""
        if type(x) is tuple:
            return tuple(self.example(part, i) for part in x)
        return x.value[i] if self.has(x) else x


def shift(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """The rule of most operations: dimensions count one more, shapes get the number of examples in front.

    Parameters called dim, dims or axes hold dimensions counted from the front; `shape` holds a shape. Others are as
    they were.
    """
    moved = dict(params)
    for name, value in params.items():
        if name in ("dims", "axes"):
            moved[name] = tuple(d + 1 for d in value)
        elif name == "dim":
            moved[name] = value + 1
        elif name == "shape":
            moved[name] = (batch.size, *value)
    return op(*[batch.front(x) for x in inputs], **moved)


def loop(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """One example after the other: right for every operation, and slow."""
    outputs = []
    for i in range(batch.size):
        given = {name: batch.example(value, i) for name, value in params.items()}
        outputs.append(op(*[batch.example(x, i) for x in inputs], **given))
    if outputs and isinstance(outputs[0], tuple):
        return tuple(functions["stack"](each) for each in zip(*outputs, strict=True))
    return functions["stack"](outputs)


_warned: set[str] = set()


def without_rule(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """The loop, with a warning the first time."""
    if op.name not in _warned:
        _warned.add(op.name)
        warnings.warn(
            f"vmap has no batching rule for {op.name} and loops over the {batch.size} examples, which is slow. Give "
            "the operation a batch= where it is declared, or a Function a static method vmap.",
            stacklevel=2,
        )
    return loop(batch, op, inputs, params)


def elementwise(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """A formula: the examples' dimensions are aligned at the last one, and the formula is that of all elements."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ndim = max(x._data.ndim for x in tensors)
    aligned = [batch.aligned(x, ndim) for x in inputs]
    promoted = op.formula.promoted
    if len({inputs[i]._data.dtype for i in promoted if isinstance(inputs[i], Tensor)}) > 1:
        # A 0-d operand of one example does not widen the dtype of the others; that of many has a dimension, and would.
        dtype = promoted_dtype([inputs[i] for i in promoted], op.formula.needs_float)
        for i in promoted:
            if batch.has(inputs[i]) and not inputs[i]._data.ndim:
                aligned[i] = aligned[i].to(dtype)
    return op(*aligned)


def rows(batch: Batch, op: Any, inputs: Sequence[Any], params: dict) -> Any:
    """A formula of rows: the rows of all examples."""
    shared = [level in ("column", "scalar") for level in op.input_levels]
    levels = op.formula.levels[: op.visible]
    if "scalar" in levels or any(batch.has(x) for x, alike in zip(inputs, shared, strict=True) if alike):
        return loop(batch, op, inputs, params)
    axes = params["axes"]
    front = [x if alike else batch.front(x) for x, alike in zip(inputs, shared, strict=True)]
    moved = {**params, "axes": tuple([i + 1 for i in axes])}
    if "column" not in levels:
        return op(*front, **moved)
    # Each example has sums over rows of its own, which are taken behind the formula.
    full = op.formula.of(op.formula.outputs[: op.visible], ["element" if v == "column" else v for v in levels])
    results = op.derived(op.name, full)(*front, **moved)
    ndim = inputs[op.first]._data.ndim
    others = [i + 1 for i in range(ndim) if i not in axes]
    summed = [
        r.sum(others) if level == "column" else r
        for r, level in zip(results if op.several else (results,), levels, strict=True)
    ]
    return tuple(summed) if op.several else summed[0]
