"""The gradient of each example by itself, all at once: which digits pull hardest on a network.

    python examples/per_sample_gradients.py [--device cpu] [--examples 256]

backward() gives the mean over a batch. vmap(grad(loss)) gives every example's own gradient, in a few batched
operations: for clipping (differential privacy), to estimate noise, or to see what the network finds hard.
"""

import argparse

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
        """That of one example, as a function of the parameters."""
        return nn.functional.cross_entropy(functional_call(model, parameters, x), y)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for name, g in gradients.items():
        print(f"{name}: {tuple(parameters[name].shape)}, its gradients {tuple(g.shape)}")

    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    worst = max((gradients[name].mean(0) - p.grad).abs().max().item() for name, p in model.named_parameters())
    print(f"their mean and the gradient by backward(): largest difference {worst:.1e}")

    norms = sum(g.square().flatten(1).sum(1) for g in gradients.values()).sqrt()
    print(f"norms from {norms.min().item():.2e} to {norms.max().item():.2e}; the hardest examples:")
    for norm, i in zip(*(each.tolist() for each in norms.topk(5)), strict=True):
        print(f"  example {i:>3}, a {y[i].item()}: {norm:.2f}")


if __name__ == "__main__":
    main()
