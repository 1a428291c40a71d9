"""1,000 random programs give the same results and gradients on cpu and on cuda, laid out alike.

A program is a list of instructions on a growing list of tensors: operations, views, casts, in-place operations,
assignments, moves between devices. Instructions come from a fixed set on few shapes, so that kernels are few.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from test_ops import steps

import gpuad
from gpuad import Tensor
from gpuad.autograd import grad

pytestmark = pytest.mark.cuda
CHUNKS, EACH = 20, 50


def broadcasts(a: Tensor, b: Tensor) -> bool:
    try:
        np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        return False
    return True


def binary(function):
    return lambda m, a, b, k: function(a, b if broadcasts(a, b) else a)


def in_place(function):
    """On a tensor of its own, with what fits into it; a view made before sees what is written."""

    def run(m, a, b, k):
        target = a * 1.0
        view = target[..., :1] if target.ndim else target
        fits = broadcasts(a, b) and np.broadcast_shapes(a.shape, b.shape) == tuple(a.shape)
        function(target, b if fits else a)
        return target + view.detach()

    return run


def assigned(m, a, b, k):
    target = a.clone()
    if not target.ndim:
        return target
    at = k % target.shape[0]
    target[at] = b.mean().to(target.dtype) * 0.5
    target[[0, at]] = target[[at, 0]].detach() * 1.5
    return target


def product(m, a, b, k):
    if a.ndim == 2 and b.ndim in (1, 2) and a.shape[-1] == b.shape[-1] and a.dtype == b.dtype:
        return (a @ b.mT if b.ndim == 2 else a @ b) * 0.25
    return a @ a.mT * 0.25 if a.ndim == 2 else a * a


def reduced(name):
    def run(m, a, b, k):
        if not a.ndim:
            return a
        return getattr(a, name)(k % a.ndim, keepdim=bool(k // 2 % 2))

    return run


def taken(m, a, b, k):
    if not a.ndim:
        return a.reshape(1)
    return a[gpuad.tensor([k % a.shape[0], 0], device=a.device)]


def selected(m, a, b, k):
    return gpuad.where(a > 0, a, 0.5 * a) if k % 2 else a.masked_fill(a < -0.5, 0.25)


# (machine, operand, other operand, number) -> a new tensor
INSTRUCTIONS = {
    "add": binary(lambda a, b: a + b),
    "sub": binary(lambda a, b: a - 0.5 * b),
    "mul": binary(lambda a, b: a * b),
    "div": binary(lambda a, b: a / (1.5 + b * b)),
    "maximum": binary(gpuad.maximum),
    "tanh": lambda m, a, b, k: a.tanh(),
    "bell": lambda m, a, b, k: (-(a * a)).exp(),
    "root": lambda m, a, b, k: (a * a + 1).sqrt(),
    "relu": lambda m, a, b, k: a.relu(),
    "select": selected,
    "softmax": lambda m, a, b, k: a.softmax(-1),
    "matmul": product,
    "sum": reduced("sum"),
    "mean": reduced("mean"),
    "amax": reduced("amax"),
    "transpose": lambda m, a, b, k: a.mT if a.ndim == 2 else a,
    "slice": lambda m, a, b, k: a[1:] if a.ndim and a.shape[0] > 1 else a,
    "column": lambda m, a, b, k: a[..., k % a.shape[-1]] if a.ndim else a,
    "flatten": lambda m, a, b, k: a.flatten()[:4],
    "unsqueeze": lambda m, a, b, k: a.unsqueeze(k % 2) if a.ndim < 2 and k % 2 <= a.ndim else a,
    "cat": lambda m, a, b, k: gpuad.cat([a, a * 2], -1)[..., :4] if a.ndim else a,
    "flip": lambda m, a, b, k: a.flip(0) if a.ndim else a,
    "take": taken,
    "add_": in_place(lambda a, b: a.add_(b)),
    "mul_": in_place(lambda a, b: a.mul_(b)),
    "tanh_": in_place(lambda a, b: a.tanh_()),
    "assign": assigned,
    "cast": lambda m, a, b, k: a.to(gpuad.float32 if k % 2 else gpuad.float64),
    "move": lambda m, a, b, k: (a.to(m.other) * 2).to(m.device),
    "detach": lambda m, a, b, k: a.detach() + a,
}
SHAPES = [(3, 4), (4,), (3, 1), ()]


class Machine:
    """Where a program runs, and where it moves tensors to and back."""

    def __init__(self, device: str, other: str) -> None:
        self.device, self.other = device, other


def run(program, machine: Machine):
    """All values, and the gradients of the leaves; or what went wrong."""
    leaves_of, instructions = program
    leaves = []
    for number, (shape, single) in enumerate(leaves_of):
        values = np.random.default_rng(number).standard_normal(SHAPES[shape])
        dtype = gpuad.float32 if single else gpuad.float64
        leaves.append(gpuad.tensor(values, dtype=dtype, device=machine.device, requires_grad=True))
    made = list(leaves)
    for name, a, b, k in instructions:
        made.append(INSTRUCTIONS[name](machine, made[-1 - a % len(made)], made[-1 - b % len(made)], k))
    total = sum((x.tanh().double().mean() for x in made), gpuad.zeros((), dtype=gpuad.float64, device=machine.device))
    try:
        gradients = grad(total, leaves)
    except gpuad.errors.GpuadError as error:
        return made, type(error), str(error)
    return made, *gradients


programs = st.tuples(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=3),
    st.lists(
        st.tuples(st.sampled_from(sorted(INSTRUCTIONS)), st.integers(0, 3), st.integers(0, 3), st.integers(0, 5)),
        min_size=3,
        max_size=10,
    ),
)


def same(a, b, single: bool) -> None:
    assert (a.shape, a.dtype, a.requires_grad, steps(a)) == (b.shape, b.dtype, b.requires_grad, steps(b))
    x, y = (np.asarray(t.detach().cpu().numpy(), np.float64) for t in (a, b))
    tolerance = 2e-4 if single else 1e-9
    np.testing.assert_allclose(y, x, tolerance, tolerance * float(np.max(np.abs(x), initial=1.0)))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs_agree(chunk, cuda_device):
    away = "cuda:1" if gpuad.cuda.device_count() > 1 and chunk % 2 else "cpu"

    @seed(chunk)
    @settings(max_examples=EACH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(programs)
    def check(program):
        here, there = run(program, Machine("cpu", "cpu")), run(program, Machine("cuda:0", away))
        single = any(s for _, s in program[0]) or any(name == "cast" for name, *_ in program[1])
        assert len(here[0]) == len(there[0])
        for a, b in zip(here[0], there[0], strict=True):
            assert b.device == cuda_device
            same(a, b, single)
        for a, b in zip(here[1:], there[1:], strict=True):
            if isinstance(a, Tensor):
                assert b.device == cuda_device
                same(a, b, single)
            else:
                assert a == b

    check()
