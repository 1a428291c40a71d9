"""Memory between streams, pinned host memory, and copies to a CUDA device beside computation.

CuPy's pool has an arena for each stream: freed memory goes back to the stream it was allocated on, at once, and that
stream may get it again while another stream still reads it. So memory that crosses streams is kept until its last
reader is done (`record_stream`), or its own stream waits for that reader (`Uploader`, which owns the stream).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuad.array.cupy_backend import load

# (event behind the last reader, memory kept alive until then)
_kept: list[tuple[Any, Any]] = []


def record_stream(array: Any, stream: Any) -> None:
    """Keep the memory of an array, once nobody holds it, until the work that `stream` has then is done."""
    release_done()
    root = array if array.base is None else array.base
    _at_death(root, _keep, root.data.mem, stream)


def _at_death(root: Any, function: Callable, *arguments: Any) -> None:
    weakref.finalize(root, function, *arguments).atexit = False


def _keep(memory: Any, stream: Any) -> None:
    _kept.append((_event_behind(stream), memory))
    release_done()


def release_done() -> None:
    """Give memory back to the pool whose readers are done; asks, and waits for nothing."""
    _kept[:] = [(event, memory) for event, memory in _kept if not event.done]


def _event_behind(stream: Any) -> Any:
    return stream.record(load().cuda.Event(disable_timing=True))


# Pinned memory --------------------------------------------------------------------------------------------------------


def pinned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A host array in page-locked memory, from which copies to a device run beside the host and the device."""
    count = int(np.prod(shape, dtype=np.int64))
    memory = load().cuda.alloc_pinned_memory(max(1, count * dtype.itemsize))
    return np.frombuffer(memory, dtype, count).reshape(shape)


def is_pinned(array: np.ndarray) -> bool:
    """Whether a host array lies in memory of CuPy's pinned pool."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return type(getattr(base, "obj", base)).__name__ == "PinnedMemoryPointer"  # CuPy's, which may not be imported


class _Slot:
    """The pinned buffers of one batch, and the event behind the copies from them."""

    def __init__(self) -> None:
        self.buffers: dict[int, np.ndarray] = {}
        self.sources: list[np.ndarray] = []  # held while they are copied from
        self.event: Any = None

    def wait(self) -> None:
        """Wait until the copies from this slot are done: its buffers may then be written."""
        if self.event is not None:
            self.event.synchronize()
        self.sources.clear()

    def staged(self, i: int, host: np.ndarray) -> np.ndarray:
        """The contents of a host array in pinned memory of this slot."""
        buffer = self.buffers.get(i)
        if buffer is None or buffer.nbytes < host.nbytes:
            buffer = self.buffers[i] = pinned_empty((host.nbytes,), np.dtype(np.uint8))
        made = buffer[: host.nbytes].view(host.dtype).reshape(host.shape)
        np.copyto(made, host)
        return made


class Uploader:
    """Copies batches of host arrays to one device on a stream of its own, through a ring of `depth` pinned slots."""

    def __init__(self, device: Any, depth: int) -> None:
        self._device = device
        with device:
            self.stream = load().cuda.Stream(non_blocking=True)
        self._ring = [_Slot() for _ in range(depth)]
        self._next = 0

    def takes(self, array: Any) -> bool:
        """Whether an array is one to copy: it lies on the host."""
        return isinstance(array, np.ndarray)

    def send(self, hosts: Sequence[np.ndarray]) -> tuple[list[Any], Any]:
        """Begin to copy; returns the arrays and what `receive` wants. Waits for the copy sent `depth` batches ago."""
        slot = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        slot.wait()
        made = []
        with self._device, self.stream:
            for i, host in enumerate(hosts):
                source = host if host.flags.c_contiguous and is_pinned(host) else slot.staged(i, host)
                array = load().empty(host.shape, host.dtype)
                if host.size:
                    array.data.copy_from_host_async(source.ctypes.data, host.nbytes, self.stream)
                slot.sources.append(source)
                made.append(array)
            slot.event = _event_behind(self.stream)
        return made, slot.event

    def receive(self, arrays: Sequence[Any], event: Any) -> None:
        """Let the current stream use the arrays once they are copied, and this stream reuse them once it is done."""
        with self._device:
            reader = load().cuda.get_current_stream()
            reader.wait_event(event)
            for array in arrays:
                _at_death(array, self._wait_for, reader)

    def _wait_for(self, reader: Any) -> None:
        with self._device:
            self.stream.wait_event(_event_behind(reader))

    def close(self) -> None:
        """Wait until nothing is copied any more, so that the pinned memory can go."""
        for slot in self._ring:
            slot.wait()
