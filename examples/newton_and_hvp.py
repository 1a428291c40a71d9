"""Newton's method on SciPy's Rosenbrock function: the function is written down, gpuad does the derivatives.

    python examples/newton_and_hvp.py [--dimensions 50] [--device cpu]

Newton-CG asks for the function, its gradient, and products of its Hessian with vectors; the Hessian itself is never
made. SciPy minimises twice, by gpuad's derivatives and by its own rosen_der and rosen_hess_prod.
"""

import argparse

import numpy as np
from scipy.optimize import minimize, rosen, rosen_der, rosen_hess_prod

import gpuad
from gpuad.func import hvp, value_and_grad


def f(x):
    """Σ 100 (x[i+1] − x[i]²)² + (1 − x[i])², which is 0 at (1, …, 1) and nowhere else."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def for_scipy(function, device):
    """A function of Tensors as SciPy calls it, with float64 arrays in and out."""

    def call(*arrays):
        result = function(*(gpuad.tensor(a, dtype="float64", device=device) for a in arrays))
        return tuple(r.cpu().numpy() for r in result) if isinstance(result, tuple) else result.cpu().numpy()

    return call


def relative(a, b):
    """The largest difference, relative to the largest entry of b."""
    return np.abs(a - b).max() / np.abs(b).max()


def main():
    """Compare the derivatives at a point, then minimise by either set of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dimensions", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    value_and_gradient = for_scipy(value_and_grad(f), arguments.device)
    hessian_product = for_scipy(lambda x, v: hvp(f, x, v), arguments.device)

    x, v = np.random.default_rng(0).uniform(-1, 1, (2, arguments.dimensions))
    gradient, product = value_and_gradient(x)[1], hessian_product(x, v)
    print(f"gradient: largest relative difference from SciPy's {relative(gradient, rosen_der(x)):.1e}")
    print(f"Hessian · v: largest relative difference from SciPy's {relative(product, rosen_hess_prod(x, v)):.1e}")

    ways = {
        "gpuad": {"fun": value_and_gradient, "jac": True, "hessp": hessian_product},
        "SciPy": {"fun": rosen, "jac": rosen_der, "hessp": rosen_hess_prod},
    }
    for name, way in ways.items():
        found = minimize(x0=x, method="Newton-CG", options={"xtol": 1e-10, "maxiter": 1000}, **way)
        print(f"{name}: f = {found.fun:.2e} after {found.nit} iterations and {found.nhev} Hessian products, "
              f"largest distance from the minimum: {np.abs(found.x - 1).max():.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
