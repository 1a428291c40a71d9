"""Work on the host spread over threads: NumPy lets go of Python's lock in its loops."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# Element-operations from which a second thread pays: handing work over takes 50 us, as 600,000 operations do.
THREADED_WORK = 4_000_000

_threads: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_pool: ThreadPoolExecutor | None = None


def get_num_threads() -> int:
    """The number of threads that large elementwise work on the host is spread over."""
    return _threads


def set_num_threads(n: int) -> None:
    """Spread large elementwise work on the host over `n` threads (1: none but the caller's)."""
    global _threads, _pool
    if n < 1:
        raise ValueError(f"set_num_threads takes a positive number, got {n}.")
    _threads, _pool = int(n), None


def parallel(work: Callable[[int, int], None], length: int, operations: int) -> None:
    """work(start, stop) over 0..length, cut between threads when `operations` pays for it."""
    global _pool
    parts = min(_threads, length)
    if parts < 2 or operations < THREADED_WORK:
        work(0, length)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(_threads, thread_name_prefix="gpuad")
    bounds = [length * i // parts for i in range(parts + 1)]
    others = [_pool.submit(work, bounds[i], bounds[i + 1]) for i in range(1, parts)]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads

    def _forget_pool() -> None:
        global _pool
        _pool = None

    os.register_at_fork(after_in_child=_forget_pool)
