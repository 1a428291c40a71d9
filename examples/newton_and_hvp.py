"""Newton's method on SciPy's Rosenbrock function, with Hessian-vector products by forward mode over reverse.

    python examples/newton_and_hvp.py [--dimensions 50] [--device cpu]

scipy.optimize.minimize(method="Newton-CG") needs f, its gradient and products of its Hessian with vectors. It gets them
once from gpuad (the function alone is written down) and once from SciPy's own rosen_der and rosen_hess_prod.
"""

import argparse

import numpy as np
from scipy.optimize import minimize, rosen, rosen_der, rosen_hess_prod

import gpuad
from gpuad.func import hvp, value_and_grad


def f(x):
    """Σ 100 (x[i+1] − x[i]²)² + (1 − x[i])², the Rosenbrock function."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def main():
    """Minimise by both sets of derivatives and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dimensions", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    def tensor(values):
        return gpuad.tensor(values, dtype="float64", device=arguments.device)

    def both(x):
        value, gradient = value_and_grad(f)(tensor(x))
        return value.item(), gradient.cpu().numpy()

    def product(x, v):
        return hvp(f, tensor(x), tensor(v)).cpu().numpy()

    generator = np.random.default_rng(0)
    x, v = generator.uniform(-1, 1, (2, arguments.dimensions))
    expected = rosen_hess_prod(x, v)
    print(f"{arguments.dimensions} dimensions, on {tensor(x).device}")
    print(f"gradient: largest relative difference from SciPy's {relative(both(x)[1], rosen_der(x)):.1e}")
    print(f"Hessian · v: largest relative difference from SciPy's {relative(product(x, v), expected):.1e}")

    options = {"xtol": 1e-10, "maxiter": 1000}
    ours = minimize(both, x, method="Newton-CG", jac=True, hessp=product, options=options)
    theirs = minimize(rosen, x, method="Newton-CG", jac=rosen_der, hessp=rosen_hess_prod, options=options)
    for name, found in (("gpuad", ours), ("SciPy", theirs)):
        print(f"{name}: {found.nit} iterations, {found.nhev} Hessian products, f = {found.fun:.2e}")
    print(f"largest difference of the two minima: {np.abs(ours.x - theirs.x).max():.1e}")
    print(f"largest distance from the minimum at (1, …, 1): {np.abs(ours.x - 1).max():.1e}")


def relative(a, b):
    """The largest difference, relative to the largest entry of b."""
    return np.abs(a - b).max() / np.abs(b).max()


if __name__ == "__main__":
    main()
