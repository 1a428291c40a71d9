"""Linear layers with their activation: the same values, gradients and tape whether or not they are one operation."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import CUDA_DEVICES

import gpuad
import gpuad.nn.functional as F
from gpuad import nn, optim
from gpuad.array import cublaslt
from gpuad.autograd.node import Node
from gpuad.ops.linear import EpilogueNode

ACTIVATIONS = {"relu": nn.ReLU, "gelu": lambda: nn.GELU(approximate="tanh")}
TOLERANCE = {"float16": 2e-2, "bfloat16": 2e-1, "float32": 2e-5, "float64": 1e-11}


def network(device, activation: str, dtype: str = "float64", bias: bool = True, sizes=(5, 7, 6, 3)):
    """A network whose weights are the same on every device."""
    numbers = np.random.default_rng(0)
    layers: list = []
    for n, m in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(n, m, bias=bias), ACTIVATIONS[activation]()]
    model = nn.Sequential(*layers[:-1]).to(gpuad.float64)
    with gpuad.no_grad():
        for p in model.parameters():
            p.copy_(gpuad.tensor(numbers.uniform(-0.7, 0.7, tuple(p.shape))))
    return model.to(device, getattr(gpuad, dtype))


def batch(device, dtype: str = "float64", rows: int = 9, columns: int = 5):
    x = np.random.default_rng(1).standard_normal((rows, columns))
    return gpuad.tensor(x, device=device, dtype=getattr(gpuad, dtype))


def gradients(model) -> list:
    return [p.grad.cpu().numpy().astype(float) for p in model.parameters()]


def close(found, expected, tolerance=1e-11):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


WITHOUT = " without cuBLASLt"
PLACES = ["cpu", *(pytest.param(name + how, marks=pytest.mark.cuda) for name in CUDA_DEVICES for how in ("", WITHOUT))]


@pytest.fixture(params=PLACES)
def device(request, monkeypatch):
    """Each device that is present; CUDA devices also as if nvmath-python had no cuBLASLt."""
    name = request.param.removesuffix(WITHOUT)
    if name != request.param:
        monkeypatch.setattr(cublaslt, "available", lambda: False)
    return gpuad.device(name)


@pytest.fixture
def fused(device):
    """Devices where a layer takes its activation along; others only show that nothing else changes."""
    return device.backend.fuses_activations


@pytest.fixture
def fused_on_cuda(cuda_device):
    if not cublaslt.available():
        pytest.skip("nvmath-python finds no cuBLASLt here")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_are_those_of_the_host(device, fused, activation, bias, dtype):
    # Sizes that every dtype's alignment rules take.
    sizes = (8, 16, 24, 8)
    results = []
    for place in ("cpu", device):
        model = network(place, activation, dtype, bias, sizes)
        x = batch(place, dtype, 16, 8).requires_grad_()
        y = model(x)
        y.backward(gpuad.ones_like(y) / 16)
        results.append(([y.detach().cpu().numpy(), x.grad.cpu().numpy(), *gradients(model)], y))
    close(results[1][0], results[0][0], TOLERANCE[dtype])
    if fused:
        assert isinstance(results[1][1].grad_fn.parents[0], EpilogueNode)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_accumulated_gradients(device, activation):
    """The second backward finds gradients, the third empty buffers, the fourth adds to what the third wrote."""
    model, reference = network(device, activation), network("cpu", activation)
    for step in range(4):
        if step == 2:
            optim.SGD(model.parameters(), lr=0.1).zero_grad()
            optim.SGD(reference.parameters(), lr=0.1).zero_grad()
        for each, place in ((model, device), (reference, "cpu")):
            each(batch(place, rows=4 + step)).square().sum().backward()
        close(gradients(model), gradients(reference))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_that_is_used_twice(device, activation):
    results = []
    for place in ("cpu", device):
        model = network(place, activation)
        for _ in range(2):
            model.zero_grad()
            h = model[:2](batch(place))
            (model[2:](h).sum() + (h * h).sum() + model[2](h).square().sum()).backward()
        results.append(gradients(model))
    close(results[1], results[0])


FUNCTIONS = [gpuad.relu, gpuad.tanh, gpuad.sigmoid, F.silu, F.gelu, F.softplus, gpuad.exp, lambda x: x.softmax(-1),
             lambda x: F.leaky_relu(x, 0.1), lambda x: x * 2, lambda x: x.unsqueeze(0).tanh().squeeze(0),
             lambda x: -x]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: getattr(f, "__name__", str(f)))
@pytest.mark.parametrize("shape", [(9, 5), (3, 2, 5), (5,)], ids=str)
def test_functions_between_layers(device, function, shape):
    """Used once and twice, with hooks and without: the gradients are those of the host."""
    found = []
    for place in ("cpu", device):
        model = network(place, "relu")
        x = gpuad.tensor(np.random.default_rng(2).standard_normal(shape), device=place, requires_grad=True)
        for use in range(3):
            h = function(model[0](x))
            if use == 2:
                h.retain_grad()
            y = model[4](function(model[2](h)))
            (y.square().sum() + (h.square().sum() if use else 0)).backward()
        found.append([x.grad.cpu().numpy(), h.grad.cpu().numpy(), *gradients(model)])
    close(found[1], found[0])


def test_shared_layers_and_shared_biases(device):
    results = []
    for place in ("cpu", device):
        one, two = nn.Linear(6, 6).to(place, gpuad.float64), nn.Linear(6, 6).to(place, gpuad.float64)
        with gpuad.no_grad():
            for k, p in enumerate([*one.parameters(), *two.parameters()]):
                p.copy_(gpuad.arange(p.numel(), device=place).reshape(p.shape).to(p.dtype).sin() * (k + 1) / 3)
        two.bias = one.bias
        model = nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), one, nn.ReLU(), two)
        for _ in range(3):
            model.zero_grad()
            loss = model(batch(place, columns=6)).square().sum() + one.bias.square().sum()
            loss.backward()
        results.append(gradients(model))
    close(results[1], results[0])


def test_hooks_and_retained_gradients_see_what_they_always_see(device):
    seen = []
    for place in ("cpu", device):
        model, x = network(place, "relu"), batch(place)
        h = model[:2](x)
        h.retain_grad()
        k = model[2:4](h)
        k.register_hook(lambda g: seen.append(g.cpu().numpy()) or g * 2)
        model[4](k).sum().backward()
        seen.append([h.grad.cpu().numpy(), *gradients(model)])
    close([seen[2], *seen[3]], [seen[0], *seen[1]])


def test_gradients_of_intermediate_results(device):
    found = []
    for place in ("cpu", device):
        model, x = network(place, "gelu"), batch(place).requires_grad_()
        h = model[:2](x)
        y = model[2:](h).square().sum()
        first = gpuad.autograd.grad(y, [h, x, model[0].bias, model[2].bias], retain_graph=True)
        second = gpuad.autograd.grad(y, [model[0].weight])
        found.append([g.cpu().numpy() for g in (*first, *second)])
    close(found[1], found[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(device, activation):
    found = []
    for place in ("cpu", device):
        model, x = network(place, activation), batch(place).requires_grad_()
        (g,) = gpuad.autograd.grad(model(x).square().sum(), [x], create_graph=True)
        g.square().sum().backward()
        found.append([g.detach().cpu().numpy(), x.grad.cpu().numpy(), *gradients(model)])
    close(found[1], found[0])


def test_a_second_walk(device):
    model = network(device, "relu")
    y = model(batch(device)).sum()
    y.backward(retain_graph=True)
    once = gradients(model)
    y.backward()
    close(gradients(model), [2 * g for g in once])
    with pytest.raises(gpuad.errors.AutogradError, match="retain_graph=True"):
        y.backward()


def test_the_walk_frees_what_it_passes_by(device, fused):
    if not fused:
        pytest.skip("on this device an activation is an operation of its own")
    model = network(device, "relu")
    y = model(batch(device))
    act = y.grad_fn.parents[0]
    assert act.saved is not None
    y.sum().backward()
    assert act.saved is None and act.parents[0].saved is None


def test_hooks_on_modules_are_called(device):
    model, called = network(device, "relu"), []
    model[1].register_forward_hook(lambda module, args, output: called.append(output.shape))
    model(batch(device))
    assert called == [(9, 7)]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5), (4, 1, 2, 5)], ids=str)
def test_inputs_of_any_shape(device, shape):
    found = []
    for place in ("cpu", device):
        model = network(place, "relu")
        x = gpuad.tensor(np.random.default_rng(2).standard_normal(shape), device=place, requires_grad=True)
        y = model(x)
        y.sum().backward()
        found.append([y.detach().cpu().numpy(), x.grad.cpu().numpy(), *gradients(model)])
    assert found[1][0].shape == (*shape[:-1], 3)
    close(found[1], found[0])


def test_the_function_says_when_it_cannot(device, fused):
    x, w, b = batch(device), gpuad.ones(4, 5, dtype=gpuad.float64, device=device), None
    found = F.linear_activation(x, w, b, "relu")
    assert (found is not None) == fused
    for wrong in ((x.float(), w), (x, w.T), (x.long(), w.long())):
        assert F.linear_activation(*wrong, b, "relu") is None
    with pytest.raises(gpuad.errors.ShapeError, match="in_features"):
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()).to(device)(x.float())


def test_forward_mode_goes_by_the_two_operations(device):
    model, x = network(device, "gelu"), batch(device)
    value, tangent = gpuad.func.jvp(model, (x,), (gpuad.ones_like(x),))
    h = 1e-6
    expected = (model(x + h) - model(x - h)) / (2 * h)
    np.testing.assert_allclose(tangent.detach().cpu().numpy(), expected.detach().cpu().numpy(), atol=1e-7)


@pytest.mark.parametrize("take", [lambda b: b[1:7], lambda b: b[::2][:6]], ids=["off alignment", "with gaps"])
def test_a_bias_that_no_epilogue_takes(device, take):
    found = []
    for place in ("cpu", device):
        long = gpuad.arange(16, device=place).to(gpuad.float64).sin().requires_grad_()
        weight = gpuad.arange(30, device=place).reshape(6, 5).to(gpuad.float64).cos().requires_grad_()
        x = batch(place)
        bias = take(long)
        y = F.linear_activation(x, weight, bias, "relu")
        y = F.linear(x, weight, bias).relu() if y is None else y
        y.square().sum().backward()
        found.append([y.detach().cpu().numpy(), long.grad.cpu().numpy(), weight.grad.cpu().numpy()])
    close(found[1], found[0])


def test_a_product_that_the_library_refuses_after_all(cuda_device, fused_on_cuda, monkeypatch):
    """The heuristic found an algorithm, the call does not take it: the plain way is gone, then and later."""

    class Refused(Exception):
        status = 15

    class Stub:
        cuBLASLtError = Refused  # noqa: N815  (nvmath's name)
        calls = 0

        def __getattr__(self, name):
            return getattr(real, name)

        def matmul(self, *arguments):
            Stub.calls += 1
            raise Refused

    real = cublaslt.lt
    monkeypatch.setattr(cublaslt, "lt", Stub())
    monkeypatch.setattr(cublaslt._thread, "plans", {})
    expected = network("cpu", "relu")(batch("cpu"))
    for _ in range(2):
        found = network(cuda_device, "relu")(batch(cuda_device))
        close([found.detach().cpu().numpy()], [expected.detach().numpy()])
    assert Stub.calls == 3  # each layer once, no more


@pytest.mark.parametrize("shape", [(2, 4, 8), (8,), (2, 1, 3, 8)], ids=str)
def test_epilogues_of_any_number_of_dimensions_forwards_and_backwards(device, fused, shape):
    """The node behind each activation is EpilogueNode, whose parents are linear; 13 columns leave gaps in gelu's."""
    if not fused:
        pytest.skip("on this device an activation is an operation of its own")
    model = network(device, "gelu", sizes=(8, 13, 16, 3))
    x = gpuad.tensor(np.random.default_rng(2).standard_normal(shape), device=device, requires_grad=True)
    y = model(x)
    names = []
    node = y.grad_fn
    while isinstance(node, Node):
        names.append("epilogue" if isinstance(node, EpilogueNode) else node.name())
        node = node.parents[0]
    assert names == ["linear", "epilogue", "linear", "epilogue", "linear"]
    act = y.grad_fn.parents[0]
    y.square().sum().backward()
    assert act.kept is None and act.parents[0].parents[0].kept is None  # passed by, and freed


def test_the_gradients_of_strided_inputs(device):
    """Inputs whose leading dimensions are no view as one."""
    found = []
    for place in ("cpu", device):
        model = network(place, "relu")
        x = gpuad.tensor(np.random.default_rng(2).standard_normal((3, 2, 5)), device=place, requires_grad=True)
        y = model(x.transpose(0, 1))
        y.transpose(0, 1).square().sum().backward()
        model(x.detach().transpose(0, 1)).sum().backward()
        found.append([y.detach().cpu().numpy(), x.grad.cpu().numpy(), *gradients(model)])
    close(found[1], found[0])
