"""Generic tests over the op table: every op, on each device, against NumPy, itself and finite differences.

An op brings its sample inputs (gpuad/ops/samples.py), so a new op is tested here without a line written here. Public
functions that are composed of ops follow in a second table, COMPOSED.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import scipy.special

import gpuad
from gpuad import Tensor
from gpuad.array.device import Device
from gpuad.autograd import backward, grad
from gpuad.autograd.forward import jvp
from gpuad.autograd.op import functions, table
from gpuad.ops.samples import HERE, Array, S, class_indices


class Composed:
    """A public function with samples, tested like an op."""

    def __init__(self, label: str, function, *samples: tuple) -> None:
        self.name, self.function, self.samples = label, function, samples

    def __call__(self, *inputs, **params):
        return self.function(*inputs, **params)

    def __repr__(self) -> str:
        return self.name


def composed(name: str, *samples: tuple) -> Composed:
    return Composed(name, functions[name], *samples)


MATRIX, VECTOR, STACK = S((3, 4)), S((4,)), S((2, 3, 4))
COMPOSED = [
    composed("sum", (MATRIX,), (MATRIX, {"dim": 1}), (STACK, {"dim": 1}), (STACK, {"dim": (0, -1), "keepdim": True}),
             (S(()),), (S((0, 3)), {"dim": 0})),
    composed("mean", (MATRIX,), (MATRIX, {"axis": 0}), (STACK, {"dim": (0, 2), "keepdims": True}), (S(()),)),
    composed("var", (MATRIX,), (MATRIX, {"dim": 0}), (STACK, {"dim": (1, 2), "correction": 0, "keepdim": True})),
    composed("std", (MATRIX,), (MATRIX, {"dim": 1, "unbiased": False})),
    composed("norm", (MATRIX,), (MATRIX, {"p": 1, "dim": 0}), (MATRIX, {"p": 3, "dim": 1}),
             (MATRIX, {"p": math.inf}), (MATRIX, {"p": -math.inf, "dim": 0, "keepdim": True})),
    composed("logsumexp", (MATRIX, {"dim": 1}), (STACK, {"dim": (0, 2), "keepdim": True})),
    composed("amax", (MATRIX, {"dim": (0, 1)}), (STACK, {"dim": 1, "keepdim": True})),
    composed("prod", (MATRIX,), (MATRIX, {"dim": 0}), (S((1, 3)), {"dim": 0, "keepdim": True})),
    composed("max", (MATRIX,), (MATRIX, {"dim": 1}), (MATRIX, {"dim": 0, "keepdim": True})),
    composed("min", (MATRIX,), (MATRIX, {"dim": -1})),
    composed("cumsum", (MATRIX, {"dim": 0}), (S((0, 2)), {"dim": 1})),
    composed("sort", (MATRIX,), (MATRIX, {"dim": 0, "descending": True})),
    composed("topk", (S((3, 5)), {"k": 2}), (MATRIX, {"k": 2, "dim": 0, "largest": False})),
    composed("clamp", (S((3, 4), -2, 2, (-0.5, 1)), {"min": -0.5, "max": 1.0}),
             (S((3, 4), -2, 2, (0.5,)), {"max": 0.5}), (S((3, 4), 0, 1), S((4,), 2, 3), S((3, 1), 4, 5))),
    composed("pow", (S((3, 4), 0.5, 2), 2), (S((3, 4), 0.5, 2), -0.5), (S((3, 4), 0.5, 2), 7), (2.0, MATRIX),
             (S((3, 4), -2, -1), 3), (S((3, 4), 0.5, 2), -2)),
    composed("add", (MATRIX, VECTOR, {"alpha": 0.5})),
    composed("sub", (MATRIX, 2.0, {"alpha": 3})),
    composed("masked_fill", (MATRIX, S((4,), kind="bool"), 0.5)),
    composed("matmul", (MATRIX, S((4, 2))), (MATRIX, VECTOR), (S((3,)), MATRIX), (VECTOR, S((4,))),
             (STACK, S((4, 5))), (S((2, 1, 3, 4)), S((3, 4, 2))), (VECTOR, S((2, 4, 3))), (S((2, 3, 4)), VECTOR),
             (S((0, 4)), S((4, 2))), (S((2, 3, 0)), S((0, 2)))),
    composed("addmm", (VECTOR, S((3, 2)), S((2, 4)), {"beta": 0.5, "alpha": 2})),
    composed("outer", (S((3,)), VECTOR)),
    composed("linear", (STACK, S((5, 4)), S((5,))), (VECTOR, S((5, 4)), S((5,))), (VECTOR, S((5, 4)))),
    composed("bilinear", (MATRIX, S((3, 5)), S((2, 4, 5)), S((2,)))),
    composed("flatten", (STACK, {"start_dim": 1}), (S(()),)),
    composed("squeeze", (S((2, 1, 3, 1)),), (S((2, 1, 3, 1)), {"dim": 1})),
    composed("unsqueeze", (MATRIX, {"dim": -1})),
    composed("movedim", (STACK, 0, -1), (STACK, (0, 2), (2, 0))),
    composed("repeat", (S((2, 3)), 2, 1, 2)),
    composed("tile", (S((2, 3)), 2)),
    composed("repeat_interleave", (S((2, 3)), 2, {"dim": 1}), (S((2, 3)), 2)),
    composed("split", (S((5, 2)), 2), (S((5, 2)), [1, 4])),
    composed("chunk", (S((2, 5)), 2, 1)),
    composed("unbind", (S((2, 3)),)),
    composed("roll", (MATRIX, 1), (MATRIX, (1, -2), (0, 1))),
    composed("diagonal", (S((3, 4)),), (S((2, 3, 4)), 1, 1, 2)),
    composed("diag", (S((3,)), 1), (S((3, 4)), -1)),
    composed("trace", (S((3, 3)),)),
    composed("lerp", (MATRIX, VECTOR, 0.25)),
    composed("softmax", (STACK, {"dim": 1}), (VECTOR, {"dim": 0}), (S((0, 3)), {"dim": 0})),
    composed("log_softmax", (STACK, {"dim": 0}), (MATRIX, {"dim": -1})),
    composed("softmin", (MATRIX, {"dim": 0})),
    composed("layer_norm", (STACK, (4,)), (STACK, (3, 4), S((3, 4)), S((3, 4))), (STACK, (4,), VECTOR),
             (STACK, (4,), None, VECTOR)),
    composed("rms_norm", (STACK, (4,)), (STACK, (3, 4), S((3, 4)))),
    composed("batch_norm", *((S((3, 4, 2)), None, None, weight, bias, True) for weight in (None, VECTOR)
                             for bias in (None, VECTOR)), (MATRIX, None, None, VECTOR, None),
             *((S((3, 4, 2)), VECTOR, S((4,), 0.5, 2), weight, bias) for weight in (None, VECTOR)
               for bias in (None, VECTOR))),
    composed("mse_loss", (MATRIX, MATRIX, "none"), (MATRIX, MATRIX, "sum")),
    composed("cross_entropy", (S((3, 4, 2)), class_indices((3, 2), 4)),
             (S((5, 3)), class_indices((5,), 3), S((3,), 0.5, 2), {"ignore_index": 1, "label_smoothing": 0.1}),
             (S((3,)), class_indices((), 3), S((3,), 0.5, 2)),
             (S((5, 3)), class_indices((5,), 3), {"reduction": "none"}), (S((5, 3)), S((5, 3), 0, 1)),
             (S((3,)), class_indices((), 3)),
             (S((2, 3, 4)), class_indices((2, 4), 3), S((3,), 0.5, 2), {"reduction": "none", "label_smoothing": 0.2}),
             (S((2, 3, 4)), class_indices((2, 4), 3), S((3,), 0.5, 2), {"reduction": "sum", "ignore_index": 0}),
             (S((2, 3, 4)), S((2, 3, 4), 0, 1), S((3,), 0.5, 2), {"label_smoothing": 0.2})),
    composed("nll_loss", (S((2, 3, 4)), class_indices((2, 4), 3), S((3,), 0.5, 2)),
             (S((5, 3)), class_indices((5,), 3), None, 1, "none")),
    composed("gelu", (MATRIX,), (MATRIX, "tanh")),
    Composed("stack", lambda *x, dim: gpuad.stack(x, dim), (VECTOR, VECTOR, {"dim": 0}), (MATRIX, MATRIX, {"dim": -1})),
    Composed("hstack", lambda *x: gpuad.hstack(x), (VECTOR, S((2,)))),
    Composed("vstack", lambda *x: gpuad.vstack(x), (VECTOR, MATRIX)),
    Composed("broadcast_tensors", gpuad.broadcast_tensors, (S((3, 1)), VECTOR)),
    Composed("indexing", lambda x: (x[1], x[..., 1:3], x[None, :, ::2], x[:, 0], x[-1, 2]), (MATRIX,)),
    Composed("advanced indexing", lambda x: (x[[0, 2, 0]], x[:, [1, 1]], x[[0, 1], [2, 2]], x[[[0], [1]], [0, 3]]),
             (MATRIX,)),
    Composed("assignment", lambda x, v: _assigned(x, v), (MATRIX, VECTOR)),
    Composed("in-place arithmetic", lambda x, v: x.clone().mul_(v).sin_().add_(x).exp_(), (MATRIX, VECTOR)),
    Composed("where", gpuad.where, (S((3, 1), kind="bool"), MATRIX, VECTOR)),
    Composed("to", lambda x: x.to(gpuad.float64) * 2, (MATRIX,)),
]  # fmt: skip


def _assigned(x: Tensor, value: Tensor) -> Tensor:
    y = x * 1
    y[1] = value
    y[:, 2] = 0.5
    y[[0, 2], [1, 3]] = value[:2] * x[0, 0]
    return y * y


EVERYTHING = [*table.values(), *COMPOSED]
# Derivatives of these are derivatives of noise: nothing is there to compare with finite differences.
NOT_SMOOTH: set[str] = set()


def ident(op) -> str:
    return op.name


# Building inputs ------------------------------------------------------------------------------------------------------


def draw(spec: S, generator: np.random.Generator) -> np.ndarray:
    if spec.kind == "bool":
        return generator.random(spec.shape) < 0.5
    if spec.kind == "int":
        return generator.integers(int(spec.low), int(spec.high), spec.shape)
    values = generator.uniform(spec.low, spec.high, spec.shape)
    for point in spec.avoid:
        near = np.abs(values - point) < 0.1
        values = np.where(near, point + np.where(values < point, -0.1, 0.1) + (values - point), values)
    return values


def place(values: np.ndarray, device: Device, dtype, layout: str = "plain") -> Tensor:
    """The values as a tensor; the other layouts than "plain" are other places in memory of the same values.

    "transposed": the dimensions in reverse; "permuted": the first one innermost; "strided": with gaps.
    """
    values = np.asarray(values, dtype if values.dtype.kind == "f" else None)
    if layout == "plain" or not values.ndim:
        return gpuad.tensor(values, device=device)
    if layout in ("transposed", "permuted"):
        order = tuple(range(values.ndim))
        order = order[::-1] if layout == "transposed" else (*order[1:], 0)
        return gpuad.tensor(values.transpose(order).copy(), device=device).permute(np.argsort(order)).detach()
    spread = np.full((*values.shape[:-1], 2 * values.shape[-1]), 7, values.dtype)
    spread[..., ::2] = values
    return gpuad.tensor(spread, device=device)[..., ::2].detach()


def resolve(x, device: Device):
    """Parameters of a sample with bare arrays and devices put in."""
    if isinstance(x, Array):
        return device.backend.asarray(np.asarray(x.values))
    if x is HERE:
        return device
    return tuple(resolve(e, device) for e in x) if type(x) is tuple else x


class Case:
    """An op with the inputs of one sample; `values` are those of its differentiable operands, in float64."""

    def __init__(self, op, sample: tuple, device: Device, dtype=np.float64, layout: str = "plain") -> None:
        self.op, self.device, self.dtype = op, device, np.dtype(dtype)
        entries, params = (sample[:-1], sample[-1]) if isinstance(sample[-1], dict) else (sample, {})
        self.params = {k: resolve(v, device) for k, v in params.items()}
        generator = np.random.default_rng(zlib.crc32(repr((op.name, sample)).encode()))
        self.entries: list = []
        self.values: list[np.ndarray] = []
        self.places: list[int] = []
        for i, entry in enumerate(entries):
            if not isinstance(entry, S):
                self.entries.append(resolve(entry, device))
                continue
            drawn = draw(entry, generator)
            if entry.kind == "float":
                drawn = drawn.astype(dtype).astype(np.float64)
                self.values.append(drawn)
                self.places.append(i)
            own = ("transposed", "plain")[i % 2] if layout == "mixed" else layout  # operands that disagree
            self.entries.append(place(drawn, device, dtype, own))
        self.generator = generator

    def __call__(self, *moving: Tensor) -> tuple[Tensor, ...]:
        """All outputs for given differentiable operands, a tuple."""
        inputs = list(self.entries)
        for i, x in zip(self.places, moving, strict=True):
            inputs[i] = x
        result = self.op(*inputs, **self.params)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def smooth(self, *moving: Tensor) -> tuple[Tensor, ...]:
        """The floating outputs, without those that are NaN for lack of elements."""
        return tuple(y for y in self(*moving) if y.is_floating_point() and not (y.ndim == 0 and np.isnan(host(y))))

    def leaves(self, requires_grad: bool = True) -> list[Tensor]:
        """The differentiable operands, as leaves of the layout asked for."""
        return [self.entries[i].detach().requires_grad_(requires_grad) for i in self.places]

    def like(self, tensors) -> list[Tensor]:
        """Random tensors with the shapes, dtypes and devices of others."""
        return [
            gpuad.tensor(self.generator.standard_normal(tuple(t.shape)).astype(t.dtype), device=t.device)
            for t in tensors
        ]

    def moved(self, directions, step: float) -> list[Tensor]:
        return [place(x + step * host(v), self.device, self.dtype) for x, v in zip(self.values, directions)]


def cases(op, device, dtype=np.float64, layout="plain"):
    return [Case(op, sample, device, dtype, layout) for sample in op.samples]


def host(t: Tensor) -> np.ndarray:
    return np.asarray(t.detach().cpu().numpy(), np.float64 if t.is_floating_point() else None)


def steps(x: Tensor | np.ndarray) -> tuple[int, ...]:
    """The strides, in elements, of the dimensions that have several entries; of an empty array none."""
    strides = x.stride() if isinstance(x, Tensor) else [s // x.itemsize for s in x.strides]
    return tuple(s for n, s in zip(x.shape, strides, strict=True) if n > 1) if math.prod(x.shape) else ()


def inner(us, vs) -> float:
    return sum(float(np.sum(host(u) * host(v))) for u, v in zip(us, vs, strict=True))


def weight(us, vs) -> float:
    """The size of the terms of an inner product: what its rounding error is relative to."""
    return sum(float(np.sum(np.abs(host(u) * host(v)))) for u, v in zip(us, vs, strict=True))


def assert_near(got: float, expected: float, scale: float, tolerance: float, what: str) -> None:
    assert abs(got - expected) <= tolerance * (scale + 1e-3), f"{what}: {got!r}, expected {expected!r}"


def differentiable(case: Case) -> bool:
    return bool(case.values) and any(y.requires_grad for y in case.smooth(*case.leaves()))


# The table itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", table.values(), ids=ident)
def test_op_brings_samples(op):
    assert len(op.samples) > 0, f"{op.name} is declared without samples, so nothing tests it; see gpuad/ops/samples.py"


@pytest.mark.parametrize("op", table.values(), ids=ident)
def test_op_is_documented(op):
    assert op.doc.strip().endswith(".")


# Values against NumPy -------------------------------------------------------------------------------------------------


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _softplus(x, beta=1.0, threshold=20.0):
    return np.where(beta * x > threshold, x, np.log1p(np.exp(np.minimum(beta * x, threshold))) / beta)


def _gelu(x):
    return x * scipy.special.ndtr(x)


REFERENCE = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
    "sign": np.sign, "floor_divide": np.floor_divide, "remainder": np.mod, "fmod": np.fmod, "pow": np.power,
    "square": np.square, "reciprocal": np.reciprocal, "maximum": np.maximum, "minimum": np.minimum, "hypot": np.hypot,
    "lerp": lambda a, b, w: a * (1 - w) + b * w, "addcmul": lambda x, a, b, v: x + v * a * b,
    "addcdiv": lambda x, a, b, v: x + v * a / b,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "isnan": np.isnan, "isinf": np.isinf, "isfinite": np.isfinite, "logical_not": np.logical_not,
    "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor, "where": np.where,
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log10": np.log10,
    "log1p": np.log1p, "sqrt": np.sqrt, "rsqrt": lambda x: x**-0.5, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "atan2": np.arctan2, "sinh": np.sinh, "cosh": np.cosh,
    "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "floor": np.floor,
    "ceil": np.ceil, "trunc": np.trunc, "frac": lambda x: x - np.trunc(x), "round": np.round,
    "erf": scipy.special.erf, "erfc": scipy.special.erfc, "erfinv": scipy.special.erfinv,
    "xlogy": scipy.special.xlogy, "logaddexp": np.logaddexp, "deg2rad": np.deg2rad, "rad2deg": np.rad2deg,
    "clamp": np.clip, "clamp_min": np.maximum, "clamp_max": np.minimum,
    "nan_to_num": lambda x, nan, high, low: np.nan_to_num(x, True, nan, high, low), "safe_sqrt": np.sqrt,
    "relu": lambda x: np.maximum(x, 0), "sigmoid": _sigmoid, "silu": lambda x: x * _sigmoid(x),
    "mish": lambda x: x * np.tanh(_softplus(x)), "softplus": _softplus, "gelu": _gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "elu": lambda x, a: np.where(x > 0, x, a * np.expm1(x)),
    "celu": lambda x, a: np.maximum(x, 0) + np.minimum(0, a * np.expm1(x / a)),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "leaky_relu": lambda x, a: np.where(x > 0, x, a * x), "prelu": lambda x, a: np.where(x > 0, x, a * x),
    "relu6": lambda x: np.clip(x, 0, 6), "hardtanh": np.clip, "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6, "softsign": lambda x: x / (1 + np.abs(x)),
    "tanhshrink": lambda x: x - np.tanh(x), "softshrink": lambda x, a: np.sign(x) * np.maximum(np.abs(x) - a, 0),
    "hardshrink": lambda x, a: np.where(np.abs(x) > a, x, 0), "threshold": lambda x, t, v: np.where(x > t, x, v),
    "logsigmoid": lambda x: -np.logaddexp(0, -x), "logit": scipy.special.logit,
    "clone": lambda x: x, "alias": lambda x: x, "cast": lambda x, dtype: x.astype(dtype),
    "move": lambda x, device, source: x,
    "sum": lambda x, axes, keepdims: np.sum(x, axes, keepdims=keepdims),
    "mean": lambda x, axes, keepdims, scale: np.sum(x, axes, keepdims=keepdims) * scale,
    "amax": lambda x, axes, keepdims: np.max(x, axes, keepdims=keepdims),
    "amin": lambda x, axes, keepdims: np.min(x, axes, keepdims=keepdims),
    "prod": lambda x, axes, keepdims: np.prod(x, axes, keepdims=keepdims),
    "cumsum": lambda x, dim, reverse: np.cumsum(x[_back(dim)], dim)[_back(dim)] if reverse else np.cumsum(x, dim),
    "reshape": lambda x, shape: np.reshape(x, shape), "permute": lambda x, dims: np.transpose(x, dims),
    "expand": lambda x, shape: np.broadcast_to(x, shape),
    "narrow": lambda x, dim, start, length: np.take(x, range(start, start + length), dim),
    "embed": lambda x, shape, dim, start: np.pad(
        x, [(start, n - start - x.shape[i]) if i == dim else (0, 0) for i, n in enumerate(shape)]
    ),
    "cat": lambda *x, dim: np.concatenate(x, dim), "flip": lambda x, dims: np.flip(x, dims),
    "roll": lambda x, shifts, dims: np.roll(x, shifts, dims),
    "trilangle": lambda x, diagonal: np.tril(x, diagonal), "triuangle": lambda x, diagonal: np.triu(x, diagonal),
    "tril": lambda x, diagonal: np.tril(x, diagonal), "triu": lambda x, diagonal: np.triu(x, diagonal),
    "diagonal": lambda x, offset: np.diagonal(x, offset, -2, -1),
    "softmax": lambda x: scipy.special.softmax(x, 1) if x.size else x,
    "log_softmax": lambda x: scipy.special.log_softmax(x, 1) if x.size else x,
    "normalise": lambda x, e: (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + e),
    "rms_normalise": lambda x, e: x / np.sqrt(np.mean(x * x, 1, keepdims=True) + e),
    "cross_entropy": lambda x, label, mean=True: _picked(-scipy.special.log_softmax(x, 1), label, mean),
    "cross_entropy_masked": lambda x, label, ignore, mean=True: _picked(
        -scipy.special.log_softmax(x, 1)[label != ignore], label[label != ignore], mean
    ),
    "nll_loss": lambda x, label, ignore, mean=True: _picked(-x[label != ignore], label[label != ignore], mean),
    "embedding": lambda x, index, padding: x[index],
    "slice": lambda x, key: x[key], "index": lambda x, key: x[key],
    "gather": lambda x, index, dim: np.take_along_axis(x, index, dim),
    "gemm": np.matmul, "linear": lambda x, w, b=None: x @ w.T + (0 if b is None else b),
}  # fmt: skip


def _picked(x, label, mean: bool):
    picked = x[np.arange(len(x)), label]
    return picked.mean() if mean else picked.sum()


def _back(dim: int):
    return (slice(None),) * dim + (slice(None, None, -1),)


REFERENCED = [op for op in table.values() if op.name in REFERENCE]
TOLERANCE = {np.float64: 1e-12, np.float32: 3e-6, np.float16: 4e-3}


def check_forward(case: Case, tolerance: float) -> None:
    def plain(x):
        return host(x) if isinstance(x, Tensor) else x.get() if hasattr(x, "get") else x

    inputs = [plain(x) for x in case.entries]
    params = {k: tuple(map(plain, v)) if type(v) is tuple else plain(v) for k, v in case.params.items()}
    (got,) = case(*case.leaves(False))
    expected = np.asarray(REFERENCE[case.op.name](*inputs, **params))
    assert tuple(got.shape) == expected.shape
    assert got.dtype == (np.bool_ if expected.dtype == np.bool_ else case.params.get("dtype", case.dtype))
    size = np.max(np.abs(expected), initial=1.0) if expected.dtype.kind == "f" else 1.0
    np.testing.assert_allclose(host(got), expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("op", REFERENCED, ids=ident)
def test_forward_is_numpys(op, device, dtype):
    for layout in ("plain", "transposed", "strided"):
        for case in cases(op, device, dtype, layout):
            check_forward(case, TOLERANCE[dtype])


@pytest.mark.parametrize("op", REFERENCED, ids=ident)
def test_forward_in_float16(op, device):
    for case in cases(op, device, np.float16):
        check_forward(case, TOLERANCE[np.float16])


def test_most_ops_have_a_reference():
    without = [op.name for op in table.values() if op.name not in REFERENCE]
    assert len(without) <= 0.25 * len(table), without


# First derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_vjp_agrees_with_jvp(op, device, dtype):
    """<v, Jᵀu> = <Jv, u>; layouts give the same numbers."""
    for layout in ("plain", "transposed", "strided"):
        for case in cases(op, device, dtype, layout):
            leaves = case.leaves()
            outs = [y for y in case.smooth(*leaves) if y.requires_grad]
            if not outs:
                continue
            us, vs = case.like(outs), case.like(leaves)
            gradients = grad(outs, leaves, us, materialize_grads=True)
            for x, g in zip(leaves, gradients, strict=True):
                assert (g.shape, g.dtype, g.device) == (x.shape, x.dtype, x.device)
            values, tangents = jvp(case.smooth, case.leaves(False), vs)
            for y, value, tangent in zip(outs, values, tangents, strict=True):
                assert (tangent.shape, tangent.dtype) == (y.shape, y.dtype)
                np.testing.assert_allclose(host(value), host(y), rtol=1e-5 if dtype is np.float32 else 1e-13,
                                           atol=1e-6 if dtype is np.float32 else 1e-13)  # fmt: skip
            scale = weight(vs, gradients) + weight(tangents, us)
            tolerance = 1e-11 if dtype is np.float64 else 2e-5
            assert_near(inner(tangents, us), inner(vs, gradients), scale, tolerance, f"{op} {layout}")


@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_gradient_is_that_of_finite_differences(op, device):
    step = 1e-6
    for case in cases(op, device):
        leaves = case.leaves()
        outs = [y for y in case.smooth(*leaves) if y.requires_grad]
        if not outs or op.name in NOT_SMOOTH:
            continue
        us, vs = case.like(outs), case.like(leaves)
        gradients = grad(outs, leaves, us, materialize_grads=True)
        above, below = (inner(case.smooth(*case.moved(vs, s)), us) for s in (step, -step))
        scale = weight(vs, gradients) + weight(outs, us)
        assert_near(inner(vs, gradients), (above - below) / (2 * step), scale, 2e-8, f"{op}")


@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_one_input_at_a_time(op, device):
    """The gradient of one operand alone is the one computed beside the others'."""
    for case in cases(op, device):
        leaves = case.leaves()
        if len(leaves) < 2 or not differentiable(case):
            continue
        us = case.like(case.smooth(*leaves))
        together = grad(case.smooth(*leaves), leaves, us, materialize_grads=True)
        for i, expected in enumerate(together):
            alone = [x.detach().requires_grad_(k == i) for k, x in enumerate(leaves)]
            outs = [(y, u) for y, u in zip(case.smooth(*alone), us, strict=True) if y.requires_grad]
            if not outs:
                continue
            (got,) = grad([y for y, _ in outs], [alone[i]], [u for _, u in outs], materialize_grads=True)
            np.testing.assert_allclose(host(got), host(expected), rtol=1e-12, atol=1e-13)


# Second derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_second_derivatives_agree(op, device):
    """D²f[v, w] weighted by u: each of reverse and forward over each of reverse and forward."""
    step = 1e-6
    for case in cases(op, device):
        if not differentiable(case) or op.name in NOT_SMOOTH:
            continue
        leaves = case.leaves()
        outs = case.smooth(*leaves)
        us, vs, ws = case.like(outs), case.like(leaves), case.like(leaves)

        def gradient(*xs, u=us, case=case):
            return grad(case.smooth(*xs), xs, u, create_graph=True, materialize_grads=True)

        for u in us:
            u.requires_grad_()
        first = gradient(*leaves)
        recorded = [(g, w) for g, w in zip(first, ws, strict=True) if g.requires_grad]
        over_reverse = grad(
            [g for g, _ in recorded], [*leaves, *us], [w for _, w in recorded], materialize_grads=True
        ) if recorded else [gpuad.zeros_like(x) for x in (*leaves, *us)]  # fmt: skip
        hessian_w, jacobian_w = over_reverse[: len(leaves)], over_reverse[len(leaves) :]
        us = [u.detach() for u in us]
        # The gradient is linear in u, so its derivative for u is the forward derivative along w.
        _, tangents = jvp(case.smooth, case.leaves(False), ws)
        scale = weight(tangents, us) + weight(first, vs)
        assert_near(inner(jacobian_w, us), inner(tangents, us), scale, 1e-10, f"{op}: derivative for the cotangent")
        expected = inner(hessian_w, vs)
        scale = weight(hessian_w, vs) + weight(first, vs)

        _, changed = jvp(lambda *xs, f=gradient, u=us: f(*xs, u=u), leaves, vs)
        assert_near(inner(changed, ws), expected, scale, 1e-10, f"{op}: forward over reverse")

        _, tangents = jvp(case.smooth, leaves, vs)
        moving = [(t, u) for t, u in zip(tangents, us, strict=True) if t.requires_grad]
        over_forward = grad([t for t, _ in moving], leaves, [u for _, u in moving], materialize_grads=True)
        assert_near(inner(over_forward, ws), expected, scale, 1e-10, f"{op}: reverse over forward")

        def along(*xs, case=case, vs=vs):
            return jvp(case.smooth, xs, vs)[1]

        _, twice = jvp(along, case.leaves(False), ws)
        assert_near(inner(twice, us), expected, scale, 1e-10, f"{op}: forward over forward")

        sides = []
        for s in (step, -step):
            xs = [x.requires_grad_() for x in case.moved(vs, s)]
            sides.append(inner(grad(case.smooth(*xs), xs, us, materialize_grads=True), ws))
        assert_near(expected, (sides[0] - sides[1]) / (2 * step), scale, 5e-8, f"{op}: finite differences")


# What an incoming gradient must survive -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_incoming_gradient_is_only_read(op, device):
    """A cotangent of stride 0, shared by two branches and handed over by the user, is neither written nor kept."""
    for case in cases(op, device):
        if not differentiable(case):
            continue
        leaves = case.leaves()
        outs = [y for y in case.smooth(*leaves) if y.requires_grad]
        expanded = [gpuad.tensor(1.5, dtype=y.dtype, device=y.device).expand(y.shape) for y in outs]
        dense = [u.clone() for u in expanded]
        expected = grad(outs, leaves, dense, materialize_grads=True)
        once = case.smooth(*leaves), case.smooth(*leaves)
        both = [a + b for a, b in zip(*once, strict=True)]
        for given in (dense, expanded, dense):  # the third time the gradients are added to what is there
            for x in leaves:
                x.grad = None
            backward(both, given, retain_graph=True)
            for x, g in zip(leaves, expected, strict=True):
                if x.grad is not None:
                    np.testing.assert_allclose(host(x.grad), 2 * host(g), rtol=1e-12, atol=1e-13)
                    with gpuad.no_grad():
                        x.grad.mul_(3)  # .grad is the leaf's own: writing to it changes nobody else's
            for u in given:
                assert (host(u) == 1.5).all()


@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_inputs_are_not_written(op, device):
    for case in cases(op, device):
        leaves = case.leaves()
        before = [host(x).copy() for x in leaves]
        outs = [y for y in case.smooth(*leaves) if y.requires_grad]
        if outs:
            grad(outs, leaves, case.like(outs), materialize_grads=True)
        for x, values in zip(leaves, before, strict=True):
            np.testing.assert_array_equal(host(x), values)
            assert x._version == 0
