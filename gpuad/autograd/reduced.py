"""Reduced operations: a formula with a sum or mean behind it, as losses are. One launch forward, one backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuad.array.dtypes import FLOATING
from gpuad.autograd.batching import Batch
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.modes import state
from gpuad.autograd.node import Node
from gpuad.autograd.op import NUMBERS, Interpreters, as_operand, broadcast_error, check_devices, floating_dtype
from gpuad.kernels.expr import variable
from gpuad.kernels.formula import Formula, trace
from gpuad.tensor import Tensor, wrap


class Reduced(Elementwise):
    """Σ term / total over all elements of a formula, a 0-d tensor; under autocast in float32, as all losses are.

    total: 1 for the sum, the number of terms for the mean. The sum over rows is in row_total.py.
    """

    keeps_output = False  # the output is the sum, not the term

    def __init__(self, name: str, term: Callable, samples: Sequence[Any] = (), doc: str = "") -> None:
        self.term = trace(term, name)
        # The formula that is differentiated.
        scale = variable("scale", "number", "scalar")
        scaled = Formula(name, [*self.term.inputs, scale], [self.term.outputs[0] * scale], self.term.levels)
        super().__init__(name, scaled, samples, doc, autocast="float32")
        self._promoted = frozenset(self.term.promoted)

    def __call__(self, *inputs: Any, mean: bool = True) -> Any:
        device: Any = None
        shape: Any = None
        dtype: Any = None
        arrays: Any = []
        wanted: tuple[int, ...] = ()
        alike = True  # whether all tensors have one device, and the numbers among them one shape and floating dtype
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor):
                data = x._data
                arrays.append(data)
                if device is None:
                    device, shape, dtype = x._device, data.shape, data.dtype
                elif x._device is not device or (
                    i in self._promoted and (data.shape != shape or data.dtype is not dtype)
                ):
                    alike = False
                if x._requires_grad:
                    wanted = (*wanted, i)
            else:
                arrays.append(x)
                alike = alike and isinstance(x, NUMBERS)
        if Interpreters.active:
            inputs = tuple([as_operand(self.name, x) for x in inputs])
            result = Interpreters.apply(self, inputs, {"mean": mean})
            if result is not NotImplemented:
                return result
        term = self.term
        layout: Any = None
        if not alike or dtype.char not in FLOATING:
            inputs = tuple([as_operand(self.name, x) for x in inputs])
            device = check_devices(self.name, inputs, self.names)
            arrays = [x._data if isinstance(x, Tensor) else x for x in inputs]
            dtype = floating_dtype(term.name, [arrays[i] for i in term.promoted])
            shape, layout = self._shapes(inputs, dtype)
        backend = device.backend
        scale = scale_of(mean, math.prod(shape))
        if layout is not None:
            arrays = backend.cast_operands(term, arrays, dtype)
        made = wrap(backend.reduce(term, arrays, dtype, tuple(range(len(shape))), False, scale), device)
        if wanted and state.enabled:
            self._record_sum(inputs, arrays, wanted, scale, layout, shape, made)
        return made

    def _shapes(self, inputs: Sequence[Any], dtype: np.dtype) -> tuple[tuple[int, ...], Any]:
        """The broadcast shape of the terms, and the shape and dtype of each input where they differ from it."""
        tensors = [x._data for x in inputs if isinstance(x, Tensor)]
        shape = tensors[0].shape
        if all([t.shape == shape and t.dtype == dtype for t in tensors]):
            return shape, None
        try:
            shape = np.broadcast_shapes(*[t.shape for t in tensors])
        except ValueError as error:
            raise broadcast_error(self.name, inputs, self.names) from error
        return shape, [(x._data.shape, x._data.dtype) if isinstance(x, Tensor) else None for x in inputs]

    def _record_sum(
        self, inputs: Sequence[Any], arrays: Sequence[Any], wanted: tuple[int, ...], scale: Any, layout: Any,
        shape: tuple[int, ...], out: Tensor,
    ) -> None:  # fmt: skip
        plan = self.plan(wanted)
        values = (*arrays, scale)
        saved = [values[i] for i in plan.inputs]
        record(self, inputs, saved, wanted, (plan, layout, None, shape), out)

    def backward(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        if node.info[1] is None:
            return super().backward(node, gradient, walk)  # one value for all terms broadcasts by itself
        full = node.device.backend.xp.broadcast_to(gradient, node.info[3])
        return super().backward(node, full, walk)

    def backward_recorded(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        return super().backward_recorded(node, gradient.expand(node.info[3]), walk)

    # Forward mode -----------------------------------------------------------------------------------------------------

    def tangent(self, inputs: Sequence[Any], tangents: Sequence[Any], params: dict) -> tuple[Any, Any]:
        value = self(*inputs, **params)
        derivative = tangent_op(self, tangents)(*inputs, 1.0, *[t for t in tangents if t is not None])
        return value, derivative.mean() if params["mean"] else derivative.sum()

    # vmap -------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def terms(self) -> Elementwise:
        """The terms as an operation of their own."""
        return self.derived(f"{self.name}_terms", self.term)

    def batch(self, batch: Batch, inputs: Sequence[Any], params: dict) -> Any:
        term = self.terms.batch(batch, inputs, {})
        axes = list(range(1, term.ndim))
        return (term.mean(axes) if params["mean"] else term.sum(axes)) if axes else term


def record(
    op: Elementwise, inputs: Sequence[Any], saved: Sequence[Any], wanted: tuple[int, ...], info: tuple, out: Tensor
) -> None:
    """Put the sum `out` of an op on the tape; info: what the node is told, its plan first."""
    given = [inputs[i] for i in info[0].inputs if i < len(inputs)]  # the last input of the formula is the scale
    cells = tuple([x._cell for x in given if isinstance(x, Tensor)])
    parents: list[Any] = [None] * op.arity
    for i in wanted:
        x = inputs[i]
        parents[i] = x if x._node is None else x._node
    version = sum([c[0] for c in cells])
    out._node = Node(op, tuple(parents), tuple(saved), cells, version, info, out._device)
    out._requires_grad = True


def tangent_op(op: Elementwise, tangents: Sequence[Any]) -> Elementwise:
    """The tangents of an op's terms as an operation of the inputs, the scale and the tangents that are there."""
    moving = tuple([i for i, t in enumerate(tangents) if t is not None])
    found = op._tangent_ops.get(moving)
    if found is None:
        full = op.formula.jvp(moving).formula
        count = len(op.formula.outputs)
        tangent: Any = full.of(full.outputs[count : count + 1], full.levels[:1])
        found = op._tangent_ops[moving] = op.derived(f"{op.name}_jvp", tangent)
    return found


def scale_of(mean: bool, count: int) -> float:
    """What a sum is multiplied with."""
    return 1.0 if not mean else 1.0 / count if count else math.nan
