"""Many arrays of one CUDA device and dtype together, one launch each: their norm, and scaling by a number there.

Like an update (update_cuda.py) the kernels walk a table of lengths and pointers; the norm's last block adds up what
all blocks have left (last_block.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.kernels import last_block
from gpuad.kernels.cuda_source import C_TYPES, PREAMBLE, RAW_TYPES, compute_dtype, headers
from gpuad.kernels.update_cuda import EACH, ROW_OF_BLOCK, TABLE_WORDS, THREADS, Table

_HEAD = r"""
{preamble}
struct Words {{ unsigned long long word[{words}]; }};
#define ROW(row, column) table{member}[(row) * 3 + (column)]
"""
_START = r"""
  {row}
  const long long length = ROW(row, 1);
  const long long start = (long long)(blockIdx.x - (unsigned int)ROW(row, 0)) * {chunk} + threadIdx.x;
  {stored}* x = ({stored}*)ROW(row, 2);
"""
_NORM = (
    _HEAD
    + r"""{last_block}
__device__ inline {T} gpuad_join({T} a, {T} b) {{ return {join}; }}

extern "C" __global__ void __launch_bounds__({threads})
gpuad_norm({table} table, const int rows, const {T} order, {T}* partials, unsigned int* counter, {T}* out) {{
  __shared__ {T} shared[{threads}];
"""
    + _START
    + r"""
  {T} total = 0;
  #pragma unroll
  for (int k = 0; k < {each}; ++k) {{
    const long long i = start + k * {threads};
    if (i < length) {{
      const {T} v = ({T})x[i];
      total = gpuad_join(total, {term});
    }}
  }}
  for (int turn = 0; turn < 2; ++turn) {{
    shared[threadIdx.x] = total;
    __syncthreads();
    for (unsigned int n = {threads} / 2; n > 0; n >>= 1) {{
      if (threadIdx.x < n) shared[threadIdx.x] = gpuad_join(shared[threadIdx.x], shared[threadIdx.x + n]);
      __syncthreads();
    }}
    if (turn) break;
    if (threadIdx.x == 0) partials[blockIdx.x] = shared[0];
    if (!gpuad_is_last_block(counter, gridDim.x)) return;
    total = 0;
    for (unsigned int i = threadIdx.x; i < gridDim.x; i += {threads}) total = gpuad_join(total, partials[i]);
  }}
  if (threadIdx.x == 0) {{ const {T} v = shared[0]; *out = {root}; }}
}}
"""
)
_CLIP = (
    _HEAD
    + r"""
extern "C" __global__ void __launch_bounds__({threads})
gpuad_clip({table} table, const int rows, const {T} max_norm, const {norm}* norm) {{
"""
    + _START
    + r"""
  {T} factor = max_norm / (({T})*norm + ({T})1e-6);
  if (factor > ({T})1) factor = 1;  // a NaN stays one
  #pragma unroll
  for (int k = 0; k < {each}; ++k) {{
    const long long i = start + k * {threads};
    if (i < length) x[i] = ({stored})(({T})x[i] * factor);
  }}
}}
"""
)
_UNSCALE = (
    _HEAD
    + r"""
extern "C" __global__ void __launch_bounds__({threads})
gpuad_unscale({table} table, const int rows, const float* scale, float* found) {{
"""
    + _START
    + r"""
  const {T} inverse = ({T})1 / ({T})*scale;
  bool bad = false;
  #pragma unroll
  for (int k = 0; k < {each}; ++k) {{
    const long long i = start + k * {threads};
    if (i < length) {{
      const {T} value = ({T})x[i];
      bad = bad || !gpuad_isfinite(value);
      x[i] = ({stored})(value * inverse);
    }}
  }}
  if (bad) *found = 1.0f;
}}
"""
)
# By the order: how a term and the root of the sum are made of v, and how two terms are joined.
_ORDERS = {
    1.0: ("fabs(v)", "v", "a + b"),
    2.0: ("v * v", "sqrt(v)", "a + b"),
    math.inf: ("fabs(v)", "v", "gpuad_maximum(a, b)"),
    None: ("pow(fabs(v), order)", "pow(v, 1 / order)", "a + b"),
}


def norm(arrays: Sequence[Any], order: float) -> Any:
    """(Σ |x|ᵖ)^(1/p) over all elements of arrays of one dtype, p = order, 0-d; float16 gives float32. One launch."""
    import cupy

    dtype = arrays[0].dtype
    real = compute_dtype(dtype)
    packed = [x if _is_packed(x) else x.copy("C") for x in arrays]
    table = _table(tuple([(x.size, x.data.ptr) for x in packed]))
    out = cupy.ndarray((), real)
    kind = order if order in _ORDERS else None
    kernel = _norm_kernel(dtype, kind, table.by_value)
    partials = cupy.ndarray((max(1, table.blocks),), real)
    kernel(
        (table.blocks,), (THREADS,),
        (table.words, np.int32(table.rows), real.type(order), partials, last_block.counters(), out),
    )  # fmt: skip
    return out


def clip(arrays: Sequence[Any], max_norm: float, total: Any) -> None:
    """Multiply arrays of one dtype in place by min(1, max_norm / (total + 1e-6)); total: 0-d there. One launch."""
    dtype = arrays[0].dtype
    real = compute_dtype(dtype)
    packed = [x for x in arrays if x.size and _is_packed(x)]
    if packed:
        table = _table(tuple([(x.size, x.data.ptr) for x in packed]))
        kernel = _clip_kernel(dtype, total.dtype, table.by_value)
        kernel((table.blocks,), (THREADS,), (table.words, np.int32(table.rows), real.type(max_norm), total))
    for x in arrays:
        if not _is_packed(x):
            once = x.copy("C")
            clip([once], max_norm, total)
            x[...] = once


def unscale(arrays: Sequence[Any], scale: Any, found: Any) -> None:
    """Divide arrays of one dtype by `scale`, in place; `found` becomes 1 where an element is not finite.

    scale, found: 0-d, float32, on the device. One launch, and three more for each array that has gaps.
    """
    import cupy

    table = _table(tuple([(g.size, g.data.ptr) for g in arrays if _is_packed(g)]))
    if table.rows:
        kernel = _unscale_kernel(arrays[0].dtype, table.by_value)
        kernel((table.blocks,), (THREADS,), (table.words, np.int32(table.rows), scale, found))
    for g in arrays:
        if not _is_packed(g):
            cupy.maximum(found, ~cupy.isfinite(g).all(), found)
            cupy.divide(g, scale, g)


@functools.lru_cache(32)
def _table(rows: tuple[tuple[int, int], ...]) -> Table:
    """Gradients keep their places from step to step, so a table that must lie on the device is written once."""
    return Table([list(rows)])


def _is_packed(x: Any) -> bool:
    return x.flags.c_contiguous or x.flags.f_contiguous


def _fields(dtype: np.dtype, by_value: bool) -> dict[str, Any]:
    return {
        "preamble": headers([dtype.name]) + PREAMBLE, "words": TABLE_WORDS, "threads": THREADS,
        "each": EACH, "chunk": THREADS * EACH, "row": ROW_OF_BLOCK, "stored": RAW_TYPES[dtype.name],
        "T": C_TYPES[compute_dtype(dtype).name], "member": ".word" if by_value else "",
        "table": "const Words" if by_value else "const unsigned long long*",
    }  # fmt: skip


@functools.cache
def _norm_kernel(dtype: np.dtype, order: float | None, by_value: bool) -> Any:
    import cupy

    term, root, join = _ORDERS[order]
    fields = {**_fields(dtype, by_value), "last_block": last_block.SOURCE, "term": term, "root": root, "join": join}
    return cupy.RawKernel(_NORM.format(**fields), "gpuad_norm")


@functools.cache
def _clip_kernel(dtype: np.dtype, norm: np.dtype, by_value: bool) -> Any:
    import cupy

    fields = _fields(dtype, by_value)
    return cupy.RawKernel(_CLIP.format(**fields, norm=C_TYPES[norm.name]), "gpuad_clip")


@functools.cache
def _unscale_kernel(dtype: np.dtype, by_value: bool) -> Any:
    import cupy

    return cupy.RawKernel(_UNSCALE.format(**_fields(dtype, by_value)), "gpuad_unscale")
