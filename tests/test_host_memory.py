"""Large arrays on the host use memory again, and never memory that somebody still looks at."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import gpuad
from gpuad.array.host_memory import LARGE, HostMemory, memory

FLOATS = LARGE // 4
float32 = np.dtype(np.float32)


@pytest.fixture
def pool():
    return HostMemory(limit=4 * LARGE)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_nobody_holds_it(pool):
    first = pool.empty((FLOATS,), float32)
    place = address(first)
    del first
    assert address(pool.empty((2, FLOATS // 2), float32)) == place


@pytest.mark.parametrize("hold", [lambda a: a, lambda a: a[3:5], lambda a: a.T, lambda a: memoryview(a)],
                         ids=["array", "slice", "transpose", "memoryview"])  # fmt: skip
def test_memory_that_is_held_is_not_used_again(pool, hold):
    first = pool.empty((4, FLOATS // 4), float32)
    first[...] = 1
    held = hold(first)
    del first
    second = pool.empty((4, FLOATS // 4), float32)
    second[...] = 2
    assert np.all(np.asarray(held) == 1)


def test_small_arrays_are_plain(pool):
    assert pool.empty((8,), float32).base is None and not pool.held


def test_the_limit_holds(pool):
    held = [pool.empty((FLOATS,), float32) for _ in range(6)]
    assert pool.held == pool.limit
    places = {address(a) for a in held}
    held.clear()
    assert len(places & {address(a) for a in [pool.empty((FLOATS,), float32) for _ in range(4)]}) == 4


def test_idle_memory_makes_room_for_other_sizes(pool):
    held = [pool.empty((FLOATS,), float32) for _ in range(3)]
    pool.empty((FLOATS,), float32)
    pool.empty((2 * FLOATS,), float32)
    assert pool.held == 3 * LARGE  # only the one that nobody held went
    held.clear()
    pool.empty((2 * FLOATS,), float32)
    assert pool.held == 2 * LARGE


def test_empty_cache_gives_back_what_is_idle(pool):
    held = pool.empty((FLOATS,), float32)
    pool.empty((2 * FLOATS,), float32)
    pool.empty_cache()
    assert pool.held == LARGE
    del held
    pool.empty_cache()
    assert pool.held == 0


@pytest.mark.parametrize("size", [FLOATS, 5, 0])
def test_alone(pool, size):
    array = pool.aligned((size,), float32)
    assert pool.alone(array) and pool.alone(np.empty(3))
    view = array.reshape(1, -1)
    assert not pool.alone(array) and not pool.alone(view) and not pool.alone(array[1:])
    del view
    assert pool.alone(array)
    assert not pool.alone(np.empty(FLOATS, np.float32)[:])


def test_what_gpuad_makes_lies_where_other_libraries_take_it():
    """JAX shares host memory at multiples of 64 bytes, and copies what lies elsewhere."""
    made = [
        gpuad.tensor([1.0, 2.0]), gpuad.tensor(np.arange(5)), gpuad.zeros(3), gpuad.ones(3, 4), gpuad.full((5,), 2.0),
        gpuad.empty(7), gpuad.zeros_like(gpuad.ones(2)), gpuad.randn(3), gpuad.rand(9), gpuad.randint(5, (3,)),
        gpuad.randperm(6), gpuad.ones(4)[1:].clone(), gpuad.tensor(1.0), gpuad.tensor([True]), gpuad.zeros(0, 3),
        gpuad.zeros(FLOATS), gpuad.nn.Linear(3, 5).weight, gpuad.nn.Linear(3, 5).bias,
    ]  # fmt: skip
    x = gpuad.randn(1024, 512)
    made += [x.exp(), x * 2 + 1, x @ x.T, x.softmax(1), x.t().contiguous()]
    assert [t.data_ptr() % 64 for t in made] == [0] * len(made)


def test_full_keeps_the_sign_of_zero(device):
    for zero in (0.0, -0.0):
        made = gpuad.full((2,), zero, device=device).cpu().numpy()
        assert np.signbit(made).tolist() == [str(zero) == "-0.0"] * 2


def test_threads_get_memory_of_their_own(pool):
    pool.limit = 64 * LARGE
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            mine = pool.empty((FLOATS,), float32)
            mine[:] = number
            if not np.all(mine == number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.held <= 8 * LARGE  # each holds its last while it asks for the next


def test_results_that_are_kept_stay_as_they_are():
    x = gpuad.randn(512, 1024, requires_grad=True)
    kept = []
    for i in range(4):
        y = (x * float(i)).tanh()
        view = y.detach()[7]
        kept.append((view, view.numpy().copy(), x.detach().numpy()[7] * np.float32(i)))
        y.sum().backward()
        x.grad = None
        del y
    for view, then, input in kept:
        assert np.array_equal(view.numpy(), then)
        np.testing.assert_allclose(then, np.tanh(input), rtol=1e-5, atol=1e-6)


def test_gradients_of_large_parameters_keep_their_buffer():
    w = gpuad.randn(512, 1024, requires_grad=True)
    places = set()
    for _ in range(4):
        gpuad.autograd.backward((w.tanh() * 2).sum())
        places.add(w.grad.data_ptr())
        held = w.grad.clone()
        w.grad = None
        del held
    assert len(places) <= 2
    gc.collect()
    assert memory.held <= memory.limit
