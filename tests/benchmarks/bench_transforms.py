"""What derivatives cost beside the plain gradient, with pytest-benchmark: jvp, hvp, per-sample gradients, Jacobians.

    pytest tests/benchmarks/bench_transforms.py

extra_info has the ratio to the gradient's median, measured just before. Not part of the suite.
"""

import statistics
import time

import pytest

import gpuad
from gpuad import nn
from gpuad.func import functional_call, grad, hvp, jacfwd, jvp, vmap


@pytest.fixture
def problem(device):
    """(loss of a parameter dictionary, parameters, a direction, a gradient per example) of a 64-256-256-10 network."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)).to(device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: gpuad.randn_like(p) for name, p in parameters.items()}
    x = gpuad.randn(256, 64, device=device)
    y = gpuad.randint(0, 10, (256,), device=device)

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    return loss, parameters, direction, x, y


def _median(call, rounds=10):
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def _finished(tree):
    next(iter(tree.values())).reshape(-1)[0].item()


@pytest.mark.parametrize("what", ["gradient", "jvp", "hvp", "per sample"])
def test_cost(what, problem, benchmark):
    loss, parameters, direction, x, y = problem

    def f(p):
        return loss(p, x, y)

    calls = {
        "gradient": lambda: _finished(grad(f)(parameters)),
        "jvp": lambda: jvp(f, (parameters,), (direction,))[1].item(),
        "hvp": lambda: _finished(hvp(f, parameters, direction)),
        "per sample": lambda: _finished(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x[:32], y[:32])),
    }
    plain = _median(calls["gradient"])
    benchmark.pedantic(calls[what], rounds=10, warmup_rounds=2)
    benchmark.extra_info["times the gradient"] = benchmark.stats.stats.median / plain
    print(f"\n{what}: {benchmark.stats.stats.median / plain:.2f} times the gradient")


def test_jacobian_of_an_input(problem, benchmark):
    loss, parameters, _, x, y = problem
    benchmark.pedantic(lambda: jacfwd(lambda x: loss(parameters, x, y[:1]))(x[:1]).reshape(-1)[0].item(), rounds=5)
