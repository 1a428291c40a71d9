"""Streams: memory that crosses them, pinned memory, and batches that are copied ahead."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

import gpuad
from gpuad import nn, optim
from gpuad.utils.data import DataLoader, TensorDataset, prefetch

cuda = pytest.mark.cuda
Pair = namedtuple("Pair", "x y")


def dataset(count=37):
    generator = np.random.default_rng(0)
    x = gpuad.tensor(generator.standard_normal((count, 5)).astype(np.float32))
    return TensorDataset(x, gpuad.tensor(generator.integers(0, 3, count)))


# prefetch -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_gives_the_loaders_batches(depth, pinned, device):
    loader = DataLoader(dataset(), batch_size=4, pin_memory=pinned)
    ahead = prefetch(loader, device, depth)
    assert len(ahead) == len(loader) == 10
    for _ in range(2):
        kept = []
        for x, y in ahead:
            assert x.device is device and y.device is device
            kept.append((x, y))  # a batch that is held keeps its values
        assert len(kept) == 10
        for (x, y), (a, b) in zip(kept, loader, strict=True):
            assert x.tolist() == a.tolist() and y.tolist() == b.tolist()
            assert (x.dtype, y.dtype) == (a.dtype, b.dtype)


def test_prefetch_enters_structures(device):
    inner = gpuad.arange(4).float().reshape(2, 2)
    there = gpuad.ones(2, device=device)
    wanted = gpuad.ones(2, requires_grad=True)
    batch = {
        "pair": Pair(inner.T, [inner[0], "text"]),
        "there": there,
        "n": 3,
        "none": (None, gpuad.zeros(0)),
        "g": wanted,
    }
    (got,) = prefetch([batch], device)
    assert type(got["pair"]) is Pair and got["pair"].y[1] == "text" and got["n"] == 3 and got["none"][0] is None
    assert got["pair"].x.tolist() == [[0, 2], [1, 3]] and got["pair"].x.device is device
    assert got["there"].data_ptr() == there.data_ptr() and got["none"][1].device is device
    got["g"].sum().backward()
    assert wanted.grad.tolist() == [1, 1]


def train(device, ahead, pinned=True, workers=0):
    gpuad.manual_seed(3)
    loader = DataLoader(dataset(), batch_size=8, shuffle=True, pin_memory=pinned, num_workers=workers)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).to(device)
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        for x, y in prefetch(loader, device) if ahead else ((x.to(device), y.to(device)) for x, y in loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return np.array([loss.item() for loss in losses] + [p.sum().item() for p in model.parameters()])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
def test_training_with_prefetch_is_training_without(pinned, workers, device):
    np.testing.assert_array_equal(train(device, True, pinned, workers), train(device, False))


def test_an_exception_comes_after_the_batches_before_it(device):
    def batches():
        yield gpuad.zeros(2)
        yield gpuad.ones(2)
        raise KeyError("the third")

    seen = []
    with pytest.raises(KeyError, match="the third"):
        for x in prefetch(batches(), device, depth=3):
            seen.append(x.tolist())
    assert seen == [[0, 0], [1, 1]]


def test_leaving_early_closes_the_loader(device):
    closed = []

    def batches():
        try:
            while True:
                yield gpuad.ones(3)
        finally:
            closed.append(True)

    for x in prefetch(batches(), device):
        assert x.tolist() == [1, 1, 1]
        break
    gc.collect()
    assert closed == [True]


def test_a_depth_below_one_is_refused(device):
    with pytest.raises(ValueError, match="depth"):
        prefetch([], device, depth=0)


@cuda
def test_prefetch_copies_on_a_stream_of_its_own_and_does_not_wait(cuda_device, counts):
    loader = DataLoader(dataset(64), batch_size=8, pin_memory=True)
    list(prefetch(loader, cuda_device))
    total = gpuad.zeros((), device=cuda_device)
    with counts(trace=True) as r:
        for x, y in prefetch(loader, cuda_device):
            total = total + x.sum() + y.sum()
    copies = [event for event in r.trace if "memcpy" in str(event[0]).lower() or "h2d" in str(event).lower()]
    assert r.copies("h2d")[0] == 16 and r.copies("d2h") == (0, 0)
    assert len(copies) == 16
    assert total.item() == pytest.approx(sum((x.sum() + y.sum()).item() for x, y in loader), rel=1e-5)


# Pinned memory --------------------------------------------------------------------------------------------------------


@cuda
def test_pinned_memory(cuda_device):
    x = gpuad.arange(6).reshape(2, 3)
    pinned = x.T.pin_memory()
    assert pinned.is_pinned() and not x.is_pinned() and pinned[1].is_pinned()
    assert pinned.tolist() == x.T.tolist() and pinned.pin_memory() is pinned
    assert gpuad.zeros(0, 2).pin_memory().shape == (0, 2)
    for batch in DataLoader(dataset(), batch_size=8, pin_memory=True):
        assert all(t.is_pinned() for t in batch)
    with pytest.raises(TypeError, match=r"on cuda:0; use x\.cpu\(\)\.pin_memory\(\)"):
        gpuad.ones(2, device=cuda_device).pin_memory()
    with pytest.raises(gpuad.errors.AutogradError, match="detach"):
        gpuad.ones(2, requires_grad=True).pin_memory()


def test_without_a_device_nothing_is_pinned():
    if gpuad.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert not gpuad.ones(2).is_pinned()
    (x, _), *_ = DataLoader(dataset(), batch_size=8, pin_memory=True)
    assert not x.is_pinned()
    with pytest.raises(gpuad.errors.DeviceError):
        gpuad.ones(2).pin_memory()


# Memory that crosses streams ------------------------------------------------------------------------------------------


def test_record_stream_does_nothing_on_cpu():
    assert gpuad.ones(2).record_stream(None) is None


@cuda
def test_memory_goes_back_to_the_stream_it_came_from(cuda_device):
    """The rule that gpuad.cuda documents, asked of CuPy itself."""
    side = gpuad.cuda.Stream()
    with gpuad.cuda.stream(side):
        x = gpuad.empty(5000, device="cuda")
        place = x.data_ptr()
    del x
    assert (y := gpuad.empty(5000, device="cuda")).data_ptr() != place
    with gpuad.cuda.stream(side):
        z = gpuad.empty(5000, device="cuda")
        assert z.data_ptr() == place
    del y, z


@cuda
@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
def test_a_recorded_stream_keeps_memory_until_it_is_done(view, cuda_device):
    side = gpuad.cuda.Stream()
    x = gpuad.ones(6000, device="cuda")
    place = x.data_ptr()
    if view:
        x = x[10:]
    side.wait_stream(gpuad.cuda.current_stream())
    with gpuad.cuda.stream(side):
        y = x * 2
    x.record_stream(side)
    busy = gpuad.cuda.memory_allocated()
    del x
    side.synchronize()
    gpuad.cuda.empty_cache()  # gives what is done back to the pool
    assert gpuad.cuda.memory_allocated() < busy
    assert (y == 2).all().item()
    del place


DEFERRED = """
import numpy as np, gpuad
import sys
sys.path.insert(0, {tests!r})
import test_streams as t

device = gpuad.device("cuda")
for pinned in (False, True):
    for workers in (0, 2):
        np.testing.assert_array_equal(t.train(device, True, pinned, workers), t.train(device, False, pinned, workers))

# Batches that are read at once, while later ones are still to be copied.
loader = t.DataLoader(t.dataset(), batch_size=4, pin_memory=True)
for (x, _), (a, _) in zip(t.prefetch(loader, device, depth=5), loader, strict=True):
    assert x.tolist() == a.tolist()

# A reader on another stream, behind work that has not run: its operand is freed and the memory asked for again.
side, main = gpuad.cuda.Stream(), gpuad.cuda.current_stream()
x = gpuad.ones(7000, device="cuda")
place = x.data_ptr()
side.wait_stream(main)
with gpuad.cuda.stream(side):
    y = x * 2
x.record_stream(side)
del x
z = gpuad.full((7000,), 5.0, device="cuda")
assert z.data_ptr() != place, "the memory was given away before its reader was done"
(z + 1).sum().item()
main.wait_stream(side)
assert (y == 2).all().item()

# backward on the stream that is current, across a side stream
a = gpuad.randn(50, 50, device="cuda", requires_grad=True)
with gpuad.cuda.stream(side):
    side.wait_stream(main)
    b = (a @ a).tanh()
main.wait_stream(side)
(b * b).sum().backward()
c = a.detach().cpu().requires_grad_()
((c @ c).tanh() ** 2).sum().backward()
np.testing.assert_allclose(a.grad.cpu().numpy(), c.grad.numpy(), rtol=1e-4, atol=1e-4)
print("in order")
"""


@cuda
def test_nothing_runs_out_of_order_where_work_is_deferred(cuda_device, counts):
    """The same on simulated devices that run nothing before somebody waits for it."""
    script = DEFERRED.format(tests=str(Path(__file__).parent))
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "CUDASIM_ASYNC": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.strip() == "in order"
