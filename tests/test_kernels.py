"""Formulas: tracing, simplification, derivatives, and the NumPy programs that they become."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.special

import gpuad
from gpuad.errors import FormulaError
from gpuad.kernels import numpy_program, scalar
from gpuad.kernels.expr import Constant, as_expr, constant, substitute, topological, variable, variables
from gpuad.kernels.formula import Formula, trace
from gpuad.kernels.numpy_program import BLOCK
from gpuad.kernels.numpy_writer import select
from gpuad.kernels.scalar import FUNCTIONS, abs, clamp, erf, exp, log, log1p, maximum, minimum, sin, sqrt, tanh, where

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
x, y, z = variable("x"), variable("y"), variable("z")


def run(formula, *arguments, dtype=F64, outs=None):
    """The outputs of a formula (or function) as a NumPy program; one output bare."""
    formula = formula if isinstance(formula, Formula) else trace(formula, "f")
    results = formula.runner("numpy")(arguments, dtype, outs)
    return results[0] if len(results) == 1 else results


def derivative(function, *points, order=1):
    """The derivative of a function of one or more arrays for its first one, `order` times, from the vjp."""
    if function in FUNCTIONS.values():
        formula = trace(lambda a: function(a), "f")
    else:
        formula = trace(function, "f")
    rest = [np.asarray(p, F64) for p in points]
    for _ in range(order):
        vjp = formula.vjp((0,), keep_output=False)
        assert not vjp.outputs
        inputs = [formula.inputs[i] for i in vjp.inputs]
        one = substitute(vjp.formula.outputs, {vjp.formula.inputs[0]: constant(1.0)})
        formula = Formula("df", formula.inputs, one)
        assert set(variables(one)) <= set(inputs) | set(formula.inputs)
    (result,) = formula.runner("numpy")(rest, F64)
    return result


# Expressions ----------------------------------------------------------------------------------------------------------


def test_equal_expressions_are_one_object():
    assert x + y is y + x
    assert x - y is not y - x
    assert exp(x * 2) is exp(x * 2)
    assert maximum(x, y) is maximum(y, x)
    assert variable("x") is x and variable("x", "mask") is not x
    assert constant(1) is not constant(1.0) and constant(1) is not constant(True)
    assert constant(0.0) is not constant(-0.0)
    assert constant(math.nan) is constant(math.nan)


@pytest.mark.parametrize(
    "built, expected",
    [
        (x + 0, x), (0 + x, x), (x - 0, x), (0 - x, -x), (x * 1, x), (1 * x, x), (x * -1, -x),
        (-(-x), x),  # noqa: B002 (meant)
        (x / 1, x),
        (x + x, 2 * x), (2 * x + x, 3 * x), (x + 2 * x, 3 * x), (2 * (3 * x), 6 * x), ((2 * x) * y, 2 * (x * y)),
        (x - (-y), x + y), (x + (-y), x - y), ((-x) + y, y - x), (-(x - y), y - x), ((-x) * (-y), x * y),
        ((-x) * y, -(x * y)), (x * (1 / y), x / y), (x / 4, x * 0.25), ((-x) / y, -(x / y)), (x / (-y), -(x / y)),
        (-(2 * x), -2 * x), (x**1, x), (x**2, x * x), (x**4, (x * x) * (x * x)), (x**0.5, sqrt(x)),
        (x**-2, 1.0 / (x * x)), (x**-0.5, 1.0 / sqrt(x)), (where(x > 0, y, y), y), (where(~(x > 0), y, z),
        where(x > 0, z, y)), (where(as_expr(True), x, y), x), (~~(x > 0), x > 0), (as_expr(2) * 3 + 1, as_expr(7)),
    ],
)  # fmt: skip
def test_simpler(built, expected):
    assert built is expected, f"{built} is not {expected}"


@pytest.mark.parametrize("kept", [x * 0, x - x, x / x, 0 / x, 0 * (1 / x), x * 0.0, exp(log(x)), x**0])
def test_what_could_be_nan_is_not_simplified(kept):
    assert not isinstance(kept, Constant)
    with np.errstate(all="ignore"):
        got = run(Formula("f", [x], [kept]), np.array([0.0, np.inf, np.nan]))
    text = str(kept)
    if text != "x ** 0":  # which is 1 whatever x is
        assert np.isnan(got).any(), text


def test_text_of_an_expression():
    assert str((x + y) * exp(-x)) == "(x + y) * exp(-x)"
    assert str(where(x > 0, x, 0.5)) == "where(x > 0, x, 0.5)"


# Random programs: the formula against the same instructions on arrays -------------------------------------------------

CONSTANTS = [0, 1, -1, 2, -2, 0.5, 3.0, -0.25, 10, 1e-4, 4, 1e4]
UNARY = ["neg", "abs", "square", "exp", "tanh", "sqrt", "log1p", "relu", "sigmoid", "sin", "sign"]
BINARY = ["add", "sub", "mul", "div", "maximum", "minimum"] * 2 + ["where", "add", "mul", "sub"]
ON_ARRAYS = {
    "neg": np.negative, "abs": np.abs, "square": np.square, "exp": np.exp, "tanh": np.tanh, "sin": np.sin,
    "sqrt": lambda a: np.sqrt(np.abs(a)), "log1p": lambda a: np.log1p(np.abs(a)), "sign": np.sign,
    "relu": lambda a: np.maximum(a, 0), "sigmoid": lambda a: 1 / (1 + np.exp(-a)), "add": np.add, "sub": np.subtract,
    "mul": np.multiply, "div": np.divide, "maximum": np.maximum, "minimum": np.minimum,
    "where": lambda a, b: np.where(np.greater(a, b), a, -np.asarray(b)),
}  # fmt: skip
ON_EXPRESSIONS = {
    **{n: FUNCTIONS[n] for n in ON_ARRAYS if n in FUNCTIONS}, "square": scalar.square,
    "sqrt": lambda a: sqrt(abs(a)), "log1p": lambda a: log1p(abs(a)),
    "where": lambda a, b: where(as_expr(a) > b, a, -as_expr(b)),
}  # fmt: skip


def instructions(rng: np.random.Generator, length: int) -> list[tuple]:
    """A straight-line program: (function, operands), an operand being an earlier value's number or ("constant", c)."""
    program: list[tuple] = []
    for i in range(length):
        count = i + 2  # two inputs
        pick = [int(rng.integers(max(0, count - 4), count)) for _ in range(2)]
        if rng.random() < 0.35:
            program.append((UNARY[rng.integers(len(UNARY))], (pick[0],)))
        else:
            operands: list = list(pick)
            if rng.random() < 0.4:
                operands[int(rng.integers(2))] = ("constant", CONSTANTS[rng.integers(len(CONSTANTS))])
            program.append((BINARY[rng.integers(len(BINARY))], tuple(operands)))
    return program


def follow(program, functions, *inputs):
    """The results of the last two instructions, and all values on the way."""
    values = list(inputs)
    for name, operands in program:
        values.append(functions[name](*[o[1] if isinstance(o, tuple) else values[o] for o in operands]))
    return values


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed, monkeypatch):
    """Simplified, shared, in one piece or in blocks: the values are those of the instructions one by one."""
    rng = np.random.default_rng(seed)
    program = instructions(rng, int(rng.integers(3, 14)))
    a, b = rng.uniform(-2, 2, (2, 300))
    with np.errstate(all="ignore"):
        values = follow(program, ON_ARRAYS, a, b)
    finite = np.all([np.isfinite(v) & (np.abs(v) < 1e8) for v in map(np.asarray, values)], axis=0)
    expected = [np.broadcast_to(v, 300) for v in values[-2:]]
    outputs = [as_expr(e) for e in follow(program, ON_EXPRESSIONS, x, y)[-2:]]
    whole = run(Formula("random", [x, y], outputs), a, b)
    monkeypatch.setattr(numpy_program, "BLOCK", 64)
    in_blocks = run(Formula("random", [x, y], outputs), a, b)
    for got in (whole, in_blocks):
        for g, e in zip(got, expected, strict=True):
            assert g.shape == (300,) and g.dtype == F64
            np.testing.assert_allclose(g[finite], e[finite], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_derivatives_of_random_programs(seed):
    """vjp and jvp of two outputs for two inputs agree with each other and with finite differences."""
    rng = np.random.default_rng(1000 + seed)
    program = [(n, o) for n, o in instructions(rng, int(rng.integers(3, 9)))]
    formula = Formula("random", [x, y], [as_expr(e) for e in follow(program, ON_EXPRESSIONS, x, y)[-2:]])
    a, b, u0, u1, va, vb = rng.uniform(-1.5, 1.5, (6, 500))
    vjp, jvp = formula.vjp((0, 1)), formula.jvp((0, 1))
    with np.errstate(all="ignore"):
        outs = run(formula, a, b)
        saved = [(a, b)[i] for i in vjp.inputs] + [outs[i] for i in vjp.outputs]
        ga, gb = run(vjp.formula, u0, u1, *saved)
        *values, ta, tb = run(jvp.formula, a, b, va, vb)
        step = 1e-6
        above = run(formula, a + step * va, b + step * vb)
        below = run(formula, a - step * va, b - step * vb)
    for value, out in zip(values, outs, strict=True):
        np.testing.assert_allclose(value, out, rtol=1e-12, atol=1e-12)
    left, right = ga * va + gb * vb, ta * u0 + tb * u1
    difference = sum((p - q) / (2 * step) * u for p, q, u in zip(above, below, (u0, u1), strict=True))
    size = np.abs(ga * va) + np.abs(gb * vb) + np.abs(ta * u0) + np.abs(tb * u1)
    fine = np.isfinite(size + difference) & (size < 1e6) & np.isfinite(outs[0] + outs[1])
    assert np.all(np.abs(left - right)[fine] <= 1e-9 * (1 + size[fine]))
    # A kink within a step of a point makes the difference wrong there; there are few.
    off = np.abs(left - difference)[fine] > 1e-3 * (1 + size[fine])
    assert off.sum() <= 0.02 * off.size


# Sharing --------------------------------------------------------------------------------------------------------------


def calls(formula: Formula, name: str, *shape) -> int:
    program = formula.runner("numpy")
    count = len(formula.inputs)
    return program.whole(frozenset(), frozenset(range(count))).source.count(f" {name}(")


def test_common_subexpressions_are_computed_once():
    formula = trace(lambda x: exp(x) * sin(exp(x)) + exp(x), "f")
    assert calls(formula, "exp") == 1
    jvp = formula.jvp((0,)).formula
    assert calls(jvp, "exp") == 1 and calls(jvp, "sin") == 1


def test_buffers_are_used_again():
    formula = trace(lambda x: sin(exp(tanh(sqrt(log1p(x) + 1) * 2)) - 3), "f")
    source = formula.runner("numpy").whole(frozenset(), frozenset([0])).source
    made = {line.split(" = ")[0].strip() for line in source.splitlines() if " = " in line}
    assert len(made) == 1, source


@pytest.mark.parametrize(
    "name, inputs, outputs",
    [("tanh", 0, 1), ("exp", 0, 1), ("sigmoid", 0, 1), ("relu", 0, 1), ("sqrt", 0, 1), ("add", 0, 0), ("sub", 0, 0),
     ("neg", 0, 0), ("mul", 2, 0), ("sin", 1, 0), ("silu", 1, 0), ("mish", 1, 0), ("gelu", 1, 0), ("abs", 1, 0)],
)  # fmt: skip
def test_what_is_kept_for_the_derivative(name, inputs, outputs):
    formula = gpuad.autograd.op.table[name].formula
    vjp = formula.vjp(tuple(range(len(formula.inputs))))
    assert (len(vjp.inputs), len(vjp.outputs)) == (inputs, outputs)


def test_mul_keeps_only_the_other_operand():
    formula = gpuad.autograd.op.table["mul"].formula
    assert formula.vjp((0,)).inputs == (1,) and formula.vjp((1,)).inputs == (0,)


def test_a_formula_that_is_one_ufunc_is_that_ufunc():
    assert trace(lambda a, b: a + b, "f").ufunc is np.add
    assert trace(lambda a, b: b - a, "f").ufunc is None
    assert trace(lambda a: exp(a), "f").ufunc is np.exp
    assert trace(lambda a: a * a, "f").ufunc is None


def test_large_expressions_need_no_recursion():
    e = x
    for _ in range(5000):
        e = sin(e) + y
    assert len(topological([e])) == 10_002
    formula = Formula("deep", [x, y], [e])
    assert len(topological(formula.vjp((0, 1)).formula.outputs)) > 10_000
    assert len(str(e)) < 3000


# Derivatives in closed form -------------------------------------------------------------------------------------------

POINTS = np.array([0.15, 0.4, 0.85])
CLOSED = {
    "square": (lambda a: a * a, lambda a: 2 * a, lambda a: 2 + 0 * a),
    "cube": (lambda a: a**3, lambda a: 3 * a**2, lambda a: 6 * a),
    "power": (lambda a: a**2.5, lambda a: 2.5 * a**1.5, lambda a: 3.75 * a**0.5),
    "reciprocal": (lambda a: 1 / a, lambda a: -1 / a**2, lambda a: 2 / a**3),
    "two to the": (lambda a: 2.0**a, lambda a: math.log(2) * 2**a, lambda a: math.log(2) ** 2 * 2**a),
    "exp": (exp, np.exp, np.exp), "log": (log, lambda a: 1 / a, lambda a: -1 / a**2),
    "expm1": (scalar.expm1, np.exp, np.exp), "exp2": (scalar.exp2, lambda a: math.log(2) * 2**a, None),
    "log2": (scalar.log2, lambda a: 1 / (a * math.log(2)), None),
    "log10": (scalar.log10, lambda a: 1 / (a * math.log(10)), None),
    "log1p": (log1p, lambda a: 1 / (1 + a), lambda a: -1 / (1 + a) ** 2),
    "sqrt": (sqrt, lambda a: 0.5 / np.sqrt(a), lambda a: -0.25 * a**-1.5),
    "rsqrt": (scalar.rsqrt, lambda a: -0.5 * a**-1.5, lambda a: 0.75 * a**-2.5),
    "sin": (sin, np.cos, lambda a: -np.sin(a)), "cos": (scalar.cos, lambda a: -np.sin(a), lambda a: -np.cos(a)),
    "tan": (scalar.tan, lambda a: 1 / np.cos(a) ** 2, lambda a: 2 * np.tan(a) / np.cos(a) ** 2),
    "asin": (scalar.asin, lambda a: (1 - a * a) ** -0.5, lambda a: a * (1 - a * a) ** -1.5),
    "acos": (scalar.acos, lambda a: -((1 - a * a) ** -0.5), lambda a: -a * (1 - a * a) ** -1.5),
    "atan": (scalar.atan, lambda a: 1 / (1 + a * a), lambda a: -2 * a / (1 + a * a) ** 2),
    "sinh": (scalar.sinh, np.cosh, np.sinh), "cosh": (scalar.cosh, np.sinh, np.cosh),
    "tanh": (tanh, lambda a: 1 - np.tanh(a) ** 2, lambda a: -2 * np.tanh(a) * (1 - np.tanh(a) ** 2)),
    "asinh": (scalar.asinh, lambda a: (1 + a * a) ** -0.5, lambda a: -a * (1 + a * a) ** -1.5),
    "acosh": (lambda a: scalar.acosh(a + 1), lambda a: (a * (a + 2)) ** -0.5,
              lambda a: -(a + 1) * (a * (a + 2)) ** -1.5),
    "atanh": (scalar.atanh, lambda a: 1 / (1 - a * a), lambda a: 2 * a / (1 - a * a) ** 2),
    "sigmoid": (scalar.sigmoid, lambda a: scipy.special.expit(a) * scipy.special.expit(-a), None),
    "erf": (erf, lambda a: 2 / np.sqrt(np.pi) * np.exp(-a * a), lambda a: -4 * a / np.sqrt(np.pi) * np.exp(-a * a)),
    "erfc": (scalar.erfc, lambda a: -2 / np.sqrt(np.pi) * np.exp(-a * a), None),
    "erfinv": (scalar.erfinv, lambda a: np.sqrt(np.pi) / 2 * np.exp(scipy.special.erfinv(a) ** 2), None),
    "atan2": (lambda a: scalar.atan2(a, 2.0), lambda a: 2 / (a * a + 4), lambda a: -4 * a / (a * a + 4) ** 2),
    "hypot": (lambda a: scalar.hypot(a, 2.0), lambda a: a / np.hypot(a, 2), lambda a: 4 / np.hypot(a, 2) ** 3),
    "self power": (lambda a: a**a, lambda a: a**a * (np.log(a) + 1), lambda a: a**a * ((np.log(a) + 1) ** 2 + 1 / a)),
    "abs": (lambda a: abs(-a), lambda a: 1 + 0 * a, lambda a: 0 * a),
    "stop": (lambda a: scalar.stop(a) * a, lambda a: a, lambda a: 0 * a),
    "remainder": (lambda a: scalar.remainder(a, 0.1), lambda a: 1 + 0 * a, lambda a: 0 * a),
    "gelu": (lambda a: a * 0.5 * (1 + erf(a * math.sqrt(0.5))),
             lambda a: scipy.special.ndtr(a) + a * np.exp(-a * a / 2) / np.sqrt(2 * np.pi),
             lambda a: (2 - a * a) * np.exp(-a * a / 2) / np.sqrt(2 * np.pi)),
    "rational": (lambda a: (a * a + 1) / (a - 2), lambda a: (a * a - 4 * a - 1) / (a - 2) ** 2,
                 lambda a: 10 / (a - 2) ** 3),
    "chain": (lambda a: sin(exp(a * a)), lambda a: 2 * a * np.exp(a * a) * np.cos(np.exp(a * a)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_derivative_in_closed_form(name):
    function, first, second = CLOSED[name]
    np.testing.assert_allclose(derivative(function, POINTS), first(POINTS), rtol=1e-12)
    if second is not None:
        np.testing.assert_allclose(derivative(function, POINTS, order=2), second(POINTS), rtol=1e-11, atol=1e-11)


def test_tenth_derivative():
    np.testing.assert_allclose(derivative(lambda a: sin(2 * a), POINTS, order=10), -(2.0**10) * np.sin(2 * POINTS))


def test_derivatives_at_ends_and_ties():
    """As PyTorch has them."""
    at = np.array([0.0])
    assert derivative(lambda a: abs(a), at) == 0
    assert derivative(lambda a: scalar.relu(a), at) == 0
    assert derivative(lambda a: maximum(a, 0.0), at) == 0.5
    assert derivative(lambda a: minimum(a, 0.0), at) == 0.5
    assert derivative(lambda a: clamp(a, 0.0, 1.0), at) == 1
    assert derivative(lambda a: clamp(a, -1.0, 0.0), at) == 1
    assert derivative(lambda a: a**2, at) == 0 and derivative(lambda a: a**1, at) == 1
    assert derivative(lambda a: a**0, at) == 0
    assert derivative(lambda a, b: a**b, at, [0.0]) == 0
    assert derivative(lambda b, a: a**b, np.array([2.0]), [0.0]) == 0
    assert derivative(lambda a: sqrt(a), at) == np.inf
    assert derivative(lambda a: sqrt(a) * a, np.array([4.0])) == 3


# Branches that are not taken ------------------------------------------------------------------------------------------

SAFE = {
    "log": (lambda a: where(a > 0, log(a), 0.0), [-1.0, 0.0, 2.0], [0, 0, 0.5]),
    "sqrt": (lambda a: where(a > 0, sqrt(a), a), [-1.0, 0.0, 4.0], [1, 1, 0.25]),
    "reciprocal": (lambda a: where(a == 0, 1.0, 1 / a), [0.0, 2.0], [0, -0.25]),
    "product": (lambda a: where(a > 0, a * log(a), 0.0) * 3, [0.0, 1.0], [0, 3]),
    "sum of two": (lambda a: where(a > 0, log(a), 0.0) + where(a > 0, a, 2 * a), [-1.0, 0.0, 1.0], [2, 2, 2]),
    "nested": (lambda a: where(a > 0, where(a < 1, log(a), sqrt(a)), -a), [-1.0, 0.5, 4.0], [-1, 2, 0.25]),
    "outside": (lambda a: exp(where(a < 50, a, 0.0)), [0.0, 1000.0], [1, 0]),
    "inside": (lambda a: where(a < 50, exp(a), 1.0), [0.0, 1000.0], [1, 0]),
    "softplus": (lambda a: where(a > 20, a, log1p(exp(a))), [-1000.0, 0.0, 1000.0], [0, 0.5, 1]),
    "square of where": (lambda a: where(a > 0, sqrt(a), 0.0) ** 2, [0.0, 4.0], [0, 1]),
    "through a variable": (lambda a: (lambda safe: where(a > 0, log(safe), 0.0))(where(a > 0, a, 1.0)),
                           [-1.0, 2.0], [0, 0.5]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFE)
def test_branch_not_taken_gives_no_nan(name):
    """The derivative of where(c, f, g) is that of the branch taken, whatever the other one's is."""
    function, points, expected = SAFE[name]
    np.testing.assert_allclose(derivative(function, points), expected, rtol=1e-15)
    assert np.isfinite(derivative(function, points, order=2)).all()
    assert np.isfinite(derivative(function, points, order=3)).all()
    formula = trace(function, "f")
    _, tangent = run(formula.jvp((0,)).formula, np.asarray(points, F64), np.ones(len(points)))
    np.testing.assert_allclose(tangent, expected, rtol=1e-15)


@pytest.mark.parametrize(
    "name, points, expected",
    [("safe_sqrt", [0.0, 4.0], [0, 0.25]), ("softplus", [-1e3, 1e3], [0, 1]), ("sigmoid", [-1e3, 1e3], [0, 0]),
     ("silu", [-1e3, 1e3], [0, 1]), ("mish", [-100.0, 1e3], [0, 1]), ("tanh", [-1e3, 1e3], [0, 0]),
     ("logsigmoid", [-1e3, 0.0, 1e3], [1, 0.5, 0]), ("elu", [-1e3, 1e3], [0, 1]), ("gelu", [-1e3, 1e3], [0, 1]),
     ("gelu_tanh", [-1e3, 1e3], [0, 1]), ("hardswish", [-5.0, 5.0], [0, 1])],
)  # fmt: skip
def test_ops_at_extremes(name, points, expected):
    op = gpuad.autograd.op.table[name]
    a = gpuad.tensor(points, dtype="float64", requires_grad=True)
    out = op(a)
    assert np.isfinite(out.detach().numpy()).all()
    out.sum().backward()
    np.testing.assert_allclose(a.grad.numpy(), expected, atol=1e-12)


# NaN and infinity -----------------------------------------------------------------------------------------------------

SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0])


@pytest.mark.parametrize(
    "function, reference",
    [
        (lambda a, b: maximum(a, b), np.maximum), (lambda a, b: minimum(a, b), np.minimum),
        (lambda a, b: a < b, np.less), (lambda a, b: a >= b, np.greater_equal), (lambda a, b: a == b, np.equal),
        (lambda a, b: a != b, np.not_equal), (lambda a, b: a * b, np.multiply), (lambda a, b: a / b, np.divide),
        (lambda a, b: a**b, np.power), (lambda a, b: where(a > b, a, b), lambda a, b: np.where(a > b, a, b)),
        (lambda a, b: scalar.isnan(a) | scalar.isinf(b), lambda a, b: np.isnan(a) | np.isinf(b)),
        (lambda a, b: scalar.remainder(a, b), np.remainder), (lambda a, b: scalar.floor_divide(a, b), np.floor_divide),
        (lambda a, b: clamp(a, -0.5, 0.5) + b, lambda a, b: np.clip(a, -0.5, 0.5) + b),
        (lambda a, b: scalar.relu(a) - b, lambda a, b: np.maximum(a, 0) - b),
        (lambda a, b: abs(a) * -b, lambda a, b: np.abs(a) * -b),
        (lambda a, b: sqrt(a) + b, lambda a, b: np.sqrt(a) + b),
        (lambda a, b: where(a > 0, math.inf, 0.0) + 0 * b, lambda a, b: np.where(a > 0, np.inf, 0.0) + 0 * b),
        (lambda a, b: where(a > 0, -1.0, 0.0) / abs(b), lambda a, b: np.where(a > 0, -1.0, 0.0) / np.abs(b)),
        (lambda a, b: 1 / where(a > 0, b, -0.0), lambda a, b: 1 / np.where(a > 0, b, -0.0)),
        (lambda a, b: where(b == b, math.nan, a), lambda a, b: np.where(b == b, np.nan, a)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_special_values(function, reference, dtype):
    a, b = (g.ravel().astype(dtype) for g in np.meshgrid(SPECIAL, SPECIAL))
    with np.errstate(all="ignore"):
        expected = reference(a, b)
        got = run(function, a, b, dtype=dtype)
        repeats = 2 * BLOCK // a.size
        large = run(function, np.tile(a, repeats), np.tile(b, repeats), dtype=dtype)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(large.reshape(repeats, -1), np.broadcast_to(expected, (repeats, a.size)))


def test_programs_warn_about_nothing():
    with np.errstate(all="raise"):
        run(lambda a: where(a > 0, log(a), 1 / a), np.array([0.0, -1.0, 1.0]))
        run(lambda a: exp(a) / (1 + exp(a)), np.array([1e4, -1e4]))


# Blocks ---------------------------------------------------------------------------------------------------------------


def long_formula(a, b, c):
    shared = exp(-abs(a)) * b
    return where(a > c, shared + sin(b) * c, tanh(shared) - 0.5), shared * 2, a > b


def check_against_pieces(arrays, dtype=F32):
    """One call on everything against calls on parts that fit the whole-array program."""
    formula = trace(long_formula, "f")
    got = run(formula, *arrays, dtype=dtype)
    full = np.broadcast_arrays(*arrays)
    flat = [np.ascontiguousarray(f).reshape(-1) for f in full]
    for i in range(0, flat[0].size, 1000):
        expected = run(formula, *[f[i : i + 1000] for f in flat], dtype=dtype)
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_allclose(g.reshape(-1)[i : i + 1000], e, rtol=2e-6, atol=1e-7)
    assert [g.shape for g in got] == [full[0].shape] * 3 and [g.dtype for g in got] == [dtype, dtype, np.bool_]


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 7])
def test_sizes_around_a_block(size):
    check_against_pieces([np.random.default_rng(0).standard_normal(size).astype(F32) for _ in range(3)])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shapes",
    [
        [(100,), (100,), (100,)], [(30, 10), (10,), ()], [(30, 1), (1, 10), (30, 10)], [(3, 200), (3, 1), (200,)],
        [(2, 3, 100), (3, 1), (100,)], [(1, 1, 300), (1,), ()], [(7, 1, 5), (1, 6, 1), (5,)], [(65,), (65,), (1,)],
        [(4, 0), (1,), (4, 1)], [(5, 64), (5, 64), (64,)], [(5, 65), (1, 65), (5, 1)],
    ],
    ids=str,
)  # fmt: skip
def test_blocks_of_broadcast_arrays(shapes, threads, dtype, monkeypatch):
    monkeypatch.setattr(numpy_program, "BLOCK", 64)
    monkeypatch.setattr("gpuad.kernels.threads.THREADED_WORK", 1)
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(s).astype(dtype) for s in shapes]
    before = gpuad.get_num_threads()
    gpuad.set_num_threads(threads)
    try:
        got = run(long_formula, *arrays, dtype=dtype)
    finally:
        gpuad.set_num_threads(before)
    monkeypatch.setattr(numpy_program, "BLOCK", 10**9)
    expected = run(long_formula, *arrays, dtype=dtype)
    for g, e in zip(got, expected, strict=True):
        assert (g.shape, g.dtype) == (e.shape, e.dtype) and g.flags.owndata
        np.testing.assert_allclose(g, e, rtol=1e-6)


LAYOUTS = {
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "every second": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "stride 0": lambda a: np.broadcast_to(a[:1], a.shape),
    "offset": lambda a: np.pad(a, 1)[1:-1, 1:-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [50, 10**9])
def test_layouts_in_memory(layout, block, monkeypatch):
    monkeypatch.setattr(numpy_program, "BLOCK", block)
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal((13, 17)) for _ in range(3)]
    arranged = [LAYOUTS[layout](arrays[0]), arrays[1], LAYOUTS[layout](arrays[2])]
    expected = run(long_formula, *[np.ascontiguousarray(a) for a in arranged])
    for g, e in zip(run(long_formula, *arranged), expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-12)


def test_numbers_as_arguments():
    a = np.linspace(-1, 1, 5)
    for arguments in [(a, 0.5, 2), (0.5, a, 2), (a, a, 0.25), (1, 0.5, a)]:
        expected = run(long_formula, *[np.broadcast_to(np.asarray(v, F64), 5).copy() for v in arguments])
        for g, e in zip(run(long_formula, *arguments), expected, strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-15)
    got = run(long_formula, np.float32(0.5) * np.ones(5, F32), 0.3, 2, dtype=F32)
    assert [g.dtype for g in got] == [F32, F32, np.bool_], "numbers promote nothing"


def test_many_threads_at_once():
    """Two callers at once share no scratch."""
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(3)
    inputs = [[rng.standard_normal(3 * BLOCK) for _ in range(3)] for _ in range(6)]
    expected = [run(long_formula, *i) for i in inputs]
    with ThreadPoolExecutor(6) as pool:
        for got, e in zip(pool.map(lambda i: run(long_formula, *i), inputs), expected, strict=True):
            np.testing.assert_array_equal(got[0], e[0])


def test_set_num_threads():
    before = gpuad.get_num_threads()
    with pytest.raises(ValueError, match="positive number, got 0"):
        gpuad.set_num_threads(0)
    assert gpuad.get_num_threads() == before


@pytest.mark.parametrize(
    "shape, axes",
    [((200, 100), (0, 1)), ((200, 100), (0,)), ((200, 100), (1,)), ((3, 5000, 2), (1,)), ((40, 30, 20), (0, 2)),
     ((20_000,), (0,)), ((0, 5), (0,)), ((), ())],
)  # fmt: skip
@pytest.mark.parametrize("keepdims", [False, True])
def test_formula_with_a_sum_behind_it(shape, axes, keepdims, monkeypatch):
    monkeypatch.setattr(numpy_program, "BLOCK", 500)
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal(shape), rng.standard_normal(shape[-1:])
    formula = trace(lambda a, b: (a - b) * a, "f")
    got = formula.runner("numpy").reduce((a, b), F64, axes, keepdims, 0.5)
    np.testing.assert_allclose(got, 0.5 * np.sum((a - b) * a, axis=axes, keepdims=keepdims), rtol=1e-11, atol=1e-12)
    assert type(got) is np.ndarray


def test_long_sums_are_accurate():
    """In pairs, not one after the other: float32 keeps its digits over millions of terms."""
    a = np.full(4_000_000, 0.1, F32)
    got = trace(lambda a: a * 1.5, "f").runner("numpy").reduce((a,), F32, (0,), False)
    assert math.isclose(float(got), 4_000_000 * 0.15, rel_tol=1e-6)


# In place -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 300])
@pytest.mark.parametrize(
    "function, over",
    [
        (lambda a, b: (a + b) * a, [0]), (lambda a, b: (a + b) * a, [1]), (lambda a, b: (a + b, a - b), [0, 1]),
        (lambda a, b: (a + b, a - b), [1, 0]), (lambda a, b: (b, a), [0, 1]), (lambda a, b: (a * 2, a), [0, 1]),
        (lambda a, b: (b, b * a), [0, 1]), (lambda a, b: (exp(a), sin(a) + exp(a) * b), [0, None]),
        (lambda a, b: (where(a > b, a, b), where(a > b, b, a)), [0, 1]),
        (lambda a, b: (a - 0.1 * b, 0.9 * b + a), [0, 1]),
        (lambda a, b: (a, a * b), [1, 0]), (lambda a, b: (tanh(a * b), tanh(a * b)), [0, 1]),
        (lambda a, b: (2.0, a), [0, 1]),
    ],
)  # fmt: skip
def test_outputs_may_be_inputs(function, over, size, monkeypatch):
    """Updates in place give what they would give out of place, also where an overwritten input is still read."""
    monkeypatch.setattr(numpy_program, "BLOCK", 64)
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, size))
    expected = run(function, a, b)
    expected = expected if isinstance(expected, list) else [expected]
    inputs = [a.copy(), b.copy()]
    outs = [np.empty(size) if i is None else inputs[i] for i in over]
    run(function, *inputs, outs=outs)
    for out, e in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out, e)


def test_outputs_are_fresh():
    """Nobody who writes to an output writes to an input."""
    a, b = np.ones(3), np.ones(3)
    for out in run(lambda a, b: (a, b, a + 0), a, b):
        out += 1
    assert (a == 1).all() and (b == 1).all()
    first, second = run(lambda a: (a * 2, a * 2), a)
    first += 1
    assert (second == 2).all()


# select ---------------------------------------------------------------------------------------------------------------

DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_is_where(dtype):
    """Bit for bit, whatever is an array and whatever a number."""
    rng = np.random.default_rng(6)
    dtype = np.dtype(dtype)
    n = 40
    arrays = [np.array([*SPECIAL, 2.5] * 5) if dtype.kind == "f" else rng.integers(0, 2, n) for _ in range(2)]
    arrays = [a.astype(dtype) for a in arrays]
    rng.shuffle(arrays[1])
    numbers = [0, 1]
    if dtype.kind == "f":
        numbers += [0.0, -0.0, -1.5, math.inf, -math.inf, math.nan, 1e-30]
    conditions = [rng.random(n) < 0.5, np.True_, np.array(False), np.ones(1, bool), rng.integers(0, 2, n).astype(dtype)]
    operands = [*arrays, arrays[0][:1], arrays[1].reshape(2, 20)[:1, :1], np.repeat(arrays[0], 2)[::2], *numbers]
    for condition, a, b in itertools.product(conditions, operands, operands):
        typed = [v if isinstance(v, np.ndarray) else dtype.type(v) for v in (a, b)]
        expected = np.where(condition, *typed)
        made = select(condition, a, b, number=dtype)
        shape = expected.shape
        assert made.dtype == dtype and made.shape == shape
        out = np.full(shape, 7).astype(dtype)
        assert select(condition, a, b, out=out) is out or np.shares_memory(out, out)
        for got in (made, out):
            assert got.tobytes() == expected.tobytes() or (
                np.array_equal(got, expected, equal_nan=True) and np.array_equal(np.signbit(got), np.signbit(expected))
            ), (condition, a, b)


def test_select_into_an_operand():
    for dtype in DTYPES:
        condition = np.arange(20) % 3 == 0
        a, b = np.arange(20).astype(dtype), (np.arange(20) % 7).astype(dtype)
        expected = np.where(condition, a, b)
        for into in (0, 1):
            operands = [a.copy(), b.copy()]
            select(condition, *operands, out=operands[into])
            np.testing.assert_array_equal(operands[into], expected)


# What a formula cannot do ---------------------------------------------------------------------------------------------


def value_dependent_if(a):
    if a > 0:
        return a
    return -a


def capturing(a):
    return a * gpuad.ones(3)


@pytest.mark.parametrize(
    "function, text",
    [
        (value_dependent_if,
         r"`if`.*cannot look at the value of x > 0|cannot look at the value of a > 0.*gpuad\.where"),
        (lambda a, b: a if a > b else b, r"where\(condition, a, b\)"), (lambda a: a > 0 and a < 1, "&, |, ~"),
        (lambda a: not a, "where"), (lambda a, b: max(a, b), r"gpuad\.maximum"), (lambda a: 0 < a < 1, "&"),
        (lambda a: sum(range(a)), r"no value yet.*range\(\)"), (lambda a: math.exp(a), r"math\.\*.*gpuad\.exp"),
        (lambda a: float(a), r"float\(\)"), (lambda a: [1, 2][a], "int"), (lambda a: len(a), r"len\(\)"),
        (lambda a: a[0], r"not elementwise.*Index the tensors before"),
        (lambda a: a.sum(), r"\.sum is not elementwise"),
        (lambda a: a.mean() + a, r"\.mean is not elementwise"), (lambda a: list(a), "no value yet"),
        (lambda a: None, "returns None"), (lambda a: (), "returns nothing"), (lambda *a: a[0], r"\*a"),
        (lambda **a: 1, r"\*a"), (capturing, "Tensor from outside"), (lambda a: a + np.ones(3), "argument"),
        (lambda a: a + "b", "str from outside"), (lambda a: a.shape, r"\.shape is not elementwise"),
    ],
)  # fmt: skip
def test_errors_say_what_to_write_instead(function, text):
    with pytest.raises(FormulaError, match=text):
        trace(function, "f")


def test_non_elementwise_functions_of_gpuad_are_refused():
    for function in (lambda a: gpuad.sum(a), lambda a, b: gpuad.matmul(a, b), lambda a: gpuad.reshape(a, (3,))):
        with pytest.raises((FormulaError, TypeError)):
            trace(function, "f")


def test_gpuads_functions_and_numpys_scalars_in_a_formula():
    a = np.linspace(0.1, 2, 7)
    np.testing.assert_allclose(run(lambda a: gpuad.exp(a) + gpuad.where(a > 1, gpuad.sigmoid(a), 0.0), a),
                               np.exp(a) + np.where(a > 1, 1 / (1 + np.exp(-a)), 0))  # fmt: skip
    np.testing.assert_allclose(run(lambda a: a.exp().sin() ** 2 + a.clamp(0.5, 1), a),
                               np.sin(np.exp(a)) ** 2 + np.clip(a, 0.5, 1))  # fmt: skip
    np.testing.assert_allclose(run(lambda a: np.float64(2) * a + np.float32(0.5) - np.int64(3), a), 2 * a - 2.5)
    np.testing.assert_allclose(run(lambda a: np.exp(a) * np.maximum(a, 1.0), a), np.exp(a) * np.maximum(a, 1))
    with pytest.raises(FormulaError, match=r"np\.spacing"):
        trace(lambda a: np.spacing(a), "f")


def test_bool_arithmetic():
    """Sums and products of conditions are those of NumPy and PyTorch: or, and."""
    a, b = np.array([1.0, 1.0, -1.0]), np.array([1.0, -1.0, -1.0])
    np.testing.assert_array_equal(run(lambda a, b: ((a > 0) | (b > 0)) * a, a, b), [1, 1, 0])
    np.testing.assert_array_equal(run(lambda a, b: ((a > 0) & (b > 0)) * 2.0 + (a > 0), a, b), [3, 1, 0])


def test_float16_is_computed_in_float32():
    a = np.array([60000.0, 1e-4, 3.0], np.float16)
    got = run(lambda a: (a * a) / (a * 2), a, dtype=np.dtype(np.float16))
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, (a.astype(F32) / 2).astype(np.float16))
