"""Transforms of functions: structures, high orders in every mix of modes, forward_ad, rules of one's own, checks."""

from __future__ import annotations

import gc
import math
from collections import namedtuple

import numpy as np
import pytest
from test_ops import EVERYTHING, Case, host, ident

import gpuad
from gpuad import Tensor
from gpuad.autograd import Function, GradcheckError, check_devices, forward_ad, functional, gradcheck, gradgradcheck
from gpuad.autograd import grad as tape_grad
from gpuad.autograd.node import Node
from gpuad.errors import AutogradError, ShapeError
from gpuad.func import (
    custom_jvp,
    custom_vjp,
    grad,
    grad_and_value,
    hessian,
    hvp,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    value_and_grad,
    vjp,
    vmap,
)
from gpuad.utils.checkpoint import checkpoint

F64 = "float64"


def close(got, expected, tolerance: float = 1e-11) -> None:
    np.testing.assert_allclose(host(got), host(expected), rtol=tolerance, atol=tolerance)


@pytest.fixture
def x(device):
    return gpuad.tensor([0.5, -1.2, 0.8, 1.7], dtype=F64, device=device)


@pytest.fixture
def v(device):
    return gpuad.tensor([1.0, 0.3, -0.7, 0.2], dtype=F64, device=device)


# Orders ---------------------------------------------------------------------------------------------------------------


def forwards(f, v):
    """x ↦ the derivative of f along v, by forward mode."""
    return lambda x: jvp(f, (x,), (v,))[1]


def backwards(f, v):
    """The same by reverse mode, of a function to one number."""
    return lambda x: sum((g * d).sum() for g, d in zip(grad(f)(x), v, strict=True))


MIXES = ["fff", "ffb", "fbf", "fbb", "bff", "bfb", "bbf", "bbb"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)], indirect=True)
@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_third_derivatives_agree_in_every_mix_of_modes(op, device):
    """D³f[v, w, z], each of the three by forward (f) or reverse mode (b), and finite differences of the second."""
    case = Case(op, op.samples[0], device)
    leaves = case.leaves(False)
    outs = [y for y in case.smooth(*case.leaves()) if y.requires_grad] if leaves else []
    if not outs or not sum(y.numel() for y in outs):
        return
    us = case.like(case.smooth(*leaves))
    directions = [case.like(leaves) for _ in range(3)]

    def f(xs):
        return sum((y * u).sum() for y, u in zip(case.smooth(*xs), us, strict=True))

    def mixed(mix, count):
        g = f
        for mode, along in zip(mix[:count], directions, strict=False):
            g = forwards(g, along) if mode == "f" else backwards(g, along)
        return g

    values = [float(host(mixed(mix, 3)(leaves))) for mix in MIXES]
    scale = 1e-10 * (1 + max(map(abs, values)) + sum(np.abs(host(u)).sum() for u in us))
    assert max(values) - min(values) <= scale, dict(zip(MIXES, values, strict=True))
    step = 1e-5
    second = mixed("bf", 2)
    above, below = (float(host(second(case.moved(directions[2], s)))) for s in (step, -step))
    allowed = 1e-5 * (1 + abs(values[0]) + abs(above))
    assert abs((above - below) / (2 * step) - values[0]) <= allowed


POWERS = {
    "sin": (lambda x: x.sin(), lambda x, n: math.sin(x + n * math.pi / 2)),
    "exp": (lambda x: x.exp(), lambda x, n: math.exp(x)),
    "cube of square": (lambda x: x**6, lambda x, n: math.perm(6, n) * x ** (6 - n) if n <= 6 else 0.0),
    "reciprocal": (lambda x: 1 / x, lambda x, n: (-1) ** n * math.factorial(n) / x ** (n + 1)),
}


@pytest.mark.parametrize("mode", ["forward", "reverse", "alternating"])
@pytest.mark.parametrize("name", POWERS)
def test_nth_derivatives_are_exact_to_rounding(name, mode):
    f, expected = POWERS[name]
    x = gpuad.tensor(0.7, dtype=F64)
    one = gpuad.tensor(1.0, dtype=F64)
    for n in range(9):
        assert float(f(x)) == pytest.approx(expected(0.7, n), rel=1e-13 * (n + 1), abs=1e-12)
        reverse = mode == "reverse" or (mode == "alternating" and n % 2)
        f = grad(f) if reverse else (lambda x, f=f: jvp(f, (x,), (one,))[1])


# Perturbation confusion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["forward", "reverse"])
@pytest.mark.parametrize("inner", ["forward", "reverse"])
def test_perturbations_are_not_confused(outer, inner):
    """d/dx (x · d/dy (x + y)) at x = 1 is 1, where a confused tangent gives 2 (Siskind & Pearlmutter, 2005)."""
    one = gpuad.tensor(1.0, dtype=F64)

    def derivative(f, mode):
        return grad(f) if mode == "reverse" else lambda x: jvp(f, (x,), (one,))[1]

    got = derivative(lambda x: x * derivative(lambda y: x + y, inner)(one), outer)(one)
    assert float(got) == 1.0
    # d/dx of f where f(x) = d/dy (x · y²) at y = x: 2 x², so 4 x.
    three = gpuad.tensor(3.0, dtype=F64)
    got = derivative(lambda x: x * derivative(lambda y: x * y * y, inner)(x), outer)(three)
    assert float(got) == pytest.approx(6 * 9)


# Structures -----------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "a b")


def test_gradients_are_structured_like_arguments(x):
    tree = {"w": x, "rest": [Pair(x * 2, (x + 1,))]}

    def f(tree, scale):
        pair = tree["rest"][0]
        return scale * (tree["w"].sin() * pair.a + pair.b[0].exp()).sum()

    got = grad(f)(tree, 2.0)
    close(got["w"], 2 * x.cos() * x * 2)
    close(got["rest"][0].a, 2 * x.sin())
    close(got["rest"][0].b[0], 2 * (x + 1).exp())
    first, second = grad(lambda a, b: (a * b["k"]).sum(), argnums=(0, 1))(x, {"k": x + 1})
    close(first, x + 1)
    close(second["k"], x)
    close(grad(lambda a, b: (a * b).sum(), argnums=-1)(x, x + 1), x)


def test_values_and_aux(x):
    def f(x):
        return x.square().sum(), {"twice": x * 2, "name": "f"}

    (value, aux), g = value_and_grad(f, has_aux=True)(x)
    close(value, x.square().sum())
    close(g, 2 * x)
    close(aux["twice"], 2 * x)
    assert not value.requires_grad
    assert not aux["twice"].requires_grad
    assert aux["name"] == "f"
    g, (value, _) = grad_and_value(f, has_aux=True)(x)
    close(g, 2 * x)
    g, aux = grad(f, has_aux=True)(x)
    close(aux["twice"], 2 * x)
    out, pull_back, aux = vjp(lambda x: (x.sin(), x), x, has_aux=True)
    close(pull_back(gpuad.ones_like(out))[0], x.cos())
    out, tangent, aux = jvp(lambda x: (x.sin(), x), (x,), (x,), has_aux=True)
    close(tangent, x * x.cos())
    close(aux, x)
    jacobian, aux = jacrev(lambda x: (x.sin(), x), has_aux=True)(x)
    close(jacobian, gpuad.diag(x.cos()))
    jacobian, aux = jacfwd(lambda x: (x.sin(), x), has_aux=True)(x)
    close(jacobian, gpuad.diag(x.cos()))
    close(aux, x)


def test_jacobians_are_structured_by_output_then_input(x):
    def f(a, b):
        return {"sum": a + b["k"], "product": [(a * b["k"]).sum()]}

    for jacobian in (jacrev, jacfwd):
        got = jacobian(f, argnums=(0, 1))(x, {"k": x * 3})
        close(got["sum"][0], gpuad.eye(4, dtype=F64))
        close(got["sum"][1]["k"], gpuad.eye(4, dtype=F64))
        close(got["product"][0][0], x * 3)
        close(got["product"][0][1]["k"], x)
    got = hessian(lambda a, b: (a * b * b).sum(), argnums=(0, 1))(x, x)
    close(got[0][1], gpuad.diag(2 * x))
    close(got[1][1], gpuad.diag(2 * x))
    close(got[0][0], gpuad.zeros(4, 4, dtype=F64))


def test_dicts_correspond_by_their_keys(x, v):
    def f(tree):
        return {"p": tree["a"] * tree["b"], "q": tree["a"].sum()}

    point, direction = {"a": x, "b": v}, {"b": x * 2, "a": v * 3}
    expected = v * 3 * v + x * x * 2
    close(jvp(f, (point,), (direction,))[1]["p"], expected)
    close(linearize(f, point)[1](direction)["p"], expected)
    (got,) = vjp(f, point)[1]({"q": x.new_ones(()), "p": v})
    close(got["a"], v * v + 1)
    close(hvp(lambda t: f(t)["p"].sum(), point, direction)["a"], x * 2)
    with pytest.raises(ShapeError, match="one tangent for each primal"):
        jvp(f, (point,), ({"a": x, "c": x},))


@pytest.mark.parametrize("name", ["grad", "jvp", "hessian", "hvp", "linearize", "vmap"])
def test_nothing_is_left_behind(name, x):
    """With gc disabled, transforms leave no tensor and no node: memory goes back by reference counting alone."""

    def f(x):
        y = x * 1
        y[0] = x[1] * x[2]
        y[1:].mul_(x[0])
        return checkpoint(lambda y: (y.sin() * y.sum()).sum(), y)

    run = {
        "grad": grad(f), "jvp": lambda x: jvp(f, (x,), (x,)), "hessian": hessian(f), "hvp": lambda x: hvp(f, x, x),
        "linearize": lambda x: linearize(f, x)[1](x), "vmap": lambda x: vmap(hessian(f))(gpuad.stack([x, x])),
    }[name]  # fmt: skip
    run(x)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(o, (Tensor, Node)) for o in gc.get_objects())
        run(x)
        assert sum(isinstance(o, (Tensor, Node)) for o in gc.get_objects()) == before
    finally:
        gc.enable()


def test_linearize_and_hvp(x, v):
    def f(x):
        return {"y": x.sin() * x.sum(), "s": x.square().sum()}

    out, push = linearize(f, x)
    _, tangent = jvp(f, (x,), (v,))
    close(out["y"], f(x)["y"])
    close(push(v)["y"], tangent["y"])
    close(push(2 * v)["s"], 2 * tangent["s"])

    def g(a, b):
        return (a.exp() * b.sin()).sum()

    got = hvp(g, (x, v), (v, x))
    h = hessian(g, argnums=(0, 1))(x, v)
    close(got[0], h[0][0] @ v + h[0][1] @ x)
    close(got[1], h[1][0] @ v + h[1][1] @ x)


def test_gradients_still_reach_what_a_function_closes_over(x):
    w = gpuad.tensor(2.0, dtype=F64, device=x.device, requires_grad=True)
    g = grad(lambda x: (w * x.square()).sum())(x)
    (got,) = tape_grad(g.sum(), [w])
    close(got, (2 * x).sum())
    assert not grad(lambda x: x.square().sum())(x).requires_grad


def test_bad_arguments_of_transforms(x):
    with pytest.raises(AutogradError, match=r"a tensor of shape \(4,\); reduce it"):
        grad(lambda x: x)(x)
    with pytest.raises(TypeError, match=r"got a float; wrap it in gpuad.tensor"):
        grad(lambda x: x)(1.0)
    with pytest.raises(ValueError, match="argnums has 1, but the function was called with 1"):
        grad(lambda x: x.sum(), argnums=1)(x)
    with pytest.raises(TypeError, match="a pair"):
        grad(lambda x: x.sum(), has_aux=True)(x)
    with pytest.raises(ShapeError, match="structured like the result"):
        vjp(lambda x: (x, x), x)[1](x)
    with pytest.raises(ShapeError, match="one tangent for each primal, in the same structure"):
        jvp(lambda x: x, (x,), ({"k": x},))
    with pytest.raises(TypeError, match="primals and tangents as tuples"):
        jvp(lambda x: x, x, x)
    with pytest.raises(AutogradError, match="does not depend on the primals"):
        jvp(lambda y: x, (x,), (x,), strict=True)


# Batched gradients and autograd.functional ----------------------------------------------------------------------------


def test_batched_gradients_are_the_rows_one_by_one(x):
    leaf = x.detach().requires_grad_()
    y = leaf.sin() * leaf.sum()
    weights = gpuad.randn(3, 4, dtype=F64, device=x.device)
    (got,) = tape_grad(y, [leaf], weights, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        close(got[i], tape_grad(y, [leaf], weights[i], retain_graph=True)[0])
    with pytest.raises(AutogradError, match="all with a first dimension of one length"):
        tape_grad(y, [leaf], None, is_grads_batched=True)


def test_functional(x, v):
    def f(a, b):
        return (a * b).sin(), (a * a).sum()

    for strategy in ("reverse-mode", "forward-mode"):
        got = functional.jacobian(f, (x, v), strategy=strategy)
        close(got[0][0], gpuad.diag((x * v).cos() * v))
        close(got[1][0], 2 * x)
        close(got[1][1], gpuad.zeros(4, dtype=F64))
    close(functional.jacobian(lambda x: x.exp(), x), gpuad.diag(x.exp()))

    def g(a):
        return (a.exp() * a.sum()).sum()

    h = functional.hessian(g, x)
    close(h, hessian(g)(x))
    close(functional.hvp(g, x, v)[1], h @ v)
    close(functional.vhp(g, x, v)[1], h @ v)
    close(functional.jvp(lambda a: a.exp(), x, v)[1], x.exp() * v)
    value, (first, second) = functional.vjp(f, (x, v), (v, x.new_ones(())))
    close(value[0], (x * v).sin())
    close(first, v * v * (x * v).cos() + 2 * x)
    close(second, x * v * (x * v).cos())
    with pytest.raises(AutogradError, match="does not depend on an input"):
        functional.jacobian(lambda a, b: a, (x, v), strict=True)
    with pytest.raises(ShapeError, match="v may be left out only"):
        functional.vjp(lambda a: a, x)
    with pytest.raises(ValueError, match="strategy is"):
        functional.jacobian(lambda a: a, x, strategy="sideways")


# forward_ad -----------------------------------------------------------------------------------------------------------


def test_forward_ad(x, v):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        primal, tangent = forward_ad.unpack_dual(dual.sin())
        close(primal, x.sin())
        close(tangent, v * x.cos())
        assert forward_ad.unpack_dual(x).tangent is None
    assert forward_ad.unpack_dual(dual).tangent is None
    with pytest.raises(AutogradError, match="works inside `with gpuad.autograd.forward_ad.dual_level"):
        forward_ad.make_dual(x, v)


def test_dual_levels_nest_with_each_other_and_with_reverse_mode(x, v):
    leaf = x.detach().requires_grad_()
    with forward_ad.dual_level() as outer:
        dual = forward_ad.make_dual(leaf, v)
        with forward_ad.dual_level():
            twice = forward_ad.unpack_dual(forward_ad.make_dual(dual, v).exp()).tangent
        second = forward_ad.unpack_dual(twice, level=outer).tangent
    close(second, v * v * x.exp())
    close(tape_grad(second.sum(), [leaf])[0], v * v * x.exp())


# Rules of one's own ---------------------------------------------------------------------------------------------------


class ByBackward(Function):
    """x³ with a backward alone; vmap by the methods, forward mode derived."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x * x


class ByAll(Function):
    """x³ and 3 x² in the setup_context form, with a jvp and a vmap of its own."""

    @staticmethod
    def forward(x):
        return x * x * x, 3 * x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])
        ctx.save_for_forward(inputs[0], output[1])

    @staticmethod
    def backward(ctx, g, h):
        x, slope = ctx.saved_tensors
        return g * slope + h * 6 * x

    @staticmethod
    def jvp(ctx, t):
        x, slope = ctx.saved_tensors
        return t * slope, 6 * x * t

    @staticmethod
    def vmap(info, in_dims, x):
        assert x.shape[in_dims[0]] == info.batch_size
        return ByAll.apply(x), (in_dims[0], in_dims[0])


@custom_vjp
def by_vjp(x, n=3):
    return x**n


by_vjp.defvjp(
    lambda x, n: (x**n, {"x": x, "n": n}), lambda kept, g: (kept["n"] * kept["x"] ** (kept["n"] - 1) * g, None)
)


@custom_jvp
def by_jvp(x):
    return x * x * x


@by_jvp.defjvp
def _by_jvp_rule(primals, tangents):
    (x,), (t,) = primals, tangents
    return by_jvp(x), 3 * x * x * t


@custom_jvp
def by_jvps(x, y):
    return x * x * y


by_jvps.defjvps(lambda t, out, x, y: 2 * x * y * t, lambda t, out, x, y: x * x * t)

CUBES = {
    "backward": ByBackward.apply, "all": lambda x: ByAll.apply(x)[0], "custom_vjp": by_vjp, "custom_jvp": by_jvp,
    "defjvps": lambda x: by_jvps(x, x),
}  # fmt: skip


EVERY_TRANSFORM = [
    lambda f: f, grad, jacfwd, hessian, lambda f: jacfwd(hessian(f)), lambda f: jacrev(hessian(f)),
    lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f)), lambda f: lambda x: hvp(f, x, x * 0.5),
]  # fmt: skip


@pytest.mark.parametrize("name", CUBES)
def test_own_rules_in_every_transform(name, x, v):
    def f(x):
        return (CUBES[name](x) * x.sin()).sum()

    def plain(x):
        return (x * x * x * x.sin()).sum()

    many = gpuad.stack([x, v, x * v])
    for transform in EVERY_TRANSFORM:
        close(transform(f)(x), transform(plain)(x))
        close(vmap(transform(f))(many), vmap(transform(plain))(many))


def test_the_given_rule_is_the_one_that_runs(x):
    """A rule that is wrong on purpose shows: nothing goes around it."""

    @custom_jvp
    def f(x):
        return x.sin()

    f.defjvp(lambda primals, tangents: (primals[0].sin(), 7 * tangents[0]))
    close(grad(lambda x: f(x).sum())(x), gpuad.full((4,), 7.0, dtype=F64))
    close(jacfwd(f)(x), 7 * gpuad.eye(4, dtype=F64))

    @custom_vjp
    def g(x):
        return x.sin()

    g.defvjp(lambda x: (x.sin(), ()), lambda kept, c: (5 * c,))
    close(grad(lambda x: g(x).sum())(x), gpuad.full((4,), 5.0, dtype=F64))
    close(jacfwd(g)(x), 5 * gpuad.eye(4, dtype=F64))


def test_nondiff_argnums(x):
    import functools

    @functools.partial(custom_vjp, nondiff_argnums=(0,))
    def apply(f, x):
        return f(x)

    apply.defvjp(lambda f, x: (f(x), x), lambda f, x, g: (g * 2,))
    close(grad(lambda x: apply(lambda y: y.sin(), x).sum())(x), gpuad.full((4,), 2.0, dtype=F64))


def test_missing_rules_are_named(x):
    with pytest.raises(AutogradError, match=r"no rule yet; give it one with f.defvjp"):
        custom_vjp(lambda x: x)(x)
    bad = custom_vjp(lambda x: x)
    bad.defvjp(lambda x: (x * 1, None), lambda kept, g: (g, g))
    with pytest.raises(ShapeError, match="a cotangent for each of the 1 differentiated"):
        grad(lambda x: bad(x).sum())(x)


class Looped(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_a_function_without_a_vmap_rule_is_looped_over_with_a_warning():
    x = gpuad.randn(3, 2)
    with pytest.warns(UserWarning, match="vmap loops over the 3 examples in Looped"):
        close(vmap(Looped.apply)(x), 2 * x)


# Checks ---------------------------------------------------------------------------------------------------------------


def test_gradcheck_passes_what_is_right(x, v):
    a, b = x.detach().requires_grad_(), v.detach().requires_grad_()

    def f(a, b):
        return (a * b).sin(), a.exp().sum()

    assert gradcheck(f, (a, b), check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(f, (a, b), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(f, (a, b), check_fwd_over_rev=True)
    with pytest.raises(ValueError, match="needs an input that requires grad"):
        gradcheck(f, (x, v))


@custom_jvp
def half(x):
    return x * x


half.defjvp(lambda p, t: (p[0] * p[0], p[0] * t[0]))

WRONG = {
    "a wrong factor: the derivative should be 2 times": half,
    "a missing term": lambda x: x.detach() * 3 + 0 * x,
    "a non-smooth point": lambda x: (x - 0.5).abs(),
    "not the same at every call": lambda x: x * gpuad.rand(2, dtype=F64),
    "the function gives float32 of float64 inputs": lambda x: x.float().sin(),
}


@pytest.mark.parametrize("cause", WRONG)
def test_gradcheck_says_what_is_wrong(cause):
    x = gpuad.tensor([-1.2, 0.5 + 1e-7], dtype=F64, requires_grad=True)
    with pytest.raises(GradcheckError, match=cause) as caught:
        gradcheck(lambda y, x: WRONG[cause](x), (gpuad.ones(2, dtype=F64), x))
    assert "for input 1 at [" in str(caught.value)
    assert "computed" in str(caught.value)
    assert "finite differences" in str(caught.value)
    assert gradcheck(WRONG[cause], x, raise_exception=False) is False


def test_gradcheck_names_low_precision():
    x = gpuad.tensor([0.3, 0.9], requires_grad=True)
    with pytest.raises(GradcheckError, match=r"too low precision: float32 inputs; check with float64 ones"):
        gradcheck(lambda x: x.exp(), x)


def test_gradcheck_of_one_direction_and_of_forward_mode():
    x = gpuad.tensor([-1.2, 0.4], dtype=F64, requires_grad=True)
    with pytest.raises(GradcheckError, match="fast_mode=False"):
        gradcheck(half, x, fast_mode=True)
    with pytest.raises(GradcheckError, match="tangent .forward mode"):
        gradcheck(half, x, check_backward_ad=False, check_forward_ad=True)
    with pytest.raises(GradcheckError):
        gradgradcheck(lambda x: half(half(x)), x)


def test_check_devices_compares_values_gradients_and_dtypes(monkeypatch):
    x = gpuad.randn(3, 2)
    assert check_devices(lambda x, n: {"y": x.sin() * n}, x, 2, devices=["cpu", "cpu"]) == {"cpu": 0.0}
    calls = []

    def unsteady(x):
        calls.append(1)
        return x * len(calls)

    with pytest.raises(GradcheckError, match=r"The value of output 0 differs at \[0, 0\]: .* elements differ"):
        check_devices(unsteady, x, devices=["cpu", "cpu"])
    calls.clear()
    with pytest.raises(GradcheckError, match="float32 .* and float64"):
        check_devices(lambda x: (calls.append(1), x.double() if len(calls) > 1 else x)[1], x, devices=["cpu", "cpu"])


@pytest.mark.cuda
def test_check_devices_on_all_that_are_present():
    worst = check_devices(lambda x, w: (x @ w).tanh().softmax(1), gpuad.randn(3, 4), gpuad.randn(4, 2))
    assert worst
    assert all(v < 1e-5 for v in worst.values())
