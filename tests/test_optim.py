"""Optimisers against NumPy loops, what PyTorch's users rely on at the edges, and what a step costs on a device."""

import copy
import math
import pickle
import weakref

import numpy as np
import pytest

import gpuad
from gpuad import nn, optim
from gpuad.update import update

# The rules again, in NumPy, one parameter at a time -------------------------------------------------------------------


def sgd(p, g, s, t, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    g = (-g if maximize else g) + weight_decay * p
    if momentum:
        first = "momentum_buffer" not in s
        s["momentum_buffer"] = g if first else momentum * s["momentum_buffer"] + (1 - dampening) * g
        g = g + momentum * s["momentum_buffer"] if nesterov else s["momentum_buffer"]
    return p - lr * g


def adam(p, g, s, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False,
         decoupled=False):  # fmt: skip
    g = -g if maximize else g
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    m = s["exp_avg"] = betas[0] * s.get("exp_avg", 0) + (1 - betas[0]) * g
    v = s["exp_avg_sq"] = betas[1] * s.get("exp_avg_sq", 0) + (1 - betas[1]) * g**2
    if amsgrad:
        v = s["max_exp_avg_sq"] = np.maximum(s.get("max_exp_avg_sq", 0), v)
    return p - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def adamw(p, g, s, t, weight_decay=1e-2, **more):
    return adam(p, g, s, t, weight_decay=weight_decay, decoupled=True, **more)


def rmsprop(p, g, s, t, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, maximize=False):
    g = (-g if maximize else g) + weight_decay * p
    v = s["square_avg"] = alpha * s.get("square_avg", 0) + (1 - alpha) * g**2
    if centered:
        s["grad_avg"] = alpha * s.get("grad_avg", 0) + (1 - alpha) * g
        v = v - s["grad_avg"] ** 2
    g = g / (np.sqrt(v) + eps)
    if momentum:
        g = s["momentum_buffer"] = momentum * s.get("momentum_buffer", 0) + g
    return p - lr * g


def adagrad(p, g, s, t, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10):
    g = g + weight_decay * p
    s["sum"] = s.get("sum", initial_accumulator_value) + g**2
    return p - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(s["sum"]) + eps)


def adadelta(p, g, s, t, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0):
    g = g + weight_decay * p
    s["square_avg"] = rho * s.get("square_avg", 0) + (1 - rho) * g**2
    d = np.sqrt(s.get("acc_delta", 0) + eps) / np.sqrt(s["square_avg"] + eps) * g
    s["acc_delta"] = rho * s.get("acc_delta", 0) + (1 - rho) * d**2
    return p - lr * d


def adamax(p, g, s, t, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    g = g + weight_decay * p
    m = s["exp_avg"] = betas[0] * s.get("exp_avg", 0) + (1 - betas[0]) * g
    u = s["exp_inf"] = np.maximum(betas[1] * s.get("exp_inf", 0), np.abs(g) + eps)
    return p - lr / (1 - betas[0] ** t) * m / u


def radam(p, g, s, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False):
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    m = s["exp_avg"] = betas[0] * s.get("exp_avg", 0) + (1 - betas[0]) * g
    v = s["exp_avg_sq"] = betas[1] * s.get("exp_avg_sq", 0) + (1 - betas[1]) * g**2
    m = m / (1 - betas[0] ** t)
    longest = 2 / (1 - betas[1]) - 1
    length = longest - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
    if length <= 5:
        return p - lr * m
    rectified = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    return p - lr * m * rectified * math.sqrt(1 - betas[1] ** t) / (np.sqrt(v) + eps)


def lion(p, g, s, t, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    m = s.get("exp_avg", 0)
    s["exp_avg"] = betas[1] * m + (1 - betas[1]) * g
    return p - lr * weight_decay * p - lr * np.sign(betas[0] * m + (1 - betas[0]) * g)


CASES = [
    (optim.SGD, sgd, {}),
    (optim.SGD, sgd, {"weight_decay": 0.1}),
    (optim.SGD, sgd, {"momentum": 0.9}),
    (optim.SGD, sgd, {"momentum": 0.9, "maximize": True}),
    (optim.SGD, sgd, {"dampening": 0.5}),
    (optim.SGD, sgd, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (optim.SGD, sgd, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.Adam, adam, {}),
    (optim.Adam, adam, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    (optim.Adam, adam, {"amsgrad": True}),
    (optim.AdamW, adamw, {}),
    (optim.AdamW, adamw, {"amsgrad": True, "weight_decay": 0.0}),
    (optim.RMSprop, rmsprop, {}),
    (optim.RMSprop, rmsprop, {"alpha": 0.5, "weight_decay": 0.1, "momentum": 0.9, "eps": 1e-4}),
    (optim.RMSprop, rmsprop, {"centered": True, "alpha": 0.5, "eps": 1e-2, "maximize": True}),
    (optim.Adagrad, adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1}),
    (optim.Adadelta, adadelta, {"weight_decay": 0.1}),
    (optim.Adamax, adamax, {"weight_decay": 0.1}),
    (optim.RAdam, radam, {"weight_decay": 0.1}),
    (optim.RAdam, radam, {"betas": (0.9, 0.5), "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.Lion, lion, {"weight_decay": 0.1}),
]
SHAPES = [(4, 3), (20001,), (), (0, 2), (2, 1, 5)]


def tensors(device, dtype=gpuad.float32, shapes=SHAPES, seed=0):
    numbers = np.random.default_rng(seed)
    return [gpuad.tensor(numbers.standard_normal(s), dtype=dtype, device=device).requires_grad_() for s in shapes]


def give(p, values):
    """Put a gradient there, as a backward pass would."""
    p.grad = gpuad.tensor(values, dtype=p.dtype, device=p.device)


def array(t):
    return t.detach().cpu().numpy()


def case_id(value):
    return value.__name__ if isinstance(value, type) else None if callable(value) else ",".join(value) or "plain"


@pytest.mark.parametrize("dtype", [gpuad.float32, gpuad.float64], ids=str)
@pytest.mark.parametrize("make, reference, options", CASES, ids=case_id)
def test_follows_the_reference_loop(make, reference, options, dtype, device):
    """In two groups, with a rate that changes and gradients that are missing now and then."""
    parameters = tensors(device, dtype)
    optimizer = make([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 3e-3}], lr=1e-2, **options)
    numbers = np.random.default_rng(1)
    expected = [array(p).astype(np.float64) for p in parameters]
    states = [{} for _ in parameters]
    steps = [0] * len(parameters)
    for t in range(20):
        if t == 10:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        for i, p in enumerate(parameters):
            grad = numbers.standard_normal(tuple(p.shape)).astype(dtype)
            if (t % 4 == 2 and i == 1) or (t < 3 and i == 2):
                p.grad = None
                continue
            give(p, grad)
            steps[i] += 1
            rate = (1e-2 if i < 2 else 3e-3) * (0.5 if t >= 10 else 1)
            expected[i] = reference(expected[i], grad.astype(np.float64), states[i], steps[i], lr=rate, **options)
        optimizer.step()
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == gpuad.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for p, wanted, state in zip(parameters, expected, states):
        np.testing.assert_allclose(array(p), wanted, **tolerance)
        own = {name: value for name, value in optimizer.state.get(p, {}).items() if name != "step"}
        assert set(own) == set(state)
        for name, value in own.items():
            np.testing.assert_allclose(array(value), state[name], err_msg=name, **tolerance)


def test_float16_is_computed_in_float32(device):
    (p,) = tensors(device, gpuad.float16, [(1000,)])
    optimizer = optim.Adam([p], lr=1e-2)
    expected, state = array(p).astype(np.float32), {}
    for t in range(1, 6):
        grad = np.full(1000, 1e-3, np.float16)  # its square is 1e-6, of which float16 keeps 4 bits
        give(p, grad)
        optimizer.step()
        expected = adam(expected, grad.astype(np.float32), state, t, lr=1e-2).astype(np.float16).astype(np.float32)
        state = {name: np.float32(np.float16(value)) for name, value in state.items()}
    assert p.dtype == gpuad.float16 and optimizer.state[p]["exp_avg"].dtype == gpuad.float16
    np.testing.assert_allclose(array(p).astype(np.float32), expected, rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("size", [6, 300], ids=["small", "large"])
def test_arrays_with_gaps(device, size):
    """A transposed parameter, whose gradient and state are laid out in their own way; a slice of a larger array."""
    numbers = np.random.default_rng(0)
    whole = gpuad.tensor(numbers.standard_normal((size, 2 * size)), dtype=gpuad.float32, device=device)
    parameters = [nn.Parameter(gpuad.zeros(size, size, device=device)) for _ in range(3)]
    parameters[0].data = whole[:, :size].t()
    parameters[1].data = whole[:, ::2]
    parameters[2].data = gpuad.tensor(numbers.standard_normal((size, size)), dtype=gpuad.float32, device=device)
    parameters = [parameters[0], parameters[2]] if size == 6 else [parameters[1], parameters[2]]
    expected, states = [array(p).copy() for p in parameters], [{}, {}]
    optimizer = optim.SGD(parameters, lr=0.1, momentum=0.9)
    for t in range(1, 4):
        for i, p in enumerate(parameters):
            grad = numbers.standard_normal((size, size)).astype(np.float32)
            p.grad = gpuad.tensor(grad.T, device=device).t() if t == 2 else gpuad.tensor(grad, device=device)
            expected[i] = sgd(expected[i], grad, states[i], t, lr=0.1, momentum=0.9)
        optimizer.step()
        for p, wanted in zip(parameters, expected):
            np.testing.assert_allclose(array(p), wanted, rtol=1e-5, atol=1e-6)


# What users rely on ---------------------------------------------------------------------------------------------------


def test_a_parameter_without_gradient_is_skipped(device):
    used, unused = tensors(device, shapes=[(3,), (3,)])
    before = array(unused).copy()
    optimizer = optim.SGD([used, unused], lr=0.1, momentum=0.9, weight_decay=0.5)
    give(used, np.ones(3))
    optimizer.step()
    np.testing.assert_array_equal(array(unused), before)
    assert unused not in optimizer.state and list(optimizer.state_dict()["state"]) == [0]


def test_a_step_without_any_gradient(device):
    optimizer = optim.Adam(tensors(device))
    assert optimizer.step() is None
    assert not optimizer.state


def test_no_decay_term_means_no_decay(device):
    """0 · p is no term at all: an infinite parameter stays infinite, as in PyTorch."""
    (p,) = tensors(device, shapes=[(2,)])
    p.data = gpuad.tensor([math.inf, 1.0], device=device)
    give(p, [1.0, 1.0])
    optim.SGD([p], lr=0.5).step()
    assert array(p).tolist() == [math.inf, 0.5]


def test_data_and_grad_can_be_replaced(device):
    (p,) = tensors(device, shapes=[(3,)])
    optimizer = optim.SGD([p], lr=1.0, momentum=0.5)
    p.data = gpuad.zeros(3, device=device)
    give(p, [1.0, 2.0, 3.0])
    optimizer.step()
    assert array(p).tolist() == [-1.0, -2.0, -3.0]
    p.data = gpuad.zeros(3, device=device)
    give(p, [1.0, 1.0, 1.0])
    optimizer.step()
    assert array(p).tolist() == [-1.5, -2.0, -2.5]  # the momentum stays
    p.grad.data = gpuad.zeros(3, device=device)
    optimizer.step()
    assert array(p).tolist() == [-2.25, -3.0, -3.75]


def test_state_can_be_replaced(device):
    (p,) = tensors(device, shapes=[(2,)])
    optimizer = optim.SGD([p], lr=1.0, momentum=0.5)
    p.data = gpuad.zeros(2, device=device)
    give(p, [1.0, 1.0])
    optimizer.step()
    optimizer.state[p]["momentum_buffer"] = gpuad.tensor([4.0, 8.0], device=device)
    optimizer.step()
    assert array(p).tolist() == [-4.0, -6.0]
    optimizer.state[p]["momentum_buffer"].zero_()
    optimizer.step()
    assert array(p).tolist() == [-5.0, -7.0]
    del optimizer.state[p]
    optimizer.step()
    assert array(p).tolist() == [-6.0, -8.0]


def test_a_frozen_parameter_stays(device):
    net = nn.Sequential(nn.Linear(2, 3, device=device), nn.Linear(3, 1, device=device))
    net[0].requires_grad_(False)
    before = [array(p).copy() for p in net.parameters()]
    optimizer = optim.Adam(net.parameters())
    net(gpuad.ones(4, 2, device=device)).sum().backward()
    optimizer.step()
    changed = [not np.array_equal(array(p), b) for p, b in zip(net.parameters(), before)]
    assert changed == [False, False, True, True]


def test_groups_have_their_own_hyperparameters(device):
    a, b, c = tensors(device, shapes=[(2,)] * 3)
    optimizer = optim.SGD([{"params": a, "lr": 1.0}, {"params": [b]}], lr=0.1)
    optimizer.add_param_group({"params": [c], "weight_decay": 1.0, "momentum": 0.9, "nesterov": True})
    for p in (a, b, c):
        p.data = gpuad.ones(2, device=device)
        give(p, [1.0, 1.0])
    optimizer.step()
    np.testing.assert_allclose([array(p)[0] for p in (a, b, c)], [0.0, 0.9, 1 - 0.1 * 2 * 1.9], rtol=1e-6)
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.1, 0.1]


def test_one_group_of_many_settings(device):
    """More sets of hyperparameters than one launch holds."""
    parameters = tensors(device, gpuad.float64, shapes=[(2,)] * 50)
    optimizer = optim.Adam([{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(parameters)])
    before = [array(p).copy() for p in parameters]
    for p in parameters:
        give(p, [1.0, 1.0])
    optimizer.step()
    for i, (p, b) in enumerate(zip(parameters, before)):
        np.testing.assert_allclose(b - array(p), 1e-3 * (i + 1), rtol=1e-6)


def test_parameters_given_twice():
    a, b = tensors("cpu", shapes=[(2,), (2,)])
    with pytest.raises(ValueError, match="twice in one parameter group"):
        optim.SGD([a, b, a])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim.SGD([{"params": [a]}, {"params": [a, b]}])
    optimizer = optim.SGD([a])
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [a]})
    assert len(optimizer.param_groups) == 1


def test_a_shared_layer_is_updated_once(device):
    layer = nn.Linear(2, 2, device=device)
    net = nn.Sequential(layer, layer)
    optimizer = optim.SGD(net.parameters(), lr=1.0)
    net(gpuad.ones(1, 2, device=device)).sum().backward()
    before, grad = array(layer.weight).copy(), array(layer.weight.grad)
    optimizer.step()
    np.testing.assert_allclose(array(layer.weight), before - grad, rtol=1e-6)


def test_what_is_no_parameter():
    (a,) = tensors("cpu", shapes=[(2,)])
    with pytest.raises(TypeError, match="put it in a list"):
        optim.SGD(a)
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.SGD([])
    with pytest.raises(TypeError, match="optimises Tensors"):
        optim.SGD([np.zeros(2)])
    with pytest.raises(TypeError, match="set"):
        optim.SGD([{"params": {a}}])
    with pytest.raises(ValueError, match="leaves"):
        optim.SGD([a * 2])
    with pytest.raises(TypeError, match="must be a dict"):
        optim.SGD([a]).add_param_group([a])


@pytest.mark.parametrize(
    "make, options, text",
    [
        (optim.SGD, {"lr": -1.0}, "lr must be at least 0, got -1.0"),
        (optim.SGD, {"lr": math.nan}, "lr must be at least 0, got nan"),
        (optim.SGD, {"momentum": -0.1}, "momentum must be at least 0"),
        (optim.SGD, {"nesterov": True}, "nesterov=True needs a momentum"),
        (optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "no dampening"),
        (optim.Adam, {"betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and below 1, got 1.0"),
        (optim.AdamW, {"eps": -1e-8}, "eps must be"),
        (optim.RMSprop, {"weight_decay": -1}, "weight_decay must be"),
        (optim.Adadelta, {"rho": 1.5}, "rho must be"),
        (optim.Adam, {"differentiable": True}, "differentiable=True is not there"),
    ],
)
def test_invalid_hyperparameters(make, options, text):
    with pytest.raises(ValueError, match=text):
        make(tensors("cpu"), **options)


def test_pytorch_s_choices_of_implementation_are_accepted():
    parameters = tensors("cpu")
    optim.SGD(parameters, foreach=True, fused=False)
    optim.AdamW(parameters, foreach=False, capturable=True, fused=True)


def test_a_step_is_noticed_by_the_tape(device):
    """A saved parameter that a step changed in place cannot serve a backward any more."""
    (p,) = tensors(device, shapes=[(3,)])
    y = (p * p).sum()
    give(p, np.ones(3))
    version = p._version
    optim.SGD([p], lr=0.1).step()
    assert p._version == version + 1 and p.is_leaf and p.requires_grad
    with pytest.raises(gpuad.errors.AutogradError, match="changed in place"):
        y.backward()


def test_closure(device):
    (p,) = tensors(device, shapes=[(3,)])
    optimizer = optim.SGD([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    losses = []
    with gpuad.no_grad():  # the closure records all the same
        for _ in range(3):
            losses.append(optimizer.step(closure).item())
    assert losses[0] > losses[1] > losses[2]


def test_hooks_of_a_step():
    (p,) = tensors("cpu", shapes=[(3,)])
    optimizer = optim.SGD([p])
    seen = []
    before = optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    optimizer.step()
    before.remove()
    optimizer.step()
    assert seen == ["before", "after", "after"]


def test_a_new_rate_compiles_nothing(device):
    (p,) = tensors(device, shapes=[(3,)])
    optimizer = optim.Adam([p])
    rule, compiled = optim.Adam.rule, None
    for t in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 * t  # 0 too: a schedule may begin there
        give(p, np.ones(3))
        optimizer.step()
        compiled = compiled or dict(rule._updates)
    assert rule._updates == compiled


def test_numpy_and_tensor_hyperparameters(device):
    (p,) = tensors(device, shapes=[(3,)])
    rate = gpuad.tensor(0.5)
    optimizer = optim.Adam([p], lr=rate, betas=(np.float64(0.9), np.float32(0.5)))
    p.data = gpuad.zeros(3, device=device)
    give(p, np.ones(3))
    optimizer.step()
    np.testing.assert_allclose(array(p), -0.5, rtol=1e-5)
    rate.fill_(1.0)
    optimizer.step()
    np.testing.assert_allclose(array(p), -1.5, rtol=1e-5)
    assert array(p).dtype == np.float32


# Gradients that keep their buffers ------------------------------------------------------------------------------------


def test_zero_grad_keeps_the_buffer(device):
    layer = nn.Linear(3, 2, device=device)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    x = gpuad.ones(4, 3, device=device)
    layer(x).sum().backward()
    address = layer.weight.grad.data_ptr()
    optimizer.zero_grad()
    assert layer.weight.grad is None
    layer(2 * x).sum().backward()
    assert layer.weight.grad.data_ptr() == address
    np.testing.assert_array_equal(array(layer.weight.grad), np.full((2, 3), 8.0))
    np.testing.assert_array_equal(array(layer.bias.grad), np.full(2, 4.0))


@pytest.mark.parametrize(
    "hold",
    [
        lambda grad: grad,
        lambda grad: grad.detach(),
        lambda grad: grad[0],
        lambda grad: grad.t(),
        lambda grad: grad.reshape(-1)[1:],
        lambda grad: gpuad.from_dlpack(grad),
    ],
    ids=["grad", "detach", "row", "transposed", "slice", "dlpack"],
)
def test_a_gradient_that_somebody_holds_does_not_change(device, hold):
    layer = nn.Linear(3, 2, device=device)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    x = gpuad.ones(4, 3, device=device)
    layer(x).sum().backward()
    held = hold(layer.weight.grad)
    before = array(held).copy()
    optimizer.step()
    optimizer.zero_grad()
    layer(5 * x).sum().backward()
    np.testing.assert_array_equal(array(held), before)
    np.testing.assert_array_equal(array(layer.weight.grad), np.full((2, 3), 20.0))


def test_zero_grad_in_place(device):
    layer = nn.Linear(3, 2, device=device)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    layer(gpuad.ones(4, 3, device=device)).sum().backward()
    held = layer.weight.grad
    optimizer.zero_grad(set_to_none=False)
    assert layer.weight.grad is held
    np.testing.assert_array_equal(array(held), np.zeros((2, 3)))


def test_nothing_keeps_old_arrays_alive(device):
    (p,) = tensors(device, shapes=[(3,)])
    optimizer = optim.Adam([p])
    give(p, np.ones(3))
    optimizer.step()
    old = [weakref.ref(p._data), weakref.ref(p.grad._data)]
    p.data = gpuad.zeros(3, device=device)
    p.grad = None
    assert [ref() for ref in old] == [None, None]


# State ----------------------------------------------------------------------------------------------------------------


def train(net, optimizer, steps, seed=0):
    numbers = np.random.default_rng(seed)
    device = next(net.parameters()).device
    losses = []
    for _ in range(steps):
        x = gpuad.tensor(numbers.standard_normal((8, 3)), dtype=gpuad.float32, device=device)
        optimizer.zero_grad()
        loss = (net(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def network(device, seed=0):
    gpuad.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(device)


KEYS = {
    optim.SGD: ["momentum_buffer"],
    optim.Adam: ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    optim.RMSprop: ["step", "square_avg", "momentum_buffer", "grad_avg"],
}


@pytest.mark.parametrize(
    "make, options",
    [
        (optim.SGD, {"momentum": 0.9}),
        (optim.Adam, {"amsgrad": True}),
        (optim.RMSprop, {"momentum": 0.9, "centered": True}),
    ],
    ids=case_id,
)
def test_state_dict_goes_on_where_it_was(make, options, device):
    net = network(device)
    optimizer = make(net.parameters(), lr=1e-2, **options)
    train(net, optimizer, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    assert list(saved["state"]) == [0, 1, 2, 3] and saved["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert all(list(own) == KEYS[make] for own in saved["state"].values())
    if "step" in KEYS[make]:
        step = saved["state"][0]["step"]
        assert (step.item(), step.shape, step.dtype, str(step.device)) == (3.0, (), gpuad.float32, "cpu")
    expected = train(net, optimizer, 4, seed=1)

    again = network(device, seed=1)
    again.load_state_dict(weights)
    loaded = make(again.parameters(), lr=1.0, **options)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["lr"] == 1e-2
    np.testing.assert_allclose(train(again, loaded, 4, seed=1), expected, rtol=1e-6)
    kept = saved["state"][0][KEYS[make][-1]]
    assert not np.array_equal(array(kept), array(loaded.state[again[0].weight][KEYS[make][-1]]))  # it was copied


def test_state_is_loaded_onto_the_parameters_device(device, cuda_device):
    net = network(cuda_device)
    optimizer = optim.Adam(net.parameters())
    train(net, optimizer, 2)
    there = network(device).double()
    loaded = optim.Adam(there.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    own = loaded.state[there[0].weight]
    assert own["exp_avg"].device == device and own["exp_avg"].dtype == gpuad.float64
    assert str(own["step"].device) == "cpu" and own["step"].dtype == gpuad.float32


def test_loading_what_does_not_fit_changes_nothing():
    net = network("cpu")
    optimizer = optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    train(net, optimizer, 2)
    good = copy.deepcopy(optimizer.state_dict())
    wrong_shape, wrong_size, wrong_groups = copy.deepcopy(good), copy.deepcopy(good), copy.deepcopy(good)
    for saved in (wrong_shape, wrong_size, wrong_groups):
        saved["param_groups"][0]["lr"] = 5.0
    wrong_shape["state"][3]["momentum_buffer"] = gpuad.zeros(7)
    wrong_size["param_groups"][0]["params"] = [0, 1, 2]
    wrong_groups["param_groups"] *= 2
    for saved, text in [(wrong_shape, "shape"), (wrong_size, "3 parameters"), (wrong_groups, "2 parameter groups")]:
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 1e-2
        for p, own in zip(net.parameters(), good["state"].values()):
            np.testing.assert_array_equal(array(optimizer.state[p]["momentum_buffer"]), array(own["momentum_buffer"]))


def test_loading_plain_step_counts():
    """Counts as numbers, as older checkpoints have them."""
    net = network("cpu")
    optimizer = optim.Adam(net.parameters())
    train(net, optimizer, 2)
    saved = optimizer.state_dict()
    for own in saved["state"].values():
        own["step"] = 2
    optimizer.load_state_dict(saved)
    train(net, optimizer, 1)
    assert optimizer.state[net[0].weight]["step"].item() == 3.0


def test_copies_and_pickles_of_an_optimizer():
    net = network("cpu")
    optimizer = optim.Adam(net.parameters())
    train(net, optimizer, 2)
    other, copied = copy.deepcopy((net, optimizer))
    np.testing.assert_allclose(train(other, copied, 3), train(net, optimizer, 3), rtol=1e-6)
    assert pickle.dumps(optimizer.param_groups[0]["lr"])


def test_repr():
    (p,) = tensors("cpu", shapes=[(2,)])
    text = repr(optim.RMSprop([p], lr=0.5))
    assert text.startswith("RMSprop (\nParameter Group 0\n") and "    lr: 0.5\n" in text and "params" not in text


def test_named_parameters():
    net = network("cpu")
    optimizer = optim.SGD(net.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    train(net, optimizer, 1)
    with pytest.raises(ValueError, match="either all parameters"):
        optim.SGD([("a", net[0].weight), net[0].bias])


# Devices and dtypes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.RMSprop])
def test_state_follows_its_parameters(make, device, cuda_device):
    options = {"momentum": 0.9} if make is optim.SGD else {}
    staying, moving = network("cpu"), network("cpu")
    one = make(staying.parameters(), lr=1e-2, **options)
    other = make(moving.parameters(), lr=1e-2, **options)
    expected = train(staying, one, 8)
    found = train(moving, other, 2)
    moving.to(cuda_device)
    numbers = np.random.default_rng(0)
    numbers.standard_normal((2, 8, 3))
    found += _go_on(moving, other, numbers, 3)
    moving.to("cuda:1" if gpuad.cuda.device_count() > 1 else "cpu")
    found += _go_on(moving, other, numbers, 2)
    moving.to("cpu")
    found += _go_on(moving, other, numbers, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert {str(t.device) for own in other.state.values() for t in own.values()} == {"cpu"}


def _go_on(net, optimizer, numbers, steps):
    losses = []
    for _ in range(steps):
        x = gpuad.tensor(numbers.standard_normal((8, 3)), dtype=gpuad.float32, device=next(net.parameters()).device)
        optimizer.zero_grad()
        loss = (net(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_state_follows_the_dtype(device):
    net = network(device)
    optimizer = optim.Adam(net.parameters())
    train(net, optimizer, 2)
    net.double()
    for p in net.parameters():
        give(p, np.ones(tuple(p.shape)))
    optimizer.step()
    assert {optimizer.state[p]["exp_avg"].dtype for p in net.parameters()} == {np.dtype("float64")}


def test_parameters_on_two_devices(cuda_device):
    a, b = tensors("cpu", shapes=[(3,)])[0], tensors(cuda_device, shapes=[(3,)])[0]
    optimizer = optim.Adam([a, b], lr=1e-2)
    for p in (a, b):
        give(p, [1.0, 2.0, 3.0])
    optimizer.step()
    np.testing.assert_allclose(array(a), array(b), rtol=1e-6)


def test_a_gradient_that_does_not_fit_is_an_error(device):
    first, p = tensors(device, shapes=[(3,), (3,)])
    before = array(first).copy()
    optimizer = optim.Adam([first, p])
    give(first, np.ones(3))
    give(p, np.ones(3))
    p.data = gpuad.zeros(1, 3, device=device)
    with pytest.raises(gpuad.errors.ShapeError, match="after replacing p.data"):
        optimizer.step()
    p.data = gpuad.zeros(3, device=device, dtype=gpuad.float64)
    with pytest.raises(gpuad.errors.DtypeError, match="float64"):
        optimizer.step()
    np.testing.assert_array_equal(array(first), before)  # nothing was updated
    assert first not in optimizer.state


def test_a_state_that_does_not_fit_is_an_error(device):
    (p,) = tensors(device, shapes=[(3,)])
    optimizer = optim.SGD([p], momentum=0.9)
    give(p, np.ones(3))
    optimizer.step()
    p.grad = None
    p.data = gpuad.zeros(4, device=device)
    give(p, np.ones(4))
    with pytest.raises(gpuad.errors.ShapeError, match="del optimizer.state"):
        optimizer.step()


# Optimisers of one's own ----------------------------------------------------------------------------------------------


class Signed(optim.Optimizer):
    """A rule with state, a flag and a number that can be left out."""

    def __init__(self, params, lr=0.1, friction=0.0, both=False):
        super().__init__(params, {"lr": lr, "friction": friction, "both": both})

    @update
    def rule(p, grad, speed, *, lr, friction=0.0, both=False):
        speed = gpuad.sign(grad) - friction * speed
        return (p - lr * speed - lr * grad if both else p - lr * speed), speed


def test_a_rule_of_one_s_own(device):
    (p,) = tensors(device, shapes=[(2,)])
    for both, friction, expected in [(False, 0.0, [-0.2, 0.2]), (True, 0.5, [-0.55, 0.75])]:
        p.data = gpuad.zeros(2, device=device)
        optimizer = Signed([p], friction=friction, both=both)
        for _ in range(2):
            give(p, [2.0, -3.0])
            optimizer.step()
        np.testing.assert_allclose(array(p), expected, rtol=1e-5)
        assert list(optimizer.state.get(p, {})) == (["speed"] if friction else [])


def test_a_step_of_one_s_own(device):
    class Plain(optim.Optimizer):
        def step(self, closure=None):
            with gpuad.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(p.grad * group["lr"])

    (p,) = tensors(device, shapes=[(2,)])
    p.data = gpuad.zeros(2, device=device)
    give(p, [1.0, 2.0])
    Plain([p], {"lr": 0.5}).step()
    assert array(p).tolist() == [-0.5, -1.0]
    with pytest.raises(NotImplementedError, match="neither a rule nor a step"):
        optim.Optimizer([p], {}).step()


def test_rules_that_cannot_be():
    with pytest.raises(gpuad.errors.FormulaError, match="after a \\*"):

        @update
        def rule(p, *, lr):
            return p

    class Wrong(optim.Optimizer):
        @update
        def rule(p, grad, speed, *, lr):
            return p - lr * grad + speed

    (p,) = tensors("cpu", shapes=[(2,)])
    give(p, [1.0, 2.0])
    with pytest.raises(gpuad.errors.FormulaError, match="must return the new p and each of its 1 states"):
        Wrong([p], {"lr": 0.1}).step()


# What a step costs on a device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, 200])
@pytest.mark.parametrize(
    "make",
    [optim.SGD, lambda p: optim.SGD(p, momentum=0.9), optim.Adam, lambda p: optim.AdamW(p, amsgrad=True)],
    ids=["sgd", "momentum", "adam", "amsgrad"],
)
def test_a_step_is_one_launch(make, count, cuda_device, counts):
    parameters = tensors(cuda_device, shapes=[(1 + i % 7, 300) for i in range(count)])
    optimizer = make(parameters)
    for p in parameters:
        give(p, np.ones(tuple(p.shape)))
    for _ in range(2):
        optimizer.step()
    with counts() as r:
        for t in range(5):
            optimizer.param_groups[0]["lr"] = 1e-3 * t
            optimizer.step()
    assert (r.kernel_launches, r.syncs, r.stats["memsets"]) == (5, 0, 0)
    assert r.copies("h2d") == r.copies("d2h") == r.copies("d2d") == (0, 0)


def test_a_long_table_is_written_without_a_copy(cuda_device, counts):
    """200 parameters are more than a kernel's arguments hold; gradients that moved are written anew by kernels."""
    parameters = tensors(cuda_device, shapes=[(5,)] * 200)
    optimizer = optim.SGD(parameters, lr=0.5, momentum=0.9)
    for _ in range(2):
        held = [p.grad for p in parameters]  # so that the new ones lie elsewhere
        for p in parameters:
            p.grad = gpuad.ones_like(p)
        with counts() as r:
            optimizer.step()
        del held
    assert r.stats["kernels"]["gpuad_update_SGD"] == 1 and set(r.stats["kernels"]) == {
        "gpuad_update_SGD", "gpuad_write_table",
    }  # fmt: skip
    assert not r.syncs and not r.stats["copies"]
    expected = array(tensors(cuda_device, shapes=[(5,)] * 200)[199]) - 0.5 - 0.5 * 1.9
    np.testing.assert_allclose(array(parameters[199]), expected, rtol=1e-5)


def test_groups_and_devices_share_launches(cuda_device, counts):
    """Groups with other numbers are one launch; another formula, dtype or device is another."""
    parameters = tensors(cuda_device, shapes=[(10,)] * 4)
    half = tensors(cuda_device, gpuad.float16, shapes=[(10,)])
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5, "weight_decay": 0.3}, {"params": half}]
    optimizer = optim.AdamW(groups)
    for p in [*parameters, *half]:
        give(p, np.ones(10))
    optimizer.step()
    with counts() as r:
        optimizer.step()
    assert r.kernel_launches == 2


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, momentum=0.9), optim.Adam], ids=["momentum", "adam"])
def test_training_allocates_and_copies_nothing(make, cuda_device, counts):
    net = network(cuda_device)
    optimizer = make(net.parameters())
    x = gpuad.randn(8, 3, device=cuda_device)

    def step():
        optimizer.zero_grad()
        (net(x) ** 2).mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    addresses = [p.grad.data_ptr() for p in net.parameters()]
    with counts() as r:
        step()
    assert (r.syncs, r.stats["mallocs"]) == (0, 0)
    assert r.copies("h2d") == r.copies("d2h") == (0, 0)
    assert [p.grad.data_ptr() for p in net.parameters()] == addresses
