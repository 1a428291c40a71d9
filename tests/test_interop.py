"""Memory shared with NumPy and CuPy, and what is refused so that no graph is lost silently."""

from __future__ import annotations

import numpy as np
import pytest

import gpuad
from gpuad.errors import AutogradError, DeviceError, DtypeError

DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]


def made(device, dtype):
    return gpuad.arange(6, device=device).to(getattr(gpuad, dtype + "_" if dtype == "bool" else dtype)).reshape(2, 3)


# DLPack ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dlpack_both_ways_shares_memory(dtype, device):
    x = made(device, dtype)
    for view in (x, x.T, x[:, 1:], x[1], x[0, 0]):
        array = device.backend.xp.from_dlpack(view)
        assert array.dtype == view.dtype and array.shape == tuple(view.shape)
        back = gpuad.from_dlpack(array)
        assert back.device is device and back.data_ptr() == view.data_ptr()
        assert back.tolist() == view.tolist() and back.stride() == view.stride()
    again = gpuad.from_dlpack(x)  # a Tensor is an exporter as good as any
    assert again.data_ptr() == x.data_ptr()


def test_dlpack_of_the_standard(device):
    x = gpuad.ones(3, device=device)
    kind, index = x.__dlpack_device__()
    assert (int(kind), index) == ((1, 0) if device.type == "cpu" else (2, device.index))
    assert "dltensor_versioned" in repr(x.__dlpack__(max_version=(1, 0)))
    assert "dltensor_versioned" not in repr(x.__dlpack__())
    copied = device.backend.xp.from_dlpack(_Exporter(x, copy=True))
    with device:
        copied[0] = 7
    assert x.tolist() == [1, 1, 1]
    with pytest.raises(BufferError, match="cannot give memory of device \\(99, 0\\)"):
        x.__dlpack__(dl_device=(99, 0))


def test_dlpack_to_the_host(cuda_device):
    x = gpuad.ones(3, device=cuda_device)
    array = np.from_dlpack(_Exporter(x, dl_device=(1, 0), host=True))
    assert array.tolist() == [1, 1, 1]
    with pytest.raises(BufferError, match="without a copy"):
        x.__dlpack__(dl_device=(1, 0), copy=False)


class _Exporter:
    """An exporter that hands on what it was asked, and more."""

    def __init__(self, x, host=False, **named):
        self.x, self.host, self.named = x, host, named

    def __dlpack__(self, **asked):
        return self.x.__dlpack__(**{**asked, **self.named})

    def __dlpack_device__(self):
        return (1, 0) if self.host else self.x.__dlpack_device__()


def test_from_dlpack_to_a_device_and_with_copies(device):
    source = np.arange(3.0)
    there = gpuad.from_dlpack(source, device=device)
    assert there.device is device and there.tolist() == [0, 1, 2]
    copied = gpuad.from_dlpack(source, copy=True)
    source[0] = 9
    assert copied.tolist() == [0, 1, 2]
    if device.type != "cpu":
        with pytest.raises(ValueError, match="cannot bring an array from cpu to cuda"):
            gpuad.from_dlpack(source, device=device, copy=False)


def test_read_only_memory_can_be_read_but_not_written():
    source = np.arange(3.0)
    source.flags.writeable = False
    x = gpuad.from_dlpack(source)
    assert (x * 2).tolist() == [0, 2, 4]
    with pytest.raises(Exception, match="read-only"):
        x.add_(1)


def test_what_from_dlpack_refuses():
    with pytest.raises(TypeError, match="array with __dlpack__, got list; use gpuad.tensor"):
        gpuad.from_dlpack([1.0])
    with pytest.raises(DtypeError, match="not a dtype of gpuad"):
        gpuad.from_dlpack(np.ones(2, np.complex64))

    class Elsewhere:
        def __dlpack_device__(self):
            return (10, 0)

        def __dlpack__(self, **asked):
            raise AssertionError("not to be called")

    with pytest.raises(DeviceError, match="kind 10; gpuad has cpu and CUDA devices"):
        gpuad.from_dlpack(Elsewhere())


def test_tensors_that_require_grad_say_detach(device):
    x = gpuad.ones(3, device=device, requires_grad=True)
    for export in (lambda: x.__dlpack__(), lambda: x.numpy(), lambda: x.cupy(), lambda: np.asarray(x)):
        with pytest.raises(AutogradError, match=r"lose the graph.*x\.detach\(\)"):
            export()
    with pytest.raises(AutogradError, match=r"x\.detach\(\)"):
        np.from_dlpack(x)
    assert not hasattr(x, "__cuda_array_interface__")
    assert gpuad.from_dlpack(x.detach()).data_ptr() == x.data_ptr()


# NumPy ----------------------------------------------------------------------------------------------------------------


def test_numpy_shares_the_memory_of_cpu_tensors():
    x = gpuad.zeros(3)
    for array in (np.asarray(x), x.numpy(), x.__array__()):
        array[0] += 1
    assert x.tolist() == [3, 0, 0]
    assert np.asarray(x, np.float64).dtype == np.float64
    copied = np.array(x)
    copied[1] = 5
    assert x.tolist() == [3, 0, 0]
    assert not hasattr(x, "__cuda_array_interface__")
    with pytest.raises(TypeError, match=r"CuPy array of a tensor on cpu; move it first: x\.to"):
        x.cupy()


# CuPy -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cupy(cuda_device):
    return pytest.importorskip("cupy")


def test_cupy_shares_the_memory_of_cuda_tensors(cupy, cuda_device):
    x = gpuad.zeros(3, device=cuda_device)
    for array in (x.cupy(), cupy.asarray(x), cupy.from_dlpack(x)):
        assert isinstance(array, cupy.ndarray)
        array += 1
    assert x.tolist() == [3, 3, 3]
    with pytest.raises(TypeError, match=r"on cuda:0; copy it to the host first: x\.cpu\(\)"):
        np.asarray(x)


def test_cupys_functions_take_tensors_that_require_no_grad(cupy, cuda_device):
    x = gpuad.ones(3, device=cuda_device)
    twice = cupy.ElementwiseKernel("T x", "T y", "y = 2 * x", "twice")
    np.testing.assert_allclose(cupy.exp(x).get(), np.exp(np.ones(3)), rtol=1e-6)
    assert twice(x).get().tolist() == [2, 2, 2]
    twice(x, x.cupy())
    assert x.tolist() == [2, 2, 2]


@pytest.mark.parametrize("way", ["ufunc", "elementwise", "reduction", "asarray"])
def test_a_tensor_that_requires_grad_in_cupy_says_what_to_do(way, cupy, cuda_device):
    x = gpuad.ones(3, device=cuda_device, requires_grad=True)
    calls = {
        "ufunc": lambda: cupy.exp(x),
        "elementwise": lambda: cupy.ElementwiseKernel("T x", "T y", "y = 2 * x", "twice")(x),
        "reduction": lambda: cupy.ReductionKernel("T x", "T y", "x", "a + b", "y = a", "0", "total")(x),
        "asarray": lambda: cupy.asarray(x),
    }
    with pytest.raises(AutogradError, match=r"x\.detach\(\)"):
        calls[way]()


def test_a_cpu_tensor_in_cupy_says_what_to_do(cupy, cuda_device):
    with pytest.raises(TypeError, match=r"tensor on cpu; move it first: x\.to\('cuda'\)"):
        cupy.exp(gpuad.ones(3))


def test_a_raw_kernel_takes_the_array(cupy, cuda_device):
    kernel = cupy.RawKernel('extern "C" __global__ void fill(float* x) { x[threadIdx.x] = 5; }', "fill")
    x = gpuad.ones(3, device=cuda_device)
    kernel((1,), (3,), (x.cupy(),))
    assert x.tolist() == [5, 5, 5]
    with pytest.raises(TypeError, match="Tensor"):  # CuPy's own text
        kernel((1,), (3,), (x,))


def test_a_bare_array_beside_a_tensor_is_refused(cupy, cuda_device):
    x = gpuad.ones(3, device=cuda_device)
    with pytest.raises(TypeError, match=r"bare cupy\.ndarray beside a Tensor.*gpuad\.from_dlpack"):
        x + cupy.ones(3)
