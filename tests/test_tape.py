"""The tape: what backward() and grad() do, what they refuse, what they hold in memory, and who may write to what."""

from __future__ import annotations

import copy
import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest

import gpuad
from gpuad import Tensor
from gpuad.autograd import walk as walk_module
from gpuad.autograd.gradients import backward, grad
from gpuad.autograd.node import Node
from gpuad.errors import AutogradError, DeviceError, DtypeError, ShapeError


def leaf(values, device=None, dtype=None) -> Tensor:
    return gpuad.tensor(values, dtype=dtype, device=device, requires_grad=True)


def values_of(t: Tensor) -> list:
    return t.detach().cpu().tolist()


# Leaves and what is recorded ------------------------------------------------------------------------------------------


def test_leaves_and_results(device):
    x = leaf([1.0, 2.0], device)
    constant = gpuad.tensor([3.0, 4.0], device=device)
    y = x * constant
    assert x.is_leaf and x.grad_fn is None and x.requires_grad
    assert not y.is_leaf and y.requires_grad and y.grad_fn.name() == "mul"
    assert constant.is_leaf and not constant.requires_grad
    z = constant * 2
    assert z.is_leaf and not z.requires_grad and z.grad_fn is None
    y.sum().backward()
    assert values_of(x.grad) == [3.0, 4.0]
    assert constant.grad is None and y.grad is None


def test_only_what_requires_grad_is_recorded(device):
    x = leaf([1.0], device)
    y = gpuad.tensor([2.0], device=device) * x
    assert y.grad_fn.parents[0] is None and y.grad_fn.parents[1] is x
    assert (x > 0).requires_grad is False
    assert x.argmax().requires_grad is False
    assert x.long().requires_grad is False


def test_requires_grad_setting():
    x = gpuad.zeros(2)
    assert x.requires_grad_() is x and x.requires_grad
    x.requires_grad = False
    assert not x.requires_grad
    y = x.requires_grad_() * 2
    y.requires_grad = True  # harmless: it does already
    with pytest.raises(AutogradError, match="detach"):
        y.requires_grad = False


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_only_floating_tensors_require_grad(dtype):
    with pytest.raises(DtypeError, match=rf"floating.*{dtype}.*float\(\)"):
        gpuad.zeros(2, dtype=dtype).requires_grad_()
    with pytest.raises(DtypeError):
        gpuad.ones(2, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gradients_have_their_leafs_dtype(device, dtype):
    x = leaf([1.0, 2.0, 3.0], device, dtype)
    w = leaf([0.5, 0.25, 2.0], device, "float32")
    (x * w).sum().backward()
    assert x.grad.dtype == x.dtype and values_of(x.grad) == [0.5, 0.25, 2.0]
    assert w.grad.dtype == w.dtype and values_of(w.grad) == [1.0, 2.0, 3.0]


def test_detach_shares_memory_and_stops_gradients(device):
    x = leaf([1.0, 2.0], device)
    d = x.detach()
    assert d.is_leaf and not d.requires_grad and d.data_ptr() == x.data_ptr()
    (x * d).sum().backward()
    assert values_of(x.grad) == [1.0, 2.0]
    y = x * 2
    y.detach_()
    assert y.is_leaf and not y.requires_grad


def test_data_shares_memory_and_can_be_replaced(device):
    x = leaf([1.0, 2.0], device)
    x.data.fill_(5.0)
    assert values_of(x) == [5.0, 5.0]
    x.data = gpuad.tensor([7.0, 8.0, 9.0], device=device)
    (x * x).sum().backward()
    assert values_of(x.grad) == [14.0, 16.0, 18.0]


# backward() -----------------------------------------------------------------------------------------------------------


def test_gradients_add_up(device):
    x = leaf([1.0, 2.0], device)
    (x * x).sum().backward()
    first = x.grad
    (x * 3).sum().backward()
    assert values_of(x.grad) == [5.0, 7.0]
    assert x.grad is first, "the second gradient is added to the first one's buffer"
    x.grad = None
    (x * 3).sum().backward()
    assert values_of(x.grad) == [3.0, 3.0]


def test_one_tensor_in_many_places(device):
    x = leaf([2.0], device)
    y = x * x * x + x + x * 4 - x / x
    y.sum().backward()
    assert values_of(x.grad) == [3 * 4.0 + 1 + 4]


def test_diamond(device):
    x = leaf([0.5, 1.5], device)
    a = x.exp()
    b, c = a * 2, a.sin()
    (b * c).sum().backward()
    e = np.exp([0.5, 1.5])
    expected = (2 * np.sin(e) + 2 * e * np.cos(e)) * e
    np.testing.assert_allclose(values_of(x.grad), expected, rtol=1e-5)


def test_backward_of_a_tensor_with_elements_needs_a_gradient(device):
    x = leaf([1.0, 2.0], device)
    with pytest.raises(AutogradError, match=r"2 elements.*loss\.sum\(\)\.backward\(\).*gradient="):
        (x * 2).backward()
    (x * 2).backward(gpuad.tensor([1.0, 10.0], device=device))
    assert values_of(x.grad) == [2.0, 20.0]
    with pytest.raises(ShapeError, match=r"\(1,\).*\(2,\)"):
        (x * 2).backward(gpuad.tensor([1.0], device=device))
    with pytest.raises(TypeError, match="Tensor or None, got list"):
        (x * 2).backward([1.0, 2.0])
    one = leaf([[3.0]], device)
    (one * 2).backward()  # one element is a scalar whatever its shape
    assert values_of(one.grad) == [[2.0]]


def test_gradient_is_converted_to_the_dtype(device):
    x = leaf([1.0, 2.0], device)
    (x * 2).backward(gpuad.tensor([1.0, 10.0], dtype="float64", device=device))
    assert x.grad.dtype == gpuad.float32


def test_backward_without_anything_that_requires_grad():
    with pytest.raises(AutogradError, match=r"does not require grad.*requires_grad_\(\)"):
        gpuad.ones(()).backward()
    with gpuad.no_grad():
        y = leaf(1.0) * 2
    with pytest.raises(AutogradError, match="no_grad"):
        y.backward()


def test_backward_from_a_leaf(device):
    x = leaf(3.0, device)
    x.backward()
    assert values_of(x.grad) == 1.0
    x.grad.add_(1.0)  # its own buffer, not the seed that every backward starts from
    y = leaf(3.0, device)
    y.backward()
    assert values_of(y.grad) == 1.0


def test_several_roots(device):
    x = leaf([1.0, 2.0], device)
    a, b = (x * x).sum(), x * 3
    backward([a, b, a], [None, gpuad.tensor([1.0, 10.0], device=device), None])
    assert values_of(x.grad) == [2 * 2 * 1.0 + 3, 2 * 2 * 2.0 + 30]
    with pytest.raises(AutogradError, match="2 tensors and 1 gradients"):
        backward([a, b], [None])


def test_roots_on_one_path(device):
    """A root below another one gets its own gradient and that of its users."""
    x = leaf(2.0, device)
    y = x * 3
    z = y * y
    backward([z, y])
    assert values_of(x.grad) == 3 * (2 * 6.0 + 1)


def test_inputs_argument(device):
    x, w = leaf([1.0, 2.0], device), leaf([3.0, 4.0], device)
    y = x * w
    y.sum().backward(inputs=[x], retain_graph=True)
    assert values_of(x.grad) == [3.0, 4.0] and w.grad is None
    y.sum().backward(inputs=w)
    assert values_of(x.grad) == [3.0, 4.0] and values_of(w.grad) == [1.0, 2.0]
    y = x * w
    (y * y).sum().backward(inputs=[y])  # a non-leaf, named, takes its gradient
    assert values_of(y.grad) == [6.0, 16.0]


def test_backward_inside_no_grad(device):
    x = leaf([1.0, 2.0], device)
    y = (x * x).sum()
    with gpuad.no_grad():
        y.backward()
    assert values_of(x.grad) == [2.0, 4.0] and not x.grad.requires_grad


# Freed graphs ---------------------------------------------------------------------------------------------------------


def test_a_second_walk_names_the_op_and_the_way_out(device):
    x = leaf([1.0, 2.0], device)
    y = x.exp().sum()
    y.backward()
    with pytest.raises(AutogradError, match=r"exp.*freed.*retain_graph=True"):
        y.backward()


def test_retain_graph(device):
    x = leaf([1.0, 2.0], device)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward(retain_graph=True)
    y.backward()
    assert values_of(x.grad) == [6.0, 12.0]
    with pytest.raises(AutogradError, match="mul"):
        y.backward()


def test_ops_that_save_nothing_can_be_walked_again(device):
    x = leaf([1.0, 2.0], device)
    y = (x + 1).sum()
    y.backward()
    y.backward()
    assert values_of(x.grad) == [2.0, 2.0]


def test_shared_part_of_two_losses(device):
    x = leaf([1.0, 2.0], device)
    h = x.tanh()
    first, second = (h * 2).sum(), (h * 3).sum()
    first.backward()
    with pytest.raises(AutogradError, match="tanh"):
        second.backward()


def test_buffers_are_freed_as_the_walk_passes(device):
    """At the last node of the walk only what it needs is still alive."""
    x = leaf(np.ones(4), device)
    h = x.exp()
    reference = weakref.ref(h.grad_fn)
    y = h.sin().sum()
    del h
    seen = []
    x.register_hook(lambda g: seen.append(reference() is None or reference().saved is None))
    y.backward()
    assert seen == [True]


# grad() ---------------------------------------------------------------------------------------------------------------


def test_grad_leaves_grad_alone(device):
    x, w = leaf([1.0, 2.0], device), leaf([3.0, 4.0], device)
    gx, gw = grad((x * w).sum(), [x, w])
    assert values_of(gx) == [3.0, 4.0] and values_of(gw) == [1.0, 2.0]
    assert x.grad is None and w.grad is None and not gx.requires_grad


def test_grad_of_something_in_the_middle(device):
    x = leaf([1.0, 2.0], device)
    y = x * 3
    z = (y * y).sum()
    (gy,) = grad(z, y, retain_graph=True)
    assert values_of(gy) == [6.0, 12.0]
    gy, gx = grad(z, [y, x])
    assert values_of(gy) == [6.0, 12.0] and values_of(gx) == [18.0, 36.0]


def test_grad_of_itself(device):
    x = leaf(2.0, device)
    y = x * x
    assert values_of(grad(y, y)[0]) == 1.0
    assert values_of(grad(x, x)[0]) == 1.0


def test_grad_with_weights(device):
    x = leaf([1.0, 2.0], device)
    (g,) = grad(x * x, x, gpuad.tensor([1.0, 10.0], device=device))
    assert values_of(g) == [2.0, 40.0]
    (g,) = grad([x * 2, x * 3], [x], [gpuad.ones(2, device=device), gpuad.ones(2, device=device)])
    assert values_of(g) == [5.0, 5.0]


def test_unused_inputs(device):
    x, other = leaf([1.0], device), leaf([1.0, 2.0], device)
    y = (x * 2).sum()
    with pytest.raises(AutogradError, match=r"input 1.*allow_unused.*materialize_grads"):
        grad(y, [x, other], retain_graph=True)
    g, nothing = grad(y, [x, other], allow_unused=True, retain_graph=True)
    assert values_of(g) == [2.0] and nothing is None
    g, zeros = grad(y, [x, other], materialize_grads=True)
    assert values_of(zeros) == [0.0, 0.0]
    with pytest.raises(AutogradError, match="input 0.*does not require grad"):
        grad(y, [gpuad.ones(1, device=device)])


def test_same_input_twice(device):
    x = leaf([1.0, 2.0], device)
    a, b = grad((x * x).sum(), [x, x])
    a.add_(1)
    assert values_of(a) == [3.0, 5.0] and values_of(b) == [2.0, 4.0]


def test_grad_does_not_work_on_branches_that_lead_to_no_input(device):
    x, w = leaf([1.0], device), leaf([1.0], device)
    touched = []
    unwanted = w.exp()
    unwanted.register_hook(touched.append)
    wanted = x.exp()
    wanted.register_hook(touched.append)
    grad((wanted * unwanted).sum(), x)
    assert len(touched) == 1


def test_grad_retains_nothing(device):
    x = leaf([1.0], device)
    y = x.exp().sum()
    grad(y, x)
    with pytest.raises(AutogradError, match="retain_graph"):
        grad(y, x)


# Higher orders --------------------------------------------------------------------------------------------------------


def test_derivatives_to_the_fourth_order(device):
    x = leaf([0.3, 0.7, 1.1], device, "float64")
    y = x.sin() * x.exp()
    # d/dx (a sin + b cos) eˣ = ((a − b) sin + (a + b) cos) eˣ
    a, b = 1.0, 0.0
    v = np.asarray(values_of(x))
    for _ in range(4):
        (y,) = grad(y.sum(), x, create_graph=True)
        a, b = a - b, a + b
        np.testing.assert_allclose(values_of(y), (a * np.sin(v) + b * np.cos(v)) * np.exp(v), rtol=1e-12)


def test_fourth_order_through_matmul_and_reductions(device):
    x = leaf(np.linspace(0.1, 0.9, 6).reshape(2, 3), device, "float64")
    y = ((x @ x.T) ** 2).sum()  # of degree 4, so Euler's rule holds: Σ x ∂y/∂x = 4 y, and so on
    value, degree = float(y), 4
    for order in range(4):
        (g,) = grad(y, x, create_graph=True)
        y = (g * x.detach() if order == 3 else g * x).sum()
        value *= degree
        if order == 3:
            np.testing.assert_allclose(float(y), value, rtol=1e-10)
    assert y.requires_grad


def test_create_graph_in_backward(device):
    x = leaf([2.0, 3.0], device, "float64")
    (x**3).sum().backward(create_graph=True)
    assert x.grad.requires_grad
    (g,) = grad(x.grad.sum(), x)
    assert values_of(g) == [12.0, 18.0]


def test_gradient_penalty(device):
    """The gradient of a function of gradients reaches the parameters, as in PyTorch."""
    w = leaf([[0.5, -0.25], [1.0, 2.0]], device, "float64")
    x = leaf([[1.0, 2.0]], device, "float64")
    out = (x @ w).tanh().sum()
    (gx,) = grad(out, x, create_graph=True)
    ((gx * gx).sum() + out).backward()
    step = 1e-6

    def value(weights):
        weights = gpuad.tensor(weights, device=device)
        x0 = leaf([[1.0, 2.0]], device, "float64")
        y = (x0 @ weights).tanh().sum()
        (g,) = grad(y, x0, create_graph=True)
        return float((g * g).sum() + y)

    base = np.asarray(values_of(w))
    for i in range(2):
        for j in range(2):
            nudge = np.zeros((2, 2))
            nudge[i, j] = step
            expected = (value(base + nudge) - value(base - nudge)) / (2 * step)
            assert values_of(w.grad)[i][j] == pytest.approx(expected, rel=1e-6)


def test_second_order_needs_create_graph(device):
    x = leaf(2.0, device)
    (g,) = grad(x**3, x)
    with pytest.raises(AutogradError, match="does not require grad"):
        grad(g, x)


# Changes in place -----------------------------------------------------------------------------------------------------


def test_saved_tensor_changed_in_place(device):
    x = leaf([1.0, 2.0], device)
    w = gpuad.tensor([3.0, 4.0], device=device)
    y = (x * w).sum()
    w.add_(1)
    with pytest.raises(AutogradError, match=r"mul saved.*changed in place.*clone\(\)"):
        y.backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[0].add_(1),
        lambda w: w.detach().mul_(2),
        lambda w: w.data.zero_(),
        lambda w: w.view(2, 1).__setitem__((0, 0), 5.0),
        lambda w: w.unsqueeze(0).T.fill_(1.0),
        lambda w: w.__setitem__(0, 5.0),
        lambda w: w.copy_(gpuad.zeros(2, device=w.device)),
        lambda w: w.uniform_(),
        lambda w: w.clamp_(min=10.0),
        lambda w: w.expand(1, 2)[0].exp_(),
        lambda w: w.split(1)[1].sqrt_(),
    ],
)
def test_change_through_a_view_is_noticed(device, change):
    x = leaf([1.0, 2.0], device)
    w = gpuad.tensor([3.0, 4.0], device=device)
    y = (x * w).sum()
    change(w)
    with pytest.raises(AutogradError, match="changed in place"):
        y.backward()


def test_only_what_is_saved_may_not_change(device):
    x = leaf([1.0, 2.0], device)
    with gpuad.no_grad():
        x.add_(1)  # before, not since: tanh keeps its output only
    y = x.tanh() * 5
    with gpuad.no_grad():
        x.add_(1)  # nobody kept x
    h = y * 2
    y.zero_()  # nor y
    h.sum().backward()
    np.testing.assert_allclose(values_of(x.grad), 10 / np.cosh([2.0, 3.0]) ** 2, rtol=1e-5)


def test_changing_a_copy_is_harmless(device):
    x = leaf([1.0, 2.0], device)
    w = gpuad.tensor([[3.0, 4.0]], device=device)
    y = (x * w).sum()
    w.clone().add_(1)
    w.T.reshape(-1).clone().mul_(3)
    gpuad.cat([w, w]).zero_()
    w[[0]].zero_()
    w.T.contiguous().flatten()
    y.backward()
    assert values_of(x.grad) == [3.0, 4.0]


def test_saved_output_changed_in_place(device):
    x = leaf([1.0, 2.0], device)
    y = x.tanh()
    y.mul_(2)
    with pytest.raises(AutogradError, match="tanh saved"):
        y.sum().backward()
    z = leaf([1.0, 2.0], device)
    w = z + 1  # add keeps nothing, so its output may change
    w.mul_(3)
    w.sum().backward()
    assert values_of(z.grad) == [3.0, 3.0]


def test_change_in_place_is_recorded(device):
    x = leaf([1.0, 2.0], device, "float64")
    y = x * 1
    y.mul_(x)
    y.add_(x, alpha=2)
    y.sin_()
    y[0] = x[1] * 3
    y /= 2
    y.sum().backward()
    v = np.array([1.0, 2.0])
    inside = np.cos(v * v + 2 * v) * (2 * v + 2) / 2
    np.testing.assert_allclose(values_of(x.grad), [0.0, inside[1] + 1.5], rtol=1e-12)


def test_result_of_in_place_is_the_tensor(device):
    x = gpuad.ones(2, device=device)
    address, version = x.data_ptr(), x._version
    assert x.add_(1) is x and x.mul_(2).sqrt_() is x
    x += 1
    x[0] = 0
    assert x.data_ptr() == address and x._version == version + 5


def test_leaf_that_requires_grad_cannot_change_in_place(device):
    x = leaf([1.0, 2.0], device)
    for change in (lambda: x.add_(1), lambda: x.__setitem__(0, 1.0), lambda: x.zero_(), lambda: x.uniform_()):
        with pytest.raises(AutogradError, match=r"leaf that requires grad.*no_grad"):
            change()
    with gpuad.no_grad():
        x.add_(1)
        x[0] = 5.0
    assert values_of(x) == [5.0, 3.0] and x.is_leaf and x.requires_grad


def test_in_place_errors(device):
    x = gpuad.tensor([1, 2], device=device)
    with pytest.raises(DtypeError, match=r"div_ computes float32.*int64"):
        x.div_(2)
    with pytest.raises(DtypeError, match="add_ computes float32"):
        x += 0.5
    with pytest.raises(ShapeError, match=r"\(3, 2\).*\(2,\)"):
        x.add_(gpuad.ones(3, 2, dtype="int64", device=device))
    with pytest.raises(ShapeError, match=r"expanded.*clone\(\)"):
        gpuad.zeros(1, device=device).expand(3).add_(1)
    with pytest.raises(ShapeError, match="do not broadcast"):
        x.add_(gpuad.ones(3, dtype="int64", device=device))


def test_in_place_with_itself(device):
    x = gpuad.tensor([1.0, 2.0, 3.0], device=device)
    x.add_(x)
    assert values_of(x) == [2.0, 4.0, 6.0]
    x.sub_(x.flip(0))
    assert values_of(x) == [-4.0, 0.0, 4.0]
    m = gpuad.arange(9, device=device).reshape(3, 3)
    m.add_(m.T)
    assert values_of(m) == [[0, 4, 8], [4, 8, 12], [8, 12, 16]]
    m[1:] = m[:-1]
    assert values_of(m) == [[0, 4, 8], [0, 4, 8], [4, 8, 12]]
    y = leaf([1.0, 2.0], device)
    z = y * 1
    z.mul_(z)
    z.sum().backward()
    assert values_of(y.grad) == [2.0, 4.0]


def test_in_place_keeps_the_dtype(device):
    x = gpuad.ones(2, dtype="float16", device=device)
    x.add_(gpuad.ones(2, dtype="float64", device=device)).mul_(np.float64(1.5))
    assert x.dtype == gpuad.float16 and values_of(x) == [3.0, 3.0]


def test_optimiser_like_step_between_backwards(device):
    """A parameter is changed after backward, as a step does; the next graph is built on its new values."""
    x = leaf([2.0], device)
    for _ in range(3):
        x.grad = None
        (x * x).sum().backward()
        with gpuad.no_grad():
            x -= 0.25 * x.grad
    assert values_of(x) == [0.25]


def test_parameter_changed_before_backward(device):
    w = leaf([2.0], device)
    loss = (w * w).sum()
    with gpuad.no_grad():
        w.mul_(0.5)
    with pytest.raises(AutogradError, match="changed in place"):
        loss.backward()


def test_replaced_data_before_backward(device):
    """`p.data = …` puts in another array; the graph keeps the one it was computed with."""
    w = leaf([2.0], device)
    loss = (w * w).sum()
    w.data = gpuad.tensor([50.0], device=device)
    loss.backward()
    assert values_of(w.grad) == [4.0]


# Gradients and memory they may not share ------------------------------------------------------------------------------


def test_gradients_do_not_alias_what_the_user_gave(device):
    x = leaf([1.0, 2.0], device)
    seed = gpuad.tensor([1.0, 10.0], device=device)
    (x + 0).backward(seed)
    x.grad.mul_(5)
    assert values_of(seed) == [1.0, 10.0]
    x.grad = None
    x.backward(seed)
    x.grad.mul_(5)
    assert values_of(seed) == [1.0, 10.0]
    (g,) = grad(x + 0, x, seed)
    g.mul_(5)
    assert values_of(seed) == [1.0, 10.0]


def test_gradients_of_two_leaves_are_two_buffers(device):
    x, y = leaf([1.0, 2.0], device), leaf([3.0, 4.0], device)
    (x + y).sum().backward()
    x.grad.mul_(5)
    assert values_of(y.grad) == [1.0, 1.0]
    a, b = grad((x + y) * 1, [x, y], gpuad.ones(2, device=device))
    a.mul_(5)
    assert values_of(b) == [1.0, 1.0]


def test_gradients_do_not_alias_retained_ones_or_hooks(device):
    x = leaf([1.0, 2.0], device)
    y = x + 0
    y.retain_grad()
    seen = []
    y.register_hook(seen.append)
    (y * 2).sum().backward()
    x.grad.mul_(5)
    assert values_of(y.grad) == [2.0, 2.0] and values_of(seen[0]) == [2.0, 2.0]


def test_gradients_do_not_alias_inputs_or_saved_values(device):
    x, w = leaf([1.0, 2.0], device), leaf([3.0, 4.0], device)
    (x * w).sum().backward()
    x.grad.mul_(7)
    assert values_of(w) == [3.0, 4.0]
    y = leaf([[1.0, 2.0]], device)
    m = gpuad.tensor([[3.0], [4.0]], device=device)
    (y @ m).sum().backward()
    y.grad.zero_()
    assert values_of(m) == [[3.0], [4.0]]


def test_grad_buffers_are_not_shared_between_steps(device):
    """What the user keeps of one step stays as it is while the next step runs."""
    x = leaf([1.0, 2.0], device)
    (x * 2).sum().backward()
    kept = x.grad
    x.grad = None
    (x * 3).sum().backward()
    assert values_of(kept) == [2.0, 2.0] and values_of(x.grad) == [3.0, 3.0]


# Hooks and kept gradients ---------------------------------------------------------------------------------------------


def test_retain_grad(device):
    x = leaf([1.0, 2.0], device)
    y = x * 3
    y.retain_grad()
    assert y.retains_grad
    y.retain_grad()
    (y * y).sum().backward()
    assert values_of(y.grad) == [6.0, 12.0]
    x.retain_grad()  # nothing to do on a leaf
    with pytest.raises(AutogradError, match=r"requires_grad_\(\)"):
        gpuad.ones(1).retain_grad()


def test_hooks_see_and_replace_gradients(device):
    x = leaf([1.0, 2.0], device)
    y = x * 3
    seen = []
    y.register_hook(lambda g: seen.append(values_of(g)))
    y.register_hook(lambda g: g * 10)
    y.register_hook(lambda g: seen.append(values_of(g)))
    handle = x.register_hook(lambda g: g + 1)
    y.sum().backward(retain_graph=True)
    assert seen == [[1.0, 1.0], [10.0, 10.0]] and values_of(x.grad) == [31.0, 31.0]
    handle.remove()
    handle.remove()
    x.grad = None
    y.sum().backward()
    assert values_of(x.grad) == [30.0, 30.0]
    with pytest.raises(AutogradError, match=r"requires_grad_\(\)"):
        gpuad.ones(1).register_hook(print)


def test_hook_runs_once_on_the_sum(device):
    x = leaf([1.0], device)
    seen = []
    x.register_hook(lambda g: seen.append(values_of(g)))
    (x * 2 + x * 3).sum().backward()
    assert seen == [[5.0]]
    with x.register_hook(lambda g: g * 0):
        x.grad = None
        (x * 2).sum().backward()
        assert values_of(x.grad) == [0.0]
    (x * 2).sum().backward()
    assert values_of(x.grad) == [2.0]


def test_hook_on_the_same_function_twice(device):
    x = leaf([1.0], device)
    y = x * 1

    def double(g):
        return g * 2

    first = y.register_hook(double)
    y.register_hook(double)
    first.remove()
    y.sum().backward()
    assert values_of(x.grad) == [2.0]


def test_hooks_apply_in_grad(device):
    x = leaf([1.0], device)
    x.register_hook(lambda g: g * 2)
    assert values_of(grad((x * 3).sum(), x)[0]) == [6.0]


def test_hooks_that_are_differentiated(device):
    x = leaf([2.0], device)
    y = x * x
    y.register_hook(lambda g: g * g)
    (g,) = grad((y * 3).sum(), x, create_graph=True)
    assert values_of(g) == [9.0 * 4.0] and g.requires_grad


def test_post_accumulate_hooks(device):
    x = leaf([1.0, 2.0], device)
    seen = []
    handle = x.register_post_accumulate_grad_hook(lambda t: seen.append(values_of(t.grad)))
    (x * 2).sum().backward()
    (x * 2).sum().backward()
    handle.remove()
    (x * 2).sum().backward()
    assert seen == [[2.0, 2.0], [4.0, 4.0]]
    with pytest.raises(AutogradError, match="leaf"):
        (x * 2).register_post_accumulate_grad_hook(print)


# Modes ----------------------------------------------------------------------------------------------------------------


def test_no_grad_and_enable_grad():
    x = leaf([1.0])
    assert gpuad.is_grad_enabled()
    with gpuad.no_grad():
        assert not gpuad.is_grad_enabled() and not (x * 2).requires_grad
        with gpuad.enable_grad():
            assert (x * 2).requires_grad
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_modes_as_decorators():
    x = leaf([1.0])

    @gpuad.no_grad()
    def silent(t):
        """Doc."""
        return (t * 2).requires_grad, gpuad.is_grad_enabled()

    @gpuad.no_grad
    def silent_too(t):
        return (t * 2).requires_grad

    @gpuad.enable_grad()
    def loud(t):
        return (t * 2).requires_grad

    @gpuad.inference_mode()
    def inference(t):
        return (t * 2).requires_grad, gpuad.is_inference_mode_enabled()

    @gpuad.set_grad_enabled(False)
    def set_off(t):
        return (t * 2).requires_grad

    assert gpuad.is_grad_enabled(), "a decorator sets nothing until its function runs"
    assert silent(x) == (False, False) and not silent_too(x) and inference(x) == (False, True) and not set_off(x)
    assert (silent.__name__, silent.__doc__) == ("silent", "Doc.")
    with gpuad.no_grad():
        assert loud(x)
    assert gpuad.is_grad_enabled()


def test_set_grad_enabled():
    with gpuad.set_grad_enabled(False):
        assert not gpuad.is_grad_enabled()
        with gpuad.set_grad_enabled(True):
            assert gpuad.is_grad_enabled()
        assert not gpuad.is_grad_enabled()
    assert gpuad.is_grad_enabled()
    gpuad.set_grad_enabled(False)
    assert not gpuad.is_grad_enabled()
    gpuad.set_grad_enabled(True)
    assert gpuad.is_grad_enabled()


def test_inference_mode():
    x = leaf([1.0])
    with gpuad.inference_mode():
        assert gpuad.is_inference_mode_enabled() and not (x * 2).requires_grad
        with gpuad.inference_mode(False):
            assert not gpuad.is_inference_mode_enabled() and (x * 2).requires_grad
    assert not gpuad.is_inference_mode_enabled() and gpuad.is_grad_enabled()


def test_modes_are_restored_after_errors():
    @gpuad.no_grad()
    def fail():
        raise KeyError

    for mode in (gpuad.no_grad, gpuad.inference_mode, lambda: gpuad.set_grad_enabled(False)):
        with pytest.raises(KeyError), mode():
            raise KeyError
        assert gpuad.is_grad_enabled()
    with pytest.raises(KeyError):
        fail()
    x = leaf([1.0])
    y = x.exp().sum()
    y.backward()
    with pytest.raises(AutogradError):
        y.backward()
    assert gpuad.is_grad_enabled()


def test_modes_can_be_entered_again():
    mode = gpuad.no_grad()
    for _ in range(2):
        with mode, mode:
            assert not gpuad.is_grad_enabled()
        assert gpuad.is_grad_enabled()


def test_modes_belong_to_their_thread():
    seen = {}

    def other():
        seen["start"] = gpuad.is_grad_enabled()
        with gpuad.no_grad():
            inside.set()
            leave.wait(10)
        seen["end"] = gpuad.is_grad_enabled()

    inside, leave = threading.Event(), threading.Event()
    with gpuad.no_grad():
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
    assert gpuad.is_grad_enabled()
    leave.set()
    thread.join()
    assert seen == {"start": True, "end": True}


def test_graphs_in_threads_do_not_meet():
    """Each thread records and walks its own graph, while the others do."""
    errors = []

    def work(seed):
        try:
            x = leaf(np.full(50, float(seed)))
            for _ in range(30):
                x.grad = None
                y = x
                for _ in range(5):
                    y = y * 1.5 + x
                y.sum().backward()
                expected = 1.5**5 + sum(1.5**k for k in range(5))
                np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-5)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


# Size and memory ------------------------------------------------------------------------------------------------------


def test_chain_of_100_000_ops():
    """No recursion, forward, backward or when the graph is dropped."""
    x = leaf([0.5])
    y = x
    for _ in range(50_000):
        y = y.sin() + 1e-3
    y.sum().backward()
    assert np.isfinite(x.grad.item())
    del y


def test_dropping_a_long_graph_unwalked():
    x = leaf([0.5])
    y = x
    for _ in range(100_000):
        y = y.neg()
    del y
    assert x.grad is None


def _visits(length: int, monkeypatch) -> int:
    """How often the walk turns to a node or contributes, for a ladder of diamonds of `length`."""
    count = [0]
    x = leaf([1.0])
    a = b = x
    for _ in range(length):
        a, b = (a + b) * 0.5, a * 0.5
    contribute = walk_module.Walk.contribute

    def counted(self, to, gradient):
        count[0] += 1
        return contribute(self, to, gradient)

    with monkeypatch.context() as patch:
        patch.setattr(walk_module.Walk, "contribute", counted)
        (a + b).sum().backward()
    return count[0]


def test_walk_is_linear_in_the_graph(monkeypatch):
    """A ladder has 2^n paths; each edge is passed once all the same."""
    short, long = _visits(100, monkeypatch), _visits(1000, monkeypatch)
    assert short < 100 * 6 and long < 10.5 * short


def test_targeted_walk_is_linear_too(device):
    x = leaf([1.0], device)
    y = x
    for _ in range(2000):
        y = y * 0.5 + y * 0.5
    assert values_of(grad(y.sum(), x)[0]) == [1.0]


def test_one_tensor_used_a_thousand_times():
    """The gradients add up in one buffer: the peak is a few arrays, not a thousand."""
    x = leaf(np.ones(10_000))
    y = sum(x * 1.0 for _ in range(3))  # warm: plans are made
    y.sum().backward()
    x.grad = None
    total = x.detach()
    for _ in range(1000):
        total = total + x
    loss = total.sum()
    del total
    tracemalloc.start()
    loss.backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values_of(x.grad)[:2] == [1000.0, 1000.0]
    assert peak < 8 * x.nbytes + 200_000, f"{peak} bytes for gradients of {x.nbytes}"


def test_fan_out_adds_in_place():
    x = leaf(np.ones(10_000))
    h = x * 1.0
    loss = gpuad.stack([(h * float(i)).sum() for i in range(100)]).sum()
    tracemalloc.start()
    loss.backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values_of(x.grad)[0] == sum(range(100))
    assert peak < 10 * x.nbytes + 200_000


def _live() -> tuple[int, int, int]:
    """How many tensors and nodes there are, how many arrays own memory, and how many bytes that is."""
    objects = sum(isinstance(o, (Tensor, Node)) for o in gc.get_objects())
    arrays = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)])
    return objects, len(arrays.traces), sum(trace.size for trace in arrays.traces)


def test_no_reference_cycles():
    """With gc disabled, a hundred training steps leave tensors, nodes, arrays and bytes as they were."""
    rng = np.random.default_rng(0)
    x = gpuad.tensor(rng.standard_normal((16, 8)), dtype="float32")
    w1 = leaf(0.1 * rng.standard_normal((8, 16)), dtype="float32")
    w2 = leaf(0.1 * rng.standard_normal((16, 1)), dtype="float32")

    def step():
        h = (x @ w1).tanh()
        kept = h * 2
        kept.retain_grad()
        kept.register_hook(lambda g: g)
        parts = kept.split(8, 1)
        y = gpuad.cat([parts[0].relu(), parts[1].exp()], 1)
        z = y @ w2
        z[0] = 0.0
        loss = (z * z).mean()
        (g,) = grad(loss, w1, create_graph=True)
        (loss + (g * g).sum()).backward()
        with gpuad.no_grad():
            for p in (w1, w2):
                p -= 1e-3 * p.grad
                p.grad = None

    for _ in range(3):
        step()
    gc.collect()
    gc.disable()
    try:
        tracemalloc.start()
        step()
        before = _live()
        for _ in range(100):
            step()
        after = _live()
        tracemalloc.stop()
    finally:
        gc.enable()
    assert after == before


def test_graph_dies_with_its_root():
    x = leaf(np.ones(3))
    y = x.exp().sin().sum()
    node = weakref.ref(y.grad_fn.parents[0])
    gc.disable()
    try:
        del y
        assert node() is None
    finally:
        gc.enable()


def test_results_without_gradients_keep_nothing():
    a = gpuad.ones(3)
    reference = weakref.ref(a)
    b = a.exp() * a
    del a
    assert reference() is None and b.grad_fn is None


def test_add_keeps_no_operands():
    x = leaf(np.ones(3))
    other = gpuad.ones(3)
    array = weakref.ref(other)
    y = x + other
    del other
    assert array() is None and y.grad_fn.saved == ()


# Devices and the grad attribute ---------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_gradients_cross_devices(cuda_device):
    x = leaf([1.0, 2.0])
    w = leaf([3.0, 4.0], cuda_device)
    (x.to(cuda_device) * w).sum().backward()
    assert values_of(x.grad) == [3.0, 4.0] and x.grad.device.type == "cpu"
    assert values_of(w.grad) == [1.0, 2.0] and w.grad.device is cuda_device


@pytest.mark.cuda
def test_gradient_on_another_device(cuda_device):
    x = leaf([1.0, 2.0])
    with pytest.raises(DeviceError, match=r"cuda:0.*cpu"):
        (x * 2).backward(gpuad.ones(2, device=cuda_device))
    with pytest.raises(AutogradError, match="device"):
        x.grad = gpuad.ones(2, device=cuda_device)


def test_grad_attribute_is_checked():
    x = leaf([1.0, 2.0])
    x.grad = gpuad.tensor([5.0, 6.0])
    (x * 1).sum().backward()
    assert values_of(x.grad) == [6.0, 7.0]
    with pytest.raises(AutogradError, match=r"\(2,\).*\(3,\)"):
        x.grad = gpuad.ones(3)
    with pytest.raises(DtypeError, match="float32.*float64"):
        x.grad = gpuad.ones(2, dtype="float64")
    with pytest.raises(TypeError, match="Tensor or None"):
        x.grad = np.ones(2)


def test_deepcopy_of_leaves_and_others():
    x = leaf([1.0, 2.0])
    (x * x).sum().backward()
    y = copy.deepcopy(x)
    assert y.requires_grad and y.is_leaf and y.data_ptr() != x.data_ptr()
    assert values_of(y.grad) == [2.0, 4.0] and y.grad is not x.grad
    with pytest.raises(AutogradError, match="leaf"):
        copy.deepcopy(x * 2)


# Views on the tape ----------------------------------------------------------------------------------------------------


def test_gradients_through_views(device):
    x = leaf(np.arange(6.0).reshape(2, 3), device)
    y = x.T.reshape(-1)[1:5].view(2, 2).unsqueeze(0).expand(3, 2, 2).permute(2, 0, 1)
    (y * y).sum().backward()
    flat = np.arange(6.0).reshape(2, 3).T.reshape(-1)
    expected = np.zeros(6)
    expected[1:5] = 3 * 2 * flat[1:5]
    np.testing.assert_allclose(values_of(x.grad), expected.reshape(3, 2).T)


def test_assignment_is_differentiated(device):
    x, v = leaf([1.0, 2.0, 3.0, 4.0], device), leaf([10.0, 20.0], device)
    y = x * 2
    y[1:3] = v * v
    y[[0, 0]] = 7.0
    (y * y).sum().backward()
    assert values_of(x.grad) == [0.0, 0.0, 0.0, 32.0]
    assert values_of(v.grad) == [4 * 10.0**3, 4 * 20.0**3]
    buffer = gpuad.zeros(3, device=device)  # a plain tensor joins the tape when it takes a recorded value
    buffer[1] = v.sum()
    assert buffer.requires_grad
    v.grad = None
    (buffer * 2).sum().backward()
    assert values_of(v.grad) == [2.0, 2.0]


def test_assigned_value_of_another_dtype(device):
    v = leaf([1.0, 2.0], device, "float64")
    y = gpuad.zeros(2, device=device)
    y[:] = v * 2
    y.sum().backward()
    assert y.dtype == gpuad.float32 and v.grad.dtype == gpuad.float64 and values_of(v.grad) == [2.0, 2.0]
