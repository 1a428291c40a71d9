"""Device memory: who frees what, and what is said when there is none left.

Who frees what. Device memory comes from CuPy's allocator (by default its pool) and goes back to it with the last
reference to the CuPy array, in the order of the stream: nobody waits, and the next array may take the same bytes at
once. gpuad holds references in these places only:

- a Tensor holds its array; a leaf also its .grad. Nodes never point at their outputs, so there are no cycles and no
  collector has to run: memory is back as soon as the last name is gone.
- a Node holds what its op saved, until Walk.run has passed it (unless retain_graph) or the last tensor that it led to
  is gone. The walk holds a gradient until its op has been walked.
- zero_grad leaves the buffer of a gradient below 1 MiB at its leaf (`_grad_buffer`) for the next backward; a backward
  that fails puts it back there. Larger ones go to the pool, so that a step's peak is no higher than PyTorch's.
- optimiser state lives in optimizer.state, as long as the optimiser or its entry does. An Updater looks at arrays
  through weak references only. A table of pointers too long for a kernel's arguments is kept until it changes.
- a backend keeps for each dtype the number 1 that backward passes start from; cuBLAS keeps its workspace.

What is freed stays in CuPy's pool until gpuad.cuda.empty_cache(), or until an allocation would fail without it.

When there is no memory left, the backend's methods let go of the buffers that wait, empty CuPy's cache and run once
more (they allocate before they write, so they can). If that fails too,
gpuad.cuda.OutOfMemoryError goes up. A failed forward changes no tensor but the generator's
counter and what ran to its end before, a failed backward no .grad, a failed optimiser step neither parameters nor
state, so that each can be repeated once memory is free. An exception keeps the frames that it went through, and they
hold tensors: leave the `except` block before trying again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gpuad.errors import OutOfMemoryError

# Put here by gpuad/autograd/live.py: every array that the layers above hold, and what it is to them; and what lets go
# of the arrays that they only keep for later.
holders: Callable[[], Iterable[tuple[Any, str]]] = tuple
let_go: Callable[[], None] = tuple  # type: ignore[assignment]

_SHOWN = 10


def exhausted(error: BaseException) -> bool:
    """Whether an exception of CuPy's says that device memory is used up, from its pool or from the driver itself."""
    kind = type(error)
    if not kind.__module__.startswith(("cupy.", "cupy_backends.")):
        return False
    return isinstance(error, MemoryError) or "cudaErrorMemoryAllocation" in str(error)


def empty_cache() -> None:
    """Give the memory that CuPy's pool keeps on the current device, and no array uses, back to the driver."""
    pool().free_all_blocks()


def make_room() -> None:
    """Before an allocation on the current device is tried again: empty the cache, gradient buffers in wait included."""
    let_go()
    empty_cache()


def pool() -> Any:
    """CuPy's memory pool: that behind its allocator where a user has chosen one, else the default one."""
    import cupy

    allocator = cupy.cuda.get_allocator()
    chosen = getattr(getattr(allocator, "watched", allocator), "__self__", None)  # watched: by gpuad.cuda's peaks
    return chosen if isinstance(chosen, cupy.cuda.MemoryPool) else cupy.get_default_memory_pool()


def out_of_memory(error: BaseException, device: Any) -> OutOfMemoryError:
    """The OutOfMemoryError that takes the place of CuPy's; `device` is the current one."""
    import cupy

    size = getattr(error, "_size", None)
    free, total = cupy.cuda.runtime.memGetInfo()
    used, reserved = pool().used_bytes(), pool().total_bytes()
    limit = pool().get_limit()
    what = "an allocation" if size is None else f"an allocation of {size:,} bytes ({_mib(size)})"
    lines = [
        f"{what[0].upper()}{what[1:]} on {device} failed, also after CuPy's cache was emptied.",
        f"{device} has {_mib(total)} in all and {_mib(free)} free; CuPy's pool holds {_mib(reserved)}, arrays take "
        f"{_mib(used)} of it{f', and its limit is {_mib(limit)}' if limit else ''}.",
    ]
    rows = largest(device.index)
    if rows:
        lines.append("The largest live buffers:")
        lines += [f"  {_mib(size):>12}  {number} × {text}" for size, number, text in rows[:_SHOWN]]
        rest = sum(size for size, _, _ in rows[_SHOWN:])
        lines += [f"  {_mib(rest):>12}  in smaller ones"] if rest else []
    lines.append(
        "Take a smaller batch, compute under gpuad.no_grad() where no gradient is wanted, or drop what is not needed "
        "(del x). The step can then be run again, outside the except block of this error."
    )
    return OutOfMemoryError("\n".join(lines), str(device), size, free, total)


def largest(index: int) -> list[tuple[int, int, str]]:
    """(bytes, how many, what) of the live buffers on CUDA device `index`, the most bytes first."""
    import cupy

    seen: set[int] = set()
    groups: dict[str, tuple[int, int]] = {}
    for array, role in holders():
        if not isinstance(array, cupy.ndarray) or array.data.device_id != index:
            continue
        memory = array.data.mem
        if memory.size and memory.ptr not in seen:
            seen.add(memory.ptr)
            text = f"{array.dtype} {tuple(array.shape)}, {role}"
            size, number = groups.get(text, (0, 0))
            groups[text] = size + memory.size, number + 1
    return sorted([(size, number, text) for text, (size, number) in groups.items()], reverse=True)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
