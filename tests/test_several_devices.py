"""Several CUDA devices: operations, gradients, optimisers and random numbers away from the current device."""

from __future__ import annotations

import numpy as np
import pytest
from test_ops import EVERYTHING, cases, host, ident

import gpuad
from gpuad import nn, optim
from gpuad.autograd import grad
from gpuad.autograd.forward import jvp

pytestmark = pytest.mark.cuda


@pytest.fixture
def elsewhere(cuda_device):
    """cuda:1, while cuda:0 is the current device."""
    if gpuad.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert gpuad.cuda.current_device() == 0
    return gpuad.device("cuda:1")


def everything_of(case):
    """Values, first and second derivatives in both modes, as tensors."""
    leaves = case.leaves()
    outs = case(*leaves)
    found = list(outs)
    wanted = [y for y in case.smooth(*leaves) if y.requires_grad]
    if not wanted:
        return found
    us, vs = case.like(wanted), case.like(leaves)
    for x in us:
        x.requires_grad_()
    first = grad(wanted, leaves, us, create_graph=True, materialize_grads=True)
    found += [*first, *jvp(case.smooth, case.leaves(False), vs)[1]]
    recorded = [(g, v) for g, v in zip(first, vs, strict=True) if g.requires_grad]
    if recorded:
        found += grad([g for g, _ in recorded], [*leaves, *us], [v for _, v in recorded], materialize_grads=True)
    return found


@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_every_op_runs_where_its_operands_are(op, elsewhere, counts):
    """All launches, products and sets of memory on the operands' device, and the values of the current one."""
    here = [everything_of(case) for case in cases(op, gpuad.device("cuda:0"))]
    made = cases(op, elsewhere)
    with counts(trace=True) as r:
        there = [everything_of(case) for case in made]
    # A trace entry is (kind, name, size, device, stream, …); copies to the host are what the op called move does.
    busy = {event[3] for event in r.trace if event[0] in ("kernel", "library", "memset")}
    assert busy <= {1}
    assert gpuad.cuda.current_device() == 0
    for mine, theirs in zip(here, there, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert b.device is (elsewhere if a.device.type == "cuda" else a.device)
            np.testing.assert_array_equal(host(a), host(b))


def chain(devices):
    """A loss that goes through a model whose layers lie on several devices, and the gradients of its parameters."""
    gpuad.manual_seed(5)
    layers = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)]
    layers = [layer.to(device) for layer, device in zip(layers, devices, strict=True)]
    x = gpuad.randn(4, 6).requires_grad_()
    h = x
    for layer, device in zip(layers, devices, strict=True):
        h = layer(h.to(device)).tanh()
    total = (h * h).sum().to(devices[0]) + sum((p.to(devices[0]) ** 2).sum() for p in layers[1].parameters())
    total.backward()
    parameters = [p for layer in layers for p in layer.parameters()]
    for p in parameters:
        assert p.grad.device is p.device and p.grad.dtype == p.dtype
    assert x.grad.device.type == "cpu"
    return [total.item(), *(host(p.grad) for p in parameters), host(x.grad)]


def test_gradients_cross_devices_and_return_to_where_they_belong(elsewhere):
    expected = chain(["cpu"] * 3)
    for devices in (["cuda:0", "cuda:1", "cuda:0"], ["cuda:1", "cpu", "cuda:0"], ["cpu", "cuda:1", "cpu"]):
        for got, wanted in zip(chain(devices), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_0d_tensor_crosses_devices(elsewhere):
    x = gpuad.tensor(2.0, device="cuda:0", requires_grad=True)
    y = x.to(elsewhere)
    assert y.shape == () and y.item() == 2.0
    (g,) = grad(y * y, x, create_graph=True)
    assert g.shape == () and g.device is x.device and g.item() == 4.0
    assert grad(g, x)[0].item() == 2.0


def test_second_derivatives_cross_devices(elsewhere):
    x = gpuad.tensor([0.5, 1.5], dtype=gpuad.float64, device="cuda:0", requires_grad=True)
    (g,) = grad((x.to(elsewhere) ** 3).sum().to("cpu"), x, create_graph=True)
    (h,) = grad(g.to(elsewhere).sum(), x)
    np.testing.assert_allclose(host(h), 6 * host(x))
    value, tangent = jvp(lambda a: a.to(elsewhere).exp(), (x.detach(),), (x.detach(),))
    assert value.device is tangent.device is elsewhere
    np.testing.assert_allclose(host(tangent), host(x) * np.exp(host(x)))


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.RMSprop], ids=["sgd", "adam", "rmsprop"])
def test_optimiser_state_follows_its_parameters(make, elsewhere):
    settings = {"momentum": 0.9} if make is not optim.Adam else {}

    def run(places):
        gpuad.manual_seed(2)
        x, y = gpuad.randn(16, 3), gpuad.randn(16, 1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = make(model.parameters(), lr=0.05, **settings)
        for place in places:
            model.to(place)
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x.to(place)), y.to(place)).backward()
                optimizer.step()
            for p in model.parameters():
                assert str(p.device) == str(gpuad.device(place))
                for name, value in optimizer.state[p].items():
                    assert value.device is (gpuad.device("cpu") if name == "step" else p.device)
        return [host(p) for p in model.parameters()]

    for got, wanted in zip(run(["cuda:0", "cuda:1", "cpu", "cuda:1"]), run(["cpu"] * 4), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-6)


def test_an_optimiser_over_two_devices(elsewhere):
    gpuad.manual_seed(0)
    ps = [gpuad.ones(3, device=place, requires_grad=True) for place in ("cuda:0", "cuda:1", "cpu")]
    optimizer = optim.Adam(ps, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for p in ps:
            (p * p).sum().backward()
        optimizer.step()
    for p in ps[1:]:
        np.testing.assert_allclose(host(p), host(ps[0]), rtol=1e-6)


DRAWS = {
    "rand": lambda device: gpuad.rand(7, device=device),
    "randn": lambda device: gpuad.randn(7, device=device),
    "randint": lambda device: gpuad.randint(100, (7,), device=device),
    "randperm": lambda device: gpuad.randperm(7, device=device),
    "dropout": lambda device: nn.functional.dropout(gpuad.ones(50, device=device), 0.5),
    "bernoulli": lambda device: gpuad.bernoulli(gpuad.full((9,), 0.5, device=device)),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_one_seed_gives_every_device_the_same_numbers(draw, elsewhere):
    found = {}
    for device in ("cpu", "cuda:0", "cuda:1"):
        gpuad.manual_seed(11)
        found[device] = [host(DRAWS[draw](device)) for _ in range(2)]
        assert not np.array_equal(*found[device]) or draw == "randperm"
    for device in ("cuda:0", "cuda:1"):
        for got, wanted in zip(found[device], found["cpu"], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_one_generator_goes_on_across_devices(elsewhere):
    """A sequence of draws is the same wherever each of them is made."""
    gpuad.manual_seed(4)
    expected = [host(gpuad.rand(5)) for _ in range(3)]
    gpuad.manual_seed(4)
    for device, wanted in zip(("cuda:1", "cpu", "cuda:0"), expected, strict=True):
        np.testing.assert_array_equal(host(gpuad.rand(5, device=device)), wanted)
