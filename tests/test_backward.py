"""backward() and grad() as PyTorch documents them: several roots, inputs=, unused inputs, retain_graph, with hooks."""

from __future__ import annotations

import pytest

import gpuad
from gpuad.autograd import backward, grad
from gpuad.errors import AutogradError


def leaf(values, device):
    return gpuad.tensor(values, device=device, requires_grad=True)


def values_of(tensor):
    return tensor.detach().cpu().tolist()


def test_several_roots_with_weights(device):
    x = leaf([1.0, 2.0], device)
    y = x * x
    weight = gpuad.tensor([10.0, 100.0], device=device)
    backward([y, y.sum(), x], [weight, None, gpuad.ones(2, device=device)], retain_graph=True)
    assert values_of(x.grad) == [10 * 2 + 2 + 1.0, 100 * 4 + 4 + 1.0]
    found = grad([y, y.sum()], [x, y], [weight, None])
    assert [values_of(g) for g in found] == [[22.0, 404.0], [11.0, 101.0]]


def test_weights_are_differentiated_too(device):
    x, weight = leaf([3.0], device), leaf([5.0], device)
    (g,) = grad(x * x, x, weight, create_graph=True)
    assert values_of(grad(g, weight)[0]) == [6.0]


def test_inputs_take_all_of_the_gradient(device):
    """Leaves accumulate; others keep their gradients from then on, as after retain_grad(); the rest gets none."""
    x, w, unused = leaf([1.0, 2.0], device), leaf([3.0, 4.0], device), leaf([1.0], device)
    y = x * 3
    z = (y * w).sum()
    z.backward(inputs=[y, x, unused], retain_graph=True)
    assert values_of(y.grad) == [3.0, 4.0] and values_of(x.grad) == [9.0, 12.0] and w.grad is None
    assert unused.grad is None and y.retains_grad
    z.backward(inputs=y, retain_graph=True)
    assert values_of(y.grad) == [6.0, 8.0] and values_of(x.grad) == [9.0, 12.0]
    z.backward(inputs=[x])
    assert values_of(x.grad) == [18.0, 24.0]


def test_inputs_below_other_inputs(device):
    x = leaf([2.0], device)
    y = x * x
    z = y * y
    z.backward(inputs=[z, y, x])
    assert [values_of(t.grad) for t in (z, y, x)] == [[1.0], [8.0], [32.0]]


def test_inputs_with_hooks_and_create_graph(device):
    x, w = leaf([2.0], device), leaf([3.0], device)
    seen = []
    x.register_hook(lambda g: seen.append("x") or g * 2)
    w.register_hook(lambda g: seen.append("w"))
    y = x * x * w
    y.register_hook(lambda g: seen.append("y"))
    y.backward(inputs=[x], create_graph=True)
    assert seen == ["y", "x"] and values_of(x.grad) == [24.0]
    assert values_of(grad(x.grad, w)[0]) == [8.0]


def test_retained_gradients_in_grad(device):
    """grad() leaves leaves alone; retain_grad() keeps what passes."""
    x = leaf([1.0, 2.0], device)
    y = x * 3
    y.retain_grad()
    grad((y * y).sum(), x)
    assert values_of(y.grad) == [6.0, 12.0] and x.grad is None


def test_unused_inputs_of_every_kind(device):
    x, u = leaf([1.0, 2.0], device), leaf([1.0], device)
    v = u * 2
    z = (x * x).sum()
    with pytest.raises(AutogradError, match="do not depend on input 1.*allow_unused=True"):
        grad(z, [x, u], retain_graph=True)
    assert grad(z, [x, v], allow_unused=True, retain_graph=True)[1] is None
    zeros = grad(z, [u, v, x], materialize_grads=True, create_graph=True)
    assert [values_of(g) for g in zeros] == [[0.0], [0.0], [2.0, 4.0]]
    assert zeros[0].device is u.device and not zeros[0].requires_grad
    with pytest.raises(ValueError, match="allow_unused=False.*leave allow_unused out"):
        grad(z, [u], allow_unused=False, materialize_grads=True)


def test_roots_that_lead_to_no_input_are_not_walked(device):
    x, u = leaf([1.0], device), leaf([1.0], device)
    a, b = x.exp(), u.exp()
    seen = []
    b.register_hook(lambda g: seen.append(1))
    grad([a, b], x)
    assert seen == []
    b.backward()  # its buffers are still there


def test_retain_graph_follows_create_graph(device):
    x = leaf([1.0], device)
    y = x.exp()
    grad(y, x, create_graph=True)
    grad(y, x, create_graph=True, retain_graph=False)
    with pytest.raises(AutogradError, match="walked before"):
        grad(y, x)


def test_what_cannot_be_asked_for(device):
    x = leaf([1.0], device)
    y = x * 2
    with pytest.raises(AutogradError, match=r"backward\(\) got no inputs"):
        y.backward(inputs=[])
    with pytest.raises(AutogradError, match=r"grad\(\) got no inputs"):
        grad(y, [])
    with pytest.raises(AutogradError, match="backward.. cannot go to input 0: it does not require grad"):
        y.backward(inputs=[gpuad.ones(1, device=device)])
    with pytest.raises(AutogradError, match="does not require grad"):
        backward([y, gpuad.ones(1, device=device)])
    with pytest.raises(AutogradError, match="2 tensors and 1 gradients"):
        backward([y, y], [None])


def test_a_failed_walk_leaves_the_modes_as_they_were(device):
    x = leaf([1.0], device)
    y = x * 2
    y.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.backward()
    assert gpuad.is_grad_enabled() and x.grad is None


# to() -----------------------------------------------------------------------------------------------------------------


def test_positional_arguments_of_to(device):
    x = gpuad.ones(2, device=device)
    other = gpuad.ones(1, dtype="float64", device=device)
    f32 = gpuad.float32
    same = [(), (None,), (f32,), (f32, True), (f32, True, False), (device,), (device, None), (device, f32, True)]
    for args in [*same, (x, True), (str(device),)]:
        assert x.to(*args) is x, args
    for args in [(f32, False, True), (device, None, False, True), (device, f32, True, True), (x, False, True)]:
        copied = x.to(*args)
        assert copied is not x and copied.data_ptr() != x.data_ptr() and copied.dtype == x.dtype, args
    assert x.to(device, gpuad.float64).dtype == x.to(other).dtype == x.to(None, gpuad.float64).dtype == gpuad.float64
    assert x.to(gpuad.float32, copy=True) is not x
    y = leaf([1.0], device)
    y.to(gpuad.float32, False, True).sum().backward()
    assert values_of(y.grad) == [1.0]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("cpu", True), {}),
        ((gpuad.float32, gpuad.float32), {}),
        ((gpuad.float32, 1), {}),
        (("cpu", "cpu"), {}),
        ((gpuad.float32, True, True, True), {}),
        ((gpuad.float32,), {"dtype": gpuad.float64}),
        ((True,), {}),
    ],
    ids=["bool as dtype", "two dtypes", "number as flag", "two devices", "too many", "twice", "bool alone"],
)
def test_wrong_arguments_of_to(args, named):
    with pytest.raises(TypeError, match=r"to\(\) got .*to\(device, dtype, non_blocking, copy\)"):
        gpuad.ones(1).to(*args, **named)
