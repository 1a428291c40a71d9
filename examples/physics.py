"""A differential equation solved by a small network (a PINN): u'' = −π² sin(π x) on [0, 1], u(0) = u(1) = 0.

    python examples/physics.py [--device cpu] [--steps 800]

The loss is the equation's residual: the second derivative of the network for its input, taken at every point by vmap,
and then differentiated for the parameters: order three in all. The exact solution is sin(π x).
Source: Raissi, Perdikaris, Karniadakis, "Physics-informed neural networks", 2019.
"""

import argparse
import math

import gpuad
from gpuad import nn, optim
from gpuad.func import grad, vmap


def main():
    """Train the network on the equation's residual and print the error of the solution."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    gpuad.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    network = network.to(arguments.device)
    optimizer = optim.Adam(network.parameters(), lr=0.005)
    points = gpuad.linspace(0.0, 1.0, 64, device=arguments.device)
    source = -(math.pi**2) * (math.pi * points).sin()

    def u(x):
        """The solution at one point; the factor x (1 − x) makes it 0 at both ends."""
        return (x * (1 - x) * network(x.reshape(1))).sum()

    second_derivative = vmap(grad(grad(u)))
    for step in range(arguments.steps):
        optimizer.zero_grad()
        loss = (second_derivative(points) - source).square().mean()
        loss.backward()
        optimizer.step()
        if step % max(arguments.steps // 8, 1) == 0:
            print(f"step {step:>5}  mean squared residual {loss.item():.3e}")
    with gpuad.no_grad():
        error = (vmap(u)(points) - (math.pi * points).sin()).abs().max().item()
    print(f"largest error of the solution: {error:.2e}")


if __name__ == "__main__":
    main()
