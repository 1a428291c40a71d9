"""Gradients divided by a loss's scale, and a flag where one is not finite, as a CUDA kernel: one launch for a dtype."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.kernels.cuda_source import C_TYPES, PREAMBLE, compute_dtype
from gpuad.kernels.update_cuda import EACH, HALF, ROW_OF_BLOCK, TABLE_WORDS, THREADS, Table

_SOURCE = r"""
{preamble}
struct Words {{ unsigned long long word[{words}]; }};
#define ROW(row, column) table{member}[(row) * 3 + (column)]

extern "C" __global__ void __launch_bounds__({threads})
gpuad_unscale({table} table, const int rows, const float* scale, float* found) {{
  {row}
  const long long length = ROW(row, 1);
  const long long start = (long long)(blockIdx.x - (unsigned int)ROW(row, 0)) * {chunk} + threadIdx.x;
  {stored}* g = ({stored}*)ROW(row, 2);
  const {compute} inverse = ({compute})1 / ({compute})*scale;
  bool bad = false;
  #pragma unroll
  for (int k = 0; k < {each}; ++k) {{
    const long long i = start + k * {threads};
    if (i < length) {{
      const {compute} value = ({compute})g[i];
      bad = bad || !gpuad_isfinite(value);
      g[i] = ({stored})(value * inverse);
    }}
  }}
  if (bad) *found = 1.0f;
}}
"""


def unscale(arrays: Sequence[Any], scale: Any, found: Any) -> None:
    """Divide arrays of one device and dtype by `scale`, in place; `found` becomes 1 where an element is not finite.

    scale, found: 0-d, float32, on the device. One launch, and three more for each array that has gaps.
    """
    import cupy

    packed = [g for g in arrays if g.flags.c_contiguous or g.flags.f_contiguous]
    table = Table([[(g.size, g.data.ptr) for g in packed]])
    if table.rows:
        kernel = _kernel(arrays[0].dtype, table.by_value)
        kernel((table.blocks,), (THREADS,), (table.words, np.int32(table.rows), scale, found))
    for g in arrays:
        if not (g.flags.c_contiguous or g.flags.f_contiguous):
            cupy.maximum(found, ~cupy.isfinite(g).all(), found)
            cupy.divide(g, scale, g)


def source(dtype: np.dtype, by_value: bool) -> str:
    """The CUDA C++ of the kernel for a dtype; by_value: whether the table of pointers is a kernel argument."""
    return _SOURCE.format(
        preamble=(HALF if dtype == np.float16 else "") + PREAMBLE, words=TABLE_WORDS, threads=THREADS, each=EACH,
        chunk=THREADS * EACH, row=ROW_OF_BLOCK, stored=C_TYPES[dtype.name], compute=C_TYPES[compute_dtype(dtype).name],
        member=".word" if by_value else "", table="const Words" if by_value else "const unsigned long long*",
    )  # fmt: skip


@functools.cache
def _kernel(dtype: np.dtype, by_value: bool) -> Any:
    import cupy

    return cupy.RawKernel(source(dtype, by_value), "gpuad_unscale")
