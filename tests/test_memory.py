"""Device memory: its figures, and how much a training step takes at most."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import gpuad
from gpuad import nn, optim
from gpuad.array import memory

pytestmark = pytest.mark.cuda

BATCH, SIZES = 128, (784, 512, 512, 10)


def rounded(*shapes: tuple[int, ...]) -> int:
    """Bytes of float32 arrays in CuPy's pool, which gives out multiples of 512."""
    return sum(-(-4 * int(np.prod(shape)) // 512) * 512 for shape in shapes)


LAYERS = list(zip(SIZES[1:], SIZES[:-1], strict=True))
PARAMETERS = rounded(*LAYERS, *((n,) for n in SIZES[1:]))
HIDDEN = rounded((BATCH, 512))  # one activation of a hidden layer, or its gradient
LOGITS = rounded((BATCH, 10))
BITS = HIDDEN // 32  # which elements of a hidden layer a relu has let through
SCALAR = rounded(())
VECTOR = rounded((BATCH,))


def host(tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


class Training:
    """The 784-512-512-10 relu network with cross-entropy; `base` is what parameters and the batch take."""

    def __init__(self, make) -> None:
        gc.collect()
        before = gpuad.cuda.memory_allocated()
        gpuad.manual_seed(0)
        layers = []
        for n, m in LAYERS:
            layers += [nn.Linear(m, n, device="cuda"), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])
        self.x = gpuad.randn(BATCH, SIZES[0], device="cuda")
        self.labels = gpuad.randint(10, (BATCH,), device="cuda")
        self.optimizer = make(self.model.parameters())
        self.base = before

    def forward(self):
        self.optimizer.zero_grad()
        return nn.functional.cross_entropy(self.model(self.x), self.labels)

    def step(self) -> None:
        self.forward().backward()
        self.optimizer.step()

    def peak(self, action) -> int:
        """The most bytes that the action takes at once beyond what is held before it."""
        gpuad.cuda.reset_peak_memory_stats()
        held = gpuad.cuda.memory_allocated()
        action()
        return gpuad.cuda.max_memory_allocated() - held


OPTIMIZERS = {
    "momentum": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), 1),
    "adam": (lambda p: optim.Adam(p, lr=1e-3), 2),
}


@pytest.fixture(params=OPTIMIZERS)
def training(request, cuda_device):
    made = Training(OPTIMIZERS[request.param][0])
    made.states = OPTIMIZERS[request.param][1]
    return made


# The peak of an MLP step ----------------------------------------------------------------------------------------------
#
# What PyTorch's saved-tensor hooks and allocation events give for this network, loss and batch (2.13, CPU build, the
# parameters, the batch and the optimiser's state left out): it saves both hidden activations, the log-probabilities
# and the total weight of the loss, 2 · 262,144 + 5,120 + 4 = 529,412 bytes. As its zero_grad frees the gradients
# (2,678,824 bytes), its peak is at the last of them, that of the first weight, beside the gradient of the first
# hidden layer that it is made of: all gradients + 262,144 + the loss and a scalar; the allocation events of a step in
# the middle of training say 2,678,824 + 262,152 with momentum SGD, 2,678,824 + 3,211,280 with Adam (temporaries of its
# step), and 2,678,824 + 1,869,832 with momentum SGD and zero_grad(set_to_none=False).

TORCH_SAVED = 2 * HIDDEN + LOGITS + SCALAR
TORCH_PEAK = PARAMETERS + HIDDEN + 2 * SCALAR


def test_a_forward_pass_keeps_what_pytorch_saves(training):
    training.step()
    before = gpuad.cuda.memory_allocated()
    loss = training.forward()
    saved = gpuad.cuda.memory_allocated() - before
    # Beside the activations: a vector with what each row of the loss keeps in place of its log-probabilities' sum, and
    # of each relu that rides in a product a bit an element.
    assert saved <= TORCH_SAVED + SCALAR + VECTOR + 2 * BITS
    del loss


def test_what_is_held_between_steps(training):
    """Parameters, gradients and state, and nothing else."""
    training.step()
    batch = rounded((BATCH, SIZES[0])) + 2 * VECTOR  # labels are of 8 bytes
    assert gpuad.cuda.memory_allocated() - training.base <= (2 + training.states) * PARAMETERS + batch


def test_the_peak_of_a_step_is_no_higher_than_pytorchs(training):
    """zero_grad lets go of large gradients, so the forward pass has their memory; small ones keep their buffers.

    Beyond what is held between steps (gradients included) there is, when the last gradient is made, the gradient of the
    first hidden layer that it is made of.
    """
    training.step()
    assert training.peak(training.step) <= TORCH_PEAK - PARAMETERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_within_a_tight_limit(name, cuda_device):
    """With what its pool held after a step and no more, it computes the same."""
    import cupy

    twin = Training(OPTIMIZERS[name][0])
    for _ in range(5):
        twin.step()
    before = cupy.cuda.get_allocator()
    pool = cupy.cuda.MemoryPool()
    cupy.cuda.set_allocator(pool.malloc)
    try:
        training = Training(OPTIMIZERS[name][0])
        training.step()
        training.step()
        pool.set_limit(pool.total_bytes())
        for _ in range(3):
            training.step()
    finally:
        cupy.cuda.set_allocator(before)
    for p, q in zip(training.model.parameters(), twin.model.parameters(), strict=True):
        np.testing.assert_array_equal(host(p), host(q))


def test_waiting_buffers_are_let_go_where_memory_is_short(training):
    training.step()
    training.optimizer.zero_grad()
    bias = training.model[0].bias
    waiting = weakref.ref(bias._grad_buffer._data)
    assert training.model[0].weight._grad_buffer is None  # large: let go already
    memory.make_room()
    assert waiting() is None
    training.step()
    assert bias.grad is not None


def test_evaluation_holds_two_activations_at_a_time(training):
    with gpuad.no_grad():
        assert training.peak(lambda: training.model(training.x)) <= 2 * HIDDEN


# Figures --------------------------------------------------------------------------------------------------------------


def test_allocated_is_what_arrays_take(cuda_device):
    before = gpuad.cuda.memory_allocated()
    x = gpuad.zeros(1000, device="cuda")
    assert gpuad.cuda.memory_allocated() - before == rounded((1000,)) == 4096
    y = x[10:]  # a view
    assert gpuad.cuda.memory_allocated() - before == 4096
    del x
    assert gpuad.cuda.memory_allocated() - before == 4096
    del y
    assert gpuad.cuda.memory_allocated() == before


def test_each_device_has_its_own_figures(cuda_device):
    if gpuad.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for device in (0, 1):
        gpuad.cuda.reset_peak_memory_stats(device)
    before = [gpuad.cuda.memory_allocated(device) for device in (0, 1)]
    x = gpuad.zeros(1 << 20, device="cuda:1")  # while cuda:0 is the current device
    del x
    assert [gpuad.cuda.memory_allocated(device) for device in (0, 1)] == before
    peaks = [gpuad.cuda.max_memory_allocated(device) for device in (0, 1)]
    assert peaks == [before[0], before[1] + (4 << 20)]
    assert gpuad.cuda.memory_summary(1).startswith("cuda:1  ")


def test_the_peak_watch_stands_before_a_users_allocator(cuda_device):
    """It calls what the user has chosen; figures are those of the user's pool."""
    import cupy

    before = cupy.cuda.get_allocator()
    own = cupy.cuda.MemoryPool()
    cupy.cuda.set_allocator(own.malloc)
    try:
        x = gpuad.zeros(1000, device="cuda")
        assert gpuad.cuda.memory_allocated() == own.used_bytes() == 4096
        assert gpuad.cuda.max_memory_allocated() == gpuad.cuda.memory_reserved() == own.total_bytes()
        gpuad.cuda.reset_peak_memory_stats()
        y = gpuad.zeros(2000, device="cuda")
        del y
        assert gpuad.cuda.memory_allocated() == 4096 and gpuad.cuda.max_memory_allocated() == 4096 + 8192
        assert gpuad.cuda.memory_reserved() == own.total_bytes()
        gpuad.cuda.empty_cache()
        assert own.total_bytes() == own.used_bytes() == 4096
        del x
    finally:
        cupy.cuda.set_allocator(before)


def test_nothing_is_watched_until_asked(cuda_device):
    """Without reset_peak_memory_stats CuPy's allocator is the one that the user sees."""
    import cupy

    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
    try:
        gpuad.cuda.memory_summary()
        gpuad.cuda.max_memory_allocated()
        gpuad.zeros(3, device="cuda")
        assert cupy.cuda.get_allocator() == cupy.get_default_memory_pool().malloc
    finally:
        cupy.cuda.set_allocator(before)
