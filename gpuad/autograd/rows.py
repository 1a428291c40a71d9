"""Operations on rows (softmax, layer norm): declared by a row formula, as elementwise operations are by theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.array.device import Device
from gpuad.autograd import batching
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.node import Node
from gpuad.autograd.op import describe, floating_dtype
from gpuad.errors import ShapeError
from gpuad.kernels.formula import Formula


class RowOp(Elementwise):
    """An operation on the rows of tensors, derived from its row formula: one launch, and one for all gradients.

    axes: which dimensions of the elements make up a row, ascending; the last one unless given. All elements have one
    shape. What has one value a row has that of the other dimensions, what has one value a column that of a row. Nothing
    broadcasts; results are in C order.
    """

    def __init__(self, name: str, formula: Formula, *arguments: Any, **named: Any) -> None:
        super().__init__(name, formula, *arguments, **named)
        self._quick = False
        formula.statistics = frozenset(range(self.visible, len(formula.outputs)))
        self.input_levels = [v.level for v in formula.inputs]
        self.first = self.input_levels.index("element")
        self._shaped = [i for i, level in enumerate(self.input_levels) if level != "scalar" and i != self.first]

    def derived(self, name: str, formula: Formula) -> RowOp:
        return RowOp(name, formula, register=False)

    def __call__(self, *inputs: Any, axes: tuple[int, ...] | None = None, **named: Any) -> Any:
        if named or len(inputs) != self.arity:
            inputs = self._bind(inputs, named)
        return self._general(inputs, {"axes": (inputs[self.first].ndim - 1,) if axes is None else axes})

    def _compute(
        self, device: Device, inputs: Sequence[Any], arrays: Sequence[Any], axes: tuple[int, ...] = ()
    ) -> tuple[list, np.dtype]:
        formula = self.formula
        dtype = floating_dtype(self.name, [arrays[i] for i in formula.promoted])
        self._check_shapes(inputs, arrays, axes)
        return device.backend.rows(formula, arrays, dtype, axes), dtype

    def _check_shapes(self, inputs: Sequence[Any], arrays: Sequence[Any], axes: tuple[int, ...]) -> None:
        shape = arrays[self.first].shape
        for i in self._shaped:
            level = self.input_levels[i]
            wanted = shape if level == "element" else tuple([n for k, n in enumerate(shape)
                                                             if (k in axes) == (level == "column")])  # fmt: skip
            if arrays[i].shape != wanted:
                raise ShapeError(f"{self.name} takes {self.names[i]} of shape {wanted}, got {describe(inputs[i])}.")

    def _alike(self, layout: Any, plan: Any, arrays: Sequence[Any], out: Any, device: Device) -> bool:
        return all([e is None or e[1] == out.dtype for e in layout])

    def _params(self, node: Node) -> dict:
        return {"axes": node.info[3]}

    def backward(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        plan, layout = node.info[0], node.info[1]
        backend = node.device.backend
        gradients = self._fill(node, gradient, backend) if self.several else (gradient,)
        result: list[Any] = [gradients[0] if i in plan.passed else None for i in range(self.arity)]
        if plan.formula is not None:
            arguments = (*gradients, *node.check())
            values = backend.rows(plan.formula, arguments, gradients[0].dtype, node.info[3])
            for i, value in zip(plan.computed, values, strict=True):
                result[i] = value
        if layout is not None:
            for i in plan.wanted:
                result[i] = backend.cast(result[i], layout[i][1])
        return result

    def batch(self, batch: batching.Batch, inputs: Sequence[Any], params: dict) -> Any:
        return batching.rows(batch, self, inputs, params)
