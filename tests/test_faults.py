"""Faults: whichever allocation of a training step fails, the step can be run again and gives what it would have given.

On CUDA devices: CuPy's allocator is replaced by one that fails at the k-th call.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
from test_ops import EVERYTHING, Case, ident

import gpuad
from gpuad import nn, optim
from gpuad.array import memory
from gpuad.autograd import backward
from gpuad.autograd.zero_grad import zero_grad
from gpuad.cuda import OutOfMemoryError

pytestmark = pytest.mark.cuda


class Allocator:
    """CuPy's pool, whose allocations fail from the `failing`-th on: `times` of them, 0 being the next."""

    def __init__(self, cupy) -> None:
        self._allocate = cupy.get_default_memory_pool().malloc
        self._error = cupy.cuda.memory.OutOfMemoryError
        self.calls, self.failing, self.times = 0, None, 1 << 60

    def __call__(self, size: int):
        self.calls += 1
        if self.failing is not None and self.failing < self.calls <= self.failing + self.times:
            raise self._error(size, 0, 0)
        return self._allocate(size)

    def fail_after(self, calls: int, times: int = 1 << 60) -> None:
        self.calls, self.failing, self.times = 0, calls, times

    def heal(self) -> None:
        self.failing = None


@pytest.fixture
def whole_allocator(cuda_device):
    """CuPy's allocator, to fail on demand."""
    import cupy

    before = cupy.cuda.get_allocator()
    made = Allocator(cupy)
    cupy.cuda.set_allocator(made)
    yield made
    cupy.cuda.set_allocator(before)


@pytest.fixture
def allocator(whole_allocator, monkeypatch):
    """The same, without the search among all objects for what is alive, which in a suite takes long."""
    monkeypatch.setattr(memory, "holders", tuple)
    monkeypatch.setattr(memory, "let_go", tuple)
    return whole_allocator


def host(tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()


def snapshot(model, optimizer) -> list[np.ndarray]:
    """All numbers of a model and of its optimiser's state."""
    found = [host(p) for p in model.parameters()]
    for p in model.parameters():
        own = optimizer.state.get(p, {})
        found += [np.frombuffer(" ".join(own).encode(), np.uint8)]
        found += [host(own[name]) for name in own]
    return found


def assert_equal(found, expected, what) -> None:
    assert len(found) == len(expected), what
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(what))  # bit for bit: NaN equals NaN only


class Training:
    """A small network with everything that keeps something: biases, dropout, batch and layer norm, two dtypes."""

    def __init__(self, make, layers=None, dtype=gpuad.float32) -> None:
        gpuad.manual_seed(3)
        layers = layers or [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)]
        self.model = nn.Sequential(*layers).to("cuda", dtype)
        self.x = gpuad.randn(4, 6, device="cuda", dtype=dtype)
        self.labels = gpuad.randint(3, (4,), device="cuda")
        self.optimizer = make(self.model.parameters())
        self.failures = 0

    def backward(self) -> None:
        nn.functional.cross_entropy(self.model(self.x), self.labels).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def state(self):
        return snapshot(self.model, self.optimizer)

    def through_faults(self, allocator, action, unchanged) -> None:
        """Do `action` once, after it has failed at each of its allocations; `unchanged` looks after each failure."""
        for k in range(1000):
            allocator.fail_after(k)
            try:
                action()
            except OutOfMemoryError:
                allocator.heal()
                self.failures += 1
                unchanged(k)
                continue
            finally:
                allocator.heal()
            return
        raise AssertionError("It still fails after a thousand allocations.")


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adamw_amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_failed_at_any_allocation_can_be_repeated(name, allocator):
    make = OPTIMIZERS[name]
    undisturbed, training = Training(make), Training(make)
    for number in range(3):
        undisturbed.step()
        before = training.state()
        training.through_faults(
            allocator,
            training.step,
            lambda k, before=before, at=number: assert_equal(training.state(), before, (at, k)),
        )
        assert_equal(training.state(), undisturbed.state(), (name, number))
    assert training.failures > 20


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_backward_and_step_can_each_be_repeated_without_zero_grad(name, allocator):
    """In a loop that calls zero_grad last, a .grad that is there is taken for whole: a failed backward leaves none."""
    make = OPTIMIZERS[name]
    undisturbed, training = Training(make), Training(make)
    parameters = list(training.model.parameters())

    def no_gradient(k):
        assert all(p.grad is None for p in parameters), k

    for number in range(3):
        undisturbed.step()
        training.through_faults(allocator, training.backward, no_gradient)
        gradients = [host(p.grad) for p in parameters]
        before = training.state()

        def same(k, before=before, gradients=gradients):
            assert_equal(training.state(), before, k)
            assert_equal([host(p.grad) for p in parameters], gradients, k)

        training.through_faults(allocator, training.optimizer.step, same)
        assert_equal(training.state(), undisturbed.state(), (name, number))
        training.optimizer.zero_grad()
    assert training.failures > 20


def test_gradients_that_accumulate_keep_what_they_had(allocator):
    """A second backward adds to all gradients or to none."""
    undisturbed, training = Training(OPTIMIZERS["sgd"]), Training(OPTIMIZERS["sgd"])
    parameters = list(training.model.parameters())
    training.model[0].weight.grad = gpuad.ones_like(training.model[0].weight)  # some have a gradient, others have none
    undisturbed.model[0].weight.grad = gpuad.ones_like(training.model[0].weight)
    for _ in range(3):
        undisturbed.backward()
        before = [None if p.grad is None else host(p.grad) for p in parameters]

        def same(k, before=before):
            for p, was in zip(parameters, before, strict=True):
                assert (p.grad is None) == (was is None), k
                if was is not None:
                    np.testing.assert_array_equal(host(p.grad), was)

        training.through_faults(allocator, training.backward, same)
        assert_equal([host(p.grad) for p in parameters], [host(p.grad) for p in undisturbed.model.parameters()], "")


def test_the_gradient_of_a_shared_leaf(whole_allocator):
    """Contributions of several uses, one written into the buffer and others added: whole, or none.

    Buffers that wait are let go on the way.
    """
    allocator = whole_allocator
    w = gpuad.ones(3, 3, device="cuda", requires_grad=True)
    b = gpuad.ones(3, device="cuda", requires_grad=True)
    x = gpuad.ones(2, 3, device="cuda")

    def backward():
        y = nn.functional.linear(nn.functional.linear(x, w, b), w, b)
        (y + b).sum().backward()

    backward()
    expected = host(w.grad), host(b.grad)
    training = Training(OPTIMIZERS["sgd"])
    for _ in range(2):
        zero_grad([w, b])
        training.through_faults(allocator, backward, lambda k: (w.grad, b.grad) == (None, None) or pytest.fail(str(k)))
        assert_equal([host(w.grad), host(b.grad)], expected, "")


def test_one_launch_fails_among_several(allocator):
    """Parameters of two dtypes and of two updates: no launch runs before all of them are sure to."""

    def make():
        gpuad.manual_seed(3)
        sizes = [(2,), (3, 2)]
        wide = [gpuad.randn(s, device="cuda", dtype=gpuad.float64).requires_grad_() for s in sizes]
        many = [gpuad.randn(2, device="cuda").requires_grad_() for _ in range(80)]  # their table lies on the device
        parameters = wide + many
        for p in parameters:
            p.grad = p.detach() * 0.5
        return parameters, optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.3)

    parameters, optimizer = make()
    others, undisturbed = make()
    for number in range(2):
        undisturbed.step()
        before = [host(p) for p in parameters]
        training = Training(OPTIMIZERS["sgd"])
        training.through_faults(
            allocator,
            optimizer.step,
            lambda k, before=before, at=number: (
                assert_equal([host(p) for p in parameters], before, k),
                at or not optimizer.state or pytest.fail(f"state is left behind at {k}"),
            ),
        )
        assert training.failures > (80 if number == 0 else 0)
        assert_equal([host(p) for p in parameters], [host(p) for p in others], number)
        for p in (*parameters[-4:], *others[-4:]):
            p.grad = None  # another table at the next step


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
def test_running_statistics_move_together_or_not_at_all(momentum, allocator):
    layer = nn.BatchNorm1d(6, momentum=momentum).to("cuda")
    twin = nn.BatchNorm1d(6, momentum=momentum).to("cuda")
    x = gpuad.randn(4, 6, device="cuda")
    training = Training(OPTIMIZERS["sgd"])
    for _ in range(2):
        twin(x)
        before = [host(b) for b in layer.buffers()]
        training.through_faults(
            allocator, lambda: layer(x), lambda k, was=before: assert_equal([host(b) for b in layer.buffers()], was, k)
        )
        assert_equal([host(b) for b in layer.buffers()], [host(b) for b in twin.buffers()], "")
    assert training.failures > 4


def test_in_place_operations_change_all_or_nothing(allocator):
    training = Training(OPTIMIZERS["sgd"])
    index = gpuad.tensor([2, 0], device="cuda")
    mask = gpuad.tensor([True, False, True, False], device="cuda")
    wide = gpuad.ones(4, 3, device="cuda", dtype=gpuad.float64)
    value = gpuad.full((2, 3), 7.0, device="cuda")
    actions = {
        "add": lambda x: x.add_(wide),
        "mul": lambda x: x.mul_(x.sum(0)),
        "copy": lambda x: x.copy_(wide),
        "index": lambda x: x.__setitem__(index, value),
        "mask": lambda x: x.__setitem__(mask, 0.0),
        "self": lambda x: x[1:].add_(x[:-1]),
        "clamp": lambda x: x.clamp_(min=0.5, max=1.5),
        "uniform": lambda x: x.t().uniform_(0, 1),
    }
    for name, action in actions.items():
        x = gpuad.arange(12.0, device="cuda").reshape(4, 3)
        expected = x.clone()
        gpuad.manual_seed(5)
        action(expected)
        gpuad.manual_seed(5)
        before = host(x)
        training.through_faults(
            allocator,
            lambda act=action, x=x: act(x),
            lambda k, x=x, was=before, name=name: assert_equal([host(x)], [was], (name, k)),
        )
        assert_equal([host(x)], [host(expected)], name)
    assert training.failures > 4


def test_a_failed_draw_leaves_the_generator_where_it_was(allocator):
    training = Training(OPTIMIZERS["sgd"])
    gpuad.manual_seed(1)
    expected = [host(gpuad.rand(5, device="cuda")), host(gpuad.randn(5, device="cuda"))]
    gpuad.manual_seed(1)
    draws = []
    for draw in (gpuad.rand, gpuad.randn):
        training.through_faults(
            allocator,
            lambda draw=draw: draws.append(draw(5, device="cuda")),
            lambda k: len(draws) <= 1 or pytest.fail(),
        )
    assert_equal([host(d) for d in draws], expected, "")
    assert training.failures == 2


def test_a_step_with_dropout_and_norms_repeats_from_the_same_state_of_the_generator(allocator):
    """What a failed forward has drawn is drawn; who wants the same masks again puts the generator back."""
    generator = gpuad.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.LayerNorm(5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3)]
    other = [nn.Linear(6, 5), nn.LayerNorm(5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3)]
    training = Training(OPTIMIZERS["adam"], layers)
    undisturbed = Training(OPTIMIZERS["adam"], other)
    undisturbed.model.load_state_dict(training.model.state_dict())
    undisturbed.x, undisturbed.labels = training.x, training.labels
    for number in range(2):
        at = generator.get_state()
        undisturbed.step()
        before = training.state()

        def step(at=at):
            generator.set_state(at)
            training.step()

        training.through_faults(allocator, step, lambda k, was=before: assert_equal(training.state(), was, k))
        assert_equal(training.state(), undisturbed.state(), number)


@pytest.mark.parametrize("k", range(0, 24, 3))
def test_an_allocation_that_fails_once_is_made_again_without_cache(k, allocator):
    """The step does not notice: memory that the cache held is enough."""
    undisturbed, training = Training(OPTIMIZERS["adam"]), Training(OPTIMIZERS["adam"])
    undisturbed.step()
    allocator.fail_after(k, times=1)
    training.step()
    allocator.heal()
    assert_equal(training.state(), undisturbed.state(), k)


def test_memory_returns_after_a_failure(allocator):
    training = Training(OPTIMIZERS["adam"])
    for _ in range(2):
        training.step()
    gc.collect()
    before = gpuad.cuda.memory_allocated()
    training.through_faults(allocator, training.step, lambda k: None)
    gc.collect()
    assert gpuad.cuda.memory_allocated() == before


@pytest.mark.parametrize("op", EVERYTHING, ids=ident)
def test_every_operation_fails_whole_and_recovers_whole(op, allocator):
    """Forward and backward of each op with each allocation failing, for good or once.

    For good, there is our error and the operands are as they were. Once, there is our error or the right result.
    """
    case = Case(op, op.samples[0], gpuad.device("cuda"), np.float32)
    leaves = case.leaves()
    ones = [gpuad.ones_like(y) for y in case(*leaves) if y.requires_grad]

    def run() -> list[np.ndarray] | None:
        """The outputs and gradients on the host; None where memory was short."""
        try:
            outs = [y for y in case(*leaves) if y.is_floating_point()]
            moving = [y for y in outs if y.requires_grad]
            if moving:
                backward(moving, ones)
        except OutOfMemoryError:
            assert all(x.grad is None for x in leaves)
            return None
        finally:
            allocator.heal()
        found = [host(t) for t in (*outs, *(x.grad for x in leaves if x.grad is not None))]
        for x in leaves:
            x.grad = None
        return found

    expected, operands = run(), [host(x) for x in leaves]
    for k in range(100):
        allocator.fail_after(k)
        lasting = run()
        allocator.fail_after(k, times=1)
        passing = run()
        assert_equal([host(x) for x in leaves], operands, (op.name, k))
        for found in (lasting, passing):
            assert found is None or assert_equal(found, expected, (op.name, k)) is None
        if lasting is not None:
            break
    assert lasting is not None and passing is not None


# What the error says --------------------------------------------------------------------------------------------------


def test_the_error_lists_what_is_alive(whole_allocator):
    allocator = whole_allocator
    x = gpuad.ones(64, 32, device="cuda")
    w = gpuad.ones(32, 1024, device="cuda", requires_grad=True)
    saved = (x @ w).exp()
    kept = gpuad.zeros(8, 8, device="cuda")
    allocator.fail_after(0)
    with pytest.raises(OutOfMemoryError) as caught:
        gpuad.zeros(1 << 20, device="cuda")
    allocator.heal()
    error = caught.value
    text = str(error)
    assert text.startswith("An allocation of 4,194,304 bytes (4.0 MiB) on cuda:0 failed, also after CuPy's cache was")
    free, total = gpuad.cuda.mem_get_info()
    assert f"cuda:0 has {total / 2**20:,.1f} MiB in all and" in text
    assert (error.device, error.requested, error.total) == ("cuda:0", 4194304, total) and error.free <= total
    assert "0.2 MiB  1 × float32 (64, 1024), saved by exp for its gradient" in text
    assert "0.1 MiB  1 × float32 (32, 1024), a leaf that requires grad" in text
    assert text.index("saved by exp") < text.index("a leaf")  # the largest first
    assert "gpuad.no_grad()" in text and "run again" in text
    rows = {what for _, _, what in memory.largest(0)}
    assert "float32 (8, 8), a tensor" in rows and "float32 (64, 32), saved by gemm for its gradient" in rows
    assert kept.shape == (8, 8) and saved.shape == (64, 1024)


def test_a_view_and_what_it_looks_into_are_one_buffer(cuda_device):
    before = dict((what, number) for _, number, what in memory.largest(0))
    x = gpuad.zeros(7, 11, 13, device="cuda")
    views = [x.reshape(77, 13), x[0], x.detach()]
    new = {what: number for _, number, what in memory.largest(0) if before.get(what) != number}
    assert sum(number - before.get(what, 0) for what, number in new.items()) == 1 and len(views) == 3


@pytest.mark.parametrize("where", ["creation", "elementwise", "product", "rows", "reshape", "cast", "cat", "draw",
                                   "from host", "backward", "recorded backward", "grad", "another device"])  # fmt: skip
def test_every_way_of_allocating_gives_the_same_error(where, allocator):
    """Also those inside CuPy, and CuPy's error is still there as the cause."""
    x = gpuad.ones(4, 5, device="cuda", requires_grad=True)
    square = gpuad.ones(4, 4, device="cuda")
    loss = (x.t().reshape(20) * 2).to(gpuad.float64).sum()
    if where == "another device" and gpuad.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    ways = {
        "creation": lambda: gpuad.full((3,), 1.5, device="cuda"), "elementwise": lambda: x * 2,
        "product": lambda: square @ square, "rows": lambda: x.softmax(1), "reshape": lambda: x.t().reshape(20),
        "cast": lambda: x.half(), "cat": lambda: gpuad.cat([x, x]), "draw": lambda: gpuad.randn(3, device="cuda"),
        "from host": lambda: gpuad.ones(3).to("cuda"), "backward": lambda: loss.backward(),
        "recorded backward": lambda: gpuad.autograd.grad(loss, x, create_graph=True),
        "grad": lambda: gpuad.autograd.grad(loss, x), "another device": lambda: square.to("cuda:1"),
    }  # fmt: skip
    allocator.fail_after(0)
    with pytest.raises(OutOfMemoryError) as caught:
        ways[where]()
    allocator.heal()
    assert type(caught.value.__cause__).__module__.startswith("cupy")
    assert isinstance(caught.value, (RuntimeError, gpuad.errors.GpuadError)) and isinstance(caught.value, MemoryError)
    assert gpuad.OutOfMemoryError is gpuad.errors.OutOfMemoryError is OutOfMemoryError


def test_the_real_end_of_memory(cuda_device):
    """No allocator of ours: CuPy's own pool, and CuPy's own without one."""
    import cupy

    total = gpuad.cuda.mem_get_info()[1]
    with pytest.raises(OutOfMemoryError, match="on cuda:0 failed") as caught:
        gpuad.empty(total, device="cuda")
    assert caught.value.requested == 4 * total
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(None)
    try:
        with pytest.raises(OutOfMemoryError, match="^An allocation on cuda:0 failed"):
            gpuad.empty(total, device="cuda")
    finally:
        cupy.cuda.set_allocator(before)
    assert gpuad.ones(3, device="cuda").sum().item() == 3.0


def test_the_limit_of_a_pool_is_named(cuda_device):
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(pool.total_bytes() + (1 << 20))
    try:
        with pytest.raises(OutOfMemoryError, match=r"its limit is \d"):
            gpuad.empty(1 << 20, device="cuda")
        assert gpuad.ones(1000, device="cuda").sum().item() == 1000.0
    finally:
        pool.set_limit(0)


def test_other_errors_pass_as_they_are(cuda_device):
    class Broken(gpuad.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            raise MemoryError("of the host")

    y = Broken.apply(gpuad.ones(2, device="cuda", requires_grad=True)).sum()
    with pytest.raises(MemoryError, match="^of the host$") as caught:
        y.backward()
    assert not isinstance(caught.value, OutOfMemoryError)
