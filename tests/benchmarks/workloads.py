"""The timed workloads, written once for any library with PyTorch's names: `lib` is `gpuad` or `torch`.

A maker returns (step, parameters): `step()` does the whole work once and returns the loss on the device. Data are
the same for every library and noisy, over many batches, so that no loss comes near 0.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np

BATCHES = 32


def _network(lib: Any, sizes: list[int], activation: Callable[[], Any]) -> Any:
    layers: list[Any] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [lib.nn.Linear(fan_in, fan_out), activation()]
    model = lib.nn.Sequential(*layers[:-1])
    # The same first weights for every library, of the size that both would draw.
    numbers = np.random.default_rng(0)
    with lib.no_grad():
        for parameter in model.parameters():
            bound = parameter.shape[-1] ** -0.5
            values = numbers.uniform(-bound, bound, tuple(parameter.shape)).astype(np.float32)
            parameter.copy_(lib.from_numpy(values))
    return model


def _training(lib: Any, device: Any, model: Any, loss: Any, batches: list[tuple], **sgd: float) -> tuple:
    model.to(device)
    optimizer = lib.optim.SGD(model.parameters(), **sgd)
    turns = cycle([tuple(lib.from_numpy(part).to(device) for part in batch) for batch in batches])

    def step() -> Any:
        x, y = next(turns)
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        return value

    return step, list(model.parameters())


def _classification(lib: Any, device: Any, sizes: list[int], batch: int) -> tuple:
    numbers = np.random.default_rng(1)
    batches = [
        (numbers.standard_normal((batch, sizes[0]), dtype=np.float32), numbers.integers(0, sizes[-1], batch))
        for _ in range(BATCHES)
    ]
    # Random labels at a small learning rate: the loss stays near log(10).
    model = _network(lib, sizes, lib.nn.ReLU)
    return _training(lib, device, model, lib.nn.CrossEntropyLoss(), batches, lr=1e-3, momentum=0.9)


def mlp_2_16_16_1(lib: Any, device: Any = "cpu", batch: int = 100) -> tuple:
    """Training step of 2-16-16-1 tanh, MSE, SGD."""
    numbers = np.random.default_rng(1)
    batches = []
    for _ in range(BATCHES):
        x = numbers.uniform(-1, 1, (batch, 2))
        y = x[:, :1] * x[:, 1:] + 0.3 * numbers.standard_normal((batch, 1))
        batches.append((x.astype(np.float32), y.astype(np.float32)))
    model = _network(lib, [2, 16, 16, 1], lib.nn.Tanh)
    return _training(lib, device, model, lib.nn.MSELoss(), batches, lr=0.01)


def mlp_64_128_10(lib: Any, device: Any = "cpu", batch: int = 64) -> tuple:
    """Training step of 64-128-10 relu, cross-entropy, SGD with momentum."""
    return _classification(lib, device, [64, 128, 10], batch)


def mlp_784_512_512_10(lib: Any, device: Any = "cpu", batch: int = 128) -> tuple:
    """Training step of 784-512-512-10 relu, cross-entropy, SGD with momentum."""
    return _classification(lib, device, [784, 512, 512, 10], batch)


def gelu(lib: Any, device: Any = "cpu", batch: int = 1024) -> tuple:
    """Forward and backward of gelu, written out from primitive ops, on (batch, 4096); under fuse where there is one."""

    def formula(x: Any) -> Any:
        return 0.5 * x * (1.0 + lib.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))

    function = lib.fuse(formula) if hasattr(lib, "fuse") else formula
    numbers = np.random.default_rng(1)
    x, g = (lib.from_numpy(numbers.standard_normal((batch, 4096), dtype=np.float32)).to(device) for _ in range(2))
    x.requires_grad_()

    def step() -> Any:
        x.grad = None
        y = function(x)
        y.backward(g)
        return y[0, 0].detach()

    return step, [x]


# The share of PyTorch eager's time that each may take on a CPU.
TARGETS = {mlp_2_16_16_1: 0.50, mlp_64_128_10: 0.50, mlp_784_512_512_10: 1.05, gelu: 0.40}
