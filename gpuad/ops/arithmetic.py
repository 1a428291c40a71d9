"""Arithmetic, comparison and selection: each op is its formula."""

from __future__ import annotations

from typing import Any

from gpuad.array.dtypes import FLOATING
from gpuad.autograd.elementwise import Elementwise, elementwise
from gpuad.autograd.op import Op, function
from gpuad.kernels import scalar as f
from gpuad.ops.samples import S, binary, unary
from gpuad.tensor import Tensor

add_ = elementwise("add", lambda input, other: input + other, binary(), "input + other.", operator="add")
sub_ = elementwise(
    "sub", lambda input, other: input - other, binary(), "input − other.", operator="sub", aliases=["subtract"]
)
mul = elementwise(
    "mul", lambda input, other: input * other, binary(), "input · other.", operator="mul", aliases=["multiply"]
)
div_ = elementwise("div", lambda input, other: input / other, binary(0.5, 2.0), "input / other; integers give floats.",
                   operator="truediv")  # fmt: skip
neg = elementwise("neg", lambda input: -input, unary(), "−input.", aliases=["negative"], in_place=True)
abs = elementwise("abs", lambda input: f.abs(input), unary(-2, 2, 0), "|input|; the derivative at 0 is 0.",
                  aliases=["absolute"], in_place=True)  # fmt: skip
sign = elementwise("sign", lambda input: f.sign(input), unary(-2, 2, 0), "−1, 0 or 1.", in_place=True)
floor_divide = elementwise(
    "floor_divide", lambda input, other: f.floor_divide(input, other), [(S((3, 4), 2.1, 2.9), S((3, 4), 0.6, 0.9))],
    "The floor of input / other.", operator="floordiv",
)  # fmt: skip
remainder = elementwise(
    "remainder", lambda input, other: f.remainder(input, other), [(S((3, 4), 2.1, 2.4), S((3, 4), 0.85, 0.95))],
    "input − other · floor(input / other): the sign of other, as Python's %.", operator="mod",
)  # fmt: skip
fmod = elementwise("fmod", lambda input, other: f.fmod(input, other), [(S((3, 4), 2.1, 2.4), S((3, 4), 0.85, 0.95))],
                   "The remainder with the sign of input, as C's fmod.")  # fmt: skip
power = elementwise(
    "pow",
    lambda input, exponent: f.pow(input, exponent),
    binary(0.5, 2.0),
    "input to the exponent.",
    autocast="float32",
)
square = elementwise("square", lambda input: f.square(input), unary(), "input · input.", in_place=True)
reciprocal = elementwise(
    "reciprocal", lambda input: 1 / input, unary(0.5, 2), "1 / input.", in_place=True, autocast="float32"
)
maximum = elementwise("maximum", lambda input, other: f.maximum(input, other), [(S((3, 4), 1, 2), S((3, 4), -1, 0)),
                      (S((3, 4), -1, 0), S((4,), 1, 2))],
                      "The larger; NaN wins; ties share the gradient.")  # fmt: skip
minimum = elementwise("minimum", lambda input, other: f.minimum(input, other), [(S((3, 4), 1, 2), S((3, 4), -1, 0)),
                      (S((3, 4), -1, 0), S((4,), 1, 2))],
                      "The smaller; NaN wins; ties share the gradient.")  # fmt: skip
hypot = elementwise("hypot", lambda input, other: f.hypot(input, other), binary(0.5, 2), "sqrt(input² + other²).")
lerp = elementwise("lerp", lambda input, end, weight: input + weight * (end - input),
                   [(S((3, 4)), S((3, 4)), 0.3), (S((3, 4)), S((4,)), S((3, 4)))],
                   "input + weight (end − input).", in_place=True)  # fmt: skip
addcmul = elementwise("addcmul", lambda input, tensor1, tensor2, value=1: input + value * (tensor1 * tensor2),
                      [(S((3, 4)), S((3, 4)), S((4,)), 0.5)], "input + value · tensor1 · tensor2.",
                      in_place=True)  # fmt: skip
addcdiv = elementwise("addcdiv", lambda input, tensor1, tensor2, value=1: input + value * (tensor1 / tensor2),
                      [(S((3, 4)), S((3, 4)), S((4,), 0.5, 2), 0.5)], "input + value · tensor1 / tensor2.",
                      in_place=True)  # fmt: skip

lt = elementwise("lt", lambda input, other: input < other, binary(), "input < other, bool.", aliases=["less"])
le = elementwise("le", lambda input, other: input <= other, binary(), "input ≤ other.", aliases=["less_equal"])
gt = elementwise("gt", lambda input, other: input > other, binary(), "input > other.", aliases=["greater"])
ge = elementwise("ge", lambda input, other: input >= other, binary(), "input ≥ other.", aliases=["greater_equal"])
eq = elementwise("eq", lambda input, other: f.eq(input, other), binary(), "input = other, elementwise.")
ne = elementwise("ne", lambda input, other: f.ne(input, other), binary(), "input ≠ other.", aliases=["not_equal"])
isnan = elementwise("isnan", lambda input: f.isnan(input), unary(), "Whether it is NaN.")
isinf = elementwise("isinf", lambda input: f.isinf(input), unary(), "Whether it is ±infinity.")
isfinite = elementwise("isfinite", lambda input: f.isfinite(input), unary(), "Whether it is neither NaN nor infinite.")

logical_not = elementwise("logical_not", lambda input: f.eq(input, 0), unary(),
                          "Whether it is zero.")  # fmt: skip
logical_and = elementwise("logical_and", lambda input, other: f.ne(input, 0) & f.ne(other, 0), binary(),
                          "Whether both are not zero.")  # fmt: skip
logical_or = elementwise("logical_or", lambda input, other: f.ne(input, 0) | f.ne(other, 0), binary(),
                         "Whether one is not zero.")  # fmt: skip
logical_xor = elementwise("logical_xor", lambda input, other: f.ne(f.ne(input, 0), f.ne(other, 0)), binary(),
                          "Whether exactly one is not zero.")  # fmt: skip

select = elementwise("where", lambda condition, input, other: f.where(condition, input, other),
                     [(S((3, 4), kind="bool"), S((3, 4)), S((4,))), (S((3, 1), kind="bool"), S((3, 4)), 0.0)],
                     "input where condition holds, else other.", method=False)  # fmt: skip


def _to_the(n: float) -> Any:
    return lambda input: f.pow(input, n)


# Exponents that are written out as products, roots and quotients: 50 times faster than pow on the host (measured). A
# bounded set, so that a new exponent never compiles a new kernel.
_EXPONENTS: dict[float, Op] = {
    n: Elementwise(f"pow_{n}".replace("-", "minus_").replace(".", "_"), _to_the(n), register=False, autocast="float32")
    for n in (-2, -1, -0.5, 0.5, 2, 3, 4)
}


@function(name="pow")
def pow(input: Any, exponent: Any) -> Any:
    """input to the power of exponent, elementwise; both may be Tensors or numbers (not both numbers)."""
    if isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        integer = isinstance(input, Tensor) and input._data.dtype.char not in FLOATING
        special = _EXPONENTS.get(exponent)
        if special is not None and not (integer and (exponent < 0 or isinstance(exponent, float))):
            return special(input)
        if integer and isinstance(exponent, int) and exponent < 0:
            raise ValueError(
                f"Integers to negative integer powers are not allowed ({exponent}); convert first, e.g. x.float()."
            )
    return power(input, exponent)


@function(name="add")
def add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """input + alpha · other."""
    return add_(input, other) if alpha == 1 else add_(input, other * alpha)


@function(name="sub", aliases=["subtract"])
def sub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """input − alpha · other."""
    return sub_(input, other) if alpha == 1 else sub_(input, other * alpha)


@function(name="div", aliases=["divide", "true_divide"])
def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """input / other; rounding_mode "floor" or "trunc" rounds the quotient."""
    if rounding_mode is None:
        return div_(input, other)
    if rounding_mode == "floor":
        return floor_divide(input, other)
    if rounding_mode == "trunc":
        if all(x.dtype.kind in "biu" if isinstance(x, Tensor) else isinstance(x, int) for x in (input, other)):
            return floor_divide(sub_(input, fmod(input, other)), other)
        return div_(input, other).trunc()
    raise ValueError(f"rounding_mode is None, 'floor' or 'trunc', got {rounding_mode!r}.")


@function(name="rsub", method=False)
def rsub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """other − alpha · input."""
    return sub(other, input, alpha=alpha)


@function(name="where", method=False)
def where(condition: Any, input: Any = None, other: Any = None) -> Any:
    """input where condition (bool) holds, else other; with condition alone, its nonzero indices as a tuple."""
    if input is None and other is None:
        return condition.nonzero(as_tuple=True)
    if isinstance(condition, Tensor) and condition._data.dtype.kind != "b":
        raise TypeError(
            f"where() takes a bool condition, got {condition.dtype}; compare first, e.g. gpuad.where(x > 0, a, b)."
        )
    return select(condition, input, other)


def _where_method(self: Tensor, condition: Tensor, other: Any) -> Tensor:
    """self where condition holds, else other."""
    return where(condition, self, other)


Tensor.where = _where_method  # type: ignore[attr-defined]
