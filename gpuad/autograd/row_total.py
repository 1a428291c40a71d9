"""Sums over the rows of a row formula's terms (cross-entropy): one launch forward, one backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from gpuad.autograd.batching import Batch
from gpuad.autograd.modes import state
from gpuad.autograd.node import Node
from gpuad.autograd.op import Interpreters, as_operand, check_devices, floating_dtype
from gpuad.autograd.reduced import record, scale_of, tangent_op
from gpuad.autograd.rows import RowOp
from gpuad.kernels.expr import variable
from gpuad.kernels.formula import Formula
from gpuad.tensor import Tensor, wrap


class RowTotal(RowOp):
    """Σ term / total over all rows; under autocast in float32, as all losses are. Returns a 0-d tensor.

    term: a row formula, whose outputs are the term, with `weighted` the weight of each row, and hidden ones. total: 1
    for the sum, the number of rows for the mean, the sum of the weights for a weighted mean. What weights depend on is
    taken as constant.
    """

    keeps_output = False  # the output is the sum, not the term

    def __init__(
        self, name: str, term: Formula, samples: Sequence[Any] = (), doc: str = "", weighted: bool = False,
        register: bool = True,
    ) -> None:  # fmt: skip
        self.term, self.weighted = term, weighted
        # The formula that is differentiated: term · scale (or term / total), with what is kept.
        scale = variable("scale", "number", "scalar")
        first = term.outputs[0] / scale if weighted else term.outputs[0] * scale
        self._count = 2 if weighted else 1
        kept = term.outputs[self._count :]
        levels = [term.levels[0], *term.levels[self._count :]]
        scaled = Formula(name, [*term.inputs, scale], [first, *kept], levels)
        super().__init__(name, scaled, samples, doc, register, hidden=len(kept), autocast="float32")
        term.statistics = frozenset(range(self._count, len(term.outputs)))

    def __call__(self, *inputs: Any, mean: bool = True, axes: tuple[int, ...] | None = None) -> Any:  # type: ignore[override]
        inputs = tuple([x if isinstance(x, Tensor) else as_operand(self.name, x) for x in inputs])
        if axes is None:
            axes = (inputs[self.first].ndim - 1,)
        if Interpreters.active:
            result = Interpreters.apply(self, inputs, {"mean": mean, "axes": axes})
            if result is not NotImplemented:
                return result
        device = check_devices(self.name, inputs, self.names)
        arrays = [x._data if isinstance(x, Tensor) else x for x in inputs]
        self._check_shapes((*inputs, 1.0), (*arrays, 1.0), axes)
        term = self.term
        dtype = floating_dtype(term.name, [arrays[i] for i in term.promoted])
        shape = tuple([n for i, n in enumerate(arrays[self.first].shape) if i not in axes])
        scale = scale_of(mean and not self.weighted, math.prod(shape))
        out, weights, kept = device.backend.row_total(term, arrays, dtype, axes, self.weighted, scale, mean)
        made = wrap(out, device)
        wanted = tuple([i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x._requires_grad])
        if wanted and state.enabled:
            values = (*arrays, weights if self.weighted and mean else scale)
            self._record_total(inputs, values, kept, wanted, axes, shape, made)
        return made

    def _record_total(
        self, inputs: Sequence[Any], values: Sequence[Any], kept: Sequence[Any], wanted: tuple[int, ...],
        axes: tuple[int, ...], shape: tuple[int, ...], out: Tensor,
    ) -> None:  # fmt: skip
        plan = self.plan(wanted)
        saved = [values[i] for i in plan.inputs] + [kept[i - 1] for i in plan.outputs]
        dtype = out._data.dtype
        alike = all([inputs[i]._data.dtype is dtype for i in wanted])
        layout = None if alike else [(x._data.shape, x._data.dtype) if isinstance(x, Tensor) else None for x in inputs]
        record(self, inputs, saved, wanted, (plan, layout, None, axes, shape), out)

    # The gradient of the sum is that of each term: one value for all rows, which backward takes as it is.
    def backward_recorded(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        return super().backward_recorded(node, gradient.expand(node.info[4]), walk)

    def tangent(self, inputs: Sequence[Any], tangents: Sequence[Any], params: dict) -> tuple[Any, Any]:
        value = self(*inputs, **params)
        axes = params["axes"]
        derivative = tangent_op(self, tangents)(*inputs, 1.0, *[t for t in tangents if t is not None], axes=axes)
        if not params["mean"]:
            return value, derivative.sum()
        if not self.weighted:
            return value, derivative.mean()
        weights = self.terms(*[x.detach() if isinstance(x, Tensor) else x for x in inputs], axes=axes)[1]
        return value, derivative.sum() / weights.sum()

    @functools.cached_property
    def terms(self) -> RowOp:
        """The terms as an operation of their own: (term, weight) with `weighted`, else the term."""
        return self._alone(range(self._count))

    @functools.cached_property
    def each(self) -> RowOp:
        """The terms without their weights."""
        return self._alone((0,))

    def _alone(self, visible: Sequence[int]) -> RowOp:
        places = (*visible, *range(self._count, len(self.term.outputs)))
        formula: Any = self.term.of([self.term.outputs[i] for i in places], [self.term.levels[i] for i in places])
        hidden = len(places) - len(visible)
        return RowOp(f"{self.name}_terms", formula, register=False, hidden=hidden, autocast="float32")

    def batch(self, batch: Batch, inputs: Sequence[Any], params: dict) -> Any:
        terms = self.terms.batch(batch, inputs, {"axes": params["axes"]})
        term = terms[0] if self.weighted else terms
        rows = list(range(1, term.ndim))  # none where an example is a single row
        if not params["mean"]:
            return term.sum(rows) if rows else term
        if self.weighted:
            return term.sum(rows) / terms[1].sum(rows) if rows else term / terms[1]
        return term.mean(rows) if rows else term
