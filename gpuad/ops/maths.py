"""Elementary and special functions: each op is its formula."""

from __future__ import annotations

import math
from typing import Any

from gpuad.array import dtypes
from gpuad.autograd.elementwise import elementwise
from gpuad.autograd.op import function
from gpuad.kernels import scalar as f
from gpuad.ops.samples import S, binary, unary

exp = elementwise("exp", lambda input: f.exp(input), unary(), "e to the input.", in_place=True, autocast="float32")
exp2 = elementwise("exp2", lambda input: f.exp2(input), unary(), "2 to the input.")
expm1 = elementwise(
    "expm1", lambda input: f.expm1(input), unary(), "e to the input, minus 1, accurate near 0.", autocast="float32"
)
log = elementwise(
    "log", lambda input: f.log(input), unary(0.2, 3), "The natural logarithm.", in_place=True, autocast="float32"
)
log2 = elementwise("log2", lambda input: f.log2(input), unary(0.2, 3), "The logarithm to base 2.", autocast="float32")
log10 = elementwise(
    "log10", lambda input: f.log10(input), unary(0.2, 3), "The logarithm to base 10.", autocast="float32"
)
log1p = elementwise(
    "log1p", lambda input: f.log1p(input), unary(-0.5, 3), "log(1 + input), accurate near 0.", autocast="float32"
)
sqrt = elementwise("sqrt", lambda input: f.sqrt(input), unary(0.2, 3), "The square root.", in_place=True)
rsqrt = elementwise(
    "rsqrt", lambda input: f.rsqrt(input), unary(0.2, 3), "1 / sqrt(input).", in_place=True, autocast="float32"
)
sin = elementwise("sin", lambda input: f.sin(input), unary(), "The sine.", in_place=True)
cos = elementwise("cos", lambda input: f.cos(input), unary(), "The cosine.", in_place=True)
tan = elementwise("tan", lambda input: f.tan(input), unary(-1, 1), "The tangent.", autocast="float32")
asin = elementwise(
    "asin", lambda input: f.asin(input), unary(-0.8, 0.8), "The inverse sine.", aliases=["arcsin"], autocast="float32"
)
acos = elementwise(
    "acos", lambda input: f.acos(input), unary(-0.8, 0.8), "The inverse cosine.", aliases=["arccos"], autocast="float32"
)
atan = elementwise("atan", lambda input: f.atan(input), unary(), "The inverse tangent.", aliases=["arctan"])
atan2 = elementwise("atan2", lambda input, other: f.atan2(input, other), binary(0.5, 2),
                    "The angle of the point (other, input).", aliases=["arctan2"])  # fmt: skip
sinh = elementwise("sinh", lambda input: f.sinh(input), unary(), "The hyperbolic sine.", autocast="float32")
cosh = elementwise("cosh", lambda input: f.cosh(input), unary(), "The hyperbolic cosine.", autocast="float32")
tanh = elementwise("tanh", lambda input: f.tanh(input), unary(), "The hyperbolic tangent.", in_place=True)
asinh = elementwise("asinh", lambda input: f.asinh(input), unary(), "The inverse of sinh.", aliases=["arcsinh"])
acosh = elementwise("acosh", lambda input: f.acosh(input), unary(1.2, 3), "The inverse of cosh.", aliases=["arccosh"])
atanh = elementwise("atanh", lambda input: f.atanh(input), unary(-0.8, 0.8), "The inverse of tanh.",
                    aliases=["arctanh"])  # fmt: skip
floor = elementwise("floor", lambda input: f.floor(input), unary(0.1, 0.9), "Rounded down.", in_place=True)
ceil = elementwise("ceil", lambda input: f.ceil(input), unary(0.1, 0.9), "Rounded up.", in_place=True)
trunc = elementwise("trunc", lambda input: f.trunc(input), unary(0.1, 0.9), "Rounded to 0.", aliases=["fix"],
                    in_place=True)  # fmt: skip
frac = elementwise("frac", lambda input: input - f.trunc(input), unary(0.1, 0.9), "input − trunc(input).")
round_ = elementwise("round", lambda input: f.round(input), unary(0.6, 0.9), "Rounded to the nearest, halves to even.",
                     in_place=True)  # fmt: skip
erf = elementwise("erf", lambda input: f.erf(input), unary(), "The error function.")
erfc = elementwise("erfc", lambda input: f.erfc(input), unary(), "1 − erf(input), accurate for large input.")
erfinv = elementwise(
    "erfinv", lambda input: f.erfinv(input), unary(-0.8, 0.8), "The inverse of erf.", autocast="float32"
)
xlogy = elementwise("xlogy", lambda input, other: f.where(f.eq(input, 0), 0.0, input * f.log(other)), binary(0.5, 2),
                    "input · log(other), 0 where input is 0.")  # fmt: skip
logaddexp = elementwise(
    "logaddexp",
    lambda input, other: f.maximum(input, other) + f.log1p(f.exp(-f.abs(input - other))),
    [(S((3, 4), 0, 1), S((3, 4), 1.5, 2.5)), (S((3, 1), 2, 3), S((4,), 0, 1))],
    "log(exp(input) + exp(other)) without overflow.",
)
deg2rad = elementwise("deg2rad", lambda input: input * (math.pi / 180), unary(), "Degrees to radians.")
rad2deg = elementwise("rad2deg", lambda input: input * (180 / math.pi), unary(), "Radians to degrees.")
clamp_both = elementwise("clamp", lambda input, min, max: f.clamp(input, min, max), [(S((3, 4)), -10.0, 10.0),
                         (S((3, 4)), 0.0, 0.0)], "input, no less than min and no more than max.")  # fmt: skip
clamp_min = elementwise("clamp_min", lambda input, min: f.clamp(input, min, None), [(S((3, 4), 1, 2), 0.5),
                        (S((3, 4), 0, 1), S((4,), 1.5, 2))], "input, no less than min.", in_place=True)  # fmt: skip
clamp_max = elementwise("clamp_max", lambda input, max: f.clamp(input, None, max), [(S((3, 4), 1, 2), 0.5),
                        (S((3, 4), 0, 1), S((4,), 1.5, 2))], "input, no more than max.", in_place=True)  # fmt: skip
nan_to_num_ = elementwise(
    "nan_to_num", lambda input, nan, posinf, neginf: f.where(f.isnan(input), nan, f.where(input > posinf, posinf,
                                                             f.where(input < neginf, neginf, input))),
    [(S((3, 4)), 0.0, 1e30, -1e30)], "input with NaN and infinities replaced.",
)  # fmt: skip


@function(name="clamp", aliases=["clip"])
def clamp(input: Any, min: Any = None, max: Any = None) -> Any:
    """input, no less than min and no more than max; either may be None, a number or a Tensor.

    The derivative is 1 on the closed interval, 0 outside, as in PyTorch.
    """
    if min is None and max is None:
        raise ValueError("clamp() needs min or max (or both); both are None.")
    if max is None:
        return clamp_min(input, min)
    if min is None:
        return clamp_max(input, max)
    return clamp_both(input, min, max)


@function(name="round")
def round(input: Any, *, decimals: int = 0) -> Any:
    """Rounded to `decimals` places, halves to even; the derivative is 0. Integers are as they are."""
    if decimals == 0:
        return round_(input) if input.dtype.char in dtypes.FLOATING else input.clone()
    scale = 10.0**decimals
    return round_(input * scale) / scale


@function(name="nan_to_num")
def nan_to_num(input: Any, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Any:
    """NaN replaced by `nan`, infinities by posinf and neginf (the largest finite numbers unless given)."""
    if input.dtype.char not in dtypes.FLOATING:
        return input.clone()
    limit = float(dtypes.finfo(input.dtype).max)
    return nan_to_num_(input, nan, limit if posinf is None else posinf, -limit if neginf is None else neginf)
