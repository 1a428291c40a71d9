"""The scalar functions that formulas are made of: for each its ufunc, its CUDA expression and its partials.

This is the one table of elementary derivatives in gpuad; everything else is derived from it by the chain rule.
Partials are functions of the arguments and the result `y`; they prefer `y` where it saves keeping the arguments.
Sources: Abramowitz & Stegun 4.2 to 4.6, 6.3, 7.1; ties and ends of domains as in PyTorch's derivatives.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuad.kernels.expr import METHODS, Expr, ScalarFunction, as_expr, constant, intern

FUNCTIONS: dict[str, ScalarFunction] = {}


class SpecialFunction:
    """A ufunc of scipy.special, imported when a formula first runs on it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def resolve(self) -> Callable:
        import scipy.special

        return getattr(scipy.special, self.name)


def _declare(
    name: str, numpy: Any, cuda: str, *partials: Callable | None, result: str = "same", **more: Any
) -> ScalarFunction:
    made = ScalarFunction(name, numpy, cuda, partials, result, **more)
    FUNCTIONS[name] = METHODS[name] = made
    return made


# Arithmetic -----------------------------------------------------------------------------------------------------------
add = _declare("add", np.add, "({0} + {1})", lambda a, b, y: constant(1), lambda a, b, y: constant(1))
sub = _declare("sub", np.subtract, "({0} - {1})", lambda a, b, y: constant(1), lambda a, b, y: constant(-1))
mul = _declare("mul", np.multiply, "({0} * {1})", lambda a, b, y: b, lambda a, b, y: a)
div = _declare("div", np.divide, "({0} / {1})", lambda a, b, y: 1 / b, lambda a, b, y: -y / b, result="float")
neg = _declare("neg", np.negative, "(-{0})", lambda a, y: constant(-1))
abs = _declare("abs", np.absolute, "({0} < ({T})(0) ? -{0} : {0})", lambda a, y: sign(a))
sign: ScalarFunction = _declare("sign", None, "(({T})({0} > ({T})(0)) - ({T})({0} < ({T})(0)))", None,
                                lowered=lambda a: where(a > 0, 1, where(a < 0, -1, 0)))  # fmt: skip
floor_divide = _declare("floor_divide", np.floor_divide, "gpuad_floor_divide({0}, {1})", None, None)
remainder = _declare("remainder", np.remainder, "gpuad_remainder({0}, {1})",
                     lambda a, b, y: constant(1), lambda a, b, y: -floor_divide(a, b))  # fmt: skip
fmod = _declare("fmod", np.fmod, "gpuad_fmod({0}, {1})", lambda a, b, y: constant(1), lambda a, b, y: -trunc(a / b))
pow: ScalarFunction = _declare(
    "pow", np.power, "gpuad_pow({0}, {1})",
    lambda a, b, y: where(b == 0, 0.0, b * pow(a, b - 1)),
    lambda a, b, y: where((a == 0) & (b >= 0), 0.0, y * log(a)),
)  # fmt: skip
maximum = _declare("maximum", np.maximum, "gpuad_maximum({0}, {1})",
                   lambda a, b, y: where(a > b, 1.0, where(a == b, 0.5, 0.0)),
                   lambda a, b, y: where(b > a, 1.0, where(a == b, 0.5, 0.0)))  # fmt: skip
minimum = _declare("minimum", np.minimum, "gpuad_minimum({0}, {1})",
                   lambda a, b, y: where(a < b, 1.0, where(a == b, 0.5, 0.0)),
                   lambda a, b, y: where(b < a, 1.0, where(a == b, 0.5, 0.0)))  # fmt: skip
relu = _declare("relu", None, "({0} <= ({T})(0) ? ({T})(0) : {0})",
                lambda a, y: where(y > 0, 1.0, 0.0), lowered=lambda a: maximum(a, 0))  # fmt: skip

# Conditions -----------------------------------------------------------------------------------------------------------
where: ScalarFunction = _declare(
    "where", np.where, "({0} ? {1} : {2})",
    None, lambda c, a, b, y: where(c, 1.0, 0.0), lambda c, a, b, y: where(c, 0.0, 1.0),
)  # fmt: skip
lt = _declare("lt", np.less, "({0} < {1})", None, None, result="bool")
le = _declare("le", np.less_equal, "({0} <= {1})", None, None, result="bool")
gt = _declare("gt", np.greater, "({0} > {1})", None, None, result="bool")
ge = _declare("ge", np.greater_equal, "({0} >= {1})", None, None, result="bool")
eq = _declare("eq", np.equal, "({0} == {1})", None, None, result="bool")
ne = _declare("ne", np.not_equal, "({0} != {1})", None, None, result="bool")
logical_and = _declare("logical_and", np.logical_and, "({0} && {1})", None, None, result="bool")
logical_or = _declare("logical_or", np.logical_or, "({0} || {1})", None, None, result="bool")
logical_xor = _declare("logical_xor", np.logical_xor, "(bool({0}) != bool({1}))", None, None, result="bool")
logical_not = _declare("logical_not", np.logical_not, "(!{0})", None, result="bool")
isnan = _declare("isnan", np.isnan, "gpuad_isnan({0})", None, result="bool")
isinf = _declare("isinf", np.isinf, "gpuad_isinf({0})", None, result="bool")
isfinite = _declare("isfinite", np.isfinite, "gpuad_isfinite({0})", None, result="bool")

# Rounding -------------------------------------------------------------------------------------------------------------
floor = _declare("floor", np.floor, "gpuad_floor({0})", None)
ceil = _declare("ceil", np.ceil, "gpuad_ceil({0})", None)
trunc: ScalarFunction = _declare("trunc", np.trunc, "gpuad_trunc({0})", None)
round = _declare("round", np.rint, "gpuad_rint({0})", None)

# Powers and exponentials ----------------------------------------------------------------------------------------------
sqrt = _declare("sqrt", np.sqrt, "sqrt({0})", lambda a, y: 0.5 / y, result="float")
rsqrt = _declare("rsqrt", None, "rsqrt({0})", lambda a, y: -0.5 * y * y * y, result="float",
                 lowered=lambda a: 1 / sqrt(a))  # fmt: skip
exp = _declare("exp", np.exp, "exp({0})", lambda a, y: y, result="float")
exp2 = _declare("exp2", np.exp2, "exp2({0})", lambda a, y: y * math.log(2), result="float")
expm1 = _declare("expm1", np.expm1, "expm1({0})", lambda a, y: y + 1, result="float")
log: ScalarFunction = _declare("log", np.log, "log({0})", lambda a, y: 1 / a, result="float")
log2 = _declare("log2", np.log2, "log2({0})", lambda a, y: (1 / math.log(2)) / a, result="float")
log10 = _declare("log10", np.log10, "log10({0})", lambda a, y: (1 / math.log(10)) / a, result="float")
log1p = _declare("log1p", np.log1p, "log1p({0})", lambda a, y: 1 / (a + 1), result="float")

# Trigonometric and hyperbolic -----------------------------------------------------------------------------------------
sin = _declare("sin", np.sin, "sin({0})", lambda a, y: cos(a), result="float")
cos: ScalarFunction = _declare("cos", np.cos, "cos({0})", lambda a, y: -sin(a), result="float")
tan = _declare("tan", np.tan, "tan({0})", lambda a, y: y * y + 1, result="float")
asin = _declare("asin", np.arcsin, "asin({0})", lambda a, y: rsqrt(1 - a * a), result="float")
acos = _declare("acos", np.arccos, "acos({0})", lambda a, y: -rsqrt(1 - a * a), result="float")
atan = _declare("atan", np.arctan, "atan({0})", lambda a, y: 1 / (a * a + 1), result="float")
atan2 = _declare("atan2", np.arctan2, "atan2({0}, {1})",
                 lambda a, b, y: b / (a * a + b * b), lambda a, b, y: -a / (a * a + b * b), result="float")  # fmt: skip
sinh = _declare("sinh", np.sinh, "sinh({0})", lambda a, y: cosh(a), result="float")
cosh: ScalarFunction = _declare("cosh", np.cosh, "cosh({0})", lambda a, y: sinh(a), result="float")
tanh = _declare("tanh", np.tanh, "tanh({0})", lambda a, y: 1 - y * y, result="float")
asinh = _declare("asinh", np.arcsinh, "asinh({0})", lambda a, y: rsqrt(a * a + 1), result="float")
acosh = _declare("acosh", np.arccosh, "acosh({0})", lambda a, y: rsqrt((a - 1) * (a + 1)), result="float")
atanh = _declare("atanh", np.arctanh, "atanh({0})", lambda a, y: 1 / (1 - a * a), result="float")
hypot = _declare("hypot", np.hypot, "hypot({0}, {1})", lambda a, b, y: a / y, lambda a, b, y: b / y, result="float")
sigmoid = _declare("sigmoid", None, "({T}(1) / ({T}(1) + exp(-{0})))", lambda a, y: (1 - y) * y, result="float",
                   lowered=lambda a: 1 / (exp(-a) + 1))  # fmt: skip

# Special functions ----------------------------------------------------------------------------------------------------
erf = _declare("erf", SpecialFunction("erf"), "erf({0})",
               lambda a, y: (2 / math.sqrt(math.pi)) * exp(-(a * a)), result="float")  # fmt: skip
erfc = _declare("erfc", SpecialFunction("erfc"), "erfc({0})",
                lambda a, y: (-2 / math.sqrt(math.pi)) * exp(-(a * a)), result="float")  # fmt: skip
erfinv = _declare("erfinv", SpecialFunction("erfinv"), "erfinv({0})",
                  lambda a, y: (math.sqrt(math.pi) / 2) * exp(y * y), result="float")  # fmt: skip

# Constant in every derivative (its argument is treated as data) -------------------------------------------------------
stop = _declare("stop", np.positive, "({0})", None)

# Across a row: used by row formulas only (kernels/rows_numpy.py, kernels/rows_cuda.py); partials are for one element --
row_sum = _declare("row_sum", None, "", lambda a, y: constant(1.0), across="row")
row_max = _declare("row_max", None, "", None, across="row")
row_logsumexp = _declare("row_logsumexp", None, "", lambda a, y: exp(a - y), across="row")
row_at = _declare("row_at", None, "", None, None, across="row")  # the element at a position; its rules are in derive.py
column = ScalarFunction("column", None, "", across="column")
row_length = ScalarFunction("row_length", None, "", across="length")


def column_index() -> Expr:
    """The position of an element in its row, 0 to row_size() − 1."""
    return intern(column, ())


def row_size() -> Expr:
    """The number of elements in a row."""
    return intern(row_length, ())


def row_mean(a: Any) -> Expr:
    """The mean of a row."""
    return row_sum(a) / row_size()


def square(a: Any) -> Expr:
    """a · a."""
    a = as_expr(a)
    return mul(a, a)


def reciprocal(a: Any) -> Expr:
    """1 / a."""
    return div(1, a)


def clamp(a: Any, low: Any = None, high: Any = None) -> Expr:
    """a, no less than low and no more than high; the derivative is 1 on both ends, as in PyTorch."""
    y = as_expr(a)
    if low is not None:
        y = where(y < low, low, y)
    if high is not None:
        y = where(y > high, high, y)
    return y


METHODS.update({"square": square, "reciprocal": reciprocal, "clamp": clamp, "clip": clamp})
