"""Operations on rows: softmax, log_softmax and normalisation. Each is a row formula: one launch each way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from gpuad.array import dtypes
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.op import function
from gpuad.errors import ShapeError
from gpuad.kernels.formula import trace
from gpuad.kernels.scalar import exp, row_logsumexp, row_mean, rsqrt
from gpuad.ops.reduction import axis_of
from gpuad.ops.samples import S


def row_op(name: str, formula: Callable, doc: str, scalars: Sequence[str] = (), hidden: int = 0) -> Elementwise:
    """Declare an operation on the rows of a matrix by its row formula."""
    samples = [(S(shape), *(1e-5 for _ in scalars)) for shape in ((3, 4), (2, 1), (0, 3))]
    return Elementwise(name, trace(formula, name, scalars=scalars), samples, doc, hidden=hidden, autocast="float32")


softmax_rows = row_op("softmax", lambda x: exp(x - row_logsumexp(x)), "exp(x) / Σ exp(x) over each row of a matrix.")
log_softmax_rows = row_op("log_softmax", lambda x: x - row_logsumexp(x), "x − log Σ exp(x) over each row of a matrix.")


def _normalised(x: Any, eps: Any) -> tuple[Any, Any, Any]:
    mean = row_mean(x)
    centred = x - mean
    inverse = rsqrt(row_mean(centred * centred) + eps)
    return centred * inverse, mean, inverse


normalise_rows = row_op("normalise", _normalised, "(x − mean) / sqrt(var + eps) over each row of a matrix.", ["eps"], 2)


def _rms(x: Any, eps: Any) -> tuple[Any, Any]:
    inverse = rsqrt(row_mean(x * x) + eps)
    return x * inverse, inverse


rms_rows = row_op("rms_normalise", _rms, "x / sqrt(mean(x²) + eps) over each row of a matrix.", ["eps"], 1)


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
    return input if input.dtype.kind == "f" else input.to(dtypes.get_default_dtype())


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


def _as_rows(name: str, x: Any, normalized_shape: Any) -> tuple[Any, int]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ShapeError(f"{name} normalises the last dimensions {shape}, but the input has shape {tuple(x.shape)}.")
    size = math.prod(shape)
    return x.reshape(x.numel() // size if size else 0, size), size


@function(nn=True)
def layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Normalise input over its last dimensions to mean 0 and variance 1.

    y = (x − mean) / sqrt(var + eps) · weight + bias, the variance biased.

    input: (*, *normalized_shape), floating. weight, bias: normalized_shape or None.
    Returns the shape and dtype of input; float16 is computed in float32.
    Raises ShapeError when input does not end in normalized_shape.
    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    rows, _ = _as_rows("layer_norm", input, normalized_shape)
    y = normalise_rows(rows, eps).reshape(input.shape)
    return _affine(y, weight, bias)


@function(nn=True)
def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """Divide input by its root mean square over its last dimensions, times weight.

    y = x / sqrt(mean(x²) + eps) · weight; eps is the dtype's epsilon unless given.
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    import numpy as np

    rows, _ = _as_rows("rms_norm", input, normalized_shape)
    y = rms_rows(rows, float(np.finfo(input.dtype).eps) if eps is None else eps).reshape(input.shape)
    return _affine(y, weight, None)


def _affine(y: Any, weight: Any, bias: Any) -> Any:
    if weight is not None and bias is not None:
        return scale_shift(y, weight, bias)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


scale_shift = Elementwise(
    "scale_shift", lambda x, weight, bias: x * weight + bias, [(S((3, 4)), S((4,)), S((4,)))], "x · weight + bias."
)


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
    y = normalise_rows(rows, eps).reshape(channels, input.shape[0], *input.shape[2:]).transpose(0, 1)
    y = _affine(y, per_channel(weight), per_channel(bias))
    if training and running_mean is not None:
        with no_grad():  # last, and written once both are there: what fails before leaves them as they were
            mean, var = rows.mean(1), rows.var(1, unbiased=True)
            mean = running_mean.lerp(mean.to(running_mean.dtype), momentum)
            var = running_var.lerp(var.to(running_var.dtype), momentum)
            running_mean.copy_(mean)
            running_var.copy_(var)
    return y
