"""Reduced operations: a formula with a sum or mean behind it, as losses are. One launch forward, one backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.modes import state
from gpuad.autograd.node import Node
from gpuad.autograd.op import Interpreters, as_operand, broadcast_error, check_devices, promoted_dtype
from gpuad.kernels.expr import variable
from gpuad.kernels.formula import Formula, trace
from gpuad.tensor import Tensor, wrap


class Reduced(Elementwise):
    """Σ term / total over all elements (rows) of a formula.

    The formula's outputs are the term, with `weighted` the weight of each row, and hidden ones. total: 1 for the sum,
    the number of terms for the mean, the sum of the weights for a weighted mean. Returns a 0-d tensor.
    """

    keeps_output = False  # the output is the sum, not the term

    def __init__(
        self,
        name: str,
        term: Callable,
        samples: Sequence[Any] = (),
        doc: str = "",
        rows: Sequence[str] = (),
        labels: Sequence[str] = (),
        scalars: Sequence[str] = (),
        weighted: bool = False,
    ) -> None:
        self.term = trace(term, name, rows, labels, scalars)
        self.weighted = weighted
        # The formula that is differentiated: term · scale (or term / total), with what is kept.
        scale = variable("scale", "number", "scalar")
        first = self.term.outputs[0] / scale if weighted else self.term.outputs[0] * scale
        kept = self.term.outputs[2 if weighted else 1 :]
        levels = [self.term.levels[0], *self.term.levels[len(self.term.outputs) - len(kept) :]]
        scaled = Formula(name, [*self.term.inputs, scale], [first, *kept], levels)
        super().__init__(name, scaled, samples, doc, hidden=len(kept))

    def __call__(self, *inputs: Any, mean: bool = True) -> Any:
        inputs = tuple([as_operand(self.name, x) for x in inputs])
        if Interpreters.active:
            result = Interpreters.apply(self, inputs, {"mean": mean})
            if result is not NotImplemented:
                return result
        device = check_devices(self.name, inputs, self.names)
        backend = device.backend
        arrays = [x._data if isinstance(x, Tensor) else x for x in inputs]
        dtype = promoted_dtype([arrays[i] for i in self.term.promoted], self.term.needs_float)
        if self.term.is_row:
            shape = next(a.shape for a, v in zip(arrays, self.term.inputs, strict=True) if v.level == "element")[:1]
            results = backend.elementwise_mixed(self.term, arrays, dtype)
            results = results if len(self.term.outputs) > 1 else [results]
            out, scale = self._total(backend, results, mean, shape[0])
        else:
            try:
                shape = np.broadcast_shapes(*[x._data.shape for x in inputs if isinstance(x, Tensor)])
            except ValueError as error:
                raise broadcast_error(self.name, inputs, self.names) from error
            scale = _scale(mean, math.prod(shape))
            out = backend.reduce(self.term, arrays, dtype, tuple(range(len(shape))), False, scale)
            results = [None]
        made = wrap(out, device)
        if state.enabled and any([isinstance(x, Tensor) and x._requires_grad for x in inputs]):
            kept = results[2 if self.weighted else 1 :]
            full = wrap(backend.xp.broadcast_to(out, shape), device)  # what the formula's output would look like
            self._record((*inputs, scale), (*arrays, scale), [full], dtype, device, [None, *kept])
            node = full._node
            assert node is not None
            node.info = (*node.info, shape)
            made._node, made._requires_grad = node, True
        return made

    def _total(self, backend: Any, results: Sequence[Any], mean: bool, rows: int) -> tuple[Any, Any]:
        if not self.weighted or not mean:
            scale = 1.0 if self.weighted else _scale(mean, rows)
            return backend.sum(results[0], (0,), False, None, scale), scale
        both = backend.weighted_mean(results[0], results[1])
        return both[0], both[1]

    def backward(self, node: Node, gradient: Any, into: Callable) -> list[Any]:
        full = node.device.backend.xp.broadcast_to(gradient, node.info[2])
        return super().backward(node, full, into)

    def backward_recorded(self, node: Node, gradient: Any, into: Callable) -> list[Any]:
        return super().backward_recorded(node, gradient.expand(node.info[2]), into)

    def tangent(self, inputs: Sequence[Any], tangents: Sequence[Any], params: dict) -> tuple[Any, Any]:
        value = self(*inputs, **params)
        moving = tuple([i for i, t in enumerate(tangents) if t is not None])
        op = self._tangent_ops.get(moving)
        if op is None:
            full = self.formula.jvp(moving).formula
            count = len(self.formula.outputs)
            op = Elementwise(f"{self.name}_jvp", full.of(full.outputs[count : count + 1], full.levels[:1]), register=False)
            self._tangent_ops[moving] = op
        scale: Any = 1.0
        if params["mean"]:
            if self.weighted:
                weights = Elementwise(f"{self.name}_weight", self.term.of(self.term.outputs[1:2], ["row"]), register=False)
                scale = weights(*inputs).sum()
            else:
                scale = 1.0
        derivative = op(*inputs, scale, *[t for t in tangents if t is not None])
        if params["mean"] and not self.weighted:
            return value, derivative.mean()
        return value, derivative.sum()


def _scale(mean: bool, count: int) -> float:
    return 1.0 if not mean else 1.0 / count if count else math.nan

