"""Writes down every CUDA source that gpuad gives CuPy to compile: python collect.py FILE, where there is a CUDA device.

All operations of the table run in every floating dtype, forwards, backwards, with tangents and twice differentiated,
and so do the optimisers, the random draws and the losses. What is written, as JSON, is what CuPy would hand to NVRTC:
the whole translation unit and CuPy's options. Nothing of it is compiled or computed here: an empty kernel runs in the
place of each of gpuad's, so that a thousand of them take seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import cupy
import numpy as np
from cupy.cuda import compiler, function

import gpuad
from gpuad import nn, optim
from gpuad.array import random
from gpuad.autograd import grad
from gpuad.autograd.forward import jvp
from gpuad.ops import many

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_ops import EVERYTHING, Case
from test_random_bits import DRAWS
from test_random_bits import run as run_draw

DTYPES = ("float16", "float32", "float64")
units: dict[tuple, dict] = {}
context: list[str] = []  # what is running: an op, a dtype, an order


class Empty(function.Module):
    """In the place of a compiled module: each of its kernels does nothing."""

    def get_function(self, name: str) -> function.Function:
        """The empty kernel, whatever the name."""
        return function.Module.get_function(self, "empty")


def collecting(compile: Callable) -> Callable:
    """CuPy's compile function, but for gpuad's sources, which are written down."""
    nothing = []

    def collected(source, options=(), *, name_expressions=None, backend="nvrtc", **named):
        if "gpuad_" not in source:
            return compile(source, options, name_expressions=name_expressions, backend=backend, **named)
        assert backend == "nvrtc" and name_expressions is None
        unit = units.setdefault((source, options), {"source": source, "options": options, "of": []})
        unit["of"].append("\t".join(context))
        if not nothing:
            image = compiler.compile_using_nvrtc('extern "C" __global__ void empty() {}')[0]
            nothing.append(Empty())
            nothing[0].load(image)
        return nothing[0]

    return collected


def differentiate(case: Case) -> None:
    """All first and second derivatives of the case, in both modes."""
    leaves = case.leaves()
    outs = [y for y in case(*leaves) if y.requires_grad]
    if not outs:
        return
    us, vs, ws = case.like(outs), case.like(leaves), case.like(leaves)
    for u in us:
        u.requires_grad_()

    def moving(*xs):
        return tuple(y for y in case(*xs) if y.is_floating_point())

    def gradient(*xs):
        return grad([y for y in case(*xs) if y.requires_grad], xs, us, create_graph=True, materialize_grads=True)

    def tangents(*xs):
        return jvp(moving, xs, vs)[1]

    context[2] = "vjp"
    for needed in leaves:  # one gradient alone may be another kernel than all of them
        grad(outs, [needed], us, retain_graph=True, allow_unused=True)
    grad(outs, leaves, us, allow_unused=True)
    context[2] = "jvp"
    tangents(*case.leaves(False))
    context[2] = "vjp of vjp"
    recorded = [(g, w) for g, w in zip(gradient(*leaves), ws, strict=True) if g.requires_grad]
    if recorded:
        grad([g for g, _ in recorded], [*leaves, *us], [w for _, w in recorded], materialize_grads=True)
    context[2] = "jvp of vjp"
    jvp(gradient, leaves, vs)
    context[2] = "vjp of jvp"
    recorded = [t for t in tangents(*leaves) if t.requires_grad]
    if recorded:
        grad(recorded, leaves, case.like(recorded), materialize_grads=True)
    context[2] = "jvp of jvp"
    jvp(tangents, case.leaves(False), ws)


def operations(dtype: str) -> None:
    """Every op with every sample."""
    for op in EVERYTHING:
        for sample in op.samples:
            context[:] = [op.name, dtype, "forward"]
            case = Case(op, sample, gpuad.device("cuda:0"), dtype)
            case(*case.leaves(False))
            differentiate(case)


OPTIMIZERS = {
    "SGD": [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"momentum": 0.9, "maximize": True}],
    "Adam": [{}, {"amsgrad": True, "weight_decay": 0.1}],
    "RMSprop": [{}, {"momentum": 0.9, "centered": True}],
}  # with other options than its defaults


def optimizers(dtype: str) -> None:
    """Every optimiser, with a table of parameters in the arguments and, for many parameters, on the device."""
    for name in optim.__all__:
        if name in ("Optimizer", "lr_scheduler"):
            continue
        for options in OPTIMIZERS.get(name, [{}]):
            for count in (2, 400):
                context[:] = [f"optim.{name}", dtype, "step"]
                parameters = [nn.Parameter(gpuad.zeros(3, device="cuda", dtype=dtype)) for _ in range(count)]
                for p in parameters:
                    p.grad = gpuad.zeros_like(p)
                parameters[0].data = gpuad.zeros(3, 2, device="cuda", dtype=dtype).t()  # strides: indexed kernels
                parameters[0].grad = gpuad.zeros(2, 3, device="cuda", dtype=dtype)
                getattr(optim, name)(parameters, lr=0.1, **options).step()


def network(dtype: str) -> None:
    """A training step as a user writes it, with what is no op of its own: dropout, clipping, weights of classes."""
    context[:] = ["network", dtype, "step"]
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.5), nn.BatchNorm1d(8),
                          nn.Linear(8, 3)).to("cuda", getattr(gpuad, dtype))  # fmt: skip
    x = gpuad.zeros(5, 4, device="cuda", dtype=dtype)
    loss = nn.CrossEntropyLoss(weight=gpuad.ones(3, device="cuda", dtype=dtype), label_smoothing=0.1)
    loss(model(x), gpuad.zeros(5, device="cuda", dtype=gpuad.int64)).backward()
    for order in (1.0, 2.0, 3.0, float("inf")):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, order)
    long_rows(dtype)
    many_gradients(dtype)


def long_rows(dtype: str) -> None:
    """Rows that a block of threads reduces together, and additions at indices in a fixed order."""
    rows = gpuad.zeros(2, 2000, device="cuda", dtype=dtype, requires_grad=True)
    labels = gpuad.zeros(2, device="cuda", dtype=gpuad.int64)
    gpuad.use_deterministic_algorithms(True)
    (rows.softmax(1)[labels].sum() + nn.functional.cross_entropy(rows, labels)).backward()
    gpuad.use_deterministic_algorithms(False)
    nn.functional.layer_norm(rows, (2000,)).sum().backward()


def many_gradients(dtype: str) -> None:
    """More gradients than a table in a kernel's arguments has rows, clipped and unscaled."""
    tensors = [gpuad.zeros(3, device="cuda", dtype=dtype) for _ in range(200)]
    many.clip_to_norm_(tensors, 1.0, many.total_norm(tensors, 2.0))
    for some in (tensors, tensors[:3]):
        many.unscale_(some, gpuad.ones((), device="cuda"), gpuad.zeros((), device="cuda"))


def draws() -> None:
    """Random numbers of every distribution and dtype."""
    for draw in DRAWS:
        context[:] = ["random", str(draw), "draw"]
        run_draw(draw, random.Generator().manual_seed(1), (7,), 0)
    generator = random.Generator().manual_seed(1)
    context[:] = ["random", "captured", "draw"]
    out = random.normal(generator, (7,), device=0)
    with cupy.cuda.Stream(non_blocking=True) as stream, generator.capture(0) as captured:
        stream.begin_capture()
        random.normal(generator, out=out)
        stream.end_capture()
        captured.advance_base()


def main() -> None:
    """Collects, and writes the file."""
    compiler._compile_module_with_cache = collecting(compiler._compile_module_with_cache)
    for dtype in DTYPES:
        operations(dtype)
        optimizers(dtype)
        network(dtype)
    draws()
    Path(sys.argv[1]).write_text(json.dumps(list(units.values())))


if __name__ == "__main__":
    np.seterr(all="ignore")  # the numbers are those of memory that nothing was written to
    with cupy.cuda.Device(0):
        main()
