"""What derivatives cost beside the plain gradient of the same loss: jvp, hvp, linearize, per-sample gradients.

    python tests/benchmarks/bench_transforms.py [--rounds 100] [--device cpu]

Each round times all of them once, so that a busy neighbour harms all alike; shown are the medians over the rounds, and
the medians of the rounds' ratios to the gradient. Not part of the suite.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import gpuad
from gpuad import nn
from gpuad.func import functional_call, grad, hvp, jvp, linearize, vmap

NETWORKS = {
    "64-128-128-1 tanh, batch 256, mean squared error": ([64, 128, 128, 1], nn.Tanh, 256),
    "784-512-512-10 relu, batch 128, cross-entropy": ([784, 512, 512, 10], nn.ReLU, 128),
}


def calls(sizes: list[int], activation: Callable, batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: functions of a network's parameters, all of them together."""
    gpuad.manual_seed(0)
    layers = [m for a, b in zip(sizes[:-1], sizes[1:], strict=True) for m in (nn.Linear(a, b), activation())]
    model = nn.Sequential(*layers[:-1]).to(device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: gpuad.randn_like(p) for name, p in parameters.items()}
    x = gpuad.randn(batch, sizes[0], device=device)
    classes = sizes[-1] > 1
    y = gpuad.randint(0, sizes[-1], (batch,), device=device) if classes else gpuad.randn(batch, 1, device=device)
    criterion = nn.functional.cross_entropy if classes else nn.functional.mse_loss

    def of(parameters: dict, x: Any, y: Any) -> Any:
        return criterion(functional_call(model, parameters, (x,)), y)

    def loss(parameters: dict) -> Any:
        return of(parameters, x, y)

    _, push_forward = linearize(loss, parameters)
    few = x[:16].unsqueeze(1), y[:16].unsqueeze(1)
    return {
        "gradient": lambda: grad(loss)(parameters),
        "value": lambda: loss(parameters),
        "jvp": lambda: jvp(loss, (parameters,), (direction,)),
        "jvp, linearized": lambda: push_forward(direction),
        "hvp": lambda: hvp(loss, parameters, direction),
        "gradients of 16 examples": lambda: vmap(grad(of), (None, 0, 0))(parameters, *few),
    }


def measured(timed: dict[str, Callable[[], Any]], rounds: int, finish: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each call in each round, after three rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds + 3):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            finish()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[3:] for name, values in seconds.items()}


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = gpuad.device(arguments.device)
    finish = (lambda: None) if device.type == "cpu" else lambda: gpuad.cuda.synchronize(device)
    print(f"gpuad {gpuad.__version__}, Python {platform.python_version()}, NumPy {np.__version__}, "
          f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    for name, network in NETWORKS.items():
        print(f"\n{name}\n{'':<26}{'ms':>8}{'gradients':>12}")
        seconds = measured(calls(*network, arguments.device), arguments.rounds, finish)
        for what, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values, seconds["gradient"], strict=True))
            print(f"{what:<26}{1000 * statistics.median(values):>8.2f}{ratio:>12.2f}")


if __name__ == "__main__":
    main()
