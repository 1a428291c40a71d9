"""The CUDA GEMM against NumPy: layouts, batches, dtypes, beta, and that it is one library call also in a capture."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from gpuad.errors import DeviceError, DtypeError, ShapeError

cupy = pytest.importorskip("cupy")
pytest.importorskip("nvmath")
try:
    DEVICES = cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError:
    DEVICES = 0
if not DEVICES:
    pytest.skip("no CUDA device", allow_module_level=True)

from gpuad.array.cublas import gemm  # noqa: E402

pytestmark = pytest.mark.cuda
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-6, "float64": 1e-14}


def launched(recording):
    """(library calls, kernels, memsets, copies, synchronisations)."""
    stats = recording.stats
    copies = sum(c["count"] for c in stats["copies"].values())
    return recording.library_calls, recording.kernel_launches, stats["memsets"], copies, recording.syncs


def array(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed + 31 * len(shape)).standard_normal(shape).astype(dtype)


def close(result, expected):
    assert result.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(cupy.asnumpy(result), expected, rtol=0, atol=TOLERANCE[str(result.dtype)] * 8 * scale)


# Views whose values are those of x; the first four need no copy.
LAYOUTS = {
    "rows": lambda x: cupy.ascontiguousarray(x),
    "columns": lambda x: cupy.asfortranarray(x),
    "slice of wider rows": lambda x: cupy.pad(x, ((0, 0), (2, 3)))[:, 2:-3],
    "slice of longer columns": lambda x: cupy.pad(x.T, ((0, 0), (1, 2)))[:, 1:-2].T,
    "every second column": lambda x: cupy.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: cupy.ascontiguousarray(x[::-1])[::-1],
}
READABLE = list(LAYOUTS)[:4]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 3, 4), (1, 3, 4), (5, 1, 4), (5, 3, 1), (1, 1, 1)], ids=str)
def test_layouts(cudasim, dtype, shape):
    m, k, n = shape
    a, b = array(m, k, dtype=dtype), array(k, n, dtype=dtype, seed=1)
    expected = a.astype("float64") @ b.astype("float64")
    device_a, device_b = cupy.asarray(a), cupy.asarray(b)
    gemm(device_a, device_b)
    for one, other in itertools.product(LAYOUTS, LAYOUTS):
        left, right = LAYOUTS[one](device_a), LAYOUTS[other](device_b)
        with cudasim.record() as recording:
            result = gemm(left, right)
        close(result, expected)
        if one in READABLE and other in READABLE:
            assert launched(recording) == (1, 0, 0, 0, 0), (one, other)
        else:
            assert launched(recording) <= (1, 2, 0, 0, 0), (one, other)


def test_broadcast_operand():
    a = cupy.broadcast_to(cupy.asarray(array(1, 6)), (4, 6))
    scalar = cupy.broadcast_to(cupy.asarray(np.float32(1.5)), (6, 3))
    close(gemm(a, scalar), cupy.asnumpy(a) @ cupy.asnumpy(scalar))
    row = cupy.lib.stride_tricks.as_strided(a, (1, 6), (0, 4))  # the stride of a single row may be anything
    b = cupy.asarray(array(6, 3))
    close(gemm(row, b), cupy.asnumpy(row) @ cupy.asnumpy(b))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", READABLE)
def test_out_alpha_beta(cudasim, dtype, layout):
    a, b, c = array(5, 3, dtype=dtype), array(3, 4, dtype=dtype, seed=1), array(5, 4, dtype=dtype, seed=2)
    device_a, device_b = cupy.asarray(a), cupy.asarray(b)
    out = LAYOUTS[layout](cupy.asarray(c))
    with cudasim.record() as recording:
        assert gemm(device_a, device_b, out, alpha=0.5, beta=2.0) is out
    assert launched(recording) == (1, 0, 0, 0, 0)
    close(out, 0.5 * (a.astype("float64") @ b.astype("float64")) + 2.0 * c)
    out.fill(np.nan)
    close(gemm(device_a, device_b, out), a.astype("float64") @ b.astype("float64"))


BATCHES = [  # shapes of a and b, views of them, library calls, kernels
    ((7, 5, 3), (7, 3, 4), None, 1, 0),
    ((2, 7, 5, 3), (2, 7, 3, 4), None, 1, 0),
    ((2, 7, 5, 3), (3, 4), None, 1, 0),
    ((5, 3), (7, 3, 4), None, 1, 0),
    ((5, 3), (2, 7, 3, 4), None, 1, 0),
    ((7, 1, 3), (3, 4), None, 1, 0),
    ((1, 5, 3), (7, 3, 4), None, 1, 0),
    ((2, 1, 5, 3), (2, 7, 3, 4), None, 2, 0),
    ((2, 7, 5, 3), (2, 1, 3, 4), None, 1, 0),
    ((2, 1, 5, 3), (1, 7, 3, 4), None, 2, 0),
    ((1, 1, 5, 3), (1, 1, 3, 4), None, 1, 0),
    ((7, 3, 5), (7, 4, 3), lambda x: x.swapaxes(1, 2), 1, 0),
    ((7, 3, 5), (4, 3), lambda x: x.swapaxes(-1, -2), 1, 0),
    ((5, 7, 3), (3, 7, 4), lambda x: x.swapaxes(0, 1), 1, 0),
    ((2, 5, 7, 3), (2, 3, 7, 4), lambda x: x.swapaxes(1, 2), 1, 2),  # heads of attention: copied
    ((7, 5, 3), (7, 3, 4), lambda x: x[::-1], 1, 2),
    ((7, 5, 3), (7, 3, 4), lambda x: x[1::2], 1, 0),
    ((7, 5, 6), (7, 3, 8), lambda x: x[..., ::2], 1, 2),
]
BATCH_IDS = [f"{i}-{'x'.join(map(str, a))}-{'x'.join(map(str, b))}" for i, (a, b, *_) in enumerate(BATCHES)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("a_shape, b_shape, view, calls, kernels", BATCHES, ids=BATCH_IDS)
def test_batches(cudasim, dtype, a_shape, b_shape, view, calls, kernels):
    view = view or (lambda x: x)
    a, b = array(*a_shape, dtype=dtype), array(*b_shape, dtype=dtype, seed=1)
    left, right = view(cupy.asarray(a)), view(cupy.asarray(b))
    expected = np.matmul(view(a).astype("float64"), view(b).astype("float64"))
    gemm(left, right)
    with cudasim.record() as recording:
        result = gemm(left, right)
    assert launched(recording) == (calls, kernels, 0, 0, 0)
    close(result, expected)
    transposed = cupy.ones(expected.shape[:-2] + expected.shape[:-3:-1], dtype).swapaxes(-1, -2)
    close(gemm(left, right, transposed, beta=1.0), expected + 1)


def test_stride_zero_batch_is_not_copied(cudasim):
    a, b = cupy.asarray(array(5, 3)), cupy.asarray(array(7, 3, 4))
    broadcast = cupy.broadcast_to(a, (7, 5, 3))
    with cudasim.record() as recording:
        result = gemm(broadcast, b)
    assert launched(recording) == (1, 0, 0, 0, 0)
    close(result, np.matmul(cupy.asnumpy(a), cupy.asnumpy(b)))


def test_random_views():
    """Whatever the strides, the product is NumPy's."""
    random = np.random.default_rng(5)

    def view(shape, order):
        base = array(*(shape[i] + int(random.integers(0, 2)) for i in order), dtype="float64")
        cut, back = tuple(slice(0, shape[i]) for i in order), np.argsort(order).tolist()
        return base[cut].transpose(back), cupy.asarray(base)[cut].transpose(*back)

    for _ in range(100):
        batch = tuple(int(x) for x in random.integers(1, 4, random.integers(0, 4)))
        m, k, n = (int(x) for x in random.integers(1, 5, 3))
        operands = []
        for matrix in ((m, k), (k, n)):
            shape = tuple(1 if random.random() < 0.3 else x for x in batch) + matrix
            shape = shape[int(random.integers(0, len(batch) + 1)) :] if random.random() < 0.4 else shape
            operands.append(view(shape, random.permutation(len(shape))))
        (a, left), (b, right) = operands
        shape = np.matmul(a, b).shape
        last = len(shape) - 1 - int(random.integers(0, 2))  # the dimension of out with unit stride
        others = [i for i in range(len(shape)) if i != last]
        c, out = view(shape, np.array([*random.permutation(others).astype(int), last]))
        close(gemm(left, right), np.matmul(a, b))
        close(gemm(left, right, out, alpha=-1.0, beta=3.0), 3 * c - np.matmul(a, b))


def test_empty(cudasim):
    for shapes in [((0, 3), (3, 4)), ((5, 3), (3, 0)), ((0, 5, 3), (0, 3, 4)), ((0, 5, 3), (3, 4))]:
        a, b = (cupy.zeros(shape, "float32") for shape in shapes)
        with cudasim.record() as recording:
            result = gemm(a, b)
        assert launched(recording) == (0, 0, 0, 0, 0)
        assert result.shape == np.matmul(*(np.zeros(shape) for shape in shapes)).shape
    a, b = cupy.zeros((5, 0), "float32"), cupy.zeros((0, 4), "float32")
    out = cupy.full((5, 4), np.nan, "float32")
    assert gemm(a, b, out) is out and (out == 0).all()
    out.fill(3)
    assert (gemm(a, b, out, beta=1.0) == 3).all()
    assert (gemm(a, b, out, beta=0.5) == 1.5).all()
    assert (gemm(a, b) == 0).all()


def test_half_is_accumulated_in_float32():
    a = cupy.full((1, 4096), 1.0, "float16")
    assert float(gemm(a, a.T)[0, 0]) == 4096.0  # a float16 sum would stop at 2048
    batch = cupy.full((3, 1, 4096), 1.0, "float16")
    assert (gemm(batch, batch.swapaxes(1, 2)) == 4096).all()


def test_tf32_is_a_switch(monkeypatch):
    from gpuad.array import cublas

    a, seen = cupy.ones((3, 3), "float32"), []
    gemm(a, a)
    real = cublas.cublas.gemm_ex
    monkeypatch.setattr(cublas, "cublas", Spy(cublas.cublas, gemm_ex=lambda *x: (seen.append(x[-2]), real(*x))))
    gemm(a, a)
    gemm(a, a, tf32=True)
    gemm(a.astype("float64"), a.astype("float64"), tf32=True)
    enum = __import__("nvmath.bindings.cublas", fromlist=["ComputeType"]).ComputeType
    assert seen == [enum.COMPUTE_32F, enum.COMPUTE_32F_FAST_TF32, enum.COMPUTE_64F]


class Spy:
    """Another object with some attributes replaced."""

    def __init__(self, other, **replaced):
        self.other = other
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self.other, name)


@pytest.mark.skipif(DEVICES < 2, reason="one device")
def test_runs_on_the_arrays_device(cudasim):
    a, b = array(5, 3), array(3, 4)
    with cupy.cuda.Device(1):
        left, right = cupy.asarray(a), cupy.asarray(b)
    with cudasim.record(trace=True) as recording:
        result = gemm(left, right)
    assert launched(recording) == (1, 0, 0, 0, 0)
    assert [event[3] for event in recording.trace if event[0] == "library"] == [1]
    assert cupy.cuda.runtime.getDevice() == 0
    assert result.device.id == 1
    close(result, a @ b)
    with pytest.raises(DeviceError, match=r"a .*cuda:1\n.*b .*cuda:0"):
        gemm(left, cupy.asarray(b))


def test_follows_the_current_stream(cudasim):
    a = cupy.asarray(array(3, 3))
    gemm(a, a)
    for stream in (cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)):
        with stream, cudasim.record(trace=True) as recording:
            cupy.multiply(a, a)
            gemm(a, a)
            cupy.matmul(a, a)  # CuPy sets the handle's stream too
            gemm(a, a)
        assert len({event[4] for event in recording.trace if event[0] in ("kernel", "library")}) == 1
    with cudasim.record(trace=True) as recording:
        gemm(a, a)
    assert {event[4] for event in recording.trace if event[0] == "library"} == {0}


def test_captured(cudasim):
    a, b, out = (cupy.asarray(array(4, 4, seed=i)) for i in range(3))
    batch, batch_out = cupy.asarray(array(3, 4, 4)), cupy.zeros((3, 4, 4), "float32")
    start = cupy.asnumpy(out)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        gemm(a, b.T, out, beta=1.0)
        gemm(batch, batch.swapaxes(1, 2), batch_out)
        graph = stream.end_capture()
        np.testing.assert_array_equal(cupy.asnumpy(out), start)
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
    close(out, start + 3 * (cupy.asnumpy(a) @ cupy.asnumpy(b).T))
    close(batch_out, np.matmul(cupy.asnumpy(batch), cupy.asnumpy(batch).swapaxes(1, 2)))
    close(gemm(a, b), cupy.asnumpy(a) @ cupy.asnumpy(b))


def test_threads_have_their_own_scalars():
    a = cupy.asarray(array(8, 8, dtype="float64"))
    expected, wrong = cupy.asnumpy(a) @ cupy.asnumpy(a), []

    def work(alpha):
        for _ in range(50):
            if not np.allclose(cupy.asnumpy(gemm(a, a, alpha=alpha)), alpha * expected):
                wrong.append(alpha)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_errors():
    a, b = cupy.ones((5, 3), "float32"), cupy.ones((3, 4), "float32")
    with pytest.raises(ShapeError, match="same k"):
        gemm(a, a)
    with pytest.raises(ShapeError, match="same k"):
        gemm(a, b[:, 0])
    with pytest.raises(ShapeError, match="do not broadcast"):
        gemm(cupy.ones((2, 5, 3), "float32"), cupy.ones((3, 3, 4), "float32"))
    with pytest.raises(ShapeError, match="must be"):
        gemm(a, b, cupy.ones((4, 5), "float32"))
    with pytest.raises(ShapeError, match="stride 1"):
        gemm(a, b, cupy.ones((10, 8), "float32")[::2, ::2])
    with pytest.raises(ShapeError, match="positive"):
        gemm(cupy.ones((2, 5, 3), "float32"), b, cupy.broadcast_to(cupy.ones((5, 4), "float32"), (2, 5, 4)))
    with pytest.raises(DtypeError, match="float64"):
        gemm(a, b.astype("float64"))
    with pytest.raises(DtypeError, match="int64"):
        gemm(a.astype("int64"), b.astype("int64"))


def test_missing_nvmath_names_the_command(monkeypatch):
    import sys

    from gpuad.array import cublas

    monkeypatch.setattr(cublas, "cublas", None)
    monkeypatch.setitem(sys.modules, "nvmath.bindings", None)
    with pytest.raises(ImportError, match=r'pip install "gpuad\[cuda13\]"'):
        gemm(cupy.ones((2, 2)), cupy.ones((2, 2)))
