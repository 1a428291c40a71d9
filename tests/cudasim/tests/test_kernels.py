"""User-written kernels."""

import cupy as cp
import numpy as np
import pytest


def test_elementwise_several_outputs_and_raw():
    k = cp.ElementwiseKernel(
        "T a, raw T b, int32 n", "T s, T d", "s = a + b[(i + 1) % n]; d = a - b[i]", "test_sum_difference"
    )
    a, b = cp.arange(5, dtype="f"), cp.arange(5, dtype="f") * 10
    s, d = k(a, b, 5)
    assert s.get().tolist() == [10, 21, 32, 43, 4]
    assert d.get().tolist() == [0, -9, -18, -27, -36]


def test_elementwise_preamble_and_options():
    k = cp.ElementwiseKernel(
        "float32 x",
        "float32 y",
        "y = twice(x) + OFFSET",
        "test_preamble",
        preamble="__device__ __forceinline__ float twice(float v) { return 2 * v; }",
        options=("-DOFFSET=3",),
        loop_prep="float unused = 0;",
        after_loop="(void)unused;",
    )
    assert k(cp.arange(3, dtype="f")).get().tolist() == [3, 5, 7]


def test_reduction():
    k = cp.ReductionKernel("T x, T y", "T z", "x * y", "a + b", "z = sqrt(a)", "0", "test_norm")
    x = cp.arange(2000, dtype="d").reshape(4, 500)
    np.testing.assert_allclose(k(x, x, axis=1).get(), np.sqrt((x.get() ** 2).sum(1)))
    np.testing.assert_allclose(k(x, x).get(), np.sqrt((x.get() ** 2).sum()))


def test_raw_kernel():
    k = cp.RawKernel(
        r"""
    extern "C" __global__
    void scale(const float* x, float* y, float f, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) y[i] = f * x[i] + rsqrtf(4.0f);
    }""",
        "scale",
    )
    x = cp.arange(1000, dtype="f")
    y = cp.empty_like(x)
    k((8,), (128,), (x, y, np.float32(2), 1000))
    np.testing.assert_allclose(y.get(), 2 * x.get() + 0.5)


def test_raw_kernel_shared_memory_and_barriers():
    k = cp.RawKernel(
        r"""
    extern "C" __global__ __launch_bounds__(256)
    void reverse_blocks(const int* x, int* y) {
      extern __shared__ int buffer[];
      __shared__ int total;
      int t = threadIdx.x;
      if (t == 0) total = 0;
      buffer[t] = x[blockIdx.x * blockDim.x + t];
      __syncthreads();
      atomicAdd(&total, buffer[t]);
      int even = __syncthreads_count(buffer[t] % 2 == 0);
      y[blockIdx.x * blockDim.x + t] = buffer[blockDim.x - 1 - t] + 1000 * total + even;
    }""",
        "reverse_blocks",
    )
    x = cp.arange(12, dtype="i")
    y = cp.empty_like(x)
    k((3,), (4,), (x, y), shared_mem=16)
    blocks = x.get().reshape(3, 4)
    assert (y.get().reshape(3, 4) == blocks[:, ::-1] + 1000 * blocks.sum(1, keepdims=True) + 2).all()


def test_two_dimensional_grid():
    k = cp.RawKernel(
        r"""
    extern "C" __global__ void where(int* out) {
      int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
      int z = blockIdx.z * blockDim.z + threadIdx.z;
      int w = gridDim.x * blockDim.x, h = gridDim.y * blockDim.y;
      out[(z * h + y) * w + x] = x + 100 * y + 10000 * z;
    }""",
        "where",
    )
    out = cp.zeros((4, 6, 4), "i")
    k((2, 3, 2), (2, 2, 2), (out,))
    z, y, x = np.indices(out.shape)
    assert (out.get() == x + 100 * y + 10000 * z).all()


def test_warp_functions():
    k = cp.RawKernel(
        r"""
    extern "C" __global__ void warp(const float* x, float* sums, unsigned* votes, int* up) {
      int t = threadIdx.x;
      float v = x[t];
      for (int d = 16; d; d /= 2) v += __shfl_down_sync(0xffffffff, v, d);
      float total = __shfl_sync(0xffffffff, v, 0);
      sums[t] = total;
      votes[t] = __ballot_sync(0xffffffff, x[t] > 30.0f);
      up[t] = __shfl_up_sync(0xffffffff, t, 1, 8) + 100 * __any_sync(0xffffffff, t == 40) +
              __reduce_max_sync(0xffffffff, t);
      __syncwarp();
    }""",
        "warp",
    )
    x = cp.arange(64, dtype="f")
    sums, votes, up = cp.empty_like(x), cp.empty(64, "u4"), cp.empty(64, "i")
    k((1,), (64,), (x, sums, votes, up))
    np.testing.assert_allclose(sums.get()[[0, 31, 32]], [496, 496, 1520])
    assert votes.get()[0] == 1 << 31 and votes.get()[40] == 0xFFFFFFFF
    t = np.arange(64)
    want = np.where(t % 8 == 0, t, t - 1) + 100 * (t >= 32) + np.where(t < 32, 31, 63)
    assert (up.get() == want).all()


def test_raw_module_templates_and_globals():
    code = r"""
    __constant__ float coefficients[3];
    __device__ int counter;
    template <typename T, int N>
    __global__ void add(T* x) { x[threadIdx.x] += N; atomicAdd(&counter, 1); }
    namespace inner {
    __global__ void plain(float* x) { x[threadIdx.x] = coefficients[threadIdx.x]; }
    }
    """
    names = ("add<int, 3>", "add<double, 7>", "inner::plain")
    m = cp.RawModule(code=code, options=("-std=c++17",), name_expressions=names)
    x, y = cp.zeros(4, "i"), cp.zeros(4, "d")
    m.get_function(names[0])((1,), (4,), (x,))
    m.get_function(names[1])((1,), (4,), (y,))
    assert x.get().tolist() == [3] * 4 and y.get().tolist() == [7] * 4
    counter = cp.ndarray(1, "i", m.get_global("counter"))
    assert counter[0] % 8 == 0  # not initialised between runs of the module
    c = cp.ndarray(3, "f", m.get_global("coefficients"))
    c[...] = cp.asarray([1, 2, 3])
    z = cp.empty(3, "f")
    m.get_function(names[2])((1,), (3,), (z,))
    assert z.get().tolist() == [1, 2, 3]


def test_kernels_made_by_macros():
    m = cp.RawModule(
        code=r"""
    #define MAKE(T) extern "C" __global__ void fill_##T(T* x, T v) { x[threadIdx.x] = v; }
    MAKE(float)
    MAKE(int)
    #if 0
    extern "C" __global__ void never(undefined_type x) {}
    #endif
    """
    )
    x = cp.empty(3, "i")
    m.get_function("fill_int")((1,), (3,), (x, np.int32(4)))
    assert x.get().tolist() == [4, 4, 4]


def test_half_and_vectors():
    k = cp.RawKernel(
        r"""
    #include <cuda_fp16.h>
    extern "C" __global__ void mix(const half* h, const float4* v, float* out) {
      float4 a = v[threadIdx.x];
      half2 p = __halves2half2(h[0], h[1]);
      half s = __hadd(h[threadIdx.x], __float2half(1.0f));
      out[threadIdx.x] = a.x + a.y + a.z + a.w + __half2float(s) + __low2float(__hmul2(p, p));
    }""",
        "mix",
    )
    h = cp.arange(2, dtype="float16") + 2
    v = cp.arange(8, dtype="f")
    out = cp.empty(2, "f")
    k((1,), (2,), (h, v, out))
    assert out.get().tolist() == [6 + 3 + 4, 22 + 4 + 4]


def test_struct_parameter():
    k = cp.RawKernel(
        r"""
    struct Pair { double a; int b; };
    extern "C" __global__ void use(Pair p, double* out) { out[0] = p.a * p.b; }""",
        "use",
    )
    pair = np.array((2.5, 4, 0), dtype=[("a", "f8"), ("b", "i4"), ("pad", "i4")])
    out = cp.empty(1)
    k((1,), (1,), (pair, out))
    assert out[0] == 10


def test_compile_error():
    k = cp.RawKernel('extern "C" __global__ void bad() {\n  undeclared = 1;\n}', "bad")
    with pytest.raises(cp.cuda.compiler.CompileException, match=r"\(2\): error: .*undeclared"):
        k((1,), (1,), ())


def test_missing_function():
    m = cp.RawModule(code='extern "C" __global__ void here() {}')
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="CUDA_ERROR_NOT_FOUND"):
        m.get_function("absent")


def test_launch_limits():
    k = cp.RawKernel('extern "C" __global__ void none() {}', "none")
    for grid, block, smem in [
        ((1,), (1025,), 0),
        ((1,), (32, 33), 0),
        ((1, 70000), (1,), 0),
        ((1,), (1, 1, 65), 0),
        ((1,), (1,), 50000),
    ]:
        with pytest.raises(cp.cuda.driver.CUDADriverError, match="CUDA_ERROR_INVALID_VALUE"):
            k(grid, block, (), shared_mem=smem)
    k((1,), (1024,), (), shared_mem=48 * 1024)
    k.max_dynamic_shared_size_bytes = 200 * 1024
    k((1,), (1,), (), shared_mem=200 * 1024)


def test_fuse():
    @cp.fuse(kernel_name="test_fused")
    def f(x, y):
        return cp.sqrt(x * x + y * y) + 1

    x, y = cp.arange(5, dtype="f"), cp.arange(5, dtype="f") * 2
    np.testing.assert_allclose(f(x, y).get(), np.hypot(x.get(), y.get()) + 1, rtol=1e-6)

    @cp.fuse()
    def g(x):
        return cp.sum(x * 2, axis=0)

    np.testing.assert_allclose(g(cp.ones((300, 4))).get(), [600] * 4)


def test_jit():
    from cupyx import jit

    @jit.rawkernel()
    def copy(x, y, n):
        i = jit.blockIdx.x * jit.blockDim.x + jit.threadIdx.x
        if i < n:
            y[i] = x[i] * 2

    x = cp.arange(100, dtype="f")
    y = cp.empty_like(x)
    copy((4,), (32,), (x, y, np.int32(100)))
    assert (y == x * 2).all()


def test_vectorize():
    @cp.vectorize
    def f(a, b):
        if a > b:
            return a - b
        return a + b

    a, b = cp.arange(4), cp.asarray([2, 0, 5, 1])
    assert f(a, b).get().tolist() == [2, 1, 7, 2]


def test_cooperative_groups():
    k = cp.RawKernel(
        r"""
    #include <cooperative_groups.h>
    namespace cg = cooperative_groups;
    extern "C" __global__ void tiles(int* out) {
      auto block = cg::this_thread_block();
      auto tile = cg::tiled_partition<8>(block);
      int v = block.thread_rank();
      for (int d = tile.size() / 2; d > 0; d /= 2) v += tile.shfl_down(v, d);
      block.sync();
      if (tile.thread_rank() == 0) out[tile.meta_group_rank()] = v;
    }""",
        "tiles",
    )
    out = cp.zeros(5, "i")
    k((1,), (40,), (out,))
    assert out.get().tolist() == np.arange(40).reshape(5, 8).sum(1).tolist()


def test_threads_that_return_before_a_barrier():
    k = cp.RawKernel(
        r"""
    extern "C" __global__ void leave(int* out, int n) {
      __shared__ int s[64];
      int t = threadIdx.x;
      if (t >= n) return;
      s[t] = t;
      __syncthreads();
      int v = s[n - 1 - t];
      __syncwarp();
      out[t] = v + __popc(__activemask());
    }""",
        "leave",
    )
    out = cp.zeros(40, "i")
    k((1,), (64,), (out, 40))
    want = np.arange(40)[::-1] + np.where(np.arange(40) < 32, 32, 8)
    assert (out.get() == want).all()


def test_grid_synchronisation():
    k = cp.RawKernel(
        r"""
    #include <cooperative_groups.h>
    extern "C" __global__ void rounds(int* a, int* b) {
      auto grid = cooperative_groups::this_grid();
      __shared__ int mine;
      extern __shared__ __align__(16) int dynamic[];
      int i = grid.thread_rank(), n = grid.size();
      if (threadIdx.x == 0) mine = dynamic[0] = blockIdx.x;
      a[i] = i;
      grid.sync();
      b[i] = a[n - 1 - i];
      grid.sync();
      __syncthreads();
      a[i] = b[(i + 1) % n] + 1000 * mine + 1000 * dynamic[0];
    }""",
        "rounds",
        enable_cooperative_groups=True,
    )
    a, b = cp.zeros(24, "i"), cp.zeros(24, "i")
    k((3,), (8,), (a, b), shared_mem=16)
    i = np.arange(24)
    assert (a.get() == 23 - (i + 1) % 24 + 2000 * (i // 8)).all()


def test_dynamic_shared_memory_in_a_template():
    m = cp.RawModule(
        code=r"""
    template <class T> __device__ T sum(T v) {
      extern __shared__ __align__(sizeof(double)) unsigned char raw[];
      T* s = reinterpret_cast<T*>(raw);
      s[threadIdx.x] = v;
      __syncthreads();
      T r = 0;
      for (int i = 0; i < blockDim.x; i++) r += s[i];
      return r;
    }
    extern "C" __global__ void f(float* x) {
      extern __shared__ float tile[][4];
      tile[threadIdx.x][3] = 0;
      float r = sum(x[threadIdx.x]);
      x[threadIdx.x] = r;
    }"""
    )
    x = cp.arange(4, dtype="f")
    m.get_function("f")((1,), (4,), (x,), shared_mem=64)
    assert x.get().tolist() == [6] * 4


def test_kernel_with_the_name_of_another_function():
    a = cp.arange(3, dtype="i4")
    assert (a.byteswap().get() == a.get().byteswap()).all()
