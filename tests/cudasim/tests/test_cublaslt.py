"""cublasLtMatmul with every epilogue against NumPy, its rules, captures and order on a stream."""

import os
import subprocess
import sys

import cudasim
import cupy as cp
import numpy as np
import pytest
from nvmath.bindings import cublasLt as lt

HOST, DEVICE = 0, 1
NOTHING, TRANSPOSED = 0, 1
COL, ROW = 0, 1
COMPUTE_32F, COMPUTE_64F = 68, 70
# dtype: cudaDataType, compute type, cudaDataType and ... of alpha and beta, tolerance
TYPES = {
    "float32": (0, COMPUTE_32F, 0, "f", 2e-6),
    "float64": (1, COMPUTE_64F, 1, "d", 1e-14),
    "float16": (2, COMPUTE_32F, 0, "f", 2e-3),
}
DESC, LAYOUT, PREFERENCE = lt.MatmulDescAttribute, lt.MatrixLayoutAttribute, lt.MatmulPreferenceAttribute
INVALID, UNSUPPORTED = "INVALID_VALUE", "NOT_SUPPORTED"


def put(setter, descriptor, attribute, value, dtype):
    value = np.array(value, dtype)
    setter(descriptor, attribute, value.ctypes.data, value.nbytes)


class Product:
    """D = epilogue(alpha op(A) op(B) + beta C), of column-major m x k and k x n operands."""

    def __init__(self, m, n, k, dtype="float32", epilogue="DEFAULT", ta=0, tb=0, batch=1, aux_ld=None, order=COL):
        self.m, self.n, self.k, self.dtype, self.batch = m, n, k, dtype, batch
        self.code, compute, scale, self.scalar, self.tolerance = TYPES[dtype]
        self.handle = lt.create()
        self.desc = lt.matmul_desc_create(compute, scale)
        self.epilogue = getattr(lt.Epilogue, epilogue)
        self.describe(DESC.TRANSA, ta, "i")
        self.describe(DESC.TRANSB, tb, "i")
        self.describe(DESC.EPILOGUE, int(self.epilogue), "u4")
        if "AUX" in epilogue or epilogue.startswith("D") and epilogue != "DEFAULT":
            granularity = 128 if "RELU" in epilogue else 8
            self.aux_ld = aux_ld or -(-m // granularity) * granularity
            self.describe(DESC.EPILOGUE_AUX_LD, self.aux_ld, "i8")
            self.describe(DESC.EPILOGUE_AUX_BATCH_STRIDE, self.aux_ld * n, "i8")
            length = self.aux_ld * n * batch
            self.aux = cp.zeros(length // 8, "u1") if "RELU" in epilogue else cp.zeros(length, dtype)
            self.describe(DESC.EPILOGUE_AUX_POINTER, self.aux.data.ptr, "u8")
        a_shape, b_shape = (k, m) if ta else (m, k), (n, k) if tb else (k, n)
        self.layouts = [self.layout(*shape, order) for shape in (a_shape, b_shape, (m, n), (m, n))]
        rng = np.random.default_rng(0)
        self.a, self.b, self.c = (rng.standard_normal((batch, *s)).astype(dtype) for s in (a_shape, b_shape, (m, n)))
        self.left = self.a.swapaxes(1, 2) if ta else self.a
        self.right = self.b.swapaxes(1, 2) if tb else self.b
        self.order = order
        self.device = [self.on_device(x) for x in (self.a, self.b, self.c, np.full_like(self.c, 9))]
        size = n if epilogue == "BGRADB" else m
        self.bias = cp.asarray(rng.standard_normal((batch, size)).astype(dtype))
        self.describe(DESC.BIAS_POINTER, self.bias.data.ptr, "u8")
        self.describe(DESC.BIAS_BATCH_STRIDE, size, "i8")

    def describe(self, attribute, value, dtype):
        put(lt.matmul_desc_set_attribute, self.desc, attribute, value, dtype)

    def layout(self, rows, cols, order=COL, ld=None):
        layout = lt.matrix_layout_create(self.code, rows, cols, ld or (rows if order == COL else cols))
        put(lt.matrix_layout_set_attribute, layout, LAYOUT.ORDER, order, "i")
        put(lt.matrix_layout_set_attribute, layout, LAYOUT.BATCH_COUNT, self.batch, "i")
        put(lt.matrix_layout_set_attribute, layout, LAYOUT.STRIDED_BATCH_OFFSET, rows * cols, "i8")
        return layout

    def on_device(self, x):
        return cp.asarray(np.ascontiguousarray(x.swapaxes(1, 2) if self.order == COL else x))

    def heuristic(self, workspace=0, alignment=None):
        preference = lt.matmul_preference_create()
        put(lt.matmul_preference_set_attribute, preference, PREFERENCE.MAX_WORKSPACE_BYTES, workspace, "u8")
        if alignment:
            for which in "ABCD":
                which = getattr(PREFERENCE, f"MIN_ALIGNMENT_{which}_BYTES")
                put(lt.matmul_preference_set_attribute, preference, which, alignment, "u4")
        result, found = np.zeros(1, lt.matmul_heuristic_result_dtype), np.zeros(1, "i")
        try:
            lt.matmul_algo_get_heuristic(
                self.handle, self.desc, *self.layouts, preference, 1, result.ctypes.data, found.ctypes.data
            )
        finally:
            lt.matmul_preference_destroy(preference)
        assert found[0] == 1 and result["state"][0] == 0
        return result

    def __call__(self, alpha=1.0, beta=0.0, algorithm=None, workspace=None, stream=None, pointers=None):
        scalars = np.array([alpha, beta], self.scalar)
        at = scalars.ctypes.data
        a, b, c, d = pointers or [x.data.ptr for x in self.device]
        la, lb, lc, ld = self.layouts
        lt.matmul(
            self.handle, self.desc, at, a, la, b, lb, at + scalars.itemsize, c, lc, d, ld,
            0 if algorithm is None else algorithm.ctypes.data, 0 if workspace is None else workspace.data.ptr,
            0 if workspace is None else workspace.nbytes,
            cp.cuda.get_current_stream().ptr if stream is None else stream,
        )  # fmt: skip
        return self

    @property
    def result(self):
        d = cp.asnumpy(self.device[3])
        return (d.swapaxes(1, 2) if self.order == COL else d).astype("d")

    def product(self, alpha=1.0, beta=0.0):
        return alpha * (self.left.astype("d") @ self.right.astype("d")) + beta * self.c.astype("d")

    def near(self, got, expected):
        scale = np.abs(expected).max() + 1
        np.testing.assert_allclose(got, expected, rtol=0, atol=self.tolerance * scale * 4)

    def mask(self):
        bits = np.unpackbits(cp.asnumpy(self.aux), bitorder="little").reshape(self.batch, self.n, self.aux_ld)
        return bits[..., : self.m].swapaxes(1, 2).astype(bool)

    def auxiliary(self):
        aux = cp.asnumpy(self.aux).reshape(self.batch, self.n, self.aux_ld)
        return aux[..., : self.m].swapaxes(1, 2).astype("d")


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_derivative(x, h=1e-6):
    return (gelu(x + h) - gelu(x - h)) / (2 * h)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("ta", [NOTHING, TRANSPOSED])
@pytest.mark.parametrize("tb", [NOTHING, TRANSPOSED])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", [COL, ROW])
def test_products(dtype, ta, tb, batch, order):
    p = Product(5, 7, 3, dtype, ta=ta, tb=tb, batch=batch, order=order)
    with cudasim.record() as r:
        p(0.5, 2.0)
    p.near(p.result, p.product(0.5, 2.0))
    assert r.stats["library"] == {"cublasLtMatmul": 1}
    assert (r.kernel_launches, r.syncs, r.stats["memsets"], r.stats["copies"]) == (0, 0, 0, {})


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("epilogue", ["RELU", "BIAS", "RELU_BIAS", "GELU", "GELU_BIAS"])
def test_forward_epilogues(dtype, epilogue, batch):
    p = Product(130, 6, 8, dtype, epilogue, batch=batch)(0.5, 2.0)
    expected = p.product(0.5, 2.0)
    if "BIAS" in epilogue:
        expected += cp.asnumpy(p.bias).astype("d")[:, :, None]
    expected = np.maximum(expected, 0) if "RELU" in epilogue else expected
    p.near(p.result, gelu(expected) if "GELU" in epilogue else expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("epilogue", ["RELU_AUX", "RELU_AUX_BIAS", "GELU_AUX", "GELU_AUX_BIAS"])
def test_auxiliary_outputs(dtype, epilogue, batch):
    p = Product(130, 6, 8, dtype, epilogue, batch=batch)(alpha=0.5)
    expected = p.product(0.5)
    if "BIAS" in epilogue:
        expected += cp.asnumpy(p.bias).astype("d")[:, :, None]
    if "RELU" in epilogue:
        p.near(p.result, np.maximum(expected, 0))
        clear = np.abs(expected) > 1e-3
        np.testing.assert_array_equal(p.mask()[clear], (expected > 0)[clear])
    else:
        p.near(p.result, gelu(expected))
        p.near(p.auxiliary(), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("epilogue", ["DRELU", "DRELU_BGRAD", "DGELU", "DGELU_BGRAD"])
def test_backward_epilogues(dtype, epilogue, batch):
    p = Product(130, 6, 8, dtype, epilogue, batch=batch)
    rng = np.random.default_rng(1)
    if "RELU" in epilogue:
        p.aux[:] = cp.asarray(rng.integers(0, 256, p.aux.shape).astype("u1"))
        factor = p.mask()
    else:
        p.aux[:] = cp.asarray(rng.standard_normal(p.aux.shape).astype(dtype))
        factor = gelu_derivative(p.auxiliary())
    before = cp.asnumpy(p.bias)
    p(0.5)
    expected = p.product(0.5) * factor
    tolerance = p.tolerance
    p.tolerance = max(tolerance, 1e-9)  # of the difference quotient
    p.near(p.result, expected)
    if "BGRAD" in epilogue:
        p.near(cp.asnumpy(p.bias).astype("d"), expected.sum(2))
    else:
        np.testing.assert_array_equal(cp.asnumpy(p.bias), before)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transposed", [NOTHING, TRANSPOSED])
@pytest.mark.parametrize("epilogue", ["BGRADA", "BGRADB"])
def test_bias_gradients_of_the_operands(dtype, transposed, epilogue):
    p = Product(5, 6, 4, dtype, epilogue, ta=transposed, tb=transposed)(0.5)
    p.near(p.result, p.product(0.5))
    operand = p.left.astype("d").sum(2) if epilogue == "BGRADA" else p.right.astype("d").sum(1)
    p.near(cp.asnumpy(p.bias).astype("d"), operand)


def test_a_relu_of_nan_is_zero_as_on_a_gpu():
    p = Product(4, 4, 4, epilogue="RELU_AUX")
    p.device[0][:] = np.nan
    p()
    assert (p.result == 0).all() and not p.mask().any()


def test_scalars_on_the_device_and_output_in_place():
    p = Product(4, 5, 6)
    p.describe(DESC.POINTER_MODE, DEVICE, "i")
    scalars = cp.array([0.5, 2.0], "f")
    a, b, c, d = p.device
    la, lb, lc, ld = p.layouts
    lt.matmul(
        p.handle, p.desc, scalars.data.ptr, a.data.ptr, la, b.data.ptr, lb, scalars.data.ptr + 4, c.data.ptr, lc,
        c.data.ptr, ld, 0, 0, 0, 0,
    )  # fmt: skip
    p.near(cp.asnumpy(c).swapaxes(1, 2), p.product(0.5, 2.0))


def test_leading_dimensions_and_broadcast_batches():
    p = Product(4, 5, 6, batch=3)
    wide = cp.zeros((3, 5, 9), "f")
    lt.matrix_layout_destroy(p.layouts[3])
    p.layouts[3] = p.layout(4, 5, ld=9)
    put(lt.matrix_layout_set_attribute, p.layouts[3], LAYOUT.STRIDED_BATCH_OFFSET, 45, "i8")
    put(lt.matrix_layout_set_attribute, p.layouts[1], LAYOUT.STRIDED_BATCH_OFFSET, 0, "i8")
    p(pointers=[*(x.data.ptr for x in p.device[:3]), wide.data.ptr])
    expected = p.left.astype("d") @ p.right[:1].astype("d")
    p.near(cp.asnumpy(wide)[:, :, :4].swapaxes(1, 2), expected)
    assert not wide[:, :, 4:].any()


def test_attributes():
    p = Product(4, 5, 6, epilogue="RELU_AUX_BIAS")
    value, written = np.zeros(1, "i8"), np.zeros(1, "u8")
    lt.matmul_desc_get_attribute(p.desc, DESC.EPILOGUE_AUX_LD, value.ctypes.data, 8, written.ctypes.data)
    assert (value[0], written[0]) == (128, 8)
    with pytest.raises(lt.cuBLASLtError, match=INVALID):
        p.describe(DESC.EPILOGUE_AUX_LD, 128, "i4")
    for destroy, descriptor in [(lt.matmul_desc_destroy, p.desc), *((lt.matrix_layout_destroy, x) for x in p.layouts)]:
        destroy(descriptor)
    lt.destroy(p.handle)


@pytest.mark.parametrize("epilogue, aux_ld", [("RELU_AUX", 160), ("DRELU", 128), ("GELU_AUX", 132), ("DGELU", 128)])
def test_auxiliary_leading_dimensions(epilogue, aux_ld):
    p = Product(130, 4, 4, epilogue=epilogue, aux_ld=aux_ld)
    with pytest.raises(lt.cuBLASLtError, match=INVALID):
        p()
    with pytest.raises(lt.cuBLASLtError, match=INVALID):
        p.heuristic()


def test_what_is_refused():
    def refused(p, status, call=lambda p: p()):
        with pytest.raises(lt.cuBLASLtError, match=status), cudasim.record() as r:
            call(p)
        assert not r.library_calls

    refused(Product(4, 4, 4, epilogue="BIAS", order=ROW), UNSUPPORTED)
    p = Product(4, 4, 4, epilogue="BIAS")
    p.describe(DESC.BIAS_POINTER, 0, "u8")
    refused(p, INVALID)
    p = Product(4, 4, 4, "float16", epilogue="BIAS")
    p.describe(DESC.BIAS_DATA_TYPE, 0, "i")
    refused(p, UNSUPPORTED)
    p = Product(4, 4, 4)
    p.layouts[0] = p.layout(4, 4, ld=3)
    refused(p, INVALID)
    p.layouts[0] = p.layout(5, 4)
    refused(p, INVALID)
    p = Product(4, 4, 4, "float16")
    p.describe(DESC.COMPUTE_TYPE, COMPUTE_64F, "i")
    refused(p, UNSUPPORTED)
    p = Product(4, 4, 4, epilogue="RELU_AUX")
    p.describe(DESC.EPILOGUE_AUX_POINTER, p.aux.data.ptr + 1, "u8")
    refused(p, INVALID)
    p.describe(DESC.EPILOGUE, 3, "u4")
    refused(p, INVALID)
    p = Product(4, 4, 4)
    with cp.cuda.Device(1):
        refused(p, INVALID)  # the handle is of device 0


def test_algorithms_keep_to_their_problem_alignment_and_workspace():
    p = Product(8, 8, 8)
    algorithm = p.heuristic(workspace=1 << 20)
    need = int(algorithm["workspace_size"][0])
    assert 0 < need <= 1 << 20
    p(algorithm=algorithm, workspace=cp.zeros(need, "u1"))
    p.near(p.result, p.product())
    for workspace in (None, cp.zeros(need - 16, "u1"), cp.zeros(need + 1, "u1")[1:]):
        with pytest.raises(lt.cuBLASLtError, match=INVALID):
            p(algorithm=algorithm, workspace=workspace)
    with pytest.raises(lt.cuBLASLtError, match=UNSUPPORTED):
        Product(8, 8, 4)(algorithm=p.heuristic())

    spread = cp.zeros(66, "f")
    pointers = [x.data.ptr for x in p.device]
    pointers[3] = spread.data.ptr + 4
    with pytest.raises(lt.cuBLASLtError, match=INVALID):
        p(algorithm=p.heuristic(), pointers=pointers)
    p(algorithm=p.heuristic(alignment=4), pointers=pointers)
    p.near(cp.asnumpy(spread[1:65]).reshape(1, 8, 8).swapaxes(1, 2), p.product())


def test_a_cublas_handle_serves_as_well():
    p = Product(4, 5, 6)
    p.handle = cp.cuda.device.get_cublas_handle()
    p.near(p().result, p.product())


def test_captured():
    p = Product(4, 5, 6, epilogue="RELU_AUX_BIAS")
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        p()
        graph = stream.end_capture()
        assert (p.result == 9).all()
        with cudasim.record() as r:
            graph.launch(stream)
            stream.synchronize()
    assert r.stats["graph_kernels"] == {"cublasLtMatmul": 1} and not r.library_calls
    p.near(p.result, np.maximum(p.product() + cp.asnumpy(p.bias)[:, :, None], 0))


def test_is_in_order_on_its_stream():
    """With CUDASIM_ASYNC=1 a product waits on its stream, after what is before it there, scalars read at the call."""
    if os.environ.get("CUDASIM_ASYNC") != "1":
        this = f"{__file__}::test_is_in_order_on_its_stream"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", this],
            env={**os.environ, "CUDASIM_ASYNC": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return
    p = Product(4, 5, 6)
    cp.cuda.Device().synchronize()
    one, other = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    with one:
        p.device[0] *= 2
        p(0.5, stream=one.ptr)
        p.device[3] += 1
    other.synchronize()
    assert (cp.ndarray(p.device[3].shape, "f", p.device[3].data).size, one.done) == (20, False)
    one.synchronize()
    p.near(p.result, p.product() + 1)
