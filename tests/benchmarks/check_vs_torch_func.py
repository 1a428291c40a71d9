"""The transforms of functions against torch.func and jax: the same functions, the same numbers.

    pip install torch jax .     # in an environment of its own
    python tests/benchmarks/check_vs_torch_func.py

Prints the largest difference of each answer, relative to its largest element, and exits with 1 where one is above the
tolerance. Not part of the suite, which needs neither.
"""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import jax
import numpy as np
import torch

import gpuad
from gpuad import func

jax.config.update("jax_enable_x64", True)

GPUAD = SimpleNamespace(
    name="gpuad", m=gpuad, array=lambda a: gpuad.tensor(a, dtype="float64"), host=lambda t: t.detach().numpy(),
    grad=func.grad, value_and_grad=func.value_and_grad, vjp=func.vjp, jvp=func.jvp, jacrev=func.jacrev,
    jacfwd=func.jacfwd, hessian=func.hessian, vmap=func.vmap, linearize=func.linearize, hvp=func.hvp,
)  # fmt: skip
TORCH = SimpleNamespace(
    name="torch.func", m=torch, array=lambda a: torch.tensor(a, dtype=torch.float64), host=lambda t: t.detach().numpy(),
    grad=torch.func.grad, vjp=torch.func.vjp, jvp=torch.func.jvp, jacrev=torch.func.jacrev, jacfwd=torch.func.jacfwd,
    hessian=torch.func.hessian, vmap=torch.func.vmap,
    linearize=lambda f, x: (f(x), lambda v: torch.func.jvp(f, (x,), (v,))[1]),  # its own does not go through vmap
    value_and_grad=lambda f, *a, **k: lambda *x: tuple(reversed(torch.func.grad_and_value(f, *a, **k)(*x))),
    hvp=lambda f, x, v: torch.func.jvp(torch.func.grad(f), (x,), (v,))[1],
)  # fmt: skip
JAX = SimpleNamespace(
    name="jax", m=jax.numpy, array=jax.numpy.asarray, host=np.asarray, grad=jax.grad,
    value_and_grad=jax.value_and_grad, vjp=jax.vjp, jvp=jax.jvp, jacrev=jax.jacrev, jacfwd=jax.jacfwd,
    hessian=jax.hessian, vmap=jax.vmap, linearize=jax.linearize,
    hvp=lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
)  # fmt: skip

RNG = np.random.default_rng(0)
X, V, U, MANY, VS = (RNG.standard_normal(s) for s in ((4,), (4,), (4,), (3, 4), (3, 4)))
MATRIX, POSITIVE = RNG.standard_normal((4, 4)), RNG.uniform(0.5, 2.0, (4,))
WEIGHTS = {
    "first": {"w": RNG.standard_normal((6, 4)), "b": RNG.standard_normal(6)},
    "last": [RNG.standard_normal((3, 6)), RNG.standard_normal(3)],
}
DIRECTIONS = {
    "first": {"w": RNG.standard_normal((6, 4)), "b": RNG.standard_normal(6)},
    "last": [RNG.standard_normal((3, 6)), RNG.standard_normal(3)],
}


def mapped(function, tree):
    """`tree` with the function applied to its leaves."""
    if isinstance(tree, dict):
        return {k: mapped(function, v) for k, v in tree.items()}
    return type(tree)(mapped(function, v) for v in tree) if isinstance(tree, (list, tuple)) else function(tree)


def leaves(tree):
    """What lies in a tree, in the order of keys."""
    if isinstance(tree, dict):
        return [x for k in sorted(tree) for x in leaves(tree[k])]
    return [x for v in tree for x in leaves(v)] if isinstance(tree, (list, tuple)) else [tree]


# Functions to one number, and to several, of a vector -----------------------------------------------------------------


SCALARS = {
    "smooth": lambda m, a: lambda x: m.sum(m.sin(x) * m.exp(x)) / (1 + m.sum(x * x)),
    "products": lambda m, a: lambda x: m.prod(x) * m.sum(a(MATRIX) @ x) + x[0] ** 3 * x[-1],
    "pieces": lambda m, a: lambda x: m.sum(m.where(x > 0, x * x * x, m.tanh(2 * x))) + m.abs(x).max(),
    "roots": lambda m, a: lambda x: m.sqrt(m.sum((x - a(POSITIVE)) ** 2)) + m.sum(m.log1p(x * x)),
    "quadratic": lambda m, a: lambda x: x @ (a(MATRIX) @ x),
}
VECTORS = {
    "layer": lambda m, a: lambda x: m.tanh(a(MATRIX) @ x) * x,
    "sums": lambda m, a: lambda x: m.cumsum(x * x, 0) / (1 + m.exp(-x)),
    "picked": lambda m, a: lambda x: m.stack([x[1] * x[2], x.max(), m.sum(x[1:] * x[:-1]), m.sin(x[0])]),
}


def network(lib):
    """(parameters, x) ↦ cross-entropy of a two-layer network for class 1."""
    m = lib.m

    def loss(parameters, x):
        hidden = m.tanh(parameters["first"]["w"] @ x + parameters["first"]["b"])
        out = parameters["last"][0] @ hidden + parameters["last"][1]
        return m.log(m.sum(m.exp(out))) - out[1]

    return loss


def answers(lib):
    """Every answer by name, as trees of the library's arrays."""
    a = lib.array
    x, v, u, many, vs = (a(z) for z in (X, V, U, MANY, VS))
    found = {}
    for name, make in SCALARS.items():
        f = make(lib.m, a)
        each = {
            "grad": lib.grad(f),
            "value_and_grad": lib.value_and_grad(f),
            "hessian": lib.hessian(f),
            "jacrev of jacrev": lib.jacrev(lib.jacrev(f)),
            "jacfwd of jacfwd": lib.jacfwd(lib.jacfwd(f)),
            "jacrev of hessian": lib.jacrev(lib.hessian(f)),
            "jacfwd of hessian": lib.jacfwd(lib.hessian(f)),
        }
        found |= {f"{t} ({name})": g(x) for t, g in each.items()}
        found |= {f"vmap of {t} ({name})": lib.vmap(g)(many) for t, g in each.items()}
        found[f"hvp ({name})"] = lib.hvp(f, x, v)
        found[f"vmap of hvp ({name})"] = lib.vmap(lambda x, v, f=f: lib.hvp(f, x, v))(many, vs)
        found[f"grad of hvp ({name})"] = lib.grad(lambda x, f=f: lib.hvp(f, x, v).sum())(x)
    for name, make in VECTORS.items():
        f = make(lib.m, a)
        each = {
            "vjp": lambda x, v, u, f=f: lib.vjp(f, x)[1](u)[0],
            "jvp": lambda x, v, u, f=f: lib.jvp(f, (x,), (v,)),
            "linearize": lambda x, v, u, f=f: lib.linearize(f, x)[1](v),
            "vjp of jvp": lambda x, v, u, f=f: lib.vjp(lambda x: lib.jvp(f, (x,), (v,))[1], x)[1](u)[0],
            "jvp of vjp": lambda x, v, u, f=f: lib.jvp(lambda x: lib.vjp(f, x)[1](u)[0], (x,), (v,))[1],
        }
        found |= {f"{t} ({name})": g(x, v, u) for t, g in each.items()}
        found |= {f"vmap of {t} ({name})": lib.vmap(g, (0, 0, None))(many, vs, u) for t, g in each.items()}
        for t in ("jacrev", "jacfwd"):
            found[f"{t} ({name})"] = getattr(lib, t)(f)(x)
            found[f"vmap of {t} ({name})"] = lib.vmap(getattr(lib, t)(f), 1, 2)(many.T)
    loss, weights, directions = network(lib), mapped(a, WEIGHTS), mapped(a, DIRECTIONS)
    found["network: grad"] = lib.grad(loss, (0, 1))(weights, x)
    found["network: per-sample gradients"] = lib.vmap(lib.grad(loss), (None, 0))(weights, many)
    found["network: hvp"] = lib.hvp(lambda w: loss(w, x), weights, directions)
    found["network: jvp"] = lib.jvp(lambda w: loss(w, x), (weights,), (directions,))
    found["network: hessian for the input"] = lib.vmap(lib.hessian(loss, 1), (None, 0))(weights, many)
    found["network: mixed second derivative"] = lib.jacfwd(lib.grad(loss), 1)(weights, x)
    found["network: gradient of a gradient's norm"] = lib.grad(
        lambda w: sum((g * g).sum() for g in leaves(lib.grad(loss)(w, x)))
    )(weights)
    return {name: [lib.host(z) for z in leaves(tree)] for name, tree in found.items()}


def difference(ours, theirs):
    """The largest difference of two lists of arrays, relative to the largest element; infinite where shapes differ."""
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return np.inf
    size = max([np.abs(x).max() for x in theirs] + [1e-300])
    return max(np.abs(x - y).max() for x, y in zip(ours, theirs, strict=True)) / max(size, 1e-3)


def main():
    """Print the table; exit with 1 where a difference is above the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tolerance", type=float, default=1e-12)
    parser.add_argument("--all", action="store_true", help="every answer, not only the ten with the largest difference")
    arguments = parser.parse_args()
    ours, others = answers(GPUAD), [(lib.name, answers(lib)) for lib in (TORCH, JAX)]
    rows = [(name, *(difference(ours[name], theirs[name]) for _, theirs in others)) for name in ours]
    rows.sort(key=lambda row: -max(row[1:]))
    width = max(len(row[0]) for row in rows)
    print(f"{'largest relative difference from':<{width}}  " + "  ".join(f"{name:>10}" for name, _ in others))
    for name, *differences in rows if arguments.all else rows[:10]:
        print(f"{name:<{width}}  " + "  ".join(f"{d:>10.1e}" for d in differences))
    wrong = [row[0] for row in rows if not max(row[1:]) <= arguments.tolerance]
    print(f"{len(rows) - len(wrong)} of {len(rows)} answers within {arguments.tolerance:.0e}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
