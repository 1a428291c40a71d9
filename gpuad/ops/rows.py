"""Operations on rows: softmax, log_softmax and normalisation. Each is a row formula: one launch each way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from gpuad.array import dtypes
from gpuad.array.dtypes import FLOATING
from gpuad.autograd.levels import level_of
from gpuad.autograd.modes import no_grad
from gpuad.autograd.op import check_devices, floating_dtype, function, writable
from gpuad.autograd.rows import RowOp
from gpuad.errors import ShapeError
from gpuad.kernels.expr import substitute, variable
from gpuad.kernels.formula import Formula, trace
from gpuad.kernels.scalar import column_index, exp, row_logsumexp, row_mean, row_size, row_sum, rsqrt, where
from gpuad.ops.creation import arange
from gpuad.ops.reduction import axis_of
from gpuad.ops.samples import S
from gpuad.tensor import Tensor


class Variants:
    """A row operation some of whose inputs may be None: one operation for each set of those that are there.

    make(absent): that without the inputs of these names, whose formula got None for them; called when first needed,
    and at once for `made`.
    """

    def __init__(
        self, names: Sequence[str], make: Callable[[tuple[str, ...]], Any], made: Sequence[tuple[str, ...]] = ((),)
    ) -> None:
        self.names, self._make = tuple(names), make
        self._made: dict[tuple[bool, ...], Any] = {}
        for absent in made:
            self.without(absent)

    def without(self, absent: tuple[str, ...]) -> Any:
        """The operation without the inputs of these names, in their order."""
        key = tuple([name not in absent for name in self.names])
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._make(absent)
        return found

    def of(self, inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The operation for these inputs, and those of them that are there."""
        op = self._made.get(tuple([x is not None for x in inputs]))
        if op is None:
            op = self.without(tuple([name for name, x in zip(self.names, inputs, strict=True) if x is None]))
        return op, [x for x in inputs if x is not None]

    def __call__(self, *inputs: Any, **params: Any) -> Any:
        op, given = self.of(inputs)
        return op(*given, **params)


def row_op(
    name: str,
    formula: Callable,
    doc: str,
    scalars: Sequence[str] = (),
    hidden: int = 0,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    shapes: Sequence[tuple[int, int]] = ((3, 4), (2, 1), (0, 3)),
    kind: type[RowOp] = RowOp,
    absent: tuple[str, ...] = (),
) -> RowOp:
    """Declare an operation on rows by its row formula; its inputs are in the order of the parameters.

    rows, columns, scalars: parameters with one value a row, one a column, one number (in samples 1e-5; var is
    positive). shapes: those of the samples. absent: a variant without these, which is not in the table of operations.
    """
    traced = trace(formula, name, rows=rows, scalars=scalars, columns=columns, absent=absent)
    samples = []
    for n, m in shapes:
        of = {"element": (n, m), "row": (n,), "column": (m,)}
        samples.append(tuple(
            1e-5 if v.level == "scalar" else S(of[v.level], 0.5, 2) if v.name == "var" else S(of[v.level])
            for v in traced.inputs
        ))  # fmt: skip
    return kind(name, traced, samples, doc, register=not absent, hidden=hidden, autocast="float32")


softmax_rows = row_op("softmax", lambda x: exp(x - row_logsumexp(x)), "exp(x) / Σ exp(x) over each row of a matrix.")


def _scaled_softmax(x: Any, scale: Any) -> Any:
    scores = x * scale
    return exp(scores - row_logsumexp(scores))


def _masked_softmax(x: Any, mask: Any, scale: Any) -> Any:
    scores = where(mask, x * scale, -math.inf)
    return exp(scores - row_logsumexp(scores))


def _shifted_softmax(x: Any, mask: Any, scale: Any) -> Any:
    scores = x * scale + mask
    return exp(scores - row_logsumexp(scores))


def _causal_softmax(x: Any, last: Any, scale: Any) -> Any:
    scores = where(column_index() <= last, x * scale, -math.inf)
    return exp(scores - row_logsumexp(scores))


def _softmax_op(name: str, formula: Callable, doc: str, *more: S) -> RowOp:
    traced = trace(formula, name, rows=["last"], labels=["last"], scalars=["scale"])
    return RowOp(name, traced, [(S((2, 8)), *more, 0.5)], doc, autocast="float32")


scaled_softmax_rows = _softmax_op("scaled_softmax", _scaled_softmax, "softmax(x · scale) over each row.")
masked_softmax_rows = _softmax_op(
    "masked_softmax", _masked_softmax, "softmax(x · scale) over each row, where mask is True.",
    S((2, 8), kind="bool"),
)  # fmt: skip
shifted_softmax_rows = _softmax_op(
    "shifted_softmax", _shifted_softmax, "softmax(x · scale + mask) over each row.", S((2, 8))
)
causal_softmax_rows = _softmax_op(
    "causal_softmax", _causal_softmax, "softmax(x · scale) over each row up to column `last`, one for each row.",
    S((2,), 0, 8, (), "int"),
)  # fmt: skip
log_softmax_rows = row_op("log_softmax", lambda x: x - row_logsumexp(x), "x − log Σ exp(x) over each row of a matrix.")


def _affine(y: Any, weight: Any, bias: Any) -> Any:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _normalised(x: Any, weight: Any, bias: Any, eps: Any) -> tuple[Any, Any, Any]:
    mean = row_mean(x)
    centred = x - mean
    inverse = rsqrt(row_mean(centred * centred) + eps)
    return _affine(centred * inverse, weight, bias), mean, inverse


def _rms(x: Any, weight: Any, eps: Any) -> tuple[Any, Any]:
    inverse = rsqrt(row_mean(x * x) + eps)
    return _affine(x * inverse, weight, None), inverse


def _given(x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any) -> Any:
    return _affine((x - mean) * rsqrt(var + eps), weight, bias)


layer_norm_rows = Variants(("x", "weight", "bias", "eps"), lambda absent: row_op(
    "layer_norm", _normalised, "(x − mean) / sqrt(var + eps) · weight + bias over each row, one of each for a column.",
    ["eps"], 2, columns=["weight", "bias"], absent=absent,
))  # fmt: skip
rms_norm_rows = Variants(("x", "weight", "eps"), lambda absent: row_op(
    "rms_norm", _rms, "x / sqrt(mean(x²) + eps) · weight over each row, one for each column.", ["eps"], 1,
    columns=["weight"], absent=absent,
))  # fmt: skip
batch_norm_given = Variants(("x", "mean", "var", "weight", "bias", "eps"), lambda absent: row_op(
    "batch_norm_given", _given, "(x − mean) / sqrt(var + eps) · weight + bias, one of each for a row.", ["eps"],
    rows=["mean", "var", "weight", "bias"], absent=absent,
))  # fmt: skip


def _running(x: Any, mean: Any, var: Any, momentum: Any) -> tuple[Any, Any]:
    now = row_mean(x)
    centred = x - now
    unbiased = row_sum(centred * centred) / (row_size() - 1)
    return mean + (now - mean) * momentum, var + (unbiased - var) * momentum


running_rows = row_op(
    "running_statistics", _running, "mean and var moved towards those of each row, the variance unbiased.",
    ["momentum"], rows=["mean", "var"], shapes=((3, 4), (2, 5), (0, 3)),
)  # fmt: skip


class _BatchNorm(RowOp):
    """Called with running=(mean, var, momentum), these move towards the statistics of the rows in the same launch."""

    def __init__(self, name: str, formula: Formula, *arguments: Any, **named: Any) -> None:
        super().__init__(name, formula, *arguments, **named)
        own = [variable("running_mean", "state", "row"), variable("running_var", "state", "row"),
               variable("momentum", "number", "scalar")]  # fmt: skip
        x, *states = running_rows.formula.inputs
        swap: dict[Any, Any] = {x: formula.inputs[0], **dict(zip(states, own, strict=True))}
        moved = substitute(running_rows.formula.outputs, swap)
        levels = [*formula.levels, "row", "row"]
        self.moving = Formula(f"{name}_moving", [*formula.inputs, *own], [*formula.outputs, *moved], levels)
        self.moving.statistics = formula.statistics
        count = len(formula.inputs)
        self.moving.states = {len(formula.outputs): count, len(formula.outputs) + 1: count + 1}

    def __call__(self, *inputs: Any, running: Any = None, **named: Any) -> Any:
        if running is None:
            return super().__call__(*inputs, **named)
        check_devices(self.name, (inputs[0], *running), ("input", "running_mean", "running_var", "momentum"))
        return self._general(inputs, {**named, "running": running})

    def _compute(self, device: Any, inputs: Any, arrays: Any, axes: Any = (), running: Any = None) -> tuple[list, Any]:
        if running is None:
            return super()._compute(device, inputs, arrays, axes)
        self._check_shapes(inputs, arrays, axes)
        dtype = floating_dtype(self.name, [arrays[i] for i in self.formula.promoted])
        *states, momentum = running
        moved = [writable(self.name, state) for state in states]
        momentum = momentum._data if isinstance(momentum, Tensor) else momentum
        results = device.backend.rows(self.moving, [*arrays, *moved, momentum], dtype, axes)
        for state in states:
            state._cell[0] += 1
        return results, dtype

    def _record(self, *arguments: Any, axes: Any = (), running: Any = None) -> None:  # type: ignore[override]
        super()._record(*arguments, axes=axes)


batch_norm_rows = Variants(("x", "weight", "bias", "eps"), lambda absent: row_op(
    "batch_norm", _normalised, "(x − mean) / sqrt(var + eps) · weight + bias over each row, one of each for a row.",
    ["eps"], 2, rows=["weight", "bias"], kind=_BatchNorm, absent=absent,
))  # fmt: skip


def over_rows(op: RowOp, input: Any, dim: int) -> Any:
    """The row operation along any dimension of a tensor."""
    at = axis_of(op.name, dim, input.ndim)
    return op(input, axes=(at,)) if input.ndim else op(input.reshape(1)).reshape(())


def _floating(input: Any, dtype: Any) -> Any:
    if dtype is not None:
        return input.to(dtypes.as_dtype(dtype))
    return input if input.dtype.char in FLOATING else input.to(dtypes.get_default_dtype())


@function
def softmax(input: Any, dim: int = -1, dtype: Any = None) -> Any:
    """exp(input) / Σ exp(input) over `dim`, without overflow; the shape of input."""
    return over_rows(softmax_rows, _floating(input, dtype), dim)


@function
def log_softmax(input: Any, dim: int = -1, dtype: Any = None) -> Any:
    """input − log Σ exp(input) over `dim`, without overflow; the shape of input."""
    return over_rows(log_softmax_rows, _floating(input, dtype), dim)


@function(nn=True)
def softmin(input: Any, dim: int = -1, dtype: Any = None) -> Any:
    """softmax(−input)."""
    return softmax(-input, dim, dtype)


def attention_weights(scores: Any, scale: float, mask: Any, causal: bool) -> Any:
    """softmax(scores · scale + mask) over the last dimension, in one kernel.

    scores: (*, L, S). mask: None, bool (True takes part) or added; broadcast to (*, L, S). causal: instead of a mask,
    row i sees the columns up to i.
    """
    shape = tuple(scores.shape)
    if not scores.numel():
        return scores.softmax(-1)
    if causal:
        return causal_softmax_rows(scores, arange(shape[-2], device=scores.device).expand(shape[:-1]), scale)
    if mask is None:
        return scaled_softmax_rows(scores, scale)
    op = masked_softmax_rows if mask.dtype.kind == "b" else shifted_softmax_rows
    return op(scores, mask.expand(shape), scale)


def _last(name: str, x: Any, normalized_shape: Any, **parameters: Any) -> tuple[int, ...]:
    """The last dimensions, which are normalised; ShapeError where they, or the parameters, have another shape."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ShapeError(f"{name} normalises the last dimensions {shape}, but the input has shape {tuple(x.shape)}.")
    for what, values in parameters.items():
        if values is not None and tuple(values.shape) != shape:
            raise ShapeError(
                f"{name} normalises the last dimensions {shape}, but its {what} has shape {tuple(values.shape)}; it "
                "must have one value for each element of them."
            )
    return tuple(range(x.ndim - len(shape), x.ndim))


@function(nn=True)
def layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Normalise input over its last dimensions to mean 0 and variance 1.

    y = (x − mean) / sqrt(var + eps) · weight + bias, the variance biased.

    input: (*, *normalized_shape), floating. weight, bias: normalized_shape or None.
    Returns the shape and dtype of input; float16 is computed in float32.
    Raises ShapeError when input does not end in normalized_shape, or weight or bias have another shape.
    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    axes = _last("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    return layer_norm_rows(input, weight, bias, eps, axes=axes)


@function(nn=True)
def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """Divide input by its root mean square over its last dimensions, times weight.

    y = x / sqrt(mean(x²) + eps) · weight; eps is the dtype's epsilon unless given.
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    axes = _last("rms_norm", input, normalized_shape, weight=weight)
    if eps is None:
        eps = float(dtypes.finfo(floating_dtype("rms_norm", (input,))).eps)
    return rms_norm_rows(input, weight, eps, axes=axes)


@function(nn=True)
def batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: Any = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Normalise each channel (dimension 1) of input over all the others.

    y = (x − mean) / sqrt(var + eps) · weight + bias. In training with the statistics of the batch (biased variance),
    and the running ones move towards them: r ← (1 − momentum) r + momentum s, with the unbiased variance; else with
    the running ones. One launch, the running statistics included, and one backward.

    input: (N, C, *). The others: (C,) or None; momentum: a number, or a 0-d tensor. Raises ShapeError for other shapes,
    and for one value a channel in training; the running statistics are then as they were.
    Source: Ioffe & Szegedy, "Batch Normalization", arXiv:1502.03167.
    """
    if input.ndim < 2:
        raise ShapeError(f"batch_norm takes input (N, C, *), got shape {tuple(input.shape)}.")
    channels = input.shape[1]
    of_channels = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, x in of_channels.items():
        if x is not None and tuple(x.shape) != (channels,):
            raise ShapeError(
                f"batch_norm got input of shape {tuple(input.shape)}, with {channels} channels, and {name} of shape "
                f"{tuple(x.shape)}; it must have one value for each channel."
            )
    axes = (0, *range(2, input.ndim))
    if not training and running_mean is not None:
        return batch_norm_given(input, running_mean, running_var, weight, bias, eps, axes=axes)
    count = input.numel() // channels if channels else 0
    if training and count <= 1:
        raise ShapeError(
            f"batch_norm in training needs more than one value for each channel, got shape {tuple(input.shape)}; "
            "use larger batches (drop_last=True), or eval()."
        )
    running = (running_mean, running_var, momentum) if training and running_mean is not None else None
    if running is None or not any(map(level_of, (input, *of_channels.values(), momentum))):
        return batch_norm_rows(input, weight, bias, eps, axes=axes, running=running)
    # On tensors with tangents, or with many examples, in-place changes have rules of their own.
    y = batch_norm_rows(input, weight, bias, eps, axes=axes)
    with no_grad():  # last, and written once both are there: what fails before leaves them as they were
        mean, var = running_rows(input.detach(), running_mean, running_var, momentum, axes=axes)
        running_mean.copy_(mean)
        running_var.copy_(var)
    return y
