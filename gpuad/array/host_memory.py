"""Large arrays on the host: memory that is used again instead of being given back to the system.

A fresh array of 16 MiB costs a page fault for every 4 KiB when it is first written, as much time as computing it. So
the memory of large arrays stays in a pool, and an array that nobody holds any more hands its memory to the next one of
its size. What tells is the reference count of the memory, which every array and view on it holds.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np

# From this many bytes an array's memory comes from the pool; below, malloc keeps it anyway.
LARGE = 1 << 20
# The pool holds at most this many bytes, in use or not; what goes beyond is plain memory.
LIMIT = 1 << 29


class HostMemory:
    """A pool of buffers by their size in bytes."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.held = limit, 0
        self._buffers: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        self._idle = self._alone = 0
        self._measure()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A C-contiguous array with any contents."""
        size = math.prod(shape) * dtype.itemsize
        if size < LARGE:
            return np.empty(shape, dtype)
        with self._lock:
            buffer = self._take(size)
            return np.empty(shape, dtype) if buffer is None else buffer.view(dtype).reshape(shape)

    def _take(self, size: int) -> np.ndarray | None:
        buffers = self._buffers.setdefault(size, [])
        buffer: Any
        for buffer in buffers:
            if sys.getrefcount(buffer) == self._idle:
                return buffer
        buffer = None  # a name for the last one is a reference too
        if self.held + size > self.limit:
            self._drop_idle()
            if self.held + size > self.limit:
                return None
        buffer = np.empty(size, np.uint8)
        self._buffers.setdefault(size, []).append(buffer)
        self.held += size
        return buffer

    def _drop_idle(self) -> None:
        for size, buffers in list(self._buffers.items()):
            kept = [buffer for buffer in buffers if sys.getrefcount(buffer) != self._idle]
            self.held -= size * (len(buffers) - len(kept))
            if kept:
                self._buffers[size] = kept
            else:
                del self._buffers[size]

    def empty_cache(self) -> None:
        """Give back the memory that no array uses."""
        with self._lock:
            self._drop_idle()

    def alone(self, array: np.ndarray) -> bool:
        """Whether `array` is the only one on its memory: a view of nothing, or of a buffer here with no other view."""
        base = array.base
        if base is None:
            return True
        if type(base) is not np.ndarray or base.nbytes != array.nbytes:
            return False
        known = any([b is base for b in self._buffers.get(base.nbytes, ())])
        return known and sys.getrefcount(base) == self._alone

    def _measure(self) -> None:
        """What the counts are for a buffer that nothing uses, and one with a single array: interpreters differ."""
        buffers = [np.empty(4, np.uint8)]
        buffer: Any
        for buffer in buffers:
            self._idle = sys.getrefcount(buffer)
        buffer = None
        array = buffers[0].view(np.float32)
        base = array.base
        self._alone = sys.getrefcount(base)


memory = HostMemory()
alone = memory.alone
