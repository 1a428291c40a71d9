"""The CUDA side of the array layer: devices, copies, streams, waits, indices, and NumPy's values."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from importlib.util import find_spec

import numpy as np
import pytest

import gpuad
from gpuad.array import cublaslt, indices
from gpuad.array.device import Device
from gpuad.autograd.gradients import grad
from gpuad.autograd.op import table
from gpuad.errors import DeviceError, SynchronizationError
from gpuad.kernels.formula import trace
from gpuad.ops.samples import HERE, Array, S

cuda = pytest.mark.cuda
FLOATS = ("float16", "float32", "float64")


@pytest.fixture
def backend(cuda_device):
    return cuda_device.backend


@pytest.fixture
def two_devices(cuda_device):
    """cuda:1, while cuda:0 is the current device."""
    if gpuad.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return gpuad.device("cuda:1")


@pytest.fixture(autouse=True)
def _sync_mode_back():
    yield
    gpuad.cuda.set_sync_debug_mode("default")


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Devices that are not there -------------------------------------------------------------------------------------------


def test_without_cupy_the_error_names_the_pip_command():
    printed = run("""
        import sys
        from importlib.abc import MetaPathFinder

        class Blocker(MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                return None

        for module in [m for m in sys.modules if m.partition(".")[0] in ("cupy", "cupy_backends")]:
            del sys.modules[module]
        import importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "cupy" else found(name, *a)
        import gpuad
        print(gpuad.cuda.is_available(), gpuad.cuda.device_count())
        for spec in ("cuda", "cuda:0", 1):
            try:
                gpuad.device(spec)
            except gpuad.errors.DeviceError as error:
                print(error)
        assert "cupy" not in sys.modules
        print(gpuad.ones(2).sum().item())
    """)
    assert printed.startswith("False 0\n") and printed.endswith("2.0\n")
    assert printed.count('pip install "gpuad[cuda13]"') == 3


@pytest.mark.skipif(
    find_spec("cudasim") is None, reason="a machine without devices is simulated: tests/cudasim/run pytest"
)
def test_without_a_device_the_error_says_so():
    printed = run(
        """
        import gpuad
        print(gpuad.cuda.is_available(), gpuad.cuda.device_count())
        try:
            gpuad.zeros(2, device="cuda")
        except gpuad.errors.DeviceError as error:
            print(error)
        print(gpuad.zeros(2).sum().item())
        """,
        CUDASIM_DEVICES="0",
    )
    assert printed.startswith("False 0\nThere is no CUDA device") and printed.endswith("0.0\n")
    assert "'cpu'" in printed


@cuda
def test_a_wrong_index_is_an_error_that_says_how_many_there_are():
    count = gpuad.cuda.device_count()
    with pytest.raises(DeviceError, match=rf"'cuda:{count}' is not there: this machine has {count} CUDA device"):
        gpuad.device(f"cuda:{count}")
    with pytest.raises(DeviceError, match="is not there"):
        gpuad.zeros(2, device=f"cuda:{count + 5}")


@cuda
def test_cuda_means_the_current_device(two_devices):
    assert gpuad.device("cuda") is gpuad.device("cuda:0")
    with gpuad.cuda.device(1):
        assert gpuad.cuda.current_device() == 1
        assert gpuad.device("cuda") is two_devices
        assert str(gpuad.zeros(1).device) == "cpu"
    with gpuad.device("cuda:1"):
        assert gpuad.cuda.current_device() == 1
        assert gpuad.zeros(1).device is two_devices
        with gpuad.device("cpu"), gpuad.cuda.device("cuda:0"):
            assert gpuad.cuda.current_device() == 0
    assert gpuad.cuda.current_device() == 0
    gpuad.cuda.set_device("cuda:1")
    try:
        assert gpuad.device("cuda") is two_devices
    finally:
        gpuad.cuda.set_device(0)
    with pytest.raises(DeviceError, match="A CUDA device is needed"):
        gpuad.cuda.set_device("cpu")


# The same values as on the host ---------------------------------------------------------------------------------------


def both(backend, values):
    """An array on the host and on the device."""
    return values, backend.asarray(values)


def random_array(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).uniform(-2, 2, shape).astype(dtype)


SUMS = [((3, 4), (0,)), ((3, 4), (1,)), ((3, 4), (0, 1)), ((2, 3, 4), (0, 2)), ((), ()), ((0, 3), (0,)),
        ((3, 0), (0, 1)), ((3, 4), ()), ((128, 10), (0,))]  # fmt: skip


@cuda
@pytest.mark.parametrize("dtype", [*FLOATS, "int64"])
@pytest.mark.parametrize("shape, axes", SUMS)
def test_sum(backend, shape, axes, dtype):
    host, here = both(backend, (random_array(shape) * 8).astype(dtype))
    for keepdims in (False, True):
        expected = gpuad.device("cpu").backend.sum(host, axes, keepdims)
        found = backend.sum(here, axes, keepdims)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_allclose(found.get(), expected, rtol=2e-3 if dtype == "float16" else 1e-5)
        out = backend.empty(expected.shape, expected.dtype)
        assert backend.sum(here, axes, keepdims, out) is out
        np.testing.assert_array_equal(out.get(), found.get())


@cuda
def test_sums_keep_their_precision(backend):
    large = backend.asarray(np.full(4096, 16.0, np.float16))
    assert backend.sum(large, (0,), scale=1 / 64).item() == 1024.0  # the sum itself does not fit float16
    whole = backend.asarray(np.array([2**60 + 1, 2]))
    assert backend.sum(whole, (0,)).item() == 2**60 + 3  # nor do these bits fit a double


@cuda
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_and_gemm(backend, dtype):
    x, weight, bias = random_array((5, 4), dtype), random_array((3, 4), dtype, 1), random_array(3, dtype, 2)
    host = gpuad.device("cpu").backend
    here = [backend.asarray(a) for a in (x, weight, bias)]
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == "float16" else {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(backend.linear(*here).get(), host.linear(x, weight, bias), **close)
    np.testing.assert_allclose(backend.linear(*here[:2], None).get(), host.linear(x, weight, None), **close)
    for layout in (lambda a: a, lambda a: a.T, lambda a: a[:, ::2]):
        shape = layout(np.empty((5, 3))).shape
        a, b = random_array((shape[0], 4), dtype, 3), random_array((4, shape[1]), dtype, 4)
        for beta in (0.0, 1.0, 0.5):
            start = random_array((5, 3), dtype, 5)
            out, device_out = layout(start.copy()), layout(backend.asarray(start))
            expected = host.gemm(a, b, np.ascontiguousarray(out), 2.0, beta)
            assert backend.gemm(backend.asarray(a), backend.asarray(b), device_out, 2.0, beta) is device_out
            np.testing.assert_allclose(device_out.get(), expected, **close)


@cuda
def test_products_of_integers(device, backend):
    a, b = np.arange(6).reshape(2, 3), np.arange(12).reshape(3, 4)
    found = gpuad.tensor(a, device="cuda") @ gpuad.tensor(b, device="cuda")
    np.testing.assert_array_equal(found.cpu().numpy(), a @ b)
    np.testing.assert_array_equal(backend.linear(backend.asarray(a), backend.asarray(b.T), None).get(), a @ b)


@cuda
@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, True, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "bool"])
def test_full(backend, value, dtype):
    if dtype in ("int64", "bool") and value != value or (dtype == "int64" and value == float("inf")):
        pytest.skip("no such integer")
    found = backend.full((2, 3), value, np.dtype(dtype)).get()
    expected = np.full((2, 3), value, dtype)
    np.testing.assert_array_equal(found, expected)


@cuda
def test_outputs_may_be_given_in_another_dtype(backend):
    formula = trace(lambda x, y: x * y, "product")
    x = backend.asarray(random_array((3, 4)))
    out = backend.empty((3, 4), np.dtype(np.float16))
    assert backend.elementwise(formula, (x, 2.0), x.dtype, [out]) is out
    np.testing.assert_allclose(out.get(), 2 * x.get(), rtol=1e-3)
    found = gpuad.ones(3, device="cuda", dtype="float16")
    found += gpuad.full((3,), 0.5, device="cuda", dtype="float32")
    assert found.dtype == gpuad.float16 and found.tolist() == [1.5] * 3


@cuda
def test_launches_of_the_backend(backend, counts):
    x, weight, bias = (backend.asarray(random_array(s)) for s in ((8, 4), (3, 4), (3,)))
    matrix = backend.empty((8, 3), np.dtype(np.float32))
    calls = [
        (lambda: backend.full((3,), 0, np.dtype(np.float32)), (0, 0, 1)),
        (lambda: backend.full((3,), 7, np.dtype(np.float32)), (1, 0, 0)),
        (lambda: backend.ones_scalar(np.dtype(np.float32)), (0, 0, 0)),
        (lambda: backend.sum(x, (0,)), (1, 0, 0)),
        (lambda: backend.sum(x, (0, 1), scale=0.5), (1, 0, 0)),
        (lambda: backend.linear(x, weight, bias), (0 if cublaslt.available() else 1, 1, 0)),
        (lambda: backend.gemm(x, weight.T, matrix, 1.0, 1.0), (0, 1, 0)),
        (lambda: backend.add(x, x), (1, 0, 0)),
        (lambda: backend.add_into(x, x), (1, 0, 0)),
        (lambda: backend.check_index(backend.xp.arange(3), 3, "index"), (2, 0, 0)),
        (lambda: backend.empty((3,), np.dtype(np.float32)), (0, 0, 0)),
    ]
    for call, _ in calls:
        call()
    for call, expected in calls:
        with counts() as r:
            call()
        assert (r.kernel_launches, r.library_calls, r.stats["memsets"]) == expected
        assert not r.syncs and not r.stats["copies"] and not r.stats["mallocs"]


# Operations run where their operands are ------------------------------------------------------------------------------


def build(entry, device):
    """An operand of a sample; see gpuad/ops/samples.py."""
    if isinstance(entry, S):
        low, high = entry.low, entry.high
        values = np.random.default_rng(0).uniform(low, high, entry.shape)
        if entry.kind == "float":
            return gpuad.tensor(values.astype(np.float32), device=device, requires_grad=True)
        return gpuad.tensor(values > 0 if entry.kind == "bool" else values.astype(np.int64), device=device)
    return entry


def parameter(entry, device):
    if isinstance(entry, Array):
        return device.backend.asarray(np.asarray(entry.values))
    if entry is HERE:
        return device
    return tuple(parameter(e, device) for e in entry) if type(entry) is tuple else entry


@cuda
@pytest.mark.parametrize("op", [op for op in table.values() if op.samples and op.name != "move"], ids=str)
def test_an_op_runs_on_its_operands_device(op, two_devices):
    for sample in op.samples:
        named = sample[-1] if isinstance(sample[-1], dict) else {}
        inputs = [build(entry, two_devices) for entry in sample if not isinstance(entry, dict)]
        found = op(*inputs, **{k: parameter(v, two_devices) for k, v in named.items()})
        for out in found if isinstance(found, tuple) else (found,):
            assert out.device is two_devices and out._data.data.device_id == 1
            wanted = [x for x in inputs if isinstance(x, gpuad.Tensor) and x.requires_grad]
            if out.requires_grad:
                for g in grad(out.sum(), wanted, allow_unused=True, retain_graph=True, create_graph=True):
                    assert g is None or g._data.data.device_id == 1
                for g in grad(out.sum(), wanted, allow_unused=True, retain_graph=True):
                    assert g is None or g._data.data.device_id == 1
    assert gpuad.cuda.current_device() == 0


@cuda
def test_what_is_made_on_a_device_lies_there(two_devices):
    d = two_devices
    index = gpuad.tensor([2, 0], device=d)
    x = gpuad.randn(3, 4, device=d)
    made = [
        gpuad.zeros(2, device=d), gpuad.ones(2, device=d), gpuad.full((2,), 3.0, device=d), gpuad.eye(3, device=d),
        gpuad.arange(1, 9, 2, device=d), gpuad.arange(0.0, 1.0, 0.25, device=d), gpuad.linspace(0, 1, 5, device=d),
        gpuad.logspace(0, 1, 5, device=d), gpuad.rand(2, device=d), gpuad.randn(2, device=d),
        gpuad.randperm(5, device=d), gpuad.randint(5, (3,), device=d), gpuad.empty(2, device=d),
        gpuad.tensor([1, 2], device=d), gpuad.tensor(x, dtype="float64"), gpuad.zeros_like(x), x.new_full((2,), 1.0),
        x.double(), x.half(), x.clone(), x[index], x[x > 0], x[1], x.argsort(), x.argmax(1), x.max(1).values,
        x.sort(1).indices, x.nonzero(), x.cumsum(0), x.T.reshape(-1), x.any(), x.all(0),
        x.gather(1, index.reshape(2, 1)), x.var(0), x.norm(), x.prod(1), gpuad.cat([x, x]), gpuad.stack([x, x]),
        gpuad.where(x > 0, x, 0.0), x.flip(0),
    ]  # fmt: skip
    for tensor in made:
        assert tensor.device is d and tensor._data.data.device_id == 1
    x[0] = 1.0
    x[index] = x[0]
    x[:, 1:] = gpuad.zeros(3, device=d)
    x += 1
    x.uniform_().normal_()
    assert gpuad.cuda.current_device() == 0


@cuda
def test_threads_have_their_own_current_device(two_devices):
    seen = []

    def work():
        with gpuad.device("cuda:1"):
            seen.append((gpuad.cuda.current_device(), str(gpuad.ones(2).sum().device)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(1, "cuda:1")] and gpuad.cuda.current_device() == 0


# Copies ---------------------------------------------------------------------------------------------------------------


@cuda
@pytest.mark.parametrize("dtype", [*FLOATS, "int64", "int8", "bool"])
def test_round_trips(two_devices, dtype):
    for values in (random_array((3, 4), dtype), random_array((4, 3), dtype).T, random_array((6, 4), dtype)[::2],
                   np.ones((), dtype), np.ones((0, 3), dtype), np.broadcast_to(np.ones(4, dtype), (3, 4))):  # fmt: skip
        start = gpuad.from_numpy(values)
        first = start.to("cuda:0")
        second = first.to("cuda:1")
        third = second.T.to("cuda:0") if values.ndim == 2 else second.to("cuda:0")
        back = (third.T if values.ndim == 2 else third).cpu()
        assert (first.device.index, second.device.index, third.device.index) == (0, 1, 0)
        assert back.dtype == start.dtype
        np.testing.assert_array_equal(back.numpy(), values)


@cuda
def test_copies_are_the_ones_asked_for(two_devices, counts):
    x = gpuad.from_numpy(random_array((64, 4)))
    x.to("cuda:0").to("cuda:1").cpu()
    with counts() as r:
        first = x.to("cuda:0")
    assert r.copies("h2d") == (1, 1024) and r.syncs == 0
    with counts() as r:
        second = first.to("cuda:1")
    assert r.copies("p2p") == (1, 1024) and len(r.stats["copies"]) == 1 and r.syncs == 0 and not r.kernel_launches
    with counts() as r:
        assert first.to("cuda:0") is first and second.cuda(1) is second
    assert not r.stats["copies"]
    with counts() as r:
        second.cpu()
    assert r.copies("d2h") == (1, 1024) and r.syncs == 1


@cuda
def test_gradients_go_back_where_they_came_from(two_devices):
    x = gpuad.tensor([1.0, 2.0], requires_grad=True)
    y = (x.to("cuda:0") * 3).to("cuda:1").square().to("cpu").sum()
    y.backward()
    assert str(x.grad.device) == "cpu" and x.grad.tolist() == [18.0, 36.0]


@cuda
def test_host_arrays_may_be_changed_after_the_copy(backend):
    values = random_array((256, 256))
    kept = values.copy()
    copied = gpuad.from_numpy(values).to("cuda")
    values[:] = 0
    np.testing.assert_array_equal(copied.cpu().numpy(), kept)


@pytest.mark.skipif(find_spec("cudasim") is None, reason="delayed streams are simulated: tests/cudasim/run pytest")
@cuda
def test_copies_between_devices_wait_for_both_streams(two_devices):
    """With CUDASIM_ASYNC a stream runs nothing until it must, so a missing wait copies what was there before."""
    printed = run(
        """
        import numpy as np
        import cupy
        import gpuad

        a = gpuad.ones(1000, device="cuda:0")
        with gpuad.device("cuda:0"):
            one = gpuad.cuda.Stream()
        with gpuad.device("cuda:1"):
            two = gpuad.cuda.Stream()
        gpuad.cuda.synchronize(0)
        with gpuad.cuda.stream(two), gpuad.cuda.stream(one):
            b = a * 2                     # on stream one of cuda:0
            c = b.to("cuda:1")            # on stream two of cuda:1, after it
            b += 5                        # on stream one again: after the copy
            d = c + 1
            print(d.cpu()[0].item(), b.cpu()[0].item())
            del b, c, d
        e = gpuad.from_numpy(np.arange(5.0)).to("cuda:1").to("cuda:0")
        print(e.tolist())
        """,
        CUDASIM_ASYNC="1",
    )
    assert printed.split("\n")[:2] == ["3.0 7.0", "[0.0, 1.0, 2.0, 3.0, 4.0]"]


@cuda
def test_arrays_of_another_device_are_not_taken_silently(two_devices):
    array = two_devices.backend.full((3,), 1, np.dtype(np.float32))
    with pytest.raises(DeviceError, match="cuda:1"):
        gpuad.device("cuda:0").backend.asarray(array)
    with pytest.raises(DeviceError, match="different devices"):
        gpuad.ones(3, device="cuda:0") + gpuad.ones(3, device="cuda:1")


# Waits ----------------------------------------------------------------------------------------------------------------


@cuda
def test_waits_are_counted_and_can_be_forbidden(backend):
    x = gpuad.tensor([1.0, 0.0, 2.0], device="cuda")
    scalar = x.sum()
    waiting = [scalar.item, x.tolist, x.cpu, lambda: bool(scalar), lambda: repr(x), lambda: x.numpy(force=True),
               x.nonzero, lambda: x[x > 0], lambda: float(scalar)]  # fmt: skip
    for wait in waiting:
        before = gpuad.cuda.synchronization_count()
        wait()
        assert gpuad.cuda.synchronization_count() == before + 1
    gpuad.cuda.set_sync_debug_mode("error")
    assert gpuad.cuda.get_sync_debug_mode() == 2
    for wait in waiting:
        with pytest.raises(SynchronizationError, match=r"waits for cuda:0"):
            wait()
    (x * 2).sum().to("cuda:0")
    gpuad.cuda.synchronize()
    gpuad.cuda.set_sync_debug_mode(1)
    with pytest.warns(UserWarning, match="waits for cuda:0") as caught:
        scalar.item()
    assert caught[0].filename == __file__
    gpuad.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match="'default', 'warn' and 'error'"):
        gpuad.cuda.set_sync_debug_mode("loud")


# Indices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_bounds_of_indices(device, dtype):
    backend = device.backend

    def check(values, length, **named):
        backend.check_index(backend.asarray(np.array(values, dtype)), length, "row", **named)
        backend.synchronize()

    check([], 0)
    check([], 3)
    check([[0, 2], [1, 1]], 3)
    check(2, 3)
    check([0, 1], 3, wrap_negative=False)
    with pytest.raises(IndexError, match=r"row 3 at position 1 is out of range: -3 to 2 are valid"):
        check([2, 3], 3)
    with pytest.raises(IndexError, match=r"row 9 at position 0 is out of range: 0 to 2 are valid"):
        check([9], 3, wrap_negative=False)
    with pytest.raises(IndexError, match=r"row 0 at position 0 is out of range"):
        check([0], 0)
    if dtype != "uint8":
        check([-3, -1], 3)
        with pytest.raises(IndexError, match="row -4 at position 0 is out of range: -3 to 2 are valid"):
            check([-4, 0], 3)
        with pytest.raises(IndexError, match="row -1 at position 2 is out of range: 0 to 2 are valid"):
            check([2, 0, -1], 3, wrap_negative=False)
    check([0], 1)  # an error is raised once


def test_the_position_is_that_in_the_flattened_index(device):
    """On CUDA the kernel that notices knows no more, and the text is the same on every device."""
    index = device.backend.asarray(np.array([[0, 1], [7, 4]]))
    with pytest.raises(IndexError, match="label 7 at position 2 is out of range"):
        device.backend.check_index(index, 5, "label", False)
        device.backend.synchronize()


@cuda
def test_bad_indices_are_found_without_a_wait(counts, cuda_device):
    weight = gpuad.randn(5, 2, device="cuda", requires_grad=True)
    index = gpuad.tensor([1, 7, 0], device="cuda")
    weight[index].sum().backward()
    with pytest.raises(IndexError, match="index 7 at position 1 is out of range: -5 to 4 are valid"):
        gpuad.cuda.synchronize()
    with counts() as r:
        weight[index]
    assert r.syncs == 0 and not r.stats["copies"]
    for found in (gpuad.cuda.current_stream().synchronize, gpuad.ones((), device="cuda").item):
        weight[index]
        with pytest.raises(IndexError, match="An operation on cuda:0 found it"):
            found()
        found()


KEYS = {
    "rows": (np.array([0, 3, 3, -1]),),
    "rows in a matrix": (np.array([[0, 3], [3, 5]]),),
    "one row": (np.array(2),),
    "no rows": (np.array([], int),),
    "columns": (slice(None), np.array([1, 1, 2])),
    "places": (np.array([0, 0, 5]), np.array([1, 1, -3])),
    "grid": (np.array([[0], [4]]), np.array([1, 1])),
    "mask": (np.random.default_rng(0).random((6, 3)) < 0.5,),
    "rows by mask": (np.array([True, False, True, True, False, False]),),
    "slice and array": (slice(1, 5, 2), np.array([0, 0])),
    "new axis": (None, np.array([1, 1])),
    "ellipsis": (..., np.array([2, 2, 2])),
}


@pytest.mark.parametrize("dtype", [*FLOATS, "int64", "int32", "uint8"])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
def test_add_at(device, key, dtype):
    backend = device.backend
    start = (random_array((6, 3)) * 4).round().astype(dtype)
    picked = np.empty((6, 3))[key].shape
    values = (random_array(picked, seed=1) * 4).round().astype(dtype)
    expected = start.copy()
    np.add.at(expected, key, values)
    here = tuple(backend.asarray(k) if isinstance(k, np.ndarray) else k for k in key)
    for made in (backend.asarray(start.copy()), backend.asarray(np.asfortranarray(start))):
        backend.add_at(made, here, backend.asarray(values))
        np.testing.assert_array_equal(backend.to_host(made), expected)
    spread = np.broadcast_to(np.ones((), dtype), picked)  # a gradient with strides 0
    made, expected = backend.asarray(start.copy()), start.copy()
    np.add.at(expected, key, spread)
    backend.add_at(made, here, backend.xp.broadcast_to(backend.asarray(np.ones((), dtype)), picked))
    np.testing.assert_array_equal(backend.to_host(made), expected)


def test_rows_are_added_without_scipys_kernel_too(monkeypatch):
    monkeypatch.setattr(indices, "_sparse_product", lambda: None)
    for key in KEYS.values():
        start = random_array((6, 3))
        values = random_array(np.empty((6, 3))[key].shape, seed=1)
        expected = start.copy()
        np.add.at(expected, key, values)
        indices.add_at(start, key, values)
        np.testing.assert_allclose(start, expected, rtol=1e-6)


def test_rows_outside_are_never_written():
    with pytest.raises(IndexError):
        indices.add_at(np.zeros((3, 2)), (np.array([0, 3]),), np.ones((2, 2)))
    with pytest.raises(IndexError):
        indices.add_at(np.zeros((3, 2)), (np.array([0, -4]),), np.ones((2, 2)))


# gpuad.cuda -----------------------------------------------------------------------------------------------------------


@cuda
def test_properties(cuda_device):
    properties = gpuad.cuda.get_device_properties("cuda:0")
    assert properties.total_memory == gpuad.cuda.mem_get_info(0)[1]
    assert gpuad.cuda.get_device_name() == properties.name
    assert gpuad.cuda.get_device_capability(0) == (properties.major, properties.minor)


@cuda
def test_memory_figures(cuda_device):
    gpuad.cuda.reset_peak_memory_stats()
    before = gpuad.cuda.memory_allocated()
    x = gpuad.zeros(1 << 20, device="cuda")
    assert gpuad.cuda.memory_allocated() - before == 4 << 20
    assert gpuad.cuda.memory_reserved() >= gpuad.cuda.memory_allocated()
    del x
    assert gpuad.cuda.memory_allocated() == before
    assert gpuad.cuda.max_memory_allocated() >= before + (4 << 20)
    gpuad.cuda.reset_peak_memory_stats()
    assert gpuad.cuda.max_memory_allocated() == before
    assert "allocated at most" in gpuad.cuda.memory_summary()
    gpuad.cuda.empty_cache()
    assert gpuad.cuda.memory_reserved() < before + (4 << 20)


@cuda
def test_streams_and_events(cuda_device, monkeypatch):
    import cupy

    default = gpuad.cuda.current_stream()
    assert default == gpuad.cuda.default_stream()
    side = gpuad.cuda.Stream()
    start, end = gpuad.cuda.Event(enable_timing=True), gpuad.cuda.Event(enable_timing=True)
    x = gpuad.ones(100, device="cuda")
    side.wait_stream(default)
    start.record(side)
    with gpuad.cuda.stream(side):
        assert gpuad.cuda.current_stream() == side
        assert cupy.cuda.get_current_stream().ptr == side.cuda_stream
        y = x * 2
        end.record()
    default.wait_stream(side)
    assert (y + 1).sum().item() == 300.0
    end.synchronize()
    assert end.query() and side.query() and start.elapsed_time(end) >= 0
    assert gpuad.cuda.current_stream() == default
    with cupy.cuda.Stream() as theirs:  # CuPy's own context is as good
        assert gpuad.cuda.current_stream().cuda_stream == theirs.ptr
    with gpuad.cuda.stream(theirs):
        assert gpuad.cuda.current_stream().cuda_stream == theirs.ptr
    with gpuad.cuda.stream(None):
        assert gpuad.cuda.current_stream() == default
    untimed = gpuad.cuda.Event()
    untimed.synchronize()  # not recorded: there is nothing to wait for
    untimed.wait()
    with pytest.raises(DeviceError, match="first event was not recorded"):
        untimed.elapsed_time(end)
    untimed.record()
    with pytest.raises(DeviceError, match=r"second event takes no time; make it by Event\(enable_timing=True\)"):
        start.elapsed_time(untimed)
    monkeypatch.setattr(end, "query", lambda: False)
    with pytest.raises(DeviceError, match="second event is not reached yet"):
        start.elapsed_time(end)


@cuda
def test_a_stream_makes_its_device_current(two_devices):
    side = gpuad.cuda.Stream("cuda:1")
    with gpuad.cuda.stream(side):
        assert gpuad.cuda.current_device() == 1
        assert gpuad.cuda.current_stream() == side
    assert gpuad.cuda.current_device() == 0
    gpuad.cuda.set_stream(side)
    try:
        assert gpuad.cuda.current_stream("cuda:1") == side and gpuad.cuda.current_device() == 1
    finally:
        gpuad.cuda.set_stream(gpuad.cuda.default_stream("cuda:1"))
        gpuad.cuda.set_device(0)


def test_seeding_serves_every_device():
    gpuad.cuda.manual_seed(7)
    first = gpuad.rand(3).tolist()
    gpuad.cuda.manual_seed_all(7)
    assert gpuad.rand(3).tolist() == first and gpuad.cuda.initial_seed() == 7


@cuda
def test_precision_of_products(cuda_device):
    assert gpuad.get_float32_matmul_precision() == "highest"
    try:
        gpuad.set_float32_matmul_precision("high")
        assert gpuad.get_float32_matmul_precision() == "high"
        (gpuad.ones(2, 2, device="cuda") @ gpuad.ones(2, 2, device="cuda")).tolist()
    finally:
        gpuad.set_float32_matmul_precision("highest")
    with pytest.raises(ValueError, match="'highest', 'high' or 'medium'"):
        gpuad.set_float32_matmul_precision("fast")


def test_the_device_of_an_array():
    from gpuad.array.device import of_array

    assert of_array(np.zeros(2)) is Device("cpu")
