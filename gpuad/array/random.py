"""Random arrays: the same numbers for the same seed on every device.

A `Generator` is a seed and the number of Philox blocks drawn so far. A draw takes the blocks it needs
and fills its array from them, in NumPy or in one CUDA kernel; nothing is copied between devices
and nothing waits. `gpuad.array.philox` says how blocks become numbers.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from gpuad.array import philox
from gpuad.array.device import Device
from gpuad.array.dtypes import FLOATING
from gpuad.array.host_memory import memory
from gpuad.errors import DeviceError, DtypeError, ShapeError

__all__ = [
    "CapturedDraws", "Generator", "Taken", "bernoulli", "default_generator", "dropout", "initial_seed", "integers",
    "manual_seed", "normal", "permutation", "seed", "take_dropout", "uniform",
]  # fmt: skip

DEFAULT_SEED = 67280421310721  # PyTorch's, of a Generator that was given none
_MASK = 0xFFFFFFFFFFFFFFFF
_THREADS = 256


class Generator:
    """A stream of random numbers: a 64-bit seed and an offset in Philox blocks.

    `device` is kept for PyTorch's sake: one generator serves every device, and gives the same numbers on all.
    """

    def __init__(self, device: Any = "cpu") -> None:
        self.device = device
        self._seed = DEFAULT_SEED
        self._offset = 0
        self._lock = threading.Lock()
        self._captures: dict[int, CapturedDraws] = {}

    def __repr__(self) -> str:
        return f"Generator(device={str(self.device)!r}, seed={self._seed}, offset={self._offset})"

    def manual_seed(self, seed: int) -> Generator:
        """Start the stream of `seed`, -2**63 <= seed < 2**64 (a negative one counts from 2**64)."""
        seed = int(seed)
        if not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"manual_seed got {seed}; it takes a seed from -2**63 to 2**64 - 1.")
        with self._lock:
            self._seed, self._offset = seed & _MASK, 0
        return self

    def seed(self) -> int:
        """Start the stream of a seed taken from the operating system, and return that seed."""
        self.manual_seed(int.from_bytes(os.urandom(8), "little"))
        return self._seed

    def initial_seed(self) -> int:
        """The seed that the stream was started with."""
        return self._seed

    def get_state(self) -> np.ndarray:
        """The state as 16 bytes (uint8): seed and offset, as little-endian 64-bit integers."""
        with self._lock:
            return np.array([self._seed, self._offset], "<u8").view(np.uint8)

    def set_state(self, state: Any) -> None:
        """Go on from a state that get_state() gave."""
        data = np.array(state, dtype=np.uint8, order="C")
        if data.shape != (16,):
            raise ShapeError(
                f"set_state got a state of shape {data.shape}; a generator's state has 16 bytes, as get_state() gives."
            )
        with self._lock:
            self._seed, self._offset = (int(word) for word in data.view("<u8"))

    def reserve(self, blocks: int) -> tuple[int, int]:
        """Take `blocks` Philox blocks: (seed, number of the first)."""
        with self._lock:
            first = self._offset
            self._offset = first + blocks
            return self._seed, first

    @contextmanager
    def capture(self, ordinal: int) -> Iterator[CapturedDraws]:
        """Let draws on CUDA device `ordinal` be captured into a graph in this block; enter before the capture begins.

        A captured kernel reads seed and offset from device memory. Call `advance_base()` of what this yields before
        each launch of the graph: the launch then draws what the same calls would have drawn without a graph.
        Draws outside the capturing stream are as always.
        """
        if ordinal in self._captures:
            raise DeviceError(f"This generator is being captured on cuda:{ordinal} already; end that capture first.")
        draws = self._captures[ordinal] = CapturedDraws(self, ordinal)
        try:
            yield draws
        finally:
            del self._captures[ordinal]

    def _reserve_captured(self, ordinal: int, blocks: int) -> tuple[int, int, int]:
        """For a kernel that is being captured: address of its device state, a seed that it ignores, first block."""
        draws = self._captures.get(ordinal)
        if draws is None:
            raise DeviceError(
                f"Random numbers were asked for on cuda:{ordinal} while its stream is being captured, and each replay "
                "would repeat them. Begin the capture inside `with generator.capture(ordinal) as draws:` and call "
                "draws.advance_base() before each replay."
            )
        with self._lock:
            first = draws.blocks
            draws.blocks += blocks
        return draws.state.data.ptr, 0, first


class CapturedDraws:
    """The draws of one captured graph: how many blocks a replay uses, and where the kernels find the base."""

    def __init__(self, generator: Generator, ordinal: int) -> None:
        import cupy

        self.generator = generator
        self.blocks = 0
        with cupy.cuda.Device(ordinal) as self._device:
            self.state = cupy.empty(2, np.uint64)  # seed, base counter

    def advance_base(self) -> None:
        """Take the next replay's blocks from the generator, and tell the device: one tiny kernel, no wait.

        It runs on the device's current stream, on which the graph must be launched next.
        """
        if self.blocks:
            seed, first = self.generator.reserve(self.blocks)
            with self._device:
                _state_kernel()((1,), (1,), (self.state, np.uint64(seed), np.uint64(first)))


@cache
def _state_kernel() -> Any:
    import cupy

    return cupy.RawKernel(
        """extern "C" __global__ void gpuad_set_random_state(
        unsigned long long* state, unsigned long long seed, unsigned long long block) {
    state[0] = seed;
    state[1] = block;
}
""",
        "gpuad_set_random_state",
    )


default_generator = Generator()
default_generator.seed()


def manual_seed(seed: int) -> Generator:
    """Seed the default generator, which serves every device, and return it."""
    return default_generator.manual_seed(seed)


def seed() -> int:
    """Seed the default generator from the operating system, and return the seed."""
    return default_generator.seed()


def initial_seed() -> int:
    """The seed of the default generator."""
    return default_generator.initial_seed()


# ------------------------------------------------------------------------ draws
#
# Common to all: generator None is the default one; device None makes a NumPy array, an ordinal a CuPy array
# there; `out`, a C-contiguous array, is filled in place of a new one and decides shape, dtype and device.


def uniform(
    generator: Generator | None = None,
    shape: tuple[int, ...] = (),
    dtype: Any = np.float32,
    low: float = 0.0,
    high: float = 1.0,
    device: int | None = None,
    *,
    out: Any = None,
) -> Any:
    """Uniform numbers from [low, high): low + u (high - low), u in [0, 1) of 24, 53, 11 (float16) or 8 bits (bfloat16).

    `high` itself can come out by rounding where |low| is large against high - low.
    """
    dtype = _floating("uniform", dtype, out)
    if not high >= low:
        raise ValueError(f"uniform got low={low} and high={high}; low must not be above high.")
    real = np.float64 if dtype.char == "d" else np.float32
    scale = (float(high) - float(low)) * 2.0 ** -philox.UNIFORM_BITS[dtype.char]
    return _draw(philox.uniform(dtype), generator, shape, (real(low), real(scale)), device, out)


def normal(
    generator: Generator | None = None,
    shape: tuple[int, ...] = (),
    dtype: Any = np.float32,
    mean: float = 0.0,
    std: float = 1.0,
    device: int | None = None,
    *,
    out: Any = None,
) -> Any:
    """Normally distributed numbers by Box-Muller; equal on all devices to a few ulps of their magnitude."""
    dtype = _floating("normal", dtype, out)
    if not std >= 0:
        raise ValueError(f"normal got std={std}; a standard deviation is not negative.")
    real = np.float64 if dtype.char == "d" else np.float32
    return _draw(philox.normal(dtype), generator, shape, (real(mean), real(std)), device, out)


def integers(
    generator: Generator | None,
    shape: tuple[int, ...],
    low: int,
    high: int,
    dtype: Any = np.int64,
    device: int | None = None,
    *,
    out: Any = None,
) -> Any:
    """Integers low <= x < high, each with the same probability up to the factor 1 + (high - low) / 2**64."""
    dtype = np.dtype(dtype if out is None else out.dtype)
    low, high = int(low), int(high)
    if low >= high:
        raise ValueError(f"integers got low={low} and high={high}; low must be below high.")
    if dtype.kind not in "iu" and dtype.char not in FLOATING:
        raise DtypeError(f"integers got dtype {dtype}; give an integer or floating dtype.")
    limits = np.iinfo(np.int64 if dtype.char in FLOATING else dtype)
    if low < limits.min or high - 1 > limits.max:
        raise ValueError(f"integers got [{low}, {high}), but {dtype} takes {limits.min} to {limits.max}.")
    arguments = (np.uint64(low & _MASK), np.uint64(high - low & _MASK))
    return _draw(philox.integers(dtype), generator, shape, arguments, device, out)


def bernoulli(
    generator: Generator | None,
    p: Any,
    shape: tuple[int, ...] = (),
    dtype: Any = np.bool_,
    device: int | None = None,
    *,
    out: Any = None,
) -> Any:
    """True (1) with probability p, to 2**-32.

    p: a number in [0, 1], or a floating NumPy or CuPy array on the device of the result, which takes its shape.
    """
    dtype = np.dtype(dtype if out is None else out.dtype)
    if isinstance(p, (int, float)):
        if not 0 <= p <= 1:
            raise ValueError(f"bernoulli got p={p}; a probability lies in [0, 1].")
        return _draw(philox.bernoulli(dtype), generator, shape, (math.ceil(p * 2**32),), device, out)
    _floating("bernoulli", p.dtype, None)
    if out is not None and out.shape != p.shape:
        raise ShapeError(f"bernoulli got p of shape {p.shape} and out of shape {out.shape}; they must be equal.")
    device = None if isinstance(p, np.ndarray) else p.device.id
    return _draw(philox.bernoulli(dtype, p.dtype), generator, p.shape, (p.reshape(-1),), device, out)


class Taken(NamedTuple):
    """Philox blocks taken from a generator: they give the same numbers whenever they are asked.

    state: the address of device memory with seed and base block, for a kernel that is being captured; else 0.
    """

    state: int
    seed: int
    block: int


def take_dropout(generator: Generator | None, size: int, device: int | None = None) -> Taken:
    """The blocks for dropping elements of an array of `size`, as many as `bernoulli` takes."""
    generator = default_generator if generator is None else generator
    return _take(generator, philox.bernoulli(np.dtype(np.bool_)).blocks(size), device)


def dropout(x: Any, p: float, taken: Taken) -> Any:
    """x / p where a Bernoulli draw with probability 0 < p < 1 is 1, else 0: the same elements for the same blocks.

    x: a C-contiguous floating NumPy or CuPy array.
    """
    real = np.float64 if x.dtype.char == "d" else np.float32
    arguments = (x.reshape(-1), real(1.0 / p), min(math.ceil(p * 2**32), 2**32 - 1))
    device = None if isinstance(x, np.ndarray) else x.device.id
    out = _empty(x.shape, x.dtype, device)
    _fill(philox.dropout(x.dtype), taken, out, arguments, device)
    return out


def permutation(generator: Generator | None, n: int, device: int | None = None) -> Any:
    """The integers 0 to n - 1 (int64) in random order: a sort of random words that carry the index in their low bits.

    On CUDA this cannot be captured into a graph, and Thrust's sort may wait for the stream.
    """
    mask = (1 << max(n - 1, 0).bit_length()) - 1
    keys = integers(generator, (n,), 0, 1 << 64, np.uint64, device)
    if device is None:
        return _sorted_order(np, keys, mask)
    import cupy

    with cupy.cuda.Device(device):
        return _sorted_order(cupy, keys, mask)


def _sorted_order(xp: Any, keys: Any, mask: int) -> Any:
    keys &= np.uint64(_MASK ^ mask)
    keys |= xp.arange(keys.size, dtype=np.uint64)
    keys.sort()
    keys &= np.uint64(mask)
    return keys.view(np.int64)


# ------------------------------------------------------------------------ running them


def _floating(what: str, dtype: Any, out: Any) -> np.dtype:
    dtype = np.dtype(dtype if out is None else out.dtype)
    if dtype.char not in philox.UNIFORM_BITS:
        raise DtypeError(f"{what} got dtype {dtype}; it takes float16, bfloat16, float32 or float64.")
    return dtype


def _draw(
    draw: philox.Draw, generator: Generator | None, shape: Any, arguments: tuple[Any, ...], device: int | None, out: Any
) -> Any:
    generator = default_generator if generator is None else generator
    if out is not None:
        shape, device = out.shape, None if isinstance(out, np.ndarray) else out.device.id
    # Made before the blocks are taken: where memory is short, the generator stays where it is.
    result = _empty(shape, draw.dtype, device) if out is None or not out.flags.c_contiguous else out
    _fill(draw, _take(generator, draw.blocks(result.size), device), result, arguments, device)
    if out is not None and result is not out:
        out[...] = result
        return out
    return result


def _empty(shape: tuple[int, ...], dtype: np.dtype, device: int | None) -> Any:
    return memory.aligned(shape, dtype) if device is None else Device("cuda", device).backend.empty(shape, dtype)


def _take(generator: Generator, blocks: int, device: int | None) -> Taken:
    if device is not None and blocks:
        import cupy

        with cupy.cuda.Device(device):
            if cupy.cuda.runtime.streamIsCapturing(cupy.cuda.get_current_stream().ptr):
                return Taken(*generator._reserve_captured(device, blocks))
    return Taken(0, *generator.reserve(blocks))


def _fill(draw: philox.Draw, taken: Taken, out: Any, arguments: tuple[Any, ...], device: int | None) -> None:
    """Fill a C-contiguous array from blocks that were taken."""
    if device is None:
        draw.fill(out.reshape(-1), taken.seed, taken.block, arguments)
    elif out.size:
        import cupy

        grid = (-(-draw.blocks(out.size) // _THREADS),)
        with cupy.cuda.Device(device):
            state, seed, block = taken
            _kernel(draw)(grid, (_THREADS,), (out, out.size, state, np.uint64(seed), block, *arguments))


@cache
def _kernel(draw: philox.Draw) -> Any:
    import cupy

    return cupy.RawKernel(draw.cuda_source, "gpuad_draw", options=("--std=c++17",))
