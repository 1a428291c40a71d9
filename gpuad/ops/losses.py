"""Losses: each is the formula of one term, with a mean or sum behind it, in one launch each way."""

from __future__ import annotations

import inspect
from typing import Any

from gpuad.array.dtypes import FLOATING
from gpuad.autograd.elementwise import Elementwise, elementwise
from gpuad.autograd.levels import level_of, whole
from gpuad.autograd.op import as_operand, check_devices, describe, function
from gpuad.autograd.reduced import Reduced
from gpuad.autograd.row_total import RowTotal
from gpuad.errors import DtypeError, ShapeError
from gpuad.kernels.formula import trace
from gpuad.kernels.scalar import (
    abs,
    clamp,
    exp,
    log,
    log1p,
    maximum,
    ne,
    row_at,
    row_logsumexp,
    row_size,
    row_sum,
    where,
)
from gpuad.ops.rows import Variants
from gpuad.ops.samples import S, class_indices
from gpuad.tensor import Tensor


class _Loss:
    """A loss in its three reductions, from the formula of one term."""

    def __init__(self, name: str, term: Any, samples: Any, doc: str) -> None:
        self.name = name
        self.each = Elementwise(f"{name}_each", term, samples, doc, autocast="float32")
        self.over_all = Reduced(name, term, samples, doc)

    def __call__(self, *inputs: Any, reduction: str) -> Any:
        if reduction == "none":
            return self.each(*inputs)
        return self.over_all(*inputs, mean=_is_mean(reduction))


def _is_mean(reduction: str) -> bool:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'none', 'mean' or 'sum', got {reduction!r}.")
    return reduction == "mean"


def _check_shapes(name: str, input: Any, target: Any, broadcast: bool = True) -> None:
    if input._data.shape == target._data.shape:
        return
    if broadcast:
        import warnings

        warnings.warn(
            f"{name} got an input of shape {tuple(input.shape)} and a target of shape {tuple(target.shape)}, which "
            "broadcast against each other; that is seldom meant. Give them the same shape, e.g. target.unsqueeze(1).",
            stacklevel=3,
        )
        return
    raise ShapeError(f"{name} needs equal shapes:\n  input   {describe(input)}\n  target  {describe(target)}")


_pair = [(S((3, 4)), S((3, 4))), (S((3, 4)), S((4,))), (S(()), S(())), (S((0, 3)), S((0, 3)))]
_squared = _Loss("mse_loss", lambda input, target: (input - target) * (input - target), _pair, "(input − target)².")
_absolute = _Loss("l1_loss", lambda input, target: abs(input - target), _pair, "|input − target|.")
_smooth = _Loss(
    "smooth_l1_loss",
    lambda input, target, beta: where(
        abs(input - target) < beta, 0.5 * (input - target) * (input - target) / beta, abs(input - target) - 0.5 * beta
    ),
    [(S((3, 4), 0, 1), S((3, 4), 3, 4), 1.0), (S((3, 4), 0, 0.4), S((3, 4), 0, 0.4), 1.0)],
    "½ d² / beta where |d| < beta, else |d| − ½ beta, with d = input − target.",
)
_huber = _Loss(
    "huber_loss",
    lambda input, target, delta: where(
        abs(input - target) <= delta,
        0.5 * (input - target) * (input - target),
        delta * (abs(input - target) - 0.5 * delta),
    ),
    [(S((3, 4), 0, 1), S((3, 4), 3, 4), 1.5), (S((3, 4), 0, 0.4), S((3, 4), 0, 0.4), 1.5)],
    "½ d² where |d| ≤ delta, else delta (|d| − ½ delta), with d = input − target.",
)


@function(nn=True)
def mse_loss(input: Any, target: Any, reduction: str = "mean") -> Any:
    """The mean (or sum, or each) of (input − target)²."""
    _check_shapes("mse_loss", input, target)
    return _squared(input, target, reduction=reduction)


@function(nn=True)
def l1_loss(input: Any, target: Any, reduction: str = "mean") -> Any:
    """The mean (or sum, or each) of |input − target|."""
    _check_shapes("l1_loss", input, target)
    return _absolute(input, target, reduction=reduction)


@function(nn=True)
def smooth_l1_loss(input: Any, target: Any, reduction: str = "mean", beta: float = 1.0) -> Any:
    """The mean (or sum, or each) of ½ d² / beta where |d| < beta, else |d| − ½ beta; d = input − target."""
    _check_shapes("smooth_l1_loss", input, target)
    if beta < 0:
        raise ValueError(f"smooth_l1_loss takes beta ≥ 0, got {beta}.")
    return (
        _absolute(input, target, reduction=reduction)
        if beta == 0
        else _smooth(input, target, beta, reduction=reduction)
    )


@function(nn=True)
def huber_loss(input: Any, target: Any, reduction: str = "mean", delta: float = 1.0) -> Any:
    """The mean (or sum, or each) of ½ d² where |d| ≤ delta, else delta (|d| − ½ delta); d = input − target.

    Source: Huber, "Robust Estimation of a Location Parameter", 1964.
    """
    _check_shapes("huber_loss", input, target)
    if delta <= 0:
        raise ValueError(f"huber_loss takes delta > 0, got {delta}.")
    return _huber(input, target, delta, reduction=reduction)


_probability = [(S((3, 4), 0.1, 0.9), S((3, 4), 0.1, 0.9))]
# The logarithms are cut at −100 as in PyTorch, so that a saturated probability costs 100, not infinity.
_bce = _Loss(
    "binary_cross_entropy",
    lambda input, target: -(
        target * clamp(log(input), -100.0, None) + (1 - target) * clamp(log1p(-input), -100.0, None)
    ),
    _probability, "−(t log p + (1 − t) log(1 − p)).",
)  # fmt: skip
_bce_logits = _Loss(
    "binary_cross_entropy_with_logits",
    lambda input, target: maximum(input, 0.0) - input * target + log1p(exp(-abs(input))),
    [(S((3, 4), -2, 2, (0,)), S((3, 4), 0.1, 0.9))], "−(t log σ(x) + (1 − t) log(1 − σ(x))), without overflow.",
)  # fmt: skip


def _weighted(each: Any, weight: Any, reduction: str) -> Any:
    each = each if weight is None else each * weight
    if reduction == "none":
        return each
    return each.mean() if _is_mean(reduction) else each.sum()


@function(nn=True)
def binary_cross_entropy(input: Any, target: Any, weight: Any = None, reduction: str = "mean") -> Any:
    """The mean (or sum, or each) of −(t log p + (1 − t) log(1 − p)), p = input in [0, 1], t = target."""
    _check_shapes("binary_cross_entropy", input, target, broadcast=False)
    if weight is None:
        return _bce(input, target, reduction=reduction)
    return _weighted(_bce(input, target, reduction="none"), weight, reduction)


@function(nn=True)
def binary_cross_entropy_with_logits(
    input: Any, target: Any, weight: Any = None, reduction: str = "mean", pos_weight: Any = None
) -> Any:
    """binary_cross_entropy of sigmoid(input), computed without overflow; pos_weight multiplies the positive terms."""
    _check_shapes("binary_cross_entropy_with_logits", input, target, broadcast=False)
    if pos_weight is None and weight is None:
        return _bce_logits(input, target, reduction=reduction)
    if pos_weight is None:
        return _weighted(_bce_logits(input, target, reduction="none"), weight, reduction)
    return _weighted(_bce_positive(input, target, pos_weight), weight, reduction)


_bce_positive = elementwise(
    "bce_with_logits_positive",
    lambda input, target, pos_weight: (1 - target) * input
    + (1 + (pos_weight - 1) * target) * (log1p(exp(-abs(input))) + maximum(-input, 0.0)),
    [(S((3, 4), -2, 2, (0,)), S((3, 4), 0.1, 0.9), S((4,), 0.5, 2))],
    "binary_cross_entropy_with_logits with a weight on the positive terms.", nn=True, autocast="float32",
)  # fmt: skip
_kl = _Loss(
    "kl_div",
    lambda input, target: where(target > 0, target * (log(target) - input), 0.0),
    [(S((3, 4)), S((3, 4), 0.1, 0.9))], "t (log t − x), 0 where t is 0.",
)  # fmt: skip
_kl_log = _Loss("kl_div_log", lambda input, target: exp(target) * (target - input), _pair, "exp(t) (t − x).")


@function(nn=True)
def kl_div(input: Any, target: Any, reduction: str = "mean", log_target: bool = False) -> Any:
    """The Kullback–Leibler divergence t (log t − x), x = input in log space; "batchmean" divides by input.shape[0]."""
    loss = _kl_log if log_target else _kl
    if reduction == "batchmean":
        return loss(input, target, reduction="sum") / input.shape[0]
    return loss(input, target, reduction=reduction)


# Classification -------------------------------------------------------------------------------------------------------


def _entropy_term(input: Any, label: Any, ignore: Any, weight: Any, smoothing: Any) -> tuple[Any, ...]:
    lse = row_logsumexp(input)
    place, counted, share = _share(label, ignore, weight)
    term = lse - row_at(input, place)
    term = term if share is None else share * term
    if smoothing is not None:
        spread = row_sum(_times(lse - input, weight)) / row_size()
        spread = spread if counted is None else where(counted, spread, 0.0)
        term = (1 - smoothing) * term + smoothing * spread
    return (term, lse) if share is None else (term, share, lse)


def _nll_term(input: Any, label: Any, ignore: Any, weight: Any) -> tuple[Any, Any]:
    place, _, share = _share(label, ignore, weight)
    return -share * row_at(input, place), share


def _soft_term(input: Any, target: Any, weight: Any, smoothing: Any) -> tuple[Any, Any]:
    lse = row_logsumexp(input)
    if smoothing is not None:
        target = target * (1 - smoothing) + smoothing / row_size()
    return row_sum(target * _times(lse - input, weight)), lse


def _times(x: Any, weight: Any) -> Any:
    return x if weight is None else x * weight


def _share(label: Any, ignore: Any, weight: Any) -> tuple[Any, Any, Any]:
    """Where to read in a row, whether it counts, and how much; None where all rows count, as 1."""
    if ignore is None:
        return label, None, None if weight is None else row_at(weight, label)
    counted = ne(label, ignore)
    place = where(counted, label, 0)
    return place, counted, where(counted, 1.0 if weight is None else row_at(weight, place), 0.0)


def _row_loss(name: str, term: Any, doc: str, table: dict[tuple[str, ...], Any]) -> Variants:
    """A loss of rows, with the samples of those variants that are in the table of operations."""

    def make(absent: tuple[str, ...]) -> RowTotal:
        traced = trace(
            term, name, rows=["label"], labels=["label", "ignore"], scalars=["ignore", "smoothing"],
            columns=["weight"], absent=absent,
        )  # fmt: skip
        own, samples = table.get(absent, (name, []))
        return RowTotal(own, traced, samples, doc, "label" in names and not {"ignore", "weight"} <= set(absent),
                        register=bool(samples))  # fmt: skip

    names = tuple(inspect.signature(term).parameters)
    return Variants(names, make, tuple(table))


_labelled = [(S((5, 3)), class_indices((5,), 3)), (S((5, 3)), class_indices((5,), 3), {"mean": False}),
             (S((1, 4)), class_indices((1,), 4))]  # fmt: skip
_masked = [(S((6, 3)), class_indices((6,), 3), 1), (S((6, 3)), class_indices((6,), 3), 1, {"mean": False}),
           (S((5, 3)), class_indices((5,), 3), -100)]  # fmt: skip
_soft = [(S((5, 3)), S((5, 3), 0, 1)), (S((5, 3)), S((5, 3), 0, 1), {"mean": False})]
_entropy = _row_loss("cross_entropy", _entropy_term, "logsumexp(x) − x[label], x a row, without rows to ignore.", {
    ("ignore", "weight", "smoothing"): ("cross_entropy", _labelled),
    ("weight", "smoothing"): ("cross_entropy_masked", _masked),
})  # fmt: skip
_nll = _row_loss(
    "nll_loss", _nll_term, "−x[label], x a row of log-probabilities.", {("weight",): ("nll_loss", _masked)}
)
_soft_entropy = _row_loss("cross_entropy_soft", _soft_term, "Σ t (logsumexp(x) − x), x and t a row.", {
    ("weight", "smoothing"): ("cross_entropy_soft", _soft)
})  # fmt: skip


def _total(loss: Variants, inputs: tuple, classes: int, reduction: str) -> Any:
    """The loss in a reduction, `classes` being the dimension of the rows."""
    op, given = loss.of(inputs)
    axes = (classes,)
    if reduction == "none":
        return op.each(*given, axes=axes)
    mean = _is_mean(reduction)
    weight = inputs[loss.names.index("weight")]
    if op.weighted and mean and weight is not None and (weight._requires_grad or level_of(weight)):
        terms, shares = op.terms(*given, axes=axes)  # the sum of the weights has a gradient too
        return terms.sum() / shares.sum()
    return op(*given, mean=mean, axes=axes)


def _check_labels(name: str, input: Any, target: Any, weight: Any) -> None:
    if weight is not None:
        weight = as_operand(name, weight)
    if input._device is not target._device or weight is not None:
        check_devices(name, (input, target, weight), ("input", "target", "weight"))
    if input._data.shape[:1] == target._data.shape and input._data.ndim == 2 and target._data.dtype.kind == "i":
        return  # the common case
    if target.dtype.kind not in "iu":
        raise DtypeError(
            f"{name} takes class indices as integers, or probabilities of the shape of its input:\n  input   "
            f"{describe(input)}\n  target  {describe(target)}"
        )
    if (
        target.ndim != input.ndim - 1
        or target.shape[:1] != input.shape[: 1 if target.ndim else 0]
        or (tuple(target.shape[1:]) != tuple(input.shape[2:]))
    ):
        raise ShapeError(
            f"{name} takes input (N, C, *) and class indices (N, *):\n  input   {describe(input)}\n  target  "
            f"{describe(target)}"
        )


@function(nn=True)
def cross_entropy(
    input: Any, target: Any, weight: Any = None, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """The cross-entropy of softmax(input) with the target classes.

    input: (N, C, *) or (C,), unnormalised log-probabilities. target: class indices (N, *) int64, or probabilities of
    input's shape. weight: (C,), of each class. Rows with target ignore_index count nothing. label_smoothing moves that
    share of the target to all classes evenly. "mean" divides by the weights of the targets.
    Errors: IndexError for an index outside [0, C).
    """
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        raise TypeError(f"cross_entropy takes Tensors, got {type(input).__name__} and {type(target).__name__}.")
    if target._data.dtype.char in FLOATING:
        return _soft_cross_entropy(input, target, weight, reduction, label_smoothing)
    _check_labels("cross_entropy", input, target, weight)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is between 0 and 1, got {label_smoothing}.")
    classes = 1 if input.ndim > 1 else 0
    valid = input._device.backend.check_labels(whole(target), input.shape[classes], ignore_index)
    inputs = (input, target, None if valid else ignore_index, weight, label_smoothing or None)
    return _total(_entropy, inputs, classes, reduction)


def _soft_cross_entropy(input: Any, target: Any, weight: Any, reduction: str, label_smoothing: float) -> Any:
    _check_shapes("cross_entropy with probabilities", input, target, broadcast=False)
    inputs = (input, target, weight, label_smoothing or None)
    return _total(_soft_entropy, inputs, 1 if input.ndim > 1 else 0, reduction)


@function(nn=True)
def nll_loss(input: Any, target: Any, weight: Any = None, ignore_index: int = -100, reduction: str = "mean") -> Any:
    """−input[target] for rows of log-probabilities; arguments as of cross_entropy."""
    _check_labels("nll_loss", input, target, weight)
    classes = 1 if input.ndim > 1 else 0
    input._device.backend.check_labels(whole(target), input.shape[classes], ignore_index)
    return _total(_nll, (input, target, ignore_index, weight), classes, reduction)
