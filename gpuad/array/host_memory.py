"""Memory of arrays on the host: aligned, and of large arrays used again instead of being given back to the system.

A fresh array of 16 MiB costs a page fault for every 4 KiB when it is first written, as much time as computing it. So
the memory of large arrays stays in a pool, and an array that nobody holds any more hands its memory to the next one of
its size. What tells is the reference count of the memory, which every array and view on it holds.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

# From this many bytes an array's memory comes from the pool; below, malloc keeps it anyway.
LARGE = 1 << 20
# The pool holds at most this many bytes, in use or not; what goes beyond is plain memory.
LIMIT = 1 << 29
# Where arrays begin, in bytes: a line of the cache, and what JAX asks of memory that it shares. NumPy's begin at 16.
ALIGNMENT = 64


def aligned(shape: tuple[int, ...], dtype: np.dtype, make: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
    """A C-contiguous array at a multiple of ALIGNMENT, with what `make` (numpy.empty or numpy.zeros) puts there."""
    return _placed(shape, dtype, *_raw(math.prod(shape) * dtype.itemsize, make))


def _raw(size: int, make: Callable[..., np.ndarray] = np.empty) -> tuple[np.ndarray, int]:
    """Bytes for an array of so many, and where among them it begins."""
    raw = make(size + ALIGNMENT, np.uint8)
    return raw, -raw.__array_interface__["data"][0] % ALIGNMENT


def _placed(shape: tuple[int, ...], dtype: np.dtype, raw: np.ndarray, offset: int) -> np.ndarray:
    return np.ndarray(shape, dtype, raw, offset)


class HostMemory:
    """A pool of memory by its size in bytes."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.held = limit, 0
        self._buffers: dict[int, list[tuple[np.ndarray, int]]] = {}
        self._lock = threading.Lock()
        self._idle = self._alone = 0
        self._measure()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A C-contiguous array with any contents; aligned where it is large, else what costs least."""
        return np.empty(shape, dtype) if math.prod(shape) * dtype.itemsize < LARGE else self.aligned(shape, dtype)

    def aligned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A C-contiguous array with any contents at a multiple of ALIGNMENT."""
        size = math.prod(shape) * dtype.itemsize
        if size < LARGE:
            return aligned(shape, dtype)
        with self._lock:
            return _placed(shape, dtype, *self._take(size))

    def _take(self, size: int) -> tuple[np.ndarray, int]:
        raw: Any
        for raw, offset in self._buffers.get(size, ()):
            if sys.getrefcount(raw) == self._idle:
                return raw, offset
        raw = None  # a name for the last one is a reference too
        if self.held + size > self.limit:
            self._drop_idle()
        made = _raw(size)
        if self.held + size <= self.limit:
            self._buffers.setdefault(size, []).append(made)
            self.held += size
        return made

    def _drop_idle(self) -> None:
        for size, buffers in list(self._buffers.items()):
            kept = [(raw, offset) for raw, offset in buffers if sys.getrefcount(raw) != self._idle]
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
        """Whether `array` is the only one on its memory: its own, or made here with no other view on it."""
        base = array.base
        if base is None:
            return True
        if type(base) is not np.ndarray or base.base is not None or base.nbytes != array.nbytes + ALIGNMENT:
            return False
        pooled = any([raw is base for raw, _ in self._buffers.get(array.nbytes, ())])
        return sys.getrefcount(base) == self._alone + pooled

    def _measure(self) -> None:
        """What the counts are for memory that only the pool holds, or one array: interpreters differ."""
        buffers = [_raw(16)]
        raw: Any
        for raw, _ in buffers:
            self._idle = sys.getrefcount(raw)
        array = aligned((4,), np.dtype(np.float32))
        base = array.base
        self._alone = sys.getrefcount(base)


memory = HostMemory()
alone = memory.alone
