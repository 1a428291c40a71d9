"""Arrays joined along a dimension in one launch, whatever their strides, with zeros where one is missing."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.kernels import join_numpy

# So many arrays are arguments of one kernel, which may have 4 KB of them: at 16 dimensions 272 bytes each.
LIMIT = 12


def join(pieces: Sequence[Any], lengths: Sequence[int], dim: int, out: Any) -> None:
    """Write the pieces, None for zeros, one after the other along `dim` of `out`, which is C-contiguous."""
    if len(pieces) > LIMIT:
        join_numpy.join(pieces, lengths, dim, out)
        return
    if not out.size:
        return
    arguments: list[Any] = []
    end = 0
    for piece, length in zip(pieces, lengths, strict=True):
        end += length
        arguments += [np.int64(end)] if piece is None else [np.int64(end), piece]
    inner = math.prod(out.shape[dim + 1 :])
    kernel = _kernel(tuple([piece is not None for piece in pieces]))
    kernel(*arguments, np.int64(inner), np.int64(out.shape[dim]), out)


@functools.cache
def _kernel(present: tuple[bool, ...]) -> Any:
    import cupy

    parameters, lines, start = [], [], "0"
    for k, there in enumerate(present):
        parameters.append(f"int64 e{k}")
        if there:
            parameters.append(f"raw T g{k}")
        value = f"g{k}[(outer * (e{k} - {start}) + at - {start}) * inner + i % inner]" if there else "T(0)"
        lines.append(f"if (at < e{k}) out = {value};")
        start = f"e{k}"
    return cupy.ElementwiseKernel(
        ", ".join([*parameters, "int64 inner", "int64 length"]),
        "T out",
        "const long long at = i / inner % length, outer = i / inner / length;\n" + "\nelse ".join(lines),
        "gpuad_join",
    )
