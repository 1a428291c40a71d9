"""Writes down every CUDA source that gpuad gives CuPy to compile: python collect.py FILE, where there is a CUDA device.

All operations of the table run in every floating dtype, forwards, backwards, with tangents and differentiated two and
three times; forwards in every other dtype that they take; with operands of several dtypes; and so do the optimisers,
the random draws, sums over axes of every layout, and what else has a kernel. What is written, as JSON, is what CuPy
would hand to NVRTC: the whole translation unit and CuPy's options. Nothing of it is compiled or computed here: an empty
kernel runs in the place of each of gpuad's, so that a thousand of them take seconds.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cupy
import numpy as np
from cupy.cuda import compiler, function

import gpuad
from gpuad import amp, nn, optim
from gpuad.array import random
from gpuad.autograd import grad
from gpuad.autograd.forward import jvp
from gpuad.func import jacfwd, jacrev
from gpuad.kernels import rows_cuda
from gpuad.ops import many

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_func import MIXES, backwards, forwards
from test_ops import EVERYTHING, Case
from test_random_bits import DRAWS
from test_random_bits import run as run_draw
from test_sums_cuda import SHAPES, VIEWS, every_axes

HALVES = ("float16", "bfloat16")
DTYPES = (*HALVES, "float32", "float64")
INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")
# Raised where an op does not take a dtype, or a number for an array.
NOT_TAKEN = (gpuad.errors.GpuadError, TypeError, ValueError, AttributeError, OverflowError)
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


def gradients(case: Case) -> None:
    """The gradients of the case, with any of the operands requiring them."""
    for required in itertools.product((True, False), repeat=len(case.places)):
        leaves = case.leaves(False)
        needed = [leaf.requires_grad_() for leaf, requires in zip(leaves, required, strict=True) if requires]
        outs = [y for y in case(*leaves) if y.requires_grad]
        if outs:
            context[2] = "vjp"
            us = case.like(outs)
            for leaf in needed:  # one gradient alone may be another kernel than all of them
                grad(outs, [leaf], us, retain_graph=True, allow_unused=True)
            grad(outs, needed, us, allow_unused=True)


def differentiate(case: Case) -> None:
    """All first and second derivatives of the case, in both modes."""
    gradients(case)
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


def differentiate_three_times(case: Case) -> None:
    """The third derivatives of the case, each of the three by forward or by reverse mode."""
    leaves = case.leaves(False)
    outs = [y for y in case(*case.leaves()) if y.requires_grad]
    if not sum(y.numel() for y in outs):
        return
    us = case.like([y for y in case(*leaves) if y.is_floating_point()])
    directions = [case.like(leaves) for _ in range(3)]

    def weighted(xs):
        ys = [y for y in case(*xs) if y.is_floating_point()]
        return sum((y * u).sum() for y, u in zip(ys, us, strict=True))

    for mix in MIXES:
        context[2] = " of ".join({"f": "jvp", "b": "vjp"}[mode] for mode in reversed(mix))
        f = weighted
        for mode, along in zip(mix, directions, strict=True):
            f = (forwards if mode == "f" else backwards)(f, along)
        f(leaves)


def jacobians(case: Case) -> None:
    """Jacobians by both modes, which let vmap compute many derivatives of a value at once."""
    leaves = case.leaves(False)
    if not any(y.requires_grad for y in case(*case.leaves())):
        return

    def moving(*xs):
        return [y for y in case(*xs) if y.is_floating_point()]

    for mode, jacobian in (("vjp", jacrev), ("jvp", jacfwd)):
        context[2] = f"vmap of {mode}"
        jacobian(moving, tuple(range(len(leaves))))(*leaves)


def cases(dtype: str, ops: Iterable = EVERYTHING) -> Iterator[Case]:
    """The ops with all their samples; the context says which."""
    for op in ops:
        for sample in op.samples:
            context[:] = [op.name, dtype, "forward"]
            yield Case(op, sample, gpuad.device("cuda:0"), dtype)


def operations(dtype: str) -> None:
    """Every op with every sample and its first and second derivatives; one sample's third ones and Jacobians."""
    for case in cases(dtype):
        case(*case.leaves(False))
        differentiate(case)
    for op in EVERYTHING:
        case = Case(op, op.samples[0], gpuad.device("cuda:0"), dtype)
        context[:] = [op.name, dtype, ""]
        differentiate_three_times(case)
        jacobians(case)


def rows_by_blocks(dtype: str) -> None:
    """The operations on rows once more, with a block of threads for each row, as if the rows were long."""
    names = {unit["of"][0].split("\t")[0] for unit in units.values() if "const long long rows" in unit["source"]}
    longest = rows_cuda.WARP_COLUMNS
    rows_cuda.WARP_COLUMNS = 0
    for kernel in [x for x in gc.get_objects() if isinstance(x, rows_cuda.RowKernel)]:
        kernel._plans.clear()
    for case in cases(dtype, [op for op in EVERYTHING if op.name in names]):
        case(*case.leaves(False))
        differentiate(case)
    rows_cuda.WARP_COLUMNS = longest


def integers(dtype: str) -> None:
    """Every op with operands of a dtype that is not a floating one, where it takes that on the host."""
    for op in EVERYTHING:
        for sample in op.samples:
            context[:] = [op.name, dtype, "forward"]
            with contextlib.suppress(*NOT_TAKEN):
                for device in ("cpu", "cuda:0"):
                    case = Case(op, sample, gpuad.device(device), dtype)
                    case(*case.leaves(False))
    context[:] = ["indexing", dtype, "forward"]
    if dtype != "bool":
        for shape in ((), (2,)):
            gpuad.zeros(3, device="cuda")[gpuad.zeros(shape, dtype=getattr(gpuad, dtype), device="cuda")]


def mixed_operands(dtype: str, other: str | float) -> None:
    """Every op of several operands, each in turn of another dtype than the rest, or a number, and the gradients."""
    for case in cases(dtype):
        given, places = list(case.entries), list(case.places)
        for place in places if len(places) > 1 else ():
            context[1:] = [f"{dtype} and {other}", "forward"]
            case.entries = list(given)
            case.entries[place] = given[place].to(getattr(gpuad, other)) if isinstance(other, str) else other
            case.places = places if other in DTYPES else [p for p in places if p != place]
            with contextlib.suppress(*NOT_TAKEN):
                case(*case.leaves(False))
                gradients(case)


def sums(dtype: str) -> None:
    """Sums over any axes of arrays of any layout."""
    context[:] = ["sum over axes", dtype, "forward"]
    backend = gpuad.device("cuda:0").backend
    for shape, view in itertools.product(SHAPES, VIEWS.values()):
        array = view(cupy.zeros(shape, dtype))
        for axes in [(), *every_axes(array.ndim)]:
            backend.sum(array, axes, False)


def pieces(dtype: str) -> None:
    """Gradients of the pieces of a tensor, of which some are missing."""
    context[:] = ["pieces", dtype, "vjp"]
    x = gpuad.zeros(5, 3, device="cuda", dtype=getattr(gpuad, dtype), requires_grad=True)
    for count in range(2, 6):
        for used in itertools.product((False, True), repeat=count):
            some = [piece for piece, use in zip(x[:count].unbind(0), used, strict=True) if use]
            grad(some, x, some, allow_unused=True)


def settings(make: Callable) -> Iterator[dict]:
    """An optimiser's options: each that is off by default, on and off, in all combinations."""
    off = {n: p.default for n, p in inspect.signature(make).parameters.items() if p.default in (False, 0)}
    switches = {n: (False, True) if default is False else (0, 0.1) for n, default in off.items()}
    for values in itertools.product(*switches.values()):
        yield dict(zip(switches, values, strict=True))


def optimizers(dtype: str) -> None:
    """Every optimiser with all its settings, for some parameters and for more than a table in the arguments holds.

    Each steps by itself and with a GradScaler, with which the numbers that depend on the count of steps are on the
    device. One parameter has other strides than its gradient, which takes an indexed kernel.
    """
    for name in optim.__all__:
        if name in ("Optimizer", "lr_scheduler"):
            continue
        make = getattr(optim, name)
        for options, count in itertools.product(settings(make), (2, 200)):
            context[:] = [f"optim.{name}", dtype, "step"]
            parameters = [nn.Parameter(gpuad.zeros(3, device="cuda", dtype=dtype)) for _ in range(count)]
            for p in parameters:
                p.grad = gpuad.zeros_like(p)
            parameters[0].data = gpuad.zeros(3, 2, device="cuda", dtype=dtype).t()
            parameters[0].grad = gpuad.zeros(2, 3, device="cuda", dtype=dtype)
            with contextlib.suppress(gpuad.errors.GpuadError, ValueError):  # some settings exclude each other
                optimizer = make(parameters, lr=0.1, **options)
                optimizer.step()
                if dtype not in HALVES:  # gradients of which are not unscaled
                    scaler = amp.GradScaler()
                    scaler.scale(gpuad.ones((), device="cuda"))
                    scaler.step(optimizer)
                    scaler.update()


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
    rows_along_several_axes(dtype)
    many_gradients(dtype)


def long_rows(dtype: str) -> None:
    """Rows that a block of threads reduces together, and additions at indices in a fixed order."""
    rows = gpuad.zeros(2, 2000, device="cuda", dtype=dtype, requires_grad=True)
    labels = gpuad.zeros(2, device="cuda", dtype=gpuad.int64)
    gpuad.use_deterministic_algorithms(True)
    (rows.softmax(1)[labels].sum() + nn.functional.cross_entropy(rows, labels)).backward()
    gpuad.use_deterministic_algorithms(False)
    nn.functional.layer_norm(rows, (2000,), rows[0], rows[1]).sum().backward()


def rows_along_several_axes(dtype: str) -> None:
    """Rows and columns that are no single axis in memory, in operands of every order."""
    x = gpuad.zeros(3, 4, 5, 6, device="cuda", dtype=dtype, requires_grad=True)
    weight = gpuad.zeros(4, device="cuda", dtype=dtype, requires_grad=True)
    labels = gpuad.zeros(3, 5, 6, device="cuda", dtype=gpuad.int64)
    for dims in itertools.permutations(range(4)):
        turned = x.permute(dims)
        norm = nn.BatchNorm1d(turned.shape[1]).to("cuda", getattr(gpuad, dtype))
        norm(turned.flatten(2)).sum().backward()
        for dim in range(4):
            turned.softmax(dim).sum().backward()
        nn.functional.layer_norm(turned, turned.shape[2:]).sum().backward()
    for smoothing in (0.0, 0.1):
        nn.functional.cross_entropy(x, labels, weight, label_smoothing=smoothing).backward()


def many_gradients(dtype: str) -> None:
    """More gradients than a table in a kernel's arguments has rows, clipped and unscaled."""
    tensors = [gpuad.zeros(3, device="cuda", dtype=dtype) for _ in range(200)]
    for some in (tensors, tensors[:3]):
        many.total_norm(some, 2.0)
        for norm in ("float32", "float64"):  # that of gradients of several dtypes is the widest
            many.clip_to_norm_(some, 1.0, gpuad.ones((), device="cuda", dtype=norm))
        many.unscale_(some, gpuad.ones((), device="cuda"), gpuad.zeros((), device="cuda"))


def draws() -> None:
    """Random numbers of every distribution and dtype."""
    for draw in DRAWS:
        context[:] = ["random", str(draw), "draw"]
        run_draw(draw, random.Generator().manual_seed(1), (7,), 0)
    generator = random.Generator().manual_seed(1)
    for dtype in DTYPES:
        random.bernoulli(random.Generator().manual_seed(1), cupy.zeros(7, dtype))
    random.permutation(random.Generator().manual_seed(1), 7, 0)
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
        rows_by_blocks(dtype)
        optimizers(dtype)
        network(dtype)
        pieces(dtype)
    for dtype in INTEGERS:
        integers(dtype)
    for dtype in (*DTYPES, *INTEGERS):
        sums(dtype)
    for other in (*HALVES, "float64", "int64", "bool", 2.0):
        mixed_operands("float32", other)
    mixed_operands("int64", 2)
    draws()
    Path(sys.argv[1]).write_text(json.dumps(list(units.values())))


if __name__ == "__main__":
    np.seterr(all="ignore")  # the numbers are those of memory that nothing was written to
    with cupy.cuda.Device(0):
        main()
