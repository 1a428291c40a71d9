"""Sums on CUDA: over any axes of any layout, long ones cut between blocks, rows by warps and by blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import gpuad
import gpuad.nn.functional as F
from gpuad.kernels import last_block
from gpuad.ops.activations import relu

pytestmark = pytest.mark.cuda

TOLERANCE = {"float16": (2e-3, 0.5), "float32": (1e-4, 2e-3), "float64": (1e-9, 1e-6), "int64": (0, 0)}
SHAPES = [(), (5,), (3, 4), (2, 3, 4), (100, 70), (7, 300), (300, 7), (0, 3), (3, 0), (70000,), (3000, 64), (64, 3000)]
VIEWS = {
    "plain": lambda a: a,
    "transposed": lambda a: a.T,
    "every second": lambda a: a[..., ::2] if a.ndim else a,
    "backwards": lambda a: a[::-1] if a.ndim else a,
}


def every_axes(ndim: int):
    yield from itertools.chain.from_iterable(itertools.combinations(range(ndim), k) for k in range(1, ndim + 1))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_any_axes_of_any_layout(cuda_device, shape, dtype, view):
    x = (np.random.default_rng(0).standard_normal(shape) * 3).astype(dtype)
    here, there = VIEWS[view](x), VIEWS[view](cuda_device.backend.asarray(x))
    rtol, atol = TOLERANCE[dtype]
    for axes in every_axes(x.ndim) if shape else [()]:
        for keepdims in (False, True):
            found = cuda_device.backend.sum(there, axes, keepdims)
            expected = here.astype(np.int64 if dtype == "int64" else np.float64).sum(axes, keepdims=keepdims)
            assert found.shape == expected.shape and found.dtype == here.dtype
            np.testing.assert_allclose(found.get().astype(expected.dtype), expected, rtol, atol)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (300, 7), (7, 300), (3000, 64), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_what_is_summed_written_in_place(cuda_device, counts, shape, dtype, view):
    """One launch: the derivative of relu over its own gradient, and the sum of the rows."""
    numbers = np.random.default_rng(0)
    g, y = (numbers.integers(-3, 4, shape).astype(dtype) for _ in range(2))
    backend, plan = cuda_device.backend, relu.plan((0,))
    there, saved = (VIEWS[view](backend.asarray(a)) for a in (g, y))
    here = VIEWS[view](g) * (VIEWS[view](y) > 0)
    with counts() as r:
        total = backend.elementwise_and_sum(plan.formula, (there, saved), there.dtype, there, (0,), None)
    assert r.kernel_launches == bool(total.size)
    np.testing.assert_array_equal(there.get(), here)
    np.testing.assert_array_equal(total.get(), here.astype(float).sum(0).astype(dtype))


def test_a_sum_into_a_buffer_with_gaps(cuda_device):
    x = cuda_device.backend.asarray(np.arange(12.0).reshape(3, 4))
    buffer = cuda_device.backend.full((8,), 7.0, np.dtype(np.float64))
    assert cuda_device.backend.sum(x, (0,), False, buffer[::2]) is not None
    assert buffer.get().tolist() == [12.0, 7.0, 15.0, 7.0, 18.0, 7.0, 21.0, 7.0]


def test_a_long_sum_is_one_launch_of_many_blocks_and_the_same_every_time(cuda_device, counts):
    x = gpuad.randn(300_000, device="cuda")
    x.square().sum()
    square = x.square()
    with counts(trace=True) as r:
        first = square.sum()
    assert r.kernel_launches == 1 and not r.syncs and not r.stats["copies"]
    again = [square.sum().item() for _ in range(3)]
    assert again == [first.item()] * 3
    assert not last_block.counters().get().any()  # ready for the next launch


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 10), (7000, 3), (9, 33), (40, 1024), (5, 1500), (600, 1100)])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_of_rows_are_the_hosts(cuda_device, counts, rows, columns, ignored, reduction):
    numbers = np.random.default_rng(1)
    x = numbers.standard_normal((rows, columns))
    labels = numbers.integers(0, columns, rows)
    if ignored:
        labels[:: 2 if rows > 1 else 5] = -100
    found = []
    for device in ("cpu", "cuda"):
        input = gpuad.tensor(x, device=device, requires_grad=True)
        loss = F.cross_entropy(input, gpuad.tensor(labels, device=device), reduction=reduction)
        loss.backward()
        found.append((loss.item(), input.grad.cpu().numpy()))
    (loss, gradient), (other, its_gradient) = found
    np.testing.assert_allclose(other, loss, rtol=1e-10)
    np.testing.assert_allclose(its_gradient, gradient, rtol=1e-9, atol=1e-14)
    with counts() as r:
        F.cross_entropy(input, gpuad.tensor(labels, device="cuda"), reduction=reduction)
    assert r.kernel_launches == 1


def test_the_mean_loss_of_nothing_is_nan(cuda_device):
    for device in ("cpu", "cuda"):
        none = gpuad.zeros(0, 3, device=device)
        labels = gpuad.zeros(0, dtype=gpuad.int64, device=device)
        assert np.isnan(F.cross_entropy(none, labels).item())
        assert F.cross_entropy(none, labels, reduction="sum").item() == 0
        every = gpuad.full((4,), -100, dtype=gpuad.int64, device=device)
        assert np.isnan(F.cross_entropy(gpuad.zeros(4, 3, device=device), every).item())


@pytest.fixture
def deterministic():
    gpuad.use_deterministic_algorithms(True)
    yield
    gpuad.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "use",
    [
        lambda x, i: x[i],
        lambda x, i: x[:, i % 3],
        lambda x, i: x[i, i % 3],
        lambda x, i: x.gather(0, i[:, None].expand(len(i), 3)),
        lambda x, i: F.embedding(i, x, padding_idx=1),
        lambda x, i: x.T[:, i],
    ],
    ids=["rows", "columns", "elements", "gather", "embedding", "transposed"],
)
def test_deterministic_gradients_of_indexing(cuda_device, counts, deterministic, use, dtype):
    assert gpuad.are_deterministic_algorithms_enabled()
    index = np.random.default_rng(0).integers(0, 5, 40)
    gradients = []
    for device in ("cpu", "cuda"):
        x = gpuad.ones(5, 3, dtype=getattr(gpuad, dtype), device=device, requires_grad=True)
        y = use(x, gpuad.tensor(index, device=device))
        with counts() as r:
            y.backward(gpuad.arange(y.numel(), device=device).reshape(y.shape).to(x.dtype) / 8)
        gradients.append(x.grad.cpu().numpy())
        if device == "cuda":
            assert "gpuad_add_at_in_order" in r.stats["kernels"] and not r.syncs
    np.testing.assert_array_equal(*gradients)  # eighths: exact in any order
