"""Linear layers whose bias and activation ride in the matrix product, or are one kernel behind it; and backwards.

On the tape nothing changes: a linear layer with an activation is a `linear` node and an activation node, as ever, and
whatever looks at them (hooks, retain_grad, higher derivatives, forward mode) finds what it expects. But the value of
the first is never written out, and a plain backward pass may take a short cut: the product that makes the gradient of
the activation's output, or the one kernel behind it, applies the activation's derivative too, sums what the bias needs,
and the result is handed to the `linear` node directly. Gradients of other uses still come by the activation node; a
derivative is linear, so the parts add up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from gpuad.array.device import of_array
from gpuad.array.dtypes import FLOATING
from gpuad.autograd.batching import Batch
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.modes import state
from gpuad.autograd.node import WRITTEN, Node, watched
from gpuad.autograd.op import Interpreters, Op, describe, function
from gpuad.autograd.primitive import Primitive
from gpuad.errors import DtypeError, ShapeError
from gpuad.kernels.formula import Formula, trace
from gpuad.ops.activations import gelu_tanh, relu
from gpuad.ops.linalg import gemm, mT
from gpuad.ops.samples import S
from gpuad.ops.shape import contiguous
from gpuad.tensor import Tensor, wrap


class EpilogueNode(Node):
    """The node of an activation that was computed with the product before it.

    kept: what its derivative needs where it rides in a product; None where the activation rode in none.
    """

    __slots__ = ("kept",)
    kept: Any

    def free(self) -> None:
        super().free()
        self.kept = None


class LinearOp(Primitive):
    """`linear` with a plain backward pass that passes by the activation before it, where that saves launches."""

    def backward(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        """The gradients of (input, weight, bias)."""
        backend = node.device.backend
        if not backend.fuses_activations:
            if gradient.ndim == 2:
                return super().backward(node, gradient, walk)
            return _like_input(super().backward(node, _matrix(gradient), walk), gradient)
        walk.free_passed(node)
        plan, _ = node.info
        saved = dict(zip(plan.names, node.check(), strict=True))
        x, weight, bias = node.parents
        result: list[Any] = [None, None, None]
        total = walk.sum_of(node, gradient)
        given, gradient = gradient, _matrix(gradient)
        if x is not None:
            result[0] = _input_gradient(backend, gradient, saved["weight"], x, walk, given.shape[:-1])
        if weight is not None:
            into = walk.into(weight) if isinstance(weight, Tensor) else None
            rows = _matrix(saved["x"])
            out, beta = into or (backend.empty((gradient.shape[1], rows.shape[1]), gradient.dtype), 0.0)
            if bias is not None and total is None:
                total = backend.weight_gradient(gradient, rows, out, beta, walk.room(bias))
                weight = None if total is not None else weight
            if weight is not None:
                backend.gemm(gradient.T, rows, out, 1.0, beta)
            result[1] = out if into is None else WRITTEN
        if bias is not None:
            result[2] = self._bias_gradient(gradient, bias, total, walk)
        return _like_input(result, given)

    def backward_recorded(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        return _like_input(super().backward_recorded(node, _matrix(gradient), walk), gradient)

    def tangent(self, inputs: Sequence[Any], tangents: Sequence[Any], params: dict) -> tuple[Any, Any]:
        """ẋ Wᵀ + x Ẇᵀ + ḃ, the last of which rides in a product."""
        (x, weight, _), (x_moves, weight_moves, bias_moves) = inputs, tangents
        out = self(*inputs)
        terms = []
        if weight_moves is not None:
            terms.append(self(x, weight_moves, bias_moves))
        if x_moves is not None:
            terms.append(self(x_moves, weight, None if terms else bias_moves))
        if not terms:
            return out, bias_moves.expand(out._data.shape)
        return out, terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def _bias_gradient(self, gradient: Any, bias: Any, total: Any, walk: Any) -> Any:
        if total is not None:
            if walk.in_room(bias, total):
                return WRITTEN
            if not isinstance(bias, Tensor) or total is not walk.direct.get(bias):  # else written over since
                return total
        into = walk.into(bias) if isinstance(bias, Tensor) else None
        found = _sum_rows(gradient, into)
        return found if into is None else WRITTEN


def _matrix(x: Any) -> Any:
    """All dimensions but the last as one: a view where the layout allows."""
    return x if x.ndim == 2 else x.reshape((math.prod(x.shape[:-1]), x.shape[-1]))


def _like_input(gradients: list[Any], gradient: Any) -> list[Any]:
    """The first of `gradients`, a matrix, with the leading dimensions of the output's gradient."""
    found = gradients[0]
    if gradient.ndim != 2 and found is not None and found is not WRITTEN:
        gradients[0] = found.reshape((*gradient.shape[:-1], found.shape[-1]))
    return gradients


def _input_gradient(backend: Any, gradient: Any, weight: Any, parent: Any, walk: Any, leading: tuple[int, ...]) -> Any:
    """g @ weight, or past an activation that nobody looks at, and then WRITTEN; leading: the dimensions of g's rows."""
    if not (_is_activation(parent) and walk.passes(parent)):
        return backend.gemm(gradient, weight)
    bias = parent.parents[0].parents[2]
    passed, total = _past(backend, gradient, weight, parent, bias is not None, walk.room(bias))
    walk.pass_by(parent, passed if len(leading) == 1 else passed.reshape((*leading, -1)), total)
    return WRITTEN


def _is_activation(node: Any) -> bool:
    """Whether it is the node of a function of one operand, the output of a linear layer."""
    if type(node) is not Node:
        return type(node) is EpilogueNode
    op, before = node.op, node.parents[0]
    if not isinstance(op, Elementwise) or op.arity > 1 or op.several or op.formula.is_row:
        return False
    plan, layout = node.info[:2]
    return layout is None and plan.formula is not None and isinstance(before, Node) and before.op is linear_


def _past(backend: Any, g: Any, weight: Any, node: Node, summed: bool, total: Any) -> tuple[Any, Any]:
    """g @ weight times the derivative of the activation whose node it is; with `summed` the sum of its rows."""
    if type(node) is EpilogueNode and node.kept is not None:
        found = backend.input_gradient(g, weight, node.kept, summed, total)
        if found is not None:
            return found
    gradient = backend.gemm(g, weight)
    formula, arguments = node.info[0].formula, (gradient, *map(_matrix, node.check()))
    if not summed:
        return backend.elementwise(formula, arguments, gradient.dtype, [gradient]), None
    return gradient, backend.elementwise_and_sum(formula, arguments, gradient.dtype, gradient, (0,), total)


def _linear(backend: Any, x: Any, weight: Any, bias: Any) -> Any:
    if x.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"linear got an input that does not fit its weight:\n  input   {describe(x)}\n  weight  "
            f"{describe(weight)}\nThe last dimension of the input must be the in_features of the layer, "
            f"{weight.shape[-1]}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"linear got a bias that does not fit its weight:\n  weight  {describe(weight)}\n  bias    "
            f"{describe(bias)}\nThe bias must have one element for each row of the weight, ({weight.shape[0]},)."
        )
    if x.dtype != weight.dtype:
        raise DtypeError(
            f"linear got an input and a weight of different dtypes:\n  input   {describe(x)}\n  weight  "
            f"{describe(weight)}\nConvert the input, e.g. x.to(gpuad.{weight.dtype}), or the module, e.g. "
            "model.double()."
        )
    if x.ndim == 2:
        return backend.linear(x, weight, bias)
    return backend.linear(_matrix(x), weight, bias).reshape((*x.shape[:-1], weight.shape[0]))


# The rules see the gradient as a matrix, see LinearOp.
linear_: LinearOp = LinearOp(
    "linear",
    _linear,
    vjp={
        "x": lambda g, weight: gemm(g, weight) if isinstance(g, Tensor) else of_array(g).backend.gemm(g, weight),
        "weight": lambda g, x, into: _product(g, _matrix(x), into),
        "bias": lambda g, into: _sum_rows(g, into),
    },
    samples=[
        (S((3, 4)), S((5, 4)), S((5,))),
        (S((2, 3, 4)), S((5, 4)), S((5,))),
        (S((4,)), S((5, 4)), None),
        (S((0, 4)), S((5, 4)), S((5,))),
        (S((2, 0, 4)), S((5, 4)), S((5,))),
    ],
    doc="x @ weight.T + bias for x of any number of dimensions.",
    autocast="lower",
    batch=lambda batch, op, inputs, params: _linear_of_all(batch, *inputs),
)


def _linear_of_all(batch: Batch, x: Any, weight: Any, bias: Any) -> Any:
    own, (*leading, inner) = batch.has(x), x._data.shape
    if batch.has(weight):
        flat = x.value.reshape((batch.size, math.prod(leading), inner)) if own else _matrix(x)
        y = gemm(flat, mT(weight.value)).reshape((batch.size, *leading, weight.shape[0]))
    else:
        y = linear_(x.value if own else x, weight, None if batch.has(bias) else bias)
        if not batch.has(bias):
            return y
    return y if bias is None else y + batch.aligned(bias, len(leading) + 1)


def _product(g: Any, x: Any, into: Any) -> Any:
    """gᵀ x, into the leaf's buffer where there is one."""
    if into is None:
        return gemm(mT(g), x)
    return of_array(g).backend.gemm(g.T, x, into[0], 1.0, into[1])


def _sum_rows(g: Any, into: Any) -> Any:
    if isinstance(g, Tensor):
        return g.sum(0)
    backend = of_array(g).backend
    if into is None:
        return backend.sum(g, (0,))
    buffer, beta = into
    if beta:
        backend.add_into(buffer, backend.sum(g, (0,)))
        return buffer
    return backend.sum(g, (0,), False, buffer)


@function(name="linear", nn=True)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """input @ weight.T + bias.

    input: (*, in_features). weight: (out_features, in_features). bias: (out_features,) or None.
    Returns (*, out_features). One dtype and device.
    """
    if input._data.ndim == 2:
        return linear_(input, weight, bias)
    if weight.ndim != 2 or not input.ndim:
        raise ShapeError(
            f"linear takes an input (*, in_features) and a weight (out_features, in_features):\n"
            f"  input   {describe(input)}\n  weight  {describe(weight)}"
        )
    return linear_(contiguous(input), weight, bias)  # one copy at most, kept for the weight's gradient


class LinearActivation(Op):
    """A linear layer and its activation: one product, or a product and one kernel in place."""

    def __init__(self, activation: str, op: Elementwise) -> None:
        super().__init__(f"linear_{activation}", register=False)
        self.activation, self.op = activation, op

    @functools.cached_property
    def shifted(self) -> Formula:
        """The activation behind the bias."""
        return trace(lambda product, bias: self.op(product + bias), self.name)

    @functools.cached_property
    def both(self) -> Formula:
        """What goes into the activation, and the activation."""
        return trace(lambda product, bias: (product + bias, self.op(product + bias)), self.name)

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = input._device
        backend: Any = device.backend
        tensors = (input, weight) if bias is None else (input, weight, bias)
        wanted = tuple([i for i, t in enumerate(tensors) if t._requires_grad]) if state.enabled else ()
        arrays = [t._data for t in tensors] + [None] * (3 - len(tensors))
        operands = _matrix(arrays[0]), arrays[1], arrays[2]
        found = backend.linear_activation(*operands, self.activation, bool(wanted))
        if found is None:
            array, before, kept = *self._behind_product(backend, *operands, bool(wanted)), None
        else:
            array, kept = found
            before = None if kept is None else kept.values
        shape = (*arrays[0].shape[:-1], array.shape[1])
        array = array if len(shape) == 2 else array.reshape(shape)
        out = wrap(array, device)
        if wanted:
            linear_out = wrap(array, device)  # stands for the value before the activation, which is nowhere
            linear_._record((input, weight, bias), arrays, linear_out, wanted, {})
            plan = self.op.plan((0,))
            saved = (before.reshape((*shape[:-1], -1))[..., : shape[-1]],) if plan.inputs else (array,)
            cells = () if plan.inputs else (out._cell,)
            version = sum([cell[0] for cell in cells])
            node = EpilogueNode(self.op, (linear_out._node,), saved, cells, version, (plan, None), device)
            node.kept = kept
            out._node, out._requires_grad = node, True
        return out

    def _behind_product(self, backend: Any, x: Any, weight: Any, bias: Any, keep: bool) -> tuple[Any, Any]:
        """(activation(x @ weight.T + bias), what went into it where its derivative needs that)."""
        product = backend.gemm(x, weight.T)
        dtype = product.dtype
        if not (keep and self.op.plan((0,)).inputs):
            formula, arguments = (self.op.formula, (product,)) if bias is None else (self.shifted, (product, bias))
            return backend.elementwise(formula, arguments, dtype, [product]), None
        if bias is None:
            return backend.elementwise(self.op.formula, (product,), dtype), product
        out = backend.empty(product.shape, dtype)
        backend.elementwise(self.both, (product, bias), dtype, [product, out])
        return out, product


_FUSED = {"relu": LinearActivation("relu", relu), "gelu": LinearActivation("gelu", gelu_tanh)}


def linear_activation(input: Any, weight: Any, bias: Any, activation: str) -> Tensor | None:
    """activation(input @ weight.T + bias) as one operation, for "relu" or "gelu" (by tanh); None where that cannot be.

    input: (*, in_features). weight: (out_features, in_features). bias: (out_features,) or None.
    """
    if not isinstance(input, Tensor) or not input._device.backend.fuses_activations:
        return None
    if Interpreters.active or watched():
        return None
    x, w = input._data, weight._data
    for t in (weight,) if bias is None else (weight, bias):
        if t._device is not input._device or t._data.dtype != x.dtype:
            return None
    fits = x.size and x.dtype.char in FLOATING and w.ndim == 2 and x.shape[-1] == w.shape[1]
    if not fits or (bias is not None and bias._data.shape != w.shape[:1]):
        return None  # linear() says what is wrong
    return _FUSED[activation](input if x.ndim == 2 else contiguous(input), weight, bias)
