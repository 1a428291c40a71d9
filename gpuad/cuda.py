"""CUDA devices: how many there are, which is current, their streams, memory and synchronisations. PyTorch's names.

CuPy is imported on the first call that needs it. Work goes to CuPy's current stream and memory comes from CuPy's
allocator, so CuPy's own `cupy.cuda.Stream`, pools and limits hold for gpuad too.

Crossing streams. Work on one stream is in order; between streams two things are the user's to say:

    side.wait_stream(gpuad.cuda.current_stream())  # 1: side begins after what made its inputs
    with gpuad.cuda.stream(side):
        y = f(x)
    x.record_stream(side)  # 2: x was made elsewhere: its memory must outlast the reader
    gpuad.cuda.current_stream().wait_stream(side)  # 1 again, before y is used here

Freed memory goes back to the stream that it was allocated on, which may get it again at once, since whatever it does
next comes later in that stream. Another stream that still reads it is not asked: hence record_stream. Memory that is
freed after that stream was waited for needs none. Gradients are computed on the stream that is current in backward(),
copies between devices wait for each other by themselves, and gpuad.utils.data.prefetch does all of this for batches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from gpuad.array import memory as _memory
from gpuad.array import random
from gpuad.array import streams as _streams
from gpuad.array import synchronization as _synchronization
from gpuad.array.cupy_backend import CupyBackend as _CupyBackend
from gpuad.array.cupy_backend import current_cuda_index as _current_cuda_index
from gpuad.array.cupy_backend import device_count as _device_count
from gpuad.array.cupy_backend import load as _load
from gpuad.array.device import Device
from gpuad.errors import DeviceError, OutOfMemoryError

__all__ = [
    "DeviceProperties", "Event", "OutOfMemoryError", "Stream", "current_device", "current_stream", "default_stream",
    "device", "device_count", "empty_cache", "get_device_capability", "get_device_name", "get_device_properties",
    "get_sync_debug_mode", "initial_seed", "is_available", "manual_seed", "manual_seed_all", "max_memory_allocated",
    "mem_get_info", "memory_allocated", "memory_reserved", "memory_summary", "reset_peak_memory_stats", "seed",
    "set_device", "set_stream", "set_sync_debug_mode", "stream", "synchronization_count", "synchronize",
]  # fmt: skip


# Devices --------------------------------------------------------------------------------------------------------------


def is_available() -> bool:
    """Whether there is a CUDA device and CuPy to use it; gpuad.device("cuda") says what is missing."""
    return device_count() > 0


def device_count() -> int:
    """How many CUDA devices there are; 0 without CuPy or without a driver."""
    try:
        return _device_count(_load())
    except (DeviceError, ImportError):
        return 0


def current_device() -> int:
    """The index of the current device, which "cuda" stands for."""
    return _current_cuda_index()


def set_device(device: Any) -> None:
    """Make a device the current one of this thread: "cuda" stands for it from now on."""
    _current(device).use()


class device:
    """A context in which a device is the current one; the default device of new tensors stays as it is.

    `with gpuad.device("cuda:1"):` makes it the default device too.
    """

    def __init__(self, device: Any) -> None:
        self._device = None if device is None or device == -1 else _cuda(device)

    def __enter__(self) -> device:
        if self._device is not None:
            self._device.backend.enter()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._device is not None:
            self._device.backend.leave()


class DeviceProperties(NamedTuple):
    """What a device is: its name, compute capability, bytes of memory and number of multiprocessors."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int


def get_device_properties(device: Any = None) -> DeviceProperties:
    """The properties of a device, of the current one unless given."""
    found = _load().cuda.runtime.getDeviceProperties(_cuda(device).index)
    return DeviceProperties(
        found["name"].decode(), found["major"], found["minor"], found["totalGlobalMem"], found["multiProcessorCount"]
    )


def get_device_name(device: Any = None) -> str:
    """The name of a device, of the current one unless given."""
    return get_device_properties(device).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """The compute capability (major, minor) of a device, of the current one unless given."""
    return get_device_properties(device)[1:3]


def _current(device: Any) -> Any:
    """A context in which a CUDA device is CuPy's current one."""
    place: Any = _cuda(device).backend
    return place._device


def _cuda(device: Any) -> Device:
    """A CUDA device from what a user passed; None is the current one."""
    found = Device("cuda" if device is None else device)
    if found.type != "cuda":
        raise DeviceError(f"A CUDA device is needed here, got {str(found)!r}; give 'cuda:<index>' or an index.")
    return found


# Waiting --------------------------------------------------------------------------------------------------------------


def synchronize(device: Any = None) -> None:
    """Wait until a device (the current one unless given) has done all work; raises for bad indices found there."""
    _cuda(device).backend.synchronize()


def set_sync_debug_mode(mode: str | int) -> None:
    """Let what waits for a device pass ("default", 0), warn ("warn", 1) or raise SynchronizationError ("error", 2).

    The text names the line that waited, the innermost one outside gpuad. What waits: item(), numpy(), tolist(),
    printing, cpu(), bool(t), nonzero(), reading with a bool tensor. A wait that is asked for, synchronize(), always
    passes.
    """
    _synchronization.set_mode(mode)


def get_sync_debug_mode() -> int:
    """The mode as a number: 0 "default", 1 "warn", 2 "error"."""
    return _synchronization.MODES.index(_synchronization.state.mode)


def synchronization_count() -> int:
    """How often this process has waited for a device because a value was read on the host."""
    return _synchronization.state.count


# Streams --------------------------------------------------------------------------------------------------------------


class Stream:
    """A queue of work on one device: CuPy's stream (in `.cupy`) by PyTorch's names.

    device: the current one unless given. priority: a lower number goes first.
    """

    def __init__(self, device: Any = None, priority: int = 0, *, cupy: Any = None) -> None:
        self.device = _cuda(device)
        if cupy is None:
            with _current(self.device):
                cupy = _load().cuda.Stream(non_blocking=True, priority=priority or None)
        self.cupy = cupy

    def __repr__(self) -> str:
        return f"gpuad.cuda.Stream(device={str(self.device)!r}, cuda_stream={self.cuda_stream:#x})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stream):
            return NotImplemented
        return other.device is self.device and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash((self.device, self.cuda_stream))

    @property
    def cuda_stream(self) -> int:
        """The cudaStream_t."""
        return self.cupy.ptr

    def synchronize(self) -> None:
        """Wait until the work in this stream is done; raises for bad indices found on its device."""
        self.cupy.synchronize()
        self.device.backend.check_faults()

    def query(self) -> bool:
        """Whether the work in this stream is done."""
        return self.cupy.done

    def wait_event(self, event: Event) -> None:
        """Let later work in this stream wait for what `event` recorded; the host goes on."""
        if event._event is not None:
            self.cupy.wait_event(event._event)

    def wait_stream(self, stream: Stream) -> None:
        """Let later work in this stream wait for the work that is in `stream` now; the host goes on."""
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        """Put an event (a new one unless given) behind the work in this stream, and return it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        self.device.backend.enter()
        self.cupy.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.cupy.__exit__(*exc)
        self.device.backend.leave()


class Event:
    """A mark in a stream that others wait for, and that tells the time; CuPy's event by PyTorch's names.

    Until it is recorded there is nothing to wait for.
    """

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._timing, self._blocking = enable_timing, blocking
        self._event: Any = None
        self._device: Device | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Put the event behind the work that is in `stream` now; in the current stream unless given."""
        stream = current_stream() if stream is None else stream
        with _current(stream.device):
            if self._event is None or self._device is not stream.device:
                self._event = _load().cuda.Event(block=self._blocking, disable_timing=not self._timing)
                self._device = stream.device
            self._event.record(stream.cupy)

    def wait(self, stream: Stream | None = None) -> None:
        """Let later work in `stream` (the current one unless given) wait for this event."""
        (current_stream() if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        """Whether the work before the event is done."""
        return self._event is None or self._event.done

    def synchronize(self) -> None:
        """Wait until the work before the event is done; raises for bad indices found on its device."""
        if self._event is not None and self._device is not None:
            self._event.synchronize()
            self._device.backend.check_faults()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`; both made with enable_timing=True, recorded and done."""
        for which, event in (("first", self), ("second", end_event)):
            if event._event is None:
                raise DeviceError(f"The {which} event was not recorded yet; call event.record() first.")
            if not event._timing:
                raise DeviceError(f"The {which} event takes no time; make it by Event(enable_timing=True).")
        if not end_event.query():
            raise DeviceError("The second event is not reached yet; call end_event.synchronize() first.")
        return _load().cuda.get_elapsed_time(self._event, end_event._event)


def current_stream(device: Any = None) -> Stream:
    """The stream that work on a device (the current one unless given) goes to."""
    place = _cuda(device)
    return Stream(place, cupy=_load().cuda.get_current_stream(place.index))


def default_stream(device: Any = None) -> Stream:
    """The stream that work goes to where nobody chose another."""
    return Stream(_cuda(device), cupy=_load().cuda.Stream.null)


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """A context in which work goes to `stream`, and its device is the current one; None changes nothing.

    A CuPy stream is taken as well.
    """
    if stream is None:
        yield
        return
    if not isinstance(stream, Stream):
        index = getattr(stream, "device_id", -1)
        stream = Stream(None if index < 0 else index, cupy=stream)
    with stream:
        yield


def set_stream(stream: Stream) -> None:
    """Let work on the device of `stream` go to it from now on, and make that device the current one."""
    set_device(stream.device)
    stream.cupy.use()


# Memory ---------------------------------------------------------------------------------------------------------------
# gpuad/array/memory.py says who frees what.


def memory_allocated(device: Any = None) -> int:
    """Bytes that arrays on a device take now, rounded up as CuPy's pool does."""
    with _current(device):
        return _memory.pool().used_bytes()


def memory_reserved(device: Any = None) -> int:
    """Bytes that CuPy's pool holds on a device: those of arrays, and those kept for the next ones."""
    with _current(device):
        return _memory.pool().total_bytes()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """(free, total) bytes of a device, as its driver sees them."""
    return _current(device).mem_info


def empty_cache() -> None:
    """Give the memory that CuPy's pools keep on all devices, and no array uses, back to the driver."""
    cupy = _load()
    _streams.release_done()
    for index in range(device_count()):
        with cupy.cuda.Device(index):
            _memory.empty_cache()
    cupy.get_default_pinned_memory_pool().free_all_blocks()


class _Peaks:
    """Asks the pool after each allocation how much is in use: CuPy's pool keeps no maximum.

    It stands before the allocator that it found; where a user has chosen another since, `watch` stands before that.
    """

    def __init__(self) -> None:
        self.highest: dict[str, int] = {}
        self._index = _load().cuda.runtime.getDevice

    @property
    def watching(self) -> bool:
        return getattr(_load().cuda.get_allocator(), "watched", None) is not None

    def watch(self) -> None:
        if self.watching:
            return
        cuda = _load().cuda
        allocate, used = cuda.get_allocator(), _memory.pool().used_bytes

        def watched(size: int) -> Any:
            made = allocate(size)
            name, now = f"cuda:{self._index()}", used()
            if now > self.highest.get(name, 0):
                self.highest[name] = now
            return made

        watched.watched = allocate  # type: ignore[attr-defined]
        cuda.set_allocator(watched)


@functools.cache
def _peaks() -> _Peaks:
    return _Peaks()


def reset_peak_memory_stats(device: Any = None) -> None:
    """Start max_memory_allocated() of a device anew, at what is allocated now.

    The first call puts a watch before CuPy's allocator, which costs about a microsecond an allocation; until then
    allocations cost nothing extra.
    """
    place = _cuda(device)
    _peaks().watch()
    _peaks().highest[str(place)] = memory_allocated(place)


def max_memory_allocated(device: Any = None) -> int:
    """The most bytes that arrays took at once since reset_peak_memory_stats(); before its first call, those reserved.

    CuPy's pool keeps no maximum of its own; what it holds is an upper bound.
    """
    place = _cuda(device)
    if not _peaks().watching:
        return memory_reserved(place)
    return max(_peaks().highest.get(str(place), 0), memory_allocated(place))


def memory_summary(device: Any = None) -> str:
    """A table of a device's memory, to print."""
    place = _cuda(device)
    free, total = mem_get_info(place)
    rows = {
        "allocated (arrays)": memory_allocated(place),
        "allocated at most": max_memory_allocated(place),
        "reserved (CuPy's pool)": memory_reserved(place),
        "free on the device": free,
        "total on the device": total,
    }
    lines = [f"{place}  {get_device_name(place)}"]
    return "\n".join(lines + [f"  {what:<24} {size / 2**20:>12,.1f} MiB" for what, size in rows.items()])


# Random numbers -------------------------------------------------------------------------------------------------------


def manual_seed(seed: int) -> None:
    """Seed the default generator, which serves every device; as gpuad.manual_seed."""
    random.manual_seed(seed)


manual_seed_all = manual_seed


def seed() -> None:
    """Seed the default generator from the operating system."""
    random.seed()


def initial_seed() -> int:
    """The seed of the default generator."""
    return random.initial_seed()


# Precision ------------------------------------------------------------------------------------------------------------


def set_float32_matmul_precision(precision: str) -> None:
    """Compute float32 products on CUDA in float32 ("highest", the default) or in TF32 ("high", "medium").

    TF32 has 10 bits of mantissa; the products are several times faster on devices since compute capability 8.0.
    """
    if precision not in ("highest", "high", "medium"):
        raise ValueError(
            f"set_float32_matmul_precision takes 'highest', 'high' or 'medium', got {precision!r}; only 'highest' "
            "keeps all of float32."
        )
    _CupyBackend.tf32 = precision != "highest"


def get_float32_matmul_precision() -> str:
    """ "highest" where float32 products on CUDA keep all of float32, else "high"."""
    return "high" if _CupyBackend.tf32 else "highest"
