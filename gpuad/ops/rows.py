"""Operations on rows: softmax, log_softmax and normalisation. Each is a row formula: one launch each way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from gpuad.array import dtypes
from gpuad.array.dtypes import FLOATING
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.op import function
from gpuad.errors import ShapeError
from gpuad.kernels.formula import trace
from gpuad.kernels.scalar import column_index, exp, row_logsumexp, row_mean, row_size, row_sum, rsqrt, where
from gpuad.ops.creation import arange
from gpuad.ops.reduction import axis_of
from gpuad.ops.samples import S


def row_op(
    name: str,
    formula: Callable,
    doc: str,
    scalars: Sequence[str] = (),
    hidden: int = 0,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    shapes: Sequence[tuple[int, int]] = ((3, 4), (2, 1), (0, 3)),
) -> Elementwise:
    """Declare an operation on the rows of a matrix by its row formula; its inputs are in the order of the parameters.

    rows, columns, scalars: parameters with one value a row, one a column, one number (in samples 1e-5). shapes: those
    of the samples.
    """
    traced = trace(formula, name, rows=rows, scalars=scalars, columns=columns)
    samples = []
    for n, m in shapes:
        of = {"element": (n, m), "row": (n,), "column": (m,)}
        samples.append(tuple(1e-5 if v.level == "scalar" else S(of[v.level]) for v in traced.inputs))
    return Elementwise(name, traced, samples, doc, hidden=hidden, autocast="float32")


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


def _softmax_op(name: str, formula: Callable, doc: str, *more: S) -> Elementwise:
    traced = trace(formula, name, rows=["last"], labels=["last"], scalars=["scale"])
    return Elementwise(name, traced, [(S((2, 8)), *more, 0.5)], doc, autocast="float32")


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


def _normalised(x: Any, eps: Any) -> tuple[Any, Any, Any]:
    mean = row_mean(x)
    centred = x - mean
    inverse = rsqrt(row_mean(centred * centred) + eps)
    return centred * inverse, mean, inverse


normalise_rows = row_op("normalise", _normalised, "(x − mean) / sqrt(var + eps) over each row of a matrix.", ["eps"], 2)


def _scaled(x: Any, weight: Any, eps: Any) -> tuple[Any, Any, Any]:
    y, *statistics = _normalised(x, eps)
    return y * weight, *statistics


def _shifted(x: Any, weight: Any, bias: Any, eps: Any) -> tuple[Any, Any, Any]:
    y, *statistics = _normalised(x, eps)
    return y * weight + bias, *statistics


layer_norm_scaled = row_op(
    "layer_norm_scaled", _scaled, "normalise(x) · weight, one for each column.", ["eps"], 2, columns=["weight"]
)
layer_norm_rows = row_op(
    "layer_norm", _shifted, "normalise(x) · weight + bias, one of each for a column.", ["eps"], 2,
    columns=["weight", "bias"],
)  # fmt: skip
batch_norm_rows = row_op(
    "batch_norm", _shifted, "normalise(x) · weight + bias, one of each for a row.", ["eps"], 2, rows=["weight", "bias"]
)


def _rms(x: Any, eps: Any) -> tuple[Any, Any]:
    inverse = rsqrt(row_mean(x * x) + eps)
    return x * inverse, inverse


def _rms_scaled(x: Any, weight: Any, eps: Any) -> tuple[Any, Any]:
    y, inverse = _rms(x, eps)
    return y * weight, inverse


rms_rows = row_op("rms_normalise", _rms, "x / sqrt(mean(x²) + eps) over each row of a matrix.", ["eps"], 1)
rms_norm_rows = row_op(
    "rms_norm", _rms_scaled, "rms_normalise(x) · weight, one for each column.", ["eps"], 1, columns=["weight"]
)


def _running(x: Any, mean: Any, var: Any, momentum: Any) -> tuple[Any, Any]:
    now = row_mean(x)
    centred = x - now
    unbiased = row_sum(centred * centred) / (row_size() - 1)
    return mean + (now - mean) * momentum, var + (unbiased - var) * momentum


running_rows = row_op(
    "running_statistics", _running, "mean and var moved towards those of each row, the variance unbiased.",
    ["momentum"], rows=["mean", "var"], shapes=((3, 4), (2, 5), (0, 3)),
)  # fmt: skip


def over_rows(op: Any, input: Any, dim: int) -> Any:
    """The row operation along any dimension of a tensor."""
    at = axis_of(op.name, dim, input.ndim)
    if input.ndim == 2 and at == 1:
        return op(input)
    shape = tuple(input.shape)
    if not shape:
        return op(input.reshape(1, 1)).reshape(())
    moved = input if at == len(shape) - 1 else input.transpose(at, -1)
    rows = moved.reshape(-1, shape[at]) if input.numel() else moved.reshape(math.prod(moved.shape[:-1]), shape[at])
    out = op(rows).reshape(moved.shape)
    return out if at == len(shape) - 1 else out.transpose(at, -1)


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
    rows = scores.reshape(-1, shape[-1])
    if causal:
        last = arange(shape[-2], device=scores.device).expand(shape[:-1]).reshape(-1)
        found = causal_softmax_rows(rows, last, scale)
    elif mask is None:
        found = scaled_softmax_rows(rows, scale)
    else:
        op = masked_softmax_rows if mask.dtype.kind == "b" else shifted_softmax_rows
        found = op(rows, mask.expand(shape).reshape(-1, shape[-1]), scale)
    return found.reshape(shape)


def _as_rows(name: str, x: Any, normalized_shape: Any, **parameters: Any) -> tuple[Any, int]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ShapeError(f"{name} normalises the last dimensions {shape}, but the input has shape {tuple(x.shape)}.")
    size = math.prod(shape)
    for what, values in parameters.items():
        if values is not None and tuple(values.shape) != shape:
            raise ShapeError(
                f"{name} normalises the last dimensions {shape}, but its {what} has shape {tuple(values.shape)}; it "
                "must have one value for each element of them."
            )
    return x.reshape(x.numel() // size if size else 0, size), size


@function(nn=True)
def layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Normalise input over its last dimensions to mean 0 and variance 1.

    y = (x − mean) / sqrt(var + eps) · weight + bias, the variance biased.

    input: (*, *normalized_shape), floating. weight, bias: normalized_shape or None.
    Returns the shape and dtype of input; float16 is computed in float32.
    Raises ShapeError when input does not end in normalized_shape, or weight or bias have another shape.
    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    rows, size = _as_rows("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    if weight is not None and bias is not None:
        return layer_norm_rows(rows, weight.reshape(size), bias.reshape(size), eps).reshape(input.shape)
    if weight is not None:
        return layer_norm_scaled(rows, weight.reshape(size), eps).reshape(input.shape)
    y = normalise_rows(rows, eps).reshape(input.shape)
    return y if bias is None else y + bias


@function(nn=True)
def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """Divide input by its root mean square over its last dimensions, times weight.

    y = x / sqrt(mean(x²) + eps) · weight; eps is the dtype's epsilon unless given.
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    rows, size = _as_rows("rms_norm", input, normalized_shape, weight=weight)
    eps = float(dtypes.finfo(input.dtype).eps) if eps is None else eps
    y = rms_rows(rows, eps) if weight is None else rms_norm_rows(rows, weight.reshape(size), eps)
    return y.reshape(input.shape)


def _affine(y: Any, weight: Any, bias: Any) -> Any:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


# With statistics that are given: one launch.
batch_norm_given = Elementwise(
    "batch_norm_given",
    trace(
        lambda x, mean, var, weight, bias, eps: (x - mean) * rsqrt(var + eps) * weight + bias, "batch_norm_given",
        scalars=["eps"],
    ),
    [(S((3, 4)), S((4,)), S((4,), 0.5, 2), S((4,)), S((4,)), 1e-5)],
    "(x − mean) / sqrt(var + eps) · weight + bias.",
)  # fmt: skip


@function(nn=True)
def batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Normalise each channel (dimension 1) of input over all the others.

    y = (x − mean) / sqrt(var + eps) · weight + bias. In training with the statistics of the batch (biased variance),
    and the running ones move towards them: r ← (1 − momentum) r + momentum s, with the unbiased variance; else with
    the running ones. input: (N, C, *). The others: (C,) or None. Raises ShapeError for one value a channel in training.
    Source: Ioffe & Szegedy, "Batch Normalization", arXiv:1502.03167.
    """
    from gpuad.autograd.modes import no_grad

    if input.ndim < 2:
        raise ShapeError(f"batch_norm takes input (N, C, *), got shape {tuple(input.shape)}.")
    channels = input.shape[1]
    across = (1, channels, *(1 for _ in input.shape[2:]))

    def per_channel(x: Any) -> Any:
        return None if x is None else x.reshape(across)

    if not training and running_mean is not None:
        if weight is not None and bias is not None:
            return batch_norm_given(input, *map(per_channel, (running_mean, running_var, weight, bias)), eps)
        scale = (running_var + eps).rsqrt()
        y = (input - per_channel(running_mean)) * per_channel(scale)
        return _affine(y, per_channel(weight), per_channel(bias))
    count = input.numel() // channels if channels else 0
    if training and count <= 1:
        raise ShapeError(
            f"batch_norm in training needs more than one value for each channel, got shape {tuple(input.shape)}; "
            "use larger batches (drop_last=True), or eval()."
        )
    rows = input.transpose(0, 1).reshape(channels, -1)
    whole = weight is not None and bias is not None
    y = batch_norm_rows(rows, weight, bias, eps) if whole else normalise_rows(rows, eps)
    y = y.reshape(channels, input.shape[0], *input.shape[2:]).transpose(0, 1)
    y = y if whole else _affine(y, per_channel(weight), per_channel(bias))
    if training and running_mean is not None:
        with no_grad():  # last, and written once both are there: what fails before leaves them as they were
            mean, var = running_rows(rows.detach(), running_mean, running_var, momentum)
            running_mean.copy_(mean)
            running_var.copy_(var)
    return y
