"""Memory, streams, events, graphs, devices, counters."""

import os
import subprocess
import sys
import threading

import cudasim
import cupy as cp
import numpy as np
import pytest

runtime = cp.cuda.runtime


def error(name):
    return pytest.raises(runtime.CUDARuntimeError, match=name)


def script(code, **env):
    """Runs code in a process of its own, for what would spoil this one."""
    r = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )
    return r.returncode, r.stdout, r.stderr


def test_memory_pool():
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc):
        a = cp.zeros(1000)
        assert pool.used_bytes() == 8192
        p = a.data.ptr
        del a
        assert pool.used_bytes() == 0 and pool.total_bytes() == 8192
        with cudasim.record() as r:
            b = cp.empty(1000)
        assert b.data.ptr == p and r.stats["mallocs"] == 0
        del b
        pool.free_all_blocks()
        assert pool.total_bytes() == 0


def test_fresh_memory_is_poisoned():
    m = cp.cuda.Memory(80)
    a = cp.ndarray(10, "d", cp.cuda.MemoryPointer(m, 0))
    assert np.isnan(a.get()).all()


def test_out_of_memory():
    free, total = runtime.memGetInfo()
    with error("cudaErrorMemoryAllocation"):
        runtime.malloc(free + 1)
    with pytest.raises(cp.cuda.memory.OutOfMemoryError):
        cp.empty(total + 1, "u1")
    free, total = runtime.memGetInfo()  # CuPy gave up what its pool had spare
    p = runtime.malloc(1 << 20)
    assert runtime.memGetInfo() == (free - (1 << 20), total)
    runtime.free(p)


def test_copies_are_checked():
    p = runtime.malloc(100)
    host = np.zeros(200, "u1")
    with error("cudaErrorInvalidValue"):
        runtime.memcpy(p, host.ctypes.data, 200, runtime.memcpyHostToDevice)
    with error("cudaErrorInvalidValue"):
        runtime.memcpy(host.ctypes.data, host.ctypes.data + 100, 10, runtime.memcpyDeviceToHost)
    with error("cudaErrorInvalidValue"):
        runtime.free(p + 8)
    runtime.free(p)
    with error("cudaErrorInvalidValue"):
        runtime.free(p)


def test_out_of_bounds_write_is_reported():
    code, out, err = script("""
import cupy
cupy.cuda.set_allocator(None)
a = cupy.zeros(10, 'f')
cupy.RawKernel('extern "C" __global__ void f(float* x) { x[10] = 1; }', 'f')((1,), (1,), (a,))
del a
try:
    cupy.cuda.Device().synchronize()
except cupy.cuda.runtime.CUDARuntimeError as e:
    print(e)
""")
    assert "cudaErrorIllegalAddress" in out and "out-of-bounds write" in err


def test_illegal_address():
    code, out, err = script("""
import cupy
k = cupy.RawKernel('extern "C" __global__ void f(float* x) { x[threadIdx.x] = 1; }', 'f')
k((1,), (1,), (cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(8, 4, None), 0),))
for i in range(2):  # the error stays
    try:
        cupy.cuda.Device().synchronize()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        print(e)
""")
    assert out.count("cudaErrorIllegalAddress: an illegal memory access") == 2, out + err


def test_device_assert():
    code, out, err = script('''
import cupy
k = cupy.RawKernel("""extern "C" __global__ void f(int n) {
    __syncthreads(); assert(n < 3 || threadIdx.x != 5); }""", 'f')
k((1,), (32,), (1,))
cupy.cuda.Device().synchronize()
k((1,), (32,), (3,))
try:
    cupy.cuda.Device().synchronize()
except cupy.cuda.runtime.CUDARuntimeError as e:
    print(e)
''')
    assert "cudaErrorAssert: device-side assert triggered" in out and "thread 5,0,0" in err


def test_pinned_and_async_copy():
    n = 1000
    mem = cp.cuda.alloc_pinned_memory(n * 4)
    host = np.frombuffer(mem, "f", n)
    host[...] = np.arange(n)
    s = cp.cuda.Stream(non_blocking=True)
    x = cp.empty(n, "f")
    x.set(host, stream=s)
    with s:
        y = x * 2
    out = y.get(stream=s, blocking=False)
    s.synchronize()
    assert (out == host * 2).all()
    assert runtime.pointerGetAttributes(x.data.ptr).type == 2
    assert runtime.pointerGetAttributes(host.ctypes.data).type == 1
    assert runtime.pointerGetAttributes(np.zeros(3).ctypes.data).type == 0


def test_managed_memory():
    with cp.cuda.using_allocator(cp.cuda.MemoryPool(cp.cuda.malloc_managed).malloc):
        a = cp.arange(10)
        assert int(a.sum()) == 45


def test_async_pool():
    with cp.cuda.using_allocator(cp.cuda.MemoryAsyncPool().malloc):
        assert int(cp.arange(10).sum()) == 45


def test_streams_and_events():
    a, b = cp.cuda.Event(), cp.cuda.Event()
    s, t = cp.cuda.Stream(), cp.cuda.Stream(non_blocking=True)
    a.record(s)
    with s:
        x = cp.ones(1000).sum()
    b.record(s)
    t.wait_event(b)
    with t:
        y = x + 1
    t.synchronize()
    assert y.get() == 1001
    assert s.done and b.done
    b.synchronize()
    assert cp.cuda.get_elapsed_time(a, b) >= 0
    seen = []
    s.launch_host_func(seen.append, 3)
    s.add_callback(lambda stream, status, data: seen.append(data), 4)
    s.synchronize()
    assert seen == [3, 4]
    with pytest.raises(runtime.CUDARuntimeError):
        cp.cuda.get_elapsed_time(cp.cuda.Event(), b)


def test_host_function_and_threads():
    """A callback needs the interpreter while another thread uses CUDA."""

    def work():
        for i in range(20):
            s = cp.cuda.Stream(non_blocking=True)
            s.launch_host_func(lambda x: x + 1, 1)
            with s:
                a = cp.arange(100) + i
            s.synchronize()
            assert int(a[0]) == i

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert not any(t.is_alive() for t in threads)


def test_graph():
    s = cp.cuda.Stream(non_blocking=True)
    x = cp.arange(16, dtype="f").reshape(4, 4)
    out = cp.zeros((4, 4), "f")
    with s:
        s.begin_capture()
        assert s.is_capturing()
        y = x * x
        y += 1
        out[...] = y
        z = cp.zeros(3, "f")
        graph = s.end_capture()
        assert not s.is_capturing()
    s.synchronize()
    assert (out == 0).all()
    with cudasim.record() as r:
        graph.upload(s)
        graph.launch(s)
        s.synchronize()
    want = x.get() ** 2 + 1
    assert (out.get() == want).all() and (z == 0).all()
    assert r.kernel_launches == 0 and r.stats["graph_launches"] == 1 and r.graph_kernels == 2
    assert r.stats["graph_copies"] == {"d2d": {"count": 1, "bytes": 64}}
    assert r.stats["graph_memsets"] == 1
    x *= 2
    cp.cuda.Device().synchronize()  # s does not wait for the default stream
    graph.launch(s)
    s.synchronize()
    assert (out.get() == 4 * (want - 1) + 1).all()
    assert "digraph" in graph.debug_dot_str()


def test_graph_with_two_streams():
    s, t = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    a, b = cp.zeros(4), cp.zeros(4)
    cp.cuda.Device().synchronize()
    s.begin_capture()
    with s:
        a += 1
    t.wait_event(s.record())
    with t:
        b += a
    s.wait_event(t.record())
    g = s.end_capture()
    g.launch(s)
    s.synchronize()
    assert a.get().tolist() == b.get().tolist() == [1] * 4

    s.begin_capture()
    t.wait_event(s.record())
    with t:
        b += 1
    with error("cudaErrorStreamCaptureUnjoined"):
        s.end_capture()
    assert not t.is_capturing()


@pytest.mark.parametrize("mode, allowed", [("Global", False), ("ThreadLocal", False), ("Relaxed", True)])
def test_capture_and_malloc(mode, allowed):
    s = cp.cuda.Stream(non_blocking=True)
    with s:
        s.begin_capture(getattr(runtime, "streamCaptureMode" + mode))
        if allowed:
            runtime.free(runtime.malloc(64))
            s.end_capture()
        else:
            with error("cudaErrorStreamCaptureUnsupported"):
                runtime.malloc(64)
            with error("cudaErrorStreamCaptureInvalidated"):
                s.end_capture()


def test_capture_of_another_thread():
    results = {}

    def other(mode):
        try:
            runtime.free(runtime.malloc(64))
            results[mode] = None
        except runtime.CUDARuntimeError as e:
            results[mode] = str(e)

    for mode in ("Global", "ThreadLocal", "Relaxed"):
        s = cp.cuda.Stream(non_blocking=True)
        s.begin_capture(getattr(runtime, "streamCaptureMode" + mode))
        thread = threading.Thread(target=other, args=(mode,))
        thread.start()
        thread.join()
        try:
            s.end_capture()
        except runtime.CUDARuntimeError:
            assert mode == "Global"
    assert "StreamCaptureUnsupported" in results["Global"]
    assert results["ThreadLocal"] is None and results["Relaxed"] is None


def test_calls_forbidden_in_a_capture():
    event = cp.cuda.Event()
    a, b = cp.zeros(4), cp.zeros(4)
    for call, name in [
        (lambda s: s.synchronize(), "Unsupported"),
        (lambda s: cp.cuda.Device().synchronize(), "Unsupported"),
        (lambda s: runtime.streamQuery(s.ptr), None),
        (lambda s: runtime.memcpy(a.data.ptr, b.data.ptr, 8, 4), "Implicit"),
        (lambda s: s.wait_event(event), "Isolation"),
    ]:
        event.record()
        s = cp.cuda.Stream()  # a blocking one
        s.begin_capture()
        if name is None:
            assert call(s) == 900
        else:
            with error("cudaErrorStreamCapture" + name):
                call(s)
        with error("cudaErrorStreamCaptureInvalidated"):
            s.end_capture()
    with error("cudaErrorStreamCaptureUnsupported"):
        runtime.streamBeginCapture(0)
    s = cp.cuda.Stream(non_blocking=True)
    with error("cudaErrorIllegalState"):
        runtime.streamEndCapture(s.ptr)
    s.begin_capture()
    event.record(s)
    with error("cudaErrorCapturedEvent"):
        event.synchronize()
    s.end_capture()


def test_devices():
    assert runtime.getDeviceCount() == 2
    with cp.cuda.Device(1):
        b = cp.arange(5)
        assert b.device.id == 1 and cp.cuda.get_device_id() == 1
    assert cp.cuda.get_device_id() == 0
    assert runtime.pointerGetAttributes(b.data.ptr).device == 1
    a = cp.zeros(5, "l")
    with cudasim.record() as r:
        a.data.copy_from_device(b.data, b.nbytes)
    assert a.get().tolist() == [0, 1, 2, 3, 4] and r.copies("p2p") == (1, 40)
    with cp.cuda.Device(1):
        c = cp.asarray(a)
        assert c.device.id == 1 and (c == b).all()
        assert (b + c).sum() == 20
    device = cp.cuda.Device(0)
    assert device.compute_capability == "90"
    assert device.attributes["MultiProcessorCount"] == 132
    assert runtime.getDeviceProperties(0)["warpSize"] == 32
    with error("cudaErrorInvalidDevice"):
        cp.cuda.Device(7).use()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(cp.cuda.get_device_id()))
    with cp.cuda.Device(1):  # the current device is a thread's own
        thread.start()
        thread.join()
    assert seen == [0]


def test_peer_access_is_needed():
    code, out, err = script("""
import cupy
k = cupy.RawKernel('extern "C" __global__ void f(float* x) { x[0] = 1; }', 'f')
a = cupy.zeros(1, 'f')
with cupy.cuda.Device(1):
    k((1,), (1,), (a,))
    try:
        cupy.cuda.Device().synchronize()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        print(e)
""")
    assert "cudaErrorIllegalAddress" in out and "peer access" in err


def test_settings():
    code, out, err = script(
        "import cupy; print(cupy.cuda.runtime.getDeviceCount(), cupy.cuda.runtime.memGetInfo()[1])",
        CUDASIM_DEVICES="3",
        CUDASIM_MEMORY="64M",
    )
    assert out.split() == ["3", str(64 << 20)]
    code, out, err = script("import cupy; print(cupy.is_available())", CUDASIM_DEVICES="0")
    assert out.split() == ["False"]


def test_counters():
    x = cp.arange(10, dtype="f")
    x + x
    with cudasim.record(trace=True) as r:
        y = x + x
        y.get()
        cp.asarray(np.zeros(100, "f"))
        x[:9].reshape(3, 3) @ x[:9].reshape(3, 3)
    assert r.stats["kernels"] == {"cupy_add__float32_float32_float32": 1}
    assert r.copies("d2h") == (1, 40) and r.copies("h2d") == (1, 400)
    assert r.library_calls == 1 and "cublasGemmEx" in r.stats["library"]
    assert r.syncs >= 1
    assert [e[0] for e in r.trace if e[0] != "malloc"][:2] == ["kernel", "memcpy"]
    cudasim.reset()
    assert cudasim.stats()["kernels"] == {}


def test_async_mode():
    # Without the wait, t overtakes s; with it, it does not.
    base = """
import numpy as np, cupy as cp
s, t = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
x, y = cp.zeros(4), cp.zeros(4)
mem = cp.cuda.alloc_pinned_memory(32)
host = np.frombuffer(mem, 'd', 4)
host[:] = -1
cp.cuda.Device().synchronize()
with s:
    x += 1
%s
with t:
    y += x
y.get(stream=t, out=host, blocking=False)
print(host[0])
t.synchronize()
print(host[0])
assert not s.done or %r
cp.cuda.Device().synchronize()
assert x.get()[0] == 1
"""
    for wait, want in (("", "0.0"), ("t.wait_event(s.record())", "1.0"), ("s.synchronize()", "1.0")):
        code, out, err = script(base % (wait, wait != ""), CUDASIM_ASYNC="1")
        assert code == 0, err
        assert out.split() == ["-1.0", want], wait
    code, out, err = script(
        """
import cupy as cp
x = cp.arange(5)                       # the default stream and blocking ones wait for each other
s = cp.cuda.Stream()
with s:
    y = x * 2
z = y + 1
print(int(z.sum()))
""",
        CUDASIM_ASYNC="1",
    )
    assert out.split() == ["25"], err
