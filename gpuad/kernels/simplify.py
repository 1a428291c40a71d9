"""Rules that make an expression simpler as it is built.

Every rule keeps the value for all finite arguments; rounding may change by reassociating constants (c1 (c2 x)).
Rules that would hide a NaN or an infinity of the user's own (0 x = 0) are left out: `derive.py` has them for partials
that are zero by structure.
"""

from __future__ import annotations

import math

from gpuad.kernels.expr import SIMPLIFIERS, Constant, Expr, constant
from gpuad.kernels.scalar import add, div, mul, neg, pow, sqrt, sub, where


def _value(node: Expr) -> float | int | bool | None:
    return node.value if isinstance(node, Constant) else None


def _fold(*values: float | int | bool | None) -> bool:
    return all(v is not None for v in values)


def _is(node: Expr, name: str) -> bool:
    return node.function.name == name


def _simplify_add(a: Expr, b: Expr) -> Expr | None:
    x, y = _value(a), _value(b)
    if x is not None and y is not None:
        return constant(x + y)
    if x is not None:
        a, b, x, y = b, a, y, x
    if y == 0 and y is not None:
        return a
    if _is(b, "neg"):
        return sub(a, b.args[0])
    if _is(a, "neg"):
        return sub(b, a.args[0])
    if a is b:
        return mul(a, 2)
    for one, other in ((a, b), (b, a)):  # c x + x = (c + 1) x
        if _is(one, "mul") and (one.args[0] is other or one.args[1] is other):
            factor = _value(one.args[0] if one.args[1] is other else one.args[1])
            if factor is not None:
                return mul(other, factor + 1)
    return None


def _simplify_sub(a: Expr, b: Expr) -> Expr | None:
    x, y = _value(a), _value(b)
    if x is not None and y is not None:
        return constant(x - y)
    if y == 0 and y is not None:
        return a
    if x == 0 and x is not None:
        return neg(b)
    if _is(b, "neg"):
        return add(a, b.args[0])
    return None


def _simplify_mul(a: Expr, b: Expr) -> Expr | None:
    x, y = _value(a), _value(b)
    if x is not None and y is not None:
        return constant(x * y)
    if x is not None:
        a, b, x, y = b, a, y, x
    if y is not None and not isinstance(y, bool):
        if y == 1:
            return a
        if y == -1:
            return neg(a)
        if _is(a, "neg"):
            return mul(a.args[0], -y)
        if _is(a, "mul"):
            inner = [_value(arg) for arg in a.args]
            for i in (0, 1):
                if inner[i] is not None:
                    return mul(a.args[1 - i], inner[i] * y)  # type: ignore[operator]
    # (c a) b is c (a b): constants move outwards, where they meet and merge. Large and small ones may be there to
    # keep a product in range, so they stay where they were put.
    for one, other in ((a, b), (b, a)):
        if _is(one, "mul") and y is None:
            for i in (0, 1):
                factor = _value(one.args[i])
                if factor is not None and 1e-3 <= abs(factor) <= 1e3:
                    return mul(mul(one.args[1 - i], other), factor)
    if _is(a, "neg") and _is(b, "neg"):
        return mul(a.args[0], b.args[0])
    if _is(a, "neg"):
        return neg(mul(a.args[0], b))
    if _is(b, "neg"):
        return neg(mul(a, b.args[0]))
    # a (1 / b) is a / b: one operation and one rounding less.
    for one, other in ((a, b), (b, a)):
        if _is(one, "div") and _value(one.args[0]) == 1:
            return div(other, one.args[1])
    return None


def _simplify_div(a: Expr, b: Expr) -> Expr | None:
    x, y = _value(a), _value(b)
    if x is not None and y:
        return constant(x / y)
    if y is not None and not isinstance(y, bool):
        if y == 1:
            return None if isinstance(a, Constant) else mul(a, 1.0)
        if y and math.frexp(y)[0] in (0.5, -0.5):  # dividing by a power of two is exact as a product
            return mul(a, 1 / y)
    if _is(a, "neg"):
        return neg(div(a.args[0], b))
    if _is(b, "neg"):
        return neg(div(a, b.args[0]))
    return None


def _simplify_neg(a: Expr) -> Expr | None:
    if isinstance(a, Constant):
        return constant(-a.value)
    if _is(a, "neg"):
        return a.args[0]
    if _is(a, "sub"):
        return sub(a.args[1], a.args[0])
    if _is(a, "mul"):
        for i in (0, 1):
            factor = _value(a.args[i])
            if factor is not None:
                return mul(a.args[1 - i], -factor)
    return None


def _simplify_pow(a: Expr, b: Expr) -> Expr | None:
    exponent = _value(b)
    if exponent is None or isinstance(exponent, bool):
        return None
    if _value(a) is not None:
        return None
    if exponent == 0.5:
        return sqrt(a)
    if exponent == -0.5:
        return div(1.0, sqrt(a))
    if exponent != int(exponent) or not -8 <= exponent <= 8:
        return None
    n = int(exponent)
    if n < 0:
        return div(1.0, pow(a, -n))
    if n == 0:
        return None
    # By squaring: x^n in at most 2 log2 n products, shared between powers of the same base.
    result, base = None, a
    while n:
        if n & 1:
            result = base if result is None else mul(result, base)
        n >>= 1
        if n:
            base = mul(base, base)
    return result


def _simplify_where(c: Expr, a: Expr, b: Expr) -> Expr | None:
    if a is b:
        return a
    chosen = _value(c)
    if chosen is not None:
        return a if chosen else b
    if _is(c, "logical_not"):
        return where(c.args[0], b, a)
    return None


def _simplify_not(a: Expr) -> Expr | None:
    return a.args[0] if _is(a, "logical_not") else None


SIMPLIFIERS.update(
    add=_simplify_add,
    sub=_simplify_sub,
    mul=_simplify_mul,
    div=_simplify_div,
    neg=_simplify_neg,
    pow=_simplify_pow,
    where=_simplify_where,
    logical_not=_simplify_not,
)
