"""Checkpoints: the same gradients of every order and mode, from fewer kept activations."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest

import gpuad
from gpuad import nn
from gpuad.autograd import grad
from gpuad.autograd.node import Node
from gpuad.errors import AutogradError, ShapeError
from gpuad.utils.checkpoint import CheckpointError, checkpoint, checkpoint_sequential


def values_of(tensor):
    return tensor.detach().cpu().tolist()


def tape_bytes(root):
    """The bytes of the distinct arrays that the graph behind a tensor keeps (parameters and inputs count once, too)."""
    seen, arrays, stack = set(), {}, [root.grad_fn]
    while stack:
        node = stack.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        stack.extend(node.parents)
        for value in node.saved or ():
            frame = getattr(getattr(value, "unpack", None), "__self__", None)
            arrays.update({id(a): a for a in ([value] if hasattr(value, "nbytes") else [])})
            if frame is not None:  # a checkpoint keeps its inputs
                arguments = [x for x in frame.arguments[0] if hasattr(x, "node")]
                kept = [a for x in arguments for a in x.node.saved]
                arrays.update({id(a): a for a in kept if hasattr(a, "nbytes")})
    return sum(a.nbytes for a in arrays.values())


@pytest.fixture
def model(device):
    gpuad.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 4)
    ).to(device)


@pytest.fixture
def x(device):
    return gpuad.randn(5, 4, device=device).requires_grad_()


WAYS = {
    "whole": lambda model, x: checkpoint(model, x),
    "keyword": lambda model, x: checkpoint(lambda *, input: model(input), input=x, use_reentrant=False),
    "segments": lambda model, x: checkpoint_sequential(model, 3, x),
    "nested": lambda model, x: checkpoint(
        lambda y: checkpoint(model[4:], checkpoint(lambda z: checkpoint(model[2:4], checkpoint(model[:2], z)), y)), x
    ),
    "one in the middle": lambda model, x: model[5:](checkpoint(model[1:5], model[:1](x))),
}


def gradients(model, x, run, order):
    gpuad.manual_seed(3)
    inputs = [x, *model.parameters()]
    y = run(model, x)
    found = grad((y * y).sum(), inputs, create_graph=order > 1)
    for _ in range(order - 1):
        found = grad(sum((g * g).sum() for g in found), inputs, create_graph=True)
    return y, found


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_those_without(model, x, way, order):
    """Bit for bit, dropout masks included; and the stream of random numbers goes on as without."""
    expected_value, expected = gradients(model, x, lambda m, x: m(x), order)
    after = gpuad.rand(1).item()
    value, found = gradients(model, x, WAYS[way], order)
    assert gpuad.rand(1).item() == after and values_of(value) == values_of(expected_value)
    for a, b in zip(found, expected, strict=True):
        assert values_of(a) == values_of(b)


@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_and_mixes(model, x, way):
    """jvp of it, reverse over forward after the level has closed, forward over reverse."""
    direction = gpuad.ones_like(x)

    def results(run):
        def loss(x):
            return (run(model, x) ** 2).sum()

        gpuad.manual_seed(3)
        value, tangent = gpuad.func.jvp(loss, (x,), (direction,))
        gpuad.manual_seed(3)
        return (
            value,
            tangent,
            *grad(tangent, [x, *model.parameters()], allow_unused=True),
            gpuad.func.hvp(loss, x.detach(), direction),
        )

    for a, b in zip(results(WAYS[way]), results(lambda m, x: m(x)), strict=True):
        assert a is b is None or values_of(a) == values_of(b)


def test_activations_are_not_kept(device):
    """n layers in √n segments: the tape keeps O(√n) activations, and the backward pass no more than a segment's."""
    activation = 64 * 32 * 4

    def kept(n, segments):
        layers = [nn.Tanh() for _ in range(n)]
        x = gpuad.randn(64, 32, device=device).requires_grad_()
        y = x * 1.0
        y = checkpoint_sequential(layers, segments, y) if segments else nn.Sequential(*layers)(y)
        return tape_bytes(y) / activation

    assert kept(64, 0) == 64
    for n in (16, 64, 144):
        root = math.isqrt(n)
        assert kept(n, root) <= 2 * root  # the inputs of √n − 1 segments, the activations of the last


def test_recomputed_values_go_as_they_are_used(device):
    """While segment i is walked backward, no other segment's values are there."""
    alive = []
    segments = 4

    def layer(x):
        return x.tanh().exp().sin()

    import gc
    import weakref

    arrays = []

    def watched(x):
        y = layer(x)
        arrays.append(weakref.ref(y._data))
        return y.sin()

    x = gpuad.randn(8, 8, device=device).requires_grad_()
    y = x
    for _ in range(segments):
        y = checkpoint(watched, y)
        y.register_hook(lambda g: alive.append(sum(a() is not None for a in arrays)))
    assert sum(a() is not None for a in arrays) == 0
    y.sum().backward()
    gc.collect()
    assert max(alive) <= 1 and sum(a() is not None for a in arrays) == 0


def test_the_second_run_stops_early(device):
    """What comes after the last saved tensor is not computed again."""
    calls = []

    def function(x):
        calls.append("first")
        y = x.exp()
        calls.append("last")
        return y + 1

    x = gpuad.ones(2, device=device, requires_grad=True)
    checkpoint(function, x).sum().backward()
    assert calls == ["first", "last", "first"] and values_of(x.grad) == values_of(x.exp())


def test_nothing_runs_twice_where_no_gradient_is_wanted(device):
    calls = []

    def function(x):
        calls.append(1)
        return x.exp()

    with gpuad.no_grad():
        assert not checkpoint(function, gpuad.ones(2, device=device, requires_grad=True)).requires_grad
    assert not checkpoint(function, gpuad.ones(2, device=device)).requires_grad
    assert len(calls) == 2


class Pair(NamedTuple):
    a: gpuad.Tensor
    b: gpuad.Tensor


def test_arguments_and_results_in_containers(device):
    a, b = gpuad.ones(2, device=device, requires_grad=True), gpuad.full((2,), 3.0, device=device, requires_grad=True)

    def function(pair, others, scale=1.0):
        return {"sum": pair.a * others["b"][0] * scale, "product": [pair.a.exp() * pair.b]}, "label"

    out, label = checkpoint(function, Pair(a, b), {"b": [b, None]}, scale=2.0)
    (out["sum"].sum() + out["product"][0].sum()).backward()
    assert label == "label"
    assert values_of(b.grad) == pytest.approx([2.0 + math.e] * 2)


def test_walking_twice(model, x):
    model.eval()
    y = checkpoint(model, x).sum()
    y.backward(retain_graph=True)
    once = values_of(x.grad)
    y.backward()
    assert values_of(x.grad) == [[2 * v for v in row] for row in once]
    with pytest.raises(AutogradError, match="retain_graph=True"):
        y.backward()


def test_only_some_inputs(model, x):
    model.eval()
    (expected,) = grad(model(x).sum(), model[3].weight)
    y = checkpoint(model, x).sum()
    (found,) = grad(y, model[3].weight, retain_graph=True)
    assert values_of(found) == values_of(expected)
    y.backward()


def test_gradients_inside_the_function(device):
    """A residual with a derivative of its own in it, as physics-informed networks have."""

    def residual(x):
        y = (x * x).sin()
        (slope,) = grad(y.sum(), x, create_graph=True)
        return slope * y

    def inside(x):
        return residual(x * 1.0)

    x = gpuad.tensor([0.3, 0.8], device=device, requires_grad=True)
    (expected,) = grad(inside(x).sum(), x)
    (found,) = grad(checkpoint(inside, x).sum(), x)
    assert values_of(found) == values_of(expected)


def test_inputs_that_do_not_require_grad(model, device):
    model.eval()
    x = gpuad.ones(5, 4, device=device)
    model(x).sum().backward()
    expected = [values_of(p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    checkpoint(model, x).sum().backward()
    for p, values in zip(model.parameters(), expected, strict=True):  # a sum may be taken in another order
        np.testing.assert_allclose(values_of(p.grad), values, rtol=1e-5, atol=1e-6)


def test_without_random_state(device):
    """preserve_rng_state=False: the second run draws on, so that masks are others."""
    x = gpuad.ones(1000, device=device, requires_grad=True)

    def dropped(x):
        return nn.functional.dropout(x, 0.5) * x

    for preserve in (True, False):
        x.grad = None
        y = checkpoint(dropped, x, preserve_rng_state=preserve)
        y.sum().backward()
        assert (values_of(x.grad) == values_of(y * 2)) is preserve


def test_changed_arguments_are_noticed(device):
    x = gpuad.ones(2, device=device, requires_grad=True)
    y = x * 2
    z = checkpoint(lambda y: y.exp(), y)
    y.add_(1)
    with pytest.raises(AutogradError, match="checkpoint saved .* changed in place"):
        z.sum().backward()


def test_functions_that_do_something_else_the_second_time(device):
    x = gpuad.ones(2, device=device, requires_grad=True)
    state = {"n": 0}

    def fewer(x):
        state["n"] += 1
        return x.exp().sin() if state["n"] == 1 else x * 2

    with pytest.raises(CheckpointError, match=r"saved 2 tensors .* only 0 when it ran again"):
        checkpoint(fewer, x).sum().backward()
    state["n"] = 0

    def other(x):
        state["n"] += 1
        return (x if state["n"] == 1 else x[:1]).sin().sum()

    with pytest.raises(CheckpointError, match=r"float32 \(2,\).* in the forward pass and is float32 \(1,\)"):
        checkpoint(other, x).backward()
    state["n"] = 0
    checkpoint(other, x, determinism_check="none").backward()
    with pytest.raises(ValueError, match='"default" or "none"'):
        checkpoint(other, x, determinism_check="all")


def test_errors_in_the_second_run_come_through(device):
    x = gpuad.ones(2, device=device, requires_grad=True)
    calls = []

    def function(x):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("on the second run")
        return x.exp()

    y = checkpoint(function, x)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert gpuad.is_grad_enabled() and Node.__init__.__name__ == "__init__"


def test_segments_are_checked(model, x):
    for segments in (0, 8):
        with pytest.raises(ShapeError, match=f"takes 1 to 7 segments, got {segments}"):
            checkpoint_sequential(model, segments, x)
    model.eval()
    assert values_of(checkpoint_sequential([*model], 2, x)) == values_of(model(x))


def test_the_second_run_is_under_the_autocast_of_the_first(device):
    w = gpuad.randn(4, 4, device=device, requires_grad=True)
    x = gpuad.randn(3, 4, device=device)
    seen = []

    def function(x):
        y = x @ w
        seen.append(y.dtype)
        return y.tanh()

    with gpuad.autocast(device.type):
        plain = function(x).sum()
        checked = checkpoint(function, x, use_reentrant=False).sum()
    plain.backward()
    expected, w.grad = w.grad, None
    checked.backward()
    assert seen == [gpuad.float16] * 3
    assert bool((w.grad == expected).all())


DERIVATIVES = {
    "gradient": gpuad.func.grad,
    "jacfwd": gpuad.func.jacfwd,
    "hessian": gpuad.func.hessian,
    "reverse over forward": lambda f: gpuad.func.jacrev(gpuad.func.jacfwd(f)),
    "hvp": lambda f: lambda x: gpuad.func.hvp(f, x, x * 0.5),
    "linearize": lambda f: lambda x: gpuad.func.linearize(f, x)[1](x * 0.5),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_inside_vmap(device, name):
    """A checkpoint in the function of one example: also when it runs again after vmap has moved on."""
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh()).to(device).double()
    x = gpuad.randn(2, 3, dtype="float64", device=device)

    def kept(x):
        return checkpoint(layers, checkpoint_sequential(layers, 2, x)).sum()

    def plain(x):
        return layers(layers(x)).sum()

    of = DERIVATIVES[name]
    found, expected = gpuad.func.vmap(of(kept))(x), gpuad.stack([of(plain)(each) for each in x])
    assert (found - expected).abs().max().item() < 1e-12
    weights = [
        grad(gpuad.func.vmap(of(f))(x).square().sum(), list(layers.parameters()), allow_unused=True)
        for f in (kept, plain)
    ]
    for a, b in zip(*weights, strict=True):
        assert a is b is None or (a - b).abs().max().item() < 1e-10
