"""detect_anomaly: the error names the line of the forward pass behind a gradient that is not finite."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest

import gpuad
from gpuad import nn
from gpuad.autograd import detect_anomaly, grad, set_detect_anomaly
from gpuad.autograd.anomaly import settings
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.node import Node
from gpuad.autograd.primitive import Primitive
from gpuad.errors import AnomalyError, AutogradError

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")


def leaf(values, device):
    return gpuad.tensor(values, device=device, requires_grad=True)


def line_of(text):
    """The number of the line of this file that has `text` as a comment."""
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {text}"))


def root_of(x):
    return x.sqrt()  # the root


def test_names_the_line_of_the_forward_pass(device):
    x = leaf([0.0, 1.0], device)
    with detect_anomaly():
        y = root_of(x * 2)  # the call
        with pytest.raises(AnomalyError) as caught:
            (y * 0).sum().backward()
    text = str(caught.value)
    assert text.startswith("The gradient that sqrt computed for its input 0 has NaN. This is sqrt at ")
    assert f"test_anomaly.py:{line_of('the root')} in root_of:\n    return x.sqrt()  # the root" in text
    assert re.search(rf"line {line_of('the call')}, in test_names.*\n.*root_of\(x \* 2\)", text)
    assert "gpuad/autograd" not in text and "In the forward pass" not in text


def test_names_the_first_operation_that_was_not_finite(device):
    x = leaf([0.0, 1.0], device)
    with detect_anomaly():
        a = x.exp() + 1
        b = x.log()  # the logarithm
        c = b + a
        with pytest.raises(AnomalyError) as caught:
            (c * x).sum().backward()
    text = str(caught.value)
    assert "mul computed for its input 1 has inf." in text
    assert "log was the first operation whose result had inf while its operands had not, at " in text
    assert f"{__file__}:{line_of('the logarithm')} in " in text


def test_infinite_gradients(device):
    x = leaf([0.0], device)
    with detect_anomaly(), pytest.raises(AnomalyError, match="sqrt computed for its input 0 has inf"):
        x.sqrt().sum().backward()


def test_says_when_the_incoming_gradient_was_bad(device):
    x = leaf([1.0], device)
    with detect_anomaly(), pytest.raises(AnomalyError, match="has NaN, and so had the one it was given"):
        (x * 2).backward(gpuad.tensor([float("nan")], device=device))


def test_products_reductions_and_functions(device):
    """Kinds of nodes: a product that writes its gradient straight into the leaf, a row reduction, a user's function."""
    layer = nn.Linear(2, 2, bias=False).to(device)
    x = gpuad.tensor([[1.0, float("inf")]], device=device)
    layer(gpuad.ones(1, 2, device=device)).sum().backward()
    layer.zero_grad()
    with detect_anomaly(), pytest.raises(AnomalyError, match="has inf|has NaN"):
        layer(x).sum().backward()

    class Bad(gpuad.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    with detect_anomaly(), pytest.raises(AnomalyError, match="that Bad computed for its input 0 has NaN"):
        Bad.apply(leaf([1.0], device)).sum().backward()


def test_gradients_of_gradients_name_both_lines(device):
    x = leaf([0.0], device)
    with detect_anomaly(check_nan=False):
        y = x.abs().sqrt() * x  # the primal
        (g,) = grad(y.sum(), x, create_graph=True)  # the gradient
    with detect_anomaly(), pytest.raises(AnomalyError) as caught:
        grad(g.sum(), x)
    text = str(caught.value)
    assert f":{line_of('the gradient')} in " in text
    assert "It computes the gradient of " in text and f":{line_of('the primal')} in " in text


def test_nodes_from_outside(device):
    x = leaf([0.0], device)
    y = x.sqrt()
    with detect_anomaly(), pytest.raises(AnomalyError, match="outside detect_anomaly, so its line is not known"):
        y.sum().backward()


def test_errors_in_a_rule_come_with_the_line(device):
    x = leaf([1.0], device)
    with detect_anomaly():
        y = x * 2
        z = y * y  # the product
        y.add_(1)
        where = line_of("the product")
        with pytest.warns(UserWarning, match=f"gradient of mul at .*:{where}"), pytest.raises(AutogradError):
            z.sum().backward()


def test_gradients_are_those_without(device):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(device)
    x = gpuad.randn(5, 3, device=device)
    labels = gpuad.tensor([0, 1, 0, 1, 0], device=device)
    nn.functional.cross_entropy(model(x), labels).backward()
    expected = [p.grad.tolist() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    with detect_anomaly():
        nn.functional.cross_entropy(model(x), labels).backward()
    for p, values in zip(model.parameters(), expected, strict=True):  # a sum may be taken in another order
        np.testing.assert_allclose(p.grad.tolist(), values, rtol=1e-5, atol=1e-7)


def test_check_nan_off(device):
    x = leaf([0.0], device)
    with detect_anomaly(check_nan=False):
        x.sqrt().sum().backward()
    assert x.grad.tolist() == [float("inf")]


def test_nothing_is_there_while_it_is_off():
    plain = Node.__init__, Elementwise.__call__, Elementwise.in_place, Primitive.__call__
    x = gpuad.ones(1, requires_grad=True)
    with detect_anomaly():
        assert Elementwise.__call__ is not plain[1]
        assert "traceback" in (x * 2).grad_fn.metadata
        with set_detect_anomaly(False):
            assert not settings.enabled and Elementwise.__call__ is plain[1]
        assert settings.enabled
    assert (Node.__init__, Elementwise.__call__, Elementwise.in_place, Primitive.__call__) == plain
    assert (x * 2).grad_fn.metadata == {}


def test_set_detect_anomaly():
    try:
        set_detect_anomaly(True, check_nan=False)
        assert settings.enabled and not settings.check_nan
        with detect_anomaly():
            assert settings.check_nan
        assert settings.enabled and not settings.check_nan
    finally:
        set_detect_anomaly(False)
    assert not settings.enabled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gpuad.ones(1, requires_grad=True) * 2).sum().backward()


def test_inside_transforms(device):
    x = leaf([-1.0, 1.0], device).detach()
    for transform in (gpuad.func.grad, gpuad.func.hessian, lambda f: gpuad.func.vmap(gpuad.func.grad(f))):
        with detect_anomaly(), pytest.raises(AnomalyError, match=r"sqrt(_jvp)? at .* in root_of:"):
            transform(lambda x: root_of(x).sum())(x.reshape(2, 1) if transform is not gpuad.func.hessian else x)
