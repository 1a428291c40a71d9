"""How the gradients of a formula are computed for some wanted inputs: prepared once, run in every backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpuad.autograd.node import WRITTEN, Node
from gpuad.kernels.formula import Derivative
from gpuad.tensor import Tensor

if TYPE_CHECKING:
    from gpuad.autograd.elementwise import Elementwise


class Plan:
    """How the gradients of the wanted inputs are computed: prepared once for each set of wanted inputs.

    inputs, outputs: which of the op's inputs and outputs are saved. passed: wanted inputs whose gradient is the
    incoming one itself. formula: the others together, as a formula of (gradients, saved…); None where there are none.
    recorded: what is run and recorded in their place when derivatives are differentiated, as an op once that happens.
    """

    __slots__ = ("wanted", "inputs", "outputs", "visible_outputs", "passed", "computed", "formula", "single",
                 "recorded", "recorded_op")  # fmt: skip

    def __init__(self, op: Elementwise, wanted: tuple[int, ...]) -> None:
        derivative: Derivative = op.formula.vjp(wanted, op.visible, op.keeps_output)
        full = derivative.formula
        cotangents = full.inputs[: op.visible]
        self.wanted = wanted
        self.inputs, self.outputs = derivative.inputs, derivative.outputs
        results = dict(zip(wanted, full.outputs, strict=True))
        levels = {i: op.formula.inputs[i].level for i in wanted}
        self.passed = frozenset(
            i for i, r in results.items() if r is cotangents[0] and levels[i] == op.formula.levels[0]
        )
        self.computed = tuple(i for i in wanted if i not in self.passed)
        self.formula = full.of([results[i] for i in self.computed], [levels[i] for i in self.computed])
        # One formula for each gradient that is summed: a sum behind a formula is one launch.
        alone = () if op.formula.is_row else wanted
        self.single: dict[int, Any] = {i: full.of([results[i]], name=f"{full.name}_{i}") for i in alone}
        # What is recorded has hidden outputs written out, as the functions of the inputs that they are.
        self.recorded = derivative.recorded.of([
            r for i, r in zip(wanted, derivative.recorded.outputs, strict=True) if i in self.computed
        ], [levels[i] for i in self.computed])  # fmt: skip
        self.visible_outputs = tuple(i for i in self.outputs if i < op.visible)
        self.recorded_op: Elementwise | None = None

    def broadcast(self, node: Node, gradients: Sequence[Any], layout: Any, saved: Any, walk: Any) -> list[Any]:
        """The gradients of operands that may be broadcast or of other dtypes, summed to their shapes.

        layout: the shape and dtype of each wanted operand; None where all are those of the gradient.
        """
        backend = node.device.backend
        shape, dtype = gradients[0].shape, gradients[0].dtype
        arguments = (*gradients, *saved)
        result: list[Any] = [None] * len(node.parents)
        whole = []
        for i in self.wanted:
            own = shape if layout is None else layout[i][0]
            if own == shape:
                if i in self.passed:
                    result[i] = gradients[0]
                else:
                    whole.append(i)
                continue
            axes = broadcast_axes(own, shape)
            if i in self.passed:
                leaf = node.parents[i]
                target = None
                if isinstance(leaf, Tensor) and len(own) + len(axes) == len(shape):
                    target = walk.into(leaf)
                if target is None:
                    result[i] = backend.sum(gradients[0], axes).reshape(own)
                elif target[1] == 0.0:
                    backend.sum(gradients[0], axes, False, target[0])
                    result[i] = WRITTEN
                else:
                    backend.add_into(target[0], backend.sum(gradients[0], axes))
                    result[i] = WRITTEN
            else:
                formula = self.single[i]
                cast = backend.cast_operands(formula, arguments, dtype)
                result[i] = backend.reduce(formula, cast, dtype, axes, True).reshape(own)
        if whole:
            formula = self.formula if len(whole) == len(self.computed) else None
            if formula is None:
                for i in whole:
                    result[i] = backend.elementwise_mixed(self.single[i], arguments, dtype)
            else:
                values = backend.elementwise_mixed(formula, arguments, dtype)
                for i, value in zip(whole, [values] if len(whole) == 1 else values, strict=True):
                    result[i] = value
        if layout is not None:
            for i in self.wanted:
                if result[i] is not WRITTEN and result[i].dtype != layout[i][1]:
                    result[i] = backend.cast(result[i], layout[i][1])
        return result


def broadcast_axes(own: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of `shape` over which an operand of shape `own` was broadcast."""
    extra = len(shape) - len(own)
    return (*range(extra), *(i + extra for i, n in enumerate(own) if n == 1 and shape[i + extra] != 1))
