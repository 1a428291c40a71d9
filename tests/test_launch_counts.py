"""What a training step asks of a CUDA device: launches, waits, copies and allocations, counted on a simulated one."""

from __future__ import annotations

import pytest

import gpuad
from gpuad import nn, optim

pytestmark = pytest.mark.cuda

# Forward: 3 products, 3 biases, 2 relus, the loss. Backward: 1 of the loss, 3 of each
# of the last two layers (input, weight, bias), 2 of the first, 2 of the relus. The optimiser: 1.
FORWARD, BACKWARD, STEP = 9, 11, 1


class Training:
    """A 784-512-512-10 relu MLP with cross-entropy, and its batch, on the device."""

    def __init__(self, optimizer=None, dtype=gpuad.float32, classes: int = 10) -> None:
        layers = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, classes))
        self.model = nn.Sequential(*layers).to("cuda", dtype)
        self.x = gpuad.randn(128, 784, device="cuda", dtype=dtype)
        self.labels = gpuad.randint(classes, (128,), device="cuda")
        self.loss = nn.CrossEntropyLoss()
        make = optimizer or (lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9))
        self.optimizer = make(self.model.parameters())

    def forward(self):
        self.optimizer.zero_grad()
        return self.loss(self.model(self.x), self.labels)

    def step(self) -> None:
        self.forward().backward()
        self.optimizer.step()

    def warm(self) -> Training:
        for _ in range(3):
            self.step()
        return self


def launches(r) -> int:
    """Kernels, library calls and memsets."""
    return r.kernel_launches + r.library_calls + r.stats["memsets"]


def nothing_else(r) -> bool:
    """No wait, no copy, no allocation."""
    assert not r.syncs, r.stats["syncs"]
    assert not r.stats["copies"], r.stats["copies"]
    assert not r.stats["mallocs"] and not r.stats["frees"], (r.stats["mallocs"], r.stats["frees"])
    return True


def test_a_training_step_takes_21_launches(cuda_device, counts):
    training = Training().warm()
    with counts() as r:
        training.step()
    assert launches(r) <= 21, (r.stats["kernels"], r.stats["library"], r.stats["memsets"])
    assert nothing_else(r)


def test_the_phases_of_a_step(cuda_device, counts):
    training = Training().warm()
    with counts() as forward:
        loss = training.forward()
    with counts() as backward:
        loss.backward()
    with counts() as step:
        training.optimizer.step()
    assert launches(forward) <= FORWARD, forward.stats["kernels"]
    assert launches(backward) <= BACKWARD, backward.stats["kernels"]
    assert launches(step) <= STEP and step.kernel_launches == 1
    assert nothing_else(forward) and nothing_else(backward) and nothing_else(step)
    assert (forward.library_calls, backward.library_calls) == (3, 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.SGD(p, lr=0.1),
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
        lambda p: optim.Adam(p, lr=1e-3),
        lambda p: optim.AdamW(p, lr=1e-3, amsgrad=True),
        lambda p: optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "rmsprop"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_every_optimiser_and_dtype_stays_within(make, dtype, cuda_device, counts):
    training = Training(make, dtype=getattr(gpuad, dtype)).warm()
    with counts() as r:
        training.step()
    assert launches(r) <= FORWARD + BACKWARD + STEP, (r.stats["kernels"], r.stats["library"], r.stats["memsets"])
    assert nothing_else(r)


def test_a_step_on_another_device_than_the_current_one(cuda_device, counts):
    if gpuad.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with gpuad.cuda.device(1):
        training = Training().warm()
    for _ in range(2):
        training.step()
    with counts(trace=True) as r:
        training.step()
    assert launches(r) <= 21 and nothing_else(r)
    assert {event[3] for event in r.trace} == {1}
    assert gpuad.cuda.current_device() == 0


def test_losses_do_not_change_the_counts_from_step_to_step(cuda_device, counts):
    training = Training().warm()
    found = []
    for _ in range(4):
        with counts() as r:
            training.step()
        found.append((r.stats["kernels"], r.stats["library"], r.stats["memsets"]))
    assert all(f == found[0] for f in found)


def test_evaluation_takes_no_more_than_the_forward_pass(cuda_device, counts):
    training = Training().warm()
    with gpuad.no_grad():
        training.model(training.x).argmax(1)
        with counts() as r:
            hits = (training.model(training.x).argmax(1) == training.labels).sum()
        assert launches(r) <= 8 + 4  # argmax, the comparison, its cast and sum
        assert not r.syncs and not r.stats["copies"]
    assert 0 <= hits.item() <= 128


def test_memory_returns_after_each_step(cuda_device):
    training = Training().warm()
    before = gpuad.cuda.memory_allocated()
    for _ in range(3):
        training.step()
        assert gpuad.cuda.memory_allocated() == before
