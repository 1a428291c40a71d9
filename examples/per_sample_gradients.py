"""The gradient of each example, all at once, by vmap over grad: which digits pull hardest on a network.

    python examples/per_sample_gradients.py [--device cpu] [--examples 256]

A sum over the batch is what backward() gives; here each example's own gradient is there, for clipping (differential
privacy), for noise estimates, or to see which examples the network finds hard.
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import gpuad
from gpuad import nn, optim
from gpuad.func import functional_call, grad, vmap


def main():
    """Train for a moment, then print whose gradients are largest."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--examples", type=int, default=256)
    arguments = parser.parse_args()
    gpuad.manual_seed(0)
    digits = load_digits()
    x = gpuad.tensor(digits.data[: arguments.examples] / 16, dtype="float32", device=arguments.device)
    y = gpuad.tensor(digits.target[: arguments.examples], device=arguments.device)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(arguments.device)

    optimizer = optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for name, g in each.items():
        print(f"{name:<10} {tuple(parameters[name].shape)!s:<10} one gradient for each example: {tuple(g.shape)}")

    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    worst = max((each[name].mean(0) - p.grad).abs().max().item() for name, p in model.named_parameters())
    print(f"their mean and backward()'s gradient: largest difference {worst:.1e}")

    squares = sum(g.square().reshape(len(x), -1).sum(1) for g in each.values())
    norms = squares.sqrt().cpu().numpy()
    hardest = np.argsort(-norms)[:5]
    print(f"norms from {norms.min():.2e} to {norms.max():.2e}; the hardest examples:")
    for i in hardest:
        print(f"  example {i:>3}, a {digits.target[i]}: {norms[i]:.2f}")


if __name__ == "__main__":
    main()
