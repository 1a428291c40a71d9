"""The CuPy backend: CUDA devices. CuPy is imported here, on the first use of a CUDA device, and nowhere earlier.

Work goes to CuPy's current stream of the device, and memory comes from CuPy's allocator. Every method makes its device
the current one while it runs, where it is not: an operation runs where its operands are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from gpuad.array import cublas, cublaslt, deterministic, memory
from gpuad.array.backend import Backend, Formula
from gpuad.array.dtypes import FLOATING
from gpuad.array.indices import index_error
from gpuad.array.order import keeping_order
from gpuad.array.synchronization import waits
from gpuad.errors import DeviceError

cupy: Any = None  # the module, once a CUDA device has been used


def load() -> Any:
    """Import CuPy and return it; DeviceError when it, the driver or a device is missing."""
    global cupy
    if cupy is None:
        if find_spec("cupy") is None:
            raise DeviceError(
                'A CUDA device needs CuPy, which is not installed. Install it with: pip install "gpuad[cuda13]" '
                "(for drivers of CUDA 13) or \"gpuad[cuda12]\"; on the host use device 'cpu'."
            )
        import cupy as module

        device_count(module)
        cupy = module
    return cupy


def device_count(module: Any) -> int:
    """How many CUDA devices there are, at least one; DeviceError when there is none, or no driver."""
    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"There is no CUDA device to use: {error}. The machine needs an NVIDIA GPU and a driver that nvidia-smi "
            "shows; on the host use device 'cpu'."
        ) from error
    if not count:
        raise DeviceError("There is no CUDA device: the driver lists none. See nvidia-smi; on the host use 'cpu'.")
    return count


def current_cuda_index() -> int:
    """The index of CuPy's current device, which "cuda" without an index means."""
    return load().cuda.runtime.getDevice()


def _here(method: Callable) -> Callable:
    """Run a method of a backend with its device as the current one; where memory is short, once more without cache."""

    @functools.wraps(method)
    def run(self: CupyBackend, *arguments: Any, **named: Any) -> Any:
        try:
            if self._current_index() == self.index:
                return method(self, *arguments, **named)
            with self._device:
                return method(self, *arguments, **named)
        except (MemoryError, RuntimeError) as error:
            if not memory.exhausted(error):
                raise
        with self._device:  # outside of the handler, whose exception keeps the frames of the first try alive
            memory.make_room()
            try:
                return method(self, *arguments, **named)
            except (MemoryError, RuntimeError) as error:
                self.explain(error)
                raise

    return run


class CupyBackend(Backend):
    """Arrays are cupy.ndarray of one device; formulas run as CUDA kernels, products in cuBLAS.

    Indices are checked on the device: see check_index.
    """

    language = "cuda"
    fuses_activations = True
    tf32 = False  # whether float32 products may be computed in TF32; gpuad.set_float32_matmul_precision

    def __init__(self, device: Any, index: int) -> None:
        count = device_count(load())
        if index >= count:
            there = "only 'cuda:0'" if count == 1 else f"'cuda:0' to 'cuda:{count - 1}'"
            raise DeviceError(f"'cuda:{index}' is not there: this machine has {count} CUDA device(s), {there}.")
        self.device = device
        self.index = index
        self.array_type = cupy.ndarray
        self.xp = _Namespace(self)
        self._device = cupy.cuda.Device(index)
        self._current_index = cupy.cuda.runtime.getDevice
        self._ones: dict[np.dtype, Any] = {}
        self._fault = _Fault(device)
        self._restoring: list[tuple[np.ndarray, Any]] = []

    # The current device -----------------------------------------------------------------------------------------------

    @property
    def current(self) -> bool:  # type: ignore[override]
        return self._current_index() == self.index

    def inside(self, function: Callable, *arguments: Any, **named: Any) -> Any:
        try:
            with self._device:
                return function(*arguments, **named)
        except (MemoryError, RuntimeError) as error:
            self.explain(error)
            raise

    def explain(self, error: Exception) -> None:
        if memory.exhausted(error):
            with self._device:
                raise memory.out_of_memory(error, self.device) from error

    @_here
    def mark(self) -> Any:
        return cupy.cuda.get_current_stream().record()

    def milliseconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end)

    def range_push(self, name: str) -> None:
        cupy.cuda.nvtx.RangePush(name)

    def range_pop(self) -> None:
        cupy.cuda.nvtx.RangePop()

    def enter(self) -> None:
        self._device.__enter__()

    def leave(self) -> None:
        self._device.__exit__()

    # Between host and devices -----------------------------------------------------------------------------------------

    @_here
    def asarray(self, values: Any, dtype: np.dtype | None = None) -> Any:
        if isinstance(values, cupy.ndarray) and values.data.device_id != self.index:
            raise DeviceError(f"asarray got an array on cuda:{values.data.device_id}; copy it to {self.device} first.")
        return cupy.asarray(values, dtype)

    @_here
    def receive(self, array: Any) -> Any:
        if not isinstance(array, cupy.ndarray):
            # Through pinned memory, in order on the current stream, without a wait.
            return keeping_order(cupy.array, array)
        if array.data.device_id == self.index:
            return keeping_order(self.copy, array)
        return keeping_order(self._from_peer, array)

    def _from_peer(self, array: Any) -> Any:
        """A copy from another CUDA device, after the work on its current stream, and before later work there.

        cudaMemcpyPeerAsync needs no peer access: without it the driver goes through the host.
        """
        there, shape = array.data.device_id, array.shape  # ascontiguousarray makes 0-d arrays 1-d
        with cupy.cuda.Device(there):
            array = cupy.ascontiguousarray(array)
            source = cupy.cuda.get_current_stream()
            written = source.record(cupy.cuda.Event(disable_timing=True))
        made = cupy.empty(shape, array.dtype)
        if made.size:
            stream = cupy.cuda.get_current_stream()
            stream.wait_event(written)
            cupy.cuda.runtime.memcpyPeerAsync(made.data.ptr, self.index, array.data.ptr, there, made.nbytes, stream.ptr)
            read = stream.record(cupy.cuda.Event(disable_timing=True))
            with cupy.cuda.Device(there):
                source.wait_event(read)  # nothing there may write or reuse the memory before
        return made

    @_here
    def to_host(self, array: Any) -> np.ndarray:
        waits(f"Reading a {array.dtype} tensor of shape {array.shape} on the host", self.device)
        host = keeping_order(cupy.ndarray.get, array)
        self._fault.check()
        return host

    @_here
    def offload(self, array: Any, pinned: bool) -> Any:
        if not pinned or not array.size:
            return self.to_host(array)
        memory = cupy.cuda.alloc_pinned_memory(array.nbytes)
        host = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
        cupy.ascontiguousarray(array).get(out=host, blocking=False)
        return _Offloaded(host, cupy.cuda.get_current_stream().record(cupy.cuda.Event(disable_timing=True)))

    @_here
    def restore(self, host: Any) -> Any:
        if not isinstance(host, _Offloaded):
            return self.receive(host)
        stream = cupy.cuda.get_current_stream()
        stream.wait_event(host.copied)
        made = cupy.empty(host.array.shape, host.array.dtype)
        made.set(host.array)
        # The pinned memory may not be used again before it was read.
        self._restoring = [(each, read) for each, read in self._restoring if not read.done]
        self._restoring.append((host.array, stream.record(cupy.cuda.Event(disable_timing=True))))
        return made

    @_here
    def synchronize(self) -> None:
        self._device.synchronize()
        self._fault.check()

    def check_faults(self) -> None:
        self._fault.check()

    def uploader(self, depth: int) -> Any:
        from gpuad.array.streams import Uploader

        return Uploader(self._device, depth)

    def record_stream(self, array: Any, stream: Any) -> None:
        from gpuad.array.streams import record_stream

        record_stream(array, stream)

    # Arrays -----------------------------------------------------------------------------------------------------------

    @_here
    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return cupy.ndarray(shape, dtype)

    @_here
    def full(self, shape: tuple[int, ...], value: Any, dtype: np.dtype) -> Any:
        made = cupy.ndarray(shape, dtype)
        made.fill(value)  # 0 by a memset, which is cheaper than a kernel
        if value == 0 and math.copysign(1.0, value) < 0.0:
            cupy.negative(made, made)
        return made

    @_here
    def ones_scalar(self, dtype: np.dtype) -> Any:
        found = self._ones.get(dtype)
        if found is None:
            found = self._ones[dtype] = cupy.ones((), dtype)
        return found

    @_here
    def cast(self, array: Any, dtype: np.dtype) -> Any:
        return array.astype(dtype, copy=False)

    @_here
    def copy(self, array: Any) -> Any:
        return array.copy("C")

    # Computing --------------------------------------------------------------------------------------------------------

    @_here
    def elementwise(self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, outs: Any = None) -> Any:
        runner = formula.runner("cuda")
        if outs is not None and any([o.dtype != formula.out_dtype(i, dtype) for i, o in enumerate(outs)]):
            for out, result in zip(outs, runner(arguments, dtype), strict=True):
                cupy.copyto(out, result, casting="unsafe")
            results = outs
        else:
            results = runner(arguments, dtype, outs)
        return results[0] if len(results) == 1 else results

    @_here
    def reduce(
        self,
        formula: Formula,
        arguments: Sequence[Any],
        dtype: np.dtype,
        axes: tuple[int, ...],
        keepdims: bool,
        scale: float = 1.0,
    ) -> Any:
        return formula.runner("cuda").reduce(arguments, dtype, axes, keepdims, scale)

    @_here
    def elementwise_and_sum(
        self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, out: Any, axes: tuple[int, ...], total: Any
    ) -> Any:
        return formula.runner("cuda").reduce(arguments, dtype, axes, False, 1.0, total, out)

    @_here
    def sum(
        self, array: Any, axes: tuple[int, ...], keepdims: bool = False, out: Any = None, scale: float = 1.0
    ) -> Any:
        return self.identity.runner("cuda").reduce((array,), array.dtype, axes, keepdims, scale, out)

    @_here
    def add(self, a: Any, b: Any) -> Any:
        return cupy.add(a, b)

    @_here
    def add_into(self, buffer: Any, b: Any) -> None:
        cupy.add(buffer, b, buffer)

    @_here
    def gemm(self, a: Any, b: Any, out: Any = None, alpha: float = 1.0, beta: float = 0.0) -> Any:
        if a.dtype.char not in FLOATING:
            product = cupy.matmul(a, b)
        elif out is None or out.flags.c_contiguous:
            return cublas.gemm(a, b, out, alpha=alpha, beta=beta, tf32=self.tf32)
        else:  # a buffer with gaps, such as a gradient that the user put there
            product, alpha = cublas.gemm(a, b, alpha=alpha, tf32=self.tf32), 1.0
        if alpha != 1.0:
            product *= alpha
        if out is None:
            return product
        if beta != 0.0:
            product += out if beta == 1.0 else out * beta
        out[...] = product
        return out

    @_here
    def linear_activation(self, x: Any, weight: Any, bias: Any, activation: str | None, keep: bool) -> Any:
        return cublaslt.linear(x, weight, bias, activation, keep, self.tf32) if cublaslt.available() else None

    @_here
    def weight_gradient(self, g: Any, x: Any, out: Any, beta: float, total: Any) -> Any:
        return cublaslt.weight_gradient(g, x, out, beta, total, self.tf32) if cublaslt.available() else None

    @_here
    def input_gradient(self, g: Any, weight: Any, kept: Any, summed: bool, total: Any) -> Any:
        return cublaslt.input_gradient(g, weight, kept, summed, total, self.tf32)

    @_here
    def linear(self, x: Any, weight: Any, bias: Any) -> Any:
        if bias is not None and x.dtype.char in FLOATING:
            found = self.linear_activation(x, weight, bias, None, False)
            if found is not None:
                return found[0]
        product = self.gemm(x, weight.T)
        if bias is not None:
            self.add_into(product, bias)
        return product

    @_here
    def prepare_update(self, program: Any, sets: Sequence[tuple[Any, list]]) -> None:
        program.ready(sets)

    def peek(self, flag: Any) -> bool | None:
        return None

    @_here
    def run(self, function: Callable, *arguments: Any) -> Any:
        return function(*arguments)

    # Indices ----------------------------------------------------------------------------------------------------------

    @_here
    def check_index(self, index: Any, length: int, what: str, wrap_negative: bool = True) -> None:
        if index.dtype.kind in "iu" and index.size:
            address, code = self.fault(what)
            _check_kernel()(index, -length if wrap_negative else 0, length, address, code)

    def fault(self, what: str) -> tuple[int, int]:
        """For a kernel that checks indices itself: the address of this device's record, and the code of `what`.

        The kernel, with gpuad.array.cupy_backend.FAULT_SOURCE in its preamble, calls
        gpuad_fault(address, code, index, position, low, length) where an index is not in low … length − 1.
        """
        return self._fault.address(), self._fault.code(what)

    def check_labels(self, labels: Any, classes: int, ignore: int) -> bool:
        return False  # the row kernel checks them, and leaves out what is to be ignored

    @_here
    def rows(self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...]) -> list[Any]:
        return formula.runner("cuda")(arguments, dtype, axes)

    @_here
    def row_total(
        self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], weighted: bool,
        scale: float, mean: bool,
    ) -> tuple[Any, Any, list[Any]]:  # fmt: skip
        summed = 2 if weighted else 1
        both, *others = formula.runner("cuda").total(arguments, dtype, axes, summed, scale, weighted and mean)
        return both[0:1].reshape(()), both[1:2].reshape(()), others

    @_here
    def read_at(self, array: Any, key: Any) -> Any:
        if any([getattr(part, "dtype", None) == np.bool_ for part in key]):
            waits(f"Indexing a tensor of shape {array.shape} with a bool tensor", self.device)
        return array[key]

    @_here
    def add_at(self, out: Any, key: Any, values: Any) -> None:
        if deterministic.are_deterministic_algorithms_enabled() and out.dtype.char in "fd":
            deterministic.add_at(cupy, out, key, values)
            return
        if out.dtype.char in "fdilqILQ":
            cupy.add.at(out, key, values)
            return
        # What has 16 bits is accumulated in float32, as in sums; the small integers have no atomic addition.
        wide = out.astype(np.float32 if out.dtype.char in FLOATING else np.int32)
        self.add_at(wide, key, values.astype(wide.dtype))
        cupy.copyto(out, wide, casting="unsafe")


class _Namespace:
    """The module cupy for one device: what its functions make lies there, whatever the current device is."""

    def __init__(self, backend: CupyBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(cupy, name)
        if name in ("ogrid", "mgrid"):
            found = _Grid(self._backend, found)
        elif callable(found) and not isinstance(found, type):
            found = _bound(self._backend, found, name)
        setattr(self, name, found)
        return found


# Functions whose result has a length that only the device knows.
_WAITING = frozenset(["nonzero", "argwhere", "flatnonzero", "unique", "bincount"])


def _bound(backend: CupyBackend, function: Callable, name: str) -> Callable:
    waiting = name in _WAITING
    call = _here(lambda _, *arguments, **named: function(*arguments, **named))

    def run(*arguments: Any, **named: Any) -> Any:
        if waiting:
            waits(f"{name}()", backend.device)
        return call(backend, *arguments, **named)

    return run


class _Offloaded:
    """An array in pinned memory, and the event after which it is there."""

    def __init__(self, array: np.ndarray, copied: Any) -> None:
        self.array, self.copied = array, copied


class _Grid:
    """cupy.ogrid or cupy.mgrid on one device."""

    def __init__(self, backend: CupyBackend, grid: Any) -> None:
        self._backend, self._grid = backend, grid

    def __getitem__(self, key: Any) -> Any:
        return self._backend.inside(self._grid.__getitem__, key)


# Faults: what kernels found wrong with indices ------------------------------------------------------------------------

FAULT_SOURCE = r"""
// The record lies in host memory that the device can write: code, index, position, low, length. First come, first kept.
__device__ inline void gpuad_fault(unsigned long long address, long long code, long long index, long long position,
                                   long long low, long long length) {
  unsigned long long* record = reinterpret_cast<unsigned long long*>(address);
  if (atomicCAS(record, 0ULL, static_cast<unsigned long long>(code)) == 0ULL) {
    record[1] = index; record[2] = position; record[3] = low; record[4] = length;
  }
}
"""


class _Fault:
    """The first bad index on a device since the last synchronisation.

    A kernel writes it to page-locked host memory, so that reading it after a synchronisation copies nothing.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self._record: Any = None
        self._memory: Any = None
        self._names: list[str] = []

    def address(self) -> int:
        """Where the record lies."""
        if self._record is None:
            self._memory = cupy.cuda.alloc_pinned_memory(64)
            self._record = np.frombuffer(self._memory, np.int64, 5)
            self._record[:] = 0
        return self._memory.ptr

    def code(self, what: str) -> int:
        """The number that stands for a kind of index in the record; never 0."""
        if what not in self._names:
            self._names.append(what)
        return self._names.index(what) + 1

    def check(self) -> None:
        """Raise IndexError for the record, and empty it."""
        if self._record is not None and self._record[0]:
            code, index, position, low, length = self._record.tolist()
            self._record[:] = 0
            text = index_error(self._names[code - 1], index, position, low, length)
            raise IndexError(
                f"{text} An operation on {self.device} found it before this point; do not use the results."
            )


@functools.cache
def _check_kernel() -> Any:
    return cupy.ElementwiseKernel(
        "T index, int64 low, int64 length, uint64 address, int64 code",
        "",
        "if (index < low || index >= length) gpuad_fault(address, code, index, i, low, length);",
        "gpuad_check_index",
        preamble=FAULT_SOURCE,
    )
