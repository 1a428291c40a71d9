"""Philox 4x64-10 on both devices: the words of the stream, and how they become numbers.

Block j of the stream of a key is the four words that Philox makes of the counter j + 1, as in
`numpy.random.Philox(key=key).random_raw()`. A `Draw` says how words become elements: element i
comes from word i // per_word alone (or from its pair, for normals), so every thread of a kernel
and every block of a NumPy loop can start anywhere. Both halves of a `Draw` do the same arithmetic
with the same roundings: uniforms, integers and Bernoulli draws are equal bit for bit on every
device, normals up to the few ulps by which the libraries' log, sin and cos differ.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11 (2011).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gpuad.array.dtypes import HALF

__all__ = [
    "CUDA_PHILOX", "UNIFORM_BITS", "WORDS_PER_BLOCK", "Draw", "bernoulli", "dropout", "integers", "normal",
    "philox_numpy", "uniform",
]  # fmt: skip

WORDS_PER_BLOCK = 4

# Device code, usable as a preamble. gpuad_philox writes block `block` of the stream of (key0, key1).
CUDA_PHILOX = r"""
__device__ __forceinline__ void gpuad_philox(unsigned long long key0, unsigned long long key1,
                                             unsigned long long block, unsigned long long* words) {
    const unsigned long long m0 = 0xD2E7470EE14C6C93ULL, m1 = 0xCA5A826395121157ULL;
    unsigned long long c0 = block + 1, c1 = c0 == 0, c2 = 0, c3 = 0;
    #pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long high0 = __umul64hi(m0, c0), high1 = __umul64hi(m1, c2);
        const unsigned long long low0 = m0 * c0, low1 = m1 * c2;
        c0 = high1 ^ c1 ^ key0;  c1 = low1;
        c2 = high0 ^ c3 ^ key1;  c3 = low0;
        key0 += 0x9E3779B97F4A7C15ULL;  key1 += 0xBB67AE8584CAA73BULL;
    }
    words[0] = c0;  words[1] = c1;  words[2] = c2;  words[3] = c3;
}
"""


class _Stream(threading.local):
    """NumPy's Philox, one a thread; the state is set by reusing one dict, in a microsecond."""

    def __init__(self) -> None:
        self.bits: np.random.Philox | None = None  # numpy.random is not imported before the first draw
        self.key = np.zeros(2, np.uint64)
        self.counter = np.zeros(4, np.uint64)
        self.state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self.counter, "key": self.key},
            "buffer": np.zeros(WORDS_PER_BLOCK, np.uint64),
            "buffer_pos": WORDS_PER_BLOCK,
            "has_uint32": 0,
            "uinteger": 0,
        }

    def seek(self, key: int | Sequence[int], counter: int | Sequence[int]) -> Callable[[int], np.ndarray]:
        """Go to the block after `counter`; returns the function that makes the next n words."""
        _split(key, self.key)
        _split(counter, self.counter)
        if self.bits is None:
            self.bits = np.random.Philox(0)
        self.bits.state = self.state
        return self.bits.random_raw


def _split(value: int | Sequence[int], words: np.ndarray) -> None:
    """Write an integer into 64-bit words, the lowest first; a sequence holds the words already."""
    if not isinstance(value, int):
        words[:] = value
    elif 0 <= value < 1 << 64:
        words[0] = value
        words[1:] = 0
    else:
        words[:] = [(value >> (64 * i)) & 0xFFFFFFFFFFFFFFFF for i in range(len(words))]


_stream = _Stream()


def philox_numpy(key: int | Sequence[int], counter: int | Sequence[int], n: int) -> np.ndarray:
    """The first n words of numpy.random.Philox(key=key, counter=counter), as uint64.

    key: an integer below 2**128 or two words. counter: an integer below 2**256 or four words;
    as in NumPy it is raised by one before each block.
    """
    return _stream.seek(key, counter)(n)


@dataclass(frozen=True, eq=False)
class Draw:
    """How words become elements of one dtype, on both devices.

    per_word: elements made of one word. numpy(words, out, *arguments) fills a chunk of `out`.
    cuda: statements that set element v[j] of `value_type`, j < 4 * per_word, from words w[0..3].
    parameters: the kernel's declarations of the arguments.
    """

    name: str
    dtype: np.dtype
    per_word: int
    numpy: Callable[..., None]
    cuda: str
    parameters: str

    def blocks(self, size: int) -> int:
        """Philox blocks that `size` elements use up."""
        return -(-size // (WORDS_PER_BLOCK * self.per_word))

    def fill(self, out: np.ndarray, key: int, block: int, arguments: tuple[Any, ...]) -> None:
        """Fill the 1-D NumPy array `out` from the stream of `key`, beginning with Philox block `block`.

        An argument that is an array has an element for each of `out`.
        """
        step = _CHUNK_WORDS * self.per_word
        words = _stream.seek(key, block)
        for start in range(0, out.size, step):
            chunk = out[start : start + step]
            here = tuple(x[start : start + step] if isinstance(x, np.ndarray) else x for x in arguments)
            self.numpy(words(self.blocks(chunk.size) * WORDS_PER_BLOCK), chunk, *here)

    @property
    def cuda_source(self) -> str:
        """The kernel gpuad_draw: each thread makes one Philox block and the elements of it.

        Where `state` is not null it holds the key and a block number that is added to `block`.
        """
        types = _CUDA_TYPES[self.dtype.char] + self.parameters
        return _KERNEL % {
            "headers": "\n".join(header for name, header in _HEADERS.items() if name in types),
            "philox": CUDA_PHILOX,
            "type": _CUDA_TYPES[self.dtype.char],
            "per_block": WORDS_PER_BLOCK * self.per_word,
            "alignment": min(16, WORDS_PER_BLOCK * self.per_word * self.dtype.itemsize),
            "parameters": self.parameters,
            "body": self.cuda,
        }


UNIFORM_BITS = {"e": 11, "E": 8, "f": 24, "d": 53}  # a uniform's bits, by dtype character

_CHUNK_WORDS = 8192  # 64 KiB of words and as much of temporaries: they stay in the second-level cache

_CUDA_TYPES = {
    "e": "__half", "E": "__nv_bfloat16", "f": "float", "d": "double", "?": "bool",
    "b": "signed char", "B": "unsigned char", "h": "short", "H": "unsigned short", "i": "int", "I": "unsigned int",
    "l": "long long", "q": "long long", "L": "unsigned long long", "Q": "unsigned long long",
}  # fmt: skip

_HEADERS = {"__half": "#include <cuda_fp16.h>", "__nv_bfloat16": "#include <cuda_bf16.h>"}

_KERNEL = r"""
%(headers)s
%(philox)s
typedef unsigned long long word;
typedef %(type)s value_type;
struct __align__(%(alignment)d) values { value_type v[%(per_block)d]; };

extern "C" __global__ void gpuad_draw(value_type* out, word n, const word* state, word key, word block,
                                      %(parameters)s) {
    const word thread = (word)blockIdx.x * blockDim.x + threadIdx.x;
    const word first = thread * %(per_block)d;
    if (first >= n) return;
    if (state) { key = state[0];  block += state[1]; }
    word w[4];
    gpuad_philox(key, 0, block + thread, w);
    values result;
    value_type* v = result.v;
    %(body)s
    if (first + %(per_block)d <= n && (word)(out + first) %% %(alignment)d == 0) {
        *(values*)(out + first) = result;
    } else {
        #pragma unroll
        for (int j = 0; j < %(per_block)d; ++j) if (first + j < n) out[first + j] = v[j];
    }
}
"""

# The j-th 32 bits of a block, low half of a word first: how little-endian NumPy views them.
_BITS32 = "(unsigned int)(w[j >> 1] >> (32 * (j & 1)))"


@cache
def uniform(dtype: np.dtype) -> Draw:
    """Arguments (low, scale), scale = (high - low) / 2**bits: low + scale * the upper bits of 32 (double: 64).

    24 bits for float32, 53 for float64; 11 for float16 and 8 for bfloat16, computed in float32 and rounded at the end.
    """
    if dtype.char == "d":
        return Draw("uniform", dtype, 1, _uniform64, """
    #pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __dadd_rn(__dmul_rn((double)(w[j] >> 11), scale), low);
""", "double low, double scale")  # fmt: skip
    shift = 32 - UNIFORM_BITS[dtype.char]

    def numpy(words: np.ndarray, out: np.ndarray, low: np.float32, scale: np.float32) -> None:
        bits = words.view(np.uint32)[: out.size]
        bits >>= shift
        x = out if dtype.char == "f" else np.empty(out.size, np.float32)
        x[...] = bits
        x *= scale
        if low != 0:
            x += low
        if x is not out:
            out[...] = x

    return Draw("uniform", dtype, 2, numpy, f"""
    #pragma unroll
    for (int j = 0; j < 8; ++j) {{
        v[j] = (value_type)__fadd_rn(__fmul_rn((float)({_BITS32} >> {shift}), scale), low);
    }}
""", "float low, float scale")  # fmt: skip


def _uniform64(words: np.ndarray, out: np.ndarray, low: np.float64, scale: np.float64) -> None:
    words >>= 11
    out[...] = words.view(np.int64)[: out.size]  # below 2**53; the signed conversion is the faster one
    out *= scale
    if low != 0:
        out += low


@cache
def normal(dtype: np.dtype) -> Draw:
    """Arguments (mean, std): Box-Muller, elements 2j and 2j + 1 are the cosine and sine of pair j.

    radius = std sqrt(-2 log((a + 1/2) / 2**bits)), angle = pi b / 2**(bits - 1), with the first a of the pair's
    numbers unsigned and the second b signed; of 32 bits (float64: 53). 16 bits are computed in float32.
    """
    if dtype.char == "d":
        code, real, suffix = "w[2 * j] >> 11", "double", ""
        angle, pair = "(long long)w[2 * j + 1] >> 11", ("__dmul_rn", "__dadd_rn")
        bits = 53
    else:
        code, real, suffix = "(unsigned int)w[j]", "float", "f"
        angle, pair = "(int)(w[j] >> 32)", ("__fmul_rn", "__fadd_rn")
        bits = 32
    mul, add = pair
    per_word = 1 if real == "double" else 2
    body = f"""
    #pragma unroll
    for (int j = 0; j < {2 * per_word}; ++j) {{
        const {real} u = {add}({mul}(({real})({code}), ({real}){2.0**-bits!r}), ({real}){2.0 ** -(bits + 1)!r});
        const {real} radius = {mul}(sqrt{suffix}({real}(-2) * log{suffix}(u)), std);
        {real} sine, cosine;
        sincos{suffix}({mul}(({real})({angle}), ({real}){np.pi * 2.0 ** (1 - bits)!r}), &sine, &cosine);
        v[2 * j] = (value_type){add}({mul}(radius, cosine), mean);
        v[2 * j + 1] = (value_type){add}({mul}(radius, sine), mean);
    }}
"""
    return Draw("normal", dtype, per_word, _normal, body, f"{real} mean, {real} std")


def _normal(words: np.ndarray, out: np.ndarray, mean: np.floating, std: np.floating) -> None:
    bits: int
    unsigned: np.ndarray
    signed: np.ndarray
    if out.dtype.char == "d":
        bits, unsigned, signed = 53, words >> 11, words.view(np.int64) >> 11
    else:
        bits, unsigned, signed = 32, words.view(np.uint32), words.view(np.int32)
    real = std.dtype
    radius = unsigned[0::2].astype(real)
    radius *= real.type(2.0**-bits)
    radius += real.type(2.0 ** -(bits + 1))
    np.log(radius, radius)
    radius *= real.type(-2)
    np.sqrt(radius, radius)
    radius *= std
    angle = signed[1::2].astype(real)
    angle *= real.type(np.pi * 2.0 ** (1 - bits))
    x = out if out.dtype == real else np.empty(out.size, real)
    pairs = out.size // 2
    np.multiply(radius[: x[0::2].size], np.cos(angle[: x[0::2].size]), x[0::2])
    np.multiply(radius[:pairs], np.sin(angle[:pairs], angle[:pairs]), x[1::2])
    if mean != 0:
        x += mean
    if x is not out:
        out[...] = x


@cache
def integers(dtype: np.dtype) -> Draw:
    """Arguments (low, span) as uint64: low + the upper 64 bits of word * span; span 0 stands for 2**64.

    No value is likelier than another by more than the factor 1 + span / 2**64.
    """
    cast = "(value_type)(float)(long long)" if dtype.char in HALF else "(value_type)(long long)"
    return Draw("integers", dtype, 1, _integers, f"""
    #pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = {cast}(low + (span ? __umul64hi(w[j], span) : w[j]));
""", "word low, word span")  # fmt: skip


def _integers(words: np.ndarray, out: np.ndarray, low: np.uint64, span: np.uint64) -> None:
    words = words[: out.size]
    if span:
        words = _multiply_high(words, int(span))
    words += low
    out[...] = words.view(np.int64)


def _multiply_high(words: np.ndarray, span: int) -> np.ndarray:
    """The upper 64 bits of words * span by 32-bit halves; `words` is overwritten."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    span_high, span_low = np.uint64(span >> 32), np.uint64(span & 0xFFFFFFFF)
    high = words >> half
    words &= mask
    middle = words * span_low
    middle >>= half
    if not span_high:
        high *= span_low
        high += middle
        high >>= half
        return high
    cross = high * span_low
    middle += cross & mask
    words *= span_high
    middle += words
    middle >>= half
    cross >>= half
    high *= span_high
    high += cross
    high += middle
    return high


@cache
def bernoulli(dtype: np.dtype, probabilities: np.dtype | None = None) -> Draw:
    """True where 32 random bits, as a fraction of 2**32, are below p.

    Argument: ceil(p * 2**32), or the array of all p if `probabilities` gives its dtype.
    """
    one = "(value_type)(float)" if dtype.char in HALF else "(value_type)"
    bits = _BITS32
    if probabilities is None:
        below, parameters = f"{bits} < threshold", "word threshold"
    else:
        below = f"first + j < n && (double){bits} < (double)p[first + j] * 4294967296.0"
        parameters = f"const {_CUDA_TYPES[probabilities.char]}* p"
    return Draw("bernoulli", dtype, 2, _bernoulli, f"""
    #pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = {one}({below});
""", parameters)  # fmt: skip


def _bernoulli(words: np.ndarray, out: np.ndarray, threshold: Any) -> None:
    bits = words.view(np.uint32)[: out.size]
    if isinstance(threshold, np.ndarray):
        out[...] = bits < threshold.astype(np.float64) * 2.0**32
    elif threshold >> 32:
        out[...] = 1
    elif out.dtype.char == "?":
        np.less(bits, np.uint32(threshold), out)
    else:
        out[...] = bits < np.uint32(threshold)


@cache
def dropout(dtype: np.dtype) -> Draw:
    """x scale where 32 random bits, as a fraction of 2**32, are below p, else 0: what `bernoulli` says True for.

    Arguments: the array of all x, scale, ceil(p * 2**32). 16 bits are computed in float32.
    """
    real = "double" if dtype.char == "d" else "float"
    return Draw("dropout", dtype, 2, _dropout, f"""
    #pragma unroll
    for (int j = 0; j < 8; ++j) {{
        v[j] = (value_type)(first + j < n && {_BITS32} < threshold ? ({real})x[first + j] * scale : ({real})0);
    }}
""", f"const value_type* x, {real} scale, word threshold")  # fmt: skip


def _dropout(words: np.ndarray, out: np.ndarray, x: np.ndarray, scale: np.floating, threshold: int) -> None:
    kept = words.view(np.uint32)[: out.size] < np.uint32(threshold)
    np.multiply(x, scale, out, casting="same_kind")
    bits = out.view(f"i{out.itemsize}")  # masked by its bits: 0 also for what is not finite
    bits &= np.negative(kept.view(np.int8), dtype=bits.dtype)
