"""What a training step asks of a CUDA device: launches, waits, copies and allocations, counted on a simulated one."""

from __future__ import annotations

import pytest

import gpuad
from gpuad import nn, optim
from gpuad.array import cublaslt

pytestmark = pytest.mark.cuda

# With cuBLASLt. Forward: 3 products (with bias and relu), the loss. Backward: 1 of the loss, 2 products of each of the
# last two layers (with the bias's sum; with relu's derivative and the next bias's sum), 1 of the first. Optimiser: 1.
FORWARD, BACKWARD, STEP = 4, 6, 1
# Without. Forward: 3 products, 3 biases (with relu), the loss. Backward: 1 of the loss, 2 products of each of the last
# two layers, 1 of the first, 1 kernel for the last bias, 2 of relu's derivative with the next bias's sum.
PLAIN_FORWARD, PLAIN_BACKWARD = 7, 9
# Of two transformer blocks with a head, AdamW.
TRANSFORMER = 34, 52, 1


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


def phases(forward, optimizer, counts) -> tuple:
    """What a forward pass, the backward pass of its loss and the optimiser's step ask for."""
    with counts() as first:
        loss = forward()
    with counts() as backward:
        loss.backward()
    with counts() as step:
        optimizer.step()
    return first, backward, step


def nothing_else(r) -> bool:
    """No wait, no copy, no allocation."""
    assert not r.syncs, r.stats["syncs"]
    assert not r.stats["copies"], r.stats["copies"]
    assert not r.stats["mallocs"] and not r.stats["frees"], (r.stats["mallocs"], r.stats["frees"])
    return True


@pytest.fixture
def epilogues(cuda_device):
    if not cublaslt.available():
        pytest.skip("nvmath-python finds no cuBLASLt here")


def test_a_training_step_takes_11_launches(epilogues, counts):
    training = Training().warm()
    with counts() as r:
        training.step()
    assert launches(r) == 11, (r.stats["kernels"], r.stats["library"], r.stats["memsets"])
    assert nothing_else(r)


def test_without_cublaslt_it_takes_17(cuda_device, counts, monkeypatch):
    monkeypatch.setattr(cublaslt, "available", lambda: False)
    training = Training().warm()
    forward, backward, step = phases(training.forward, training.optimizer, counts)
    assert (launches(forward), launches(backward), launches(step)) == (PLAIN_FORWARD, PLAIN_BACKWARD, STEP)
    assert nothing_else(forward) and nothing_else(backward) and nothing_else(step)
    assert (forward.library_calls, backward.library_calls) == (3, 5)


class WithFunctions(nn.Module):
    """The network of Training as many write theirs: activations are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 512), nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x):
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


@pytest.mark.parametrize("library, expected", [(True, (6, 8, 1)), (False, (9, 9, 1))], ids=["cuBLASLt", "without"])
def test_activations_that_are_functions(request, cuda_device, counts, monkeypatch, library, expected):
    """A kernel each forwards; backwards one kernel in place that also sums for the bias, as in Sequential."""
    if library:
        request.getfixturevalue("epilogues")
    else:
        monkeypatch.setattr(cublaslt, "available", lambda: False)
    training = Training()
    training.model = WithFunctions().to("cuda")
    training.optimizer = optim.SGD(training.model.parameters(), lr=0.1, momentum=0.9)
    forward, backward, step = phases(training.warm().forward, training.optimizer, counts)
    assert (launches(forward), launches(backward), launches(step)) == expected
    assert nothing_else(forward) and nothing_else(backward) and nothing_else(step)


def test_the_phases_of_a_step(epilogues, counts):
    training = Training().warm()
    forward, backward, step = phases(training.forward, training.optimizer, counts)
    assert (launches(forward), launches(backward), launches(step)) == (FORWARD, BACKWARD, STEP)
    assert nothing_else(forward) and nothing_else(backward) and nothing_else(step)
    assert (forward.library_calls, backward.library_calls, step.kernel_launches) == (3, 5, 1)


class Block(nn.Module):
    """A transformer block, normalisation first: 4 heads of 16, a feed-forward layer of 128."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c)
        x = x + self.project(y)
        return x + self.feed(self.norm2(x))


def test_a_transformer_of_two_blocks(epilogues, counts):
    """The table of the README: launches of each phase of a training step."""
    model = nn.Sequential(Block(), Block(), nn.Linear(64, 10)).to("cuda")
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    x = gpuad.randn(8, 16, 64, device="cuda")
    labels = gpuad.randint(10, (8 * 16,), device="cuda")

    def forward():
        optimizer.zero_grad()
        return nn.functional.cross_entropy(model(x).reshape(-1, 10), labels)

    for _ in range(3):
        forward().backward()
        optimizer.step()
    first, backward, step = phases(forward, optimizer, counts)
    assert nothing_else(first) and nothing_else(backward) and nothing_else(step)
    found = launches(first), launches(backward), launches(step)
    assert found == TRANSFORMER, (found, first.stats, backward.stats)


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
    assert launches(r) <= PLAIN_FORWARD + PLAIN_BACKWARD + STEP, (r.stats["kernels"], r.stats["library"])
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
    assert launches(r) <= PLAIN_FORWARD + PLAIN_BACKWARD + STEP and nothing_else(r)
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
