"""A formula with a sum over axes behind it as one CUDA launch, for operands of any strides.

The axes that are kept and those that are summed are merged as far as the operands allow. A block has threads along the
outputs and threads along the sum; which of the two is threadIdx.x, whose neighbours read neighbouring memory, is
decided by which axis lies innermost. A long sum with few outputs is cut between blocks, see last_block.py; sums are
taken in a fixed order, so the same call gives the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuad.array.dtypes import FLOATING
from gpuad.kernels import last_block
from gpuad.kernels.cuda_source import (
    C_TYPES,
    PREAMBLE,
    RAW_TYPES,
    compute_dtype,
    dtype_codes,
    dtype_names,
    headers,
    write_statements,
)
from gpuad.kernels.expr import Expr

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

THREADS = 256
# Terms that each thread should add before a sum is cut between blocks.
TERMS = 16

_SOURCE = r"""
{headers}{preamble}{last_block}
struct Layout {{ long long v[{words}]; }};
#define OUT_LANE threadIdx.{out_lane}
#define SUM_LANE threadIdx.{sum_lane}
#define OUT_LANES blockDim.{out_lane}
#define SUM_LANES blockDim.{sum_lane}

extern "C" __global__ void __launch_bounds__({threads})
{name}({parameters}{sum}* partials, unsigned int* counters, const Layout layout, const {scale} scale) {{
  __shared__ {sum} shared[{count}][{threads}];
  const long long outputs = layout.v[0], terms = layout.v[1], chunk = layout.v[2];
  const long long o = (long long)blockIdx.x * OUT_LANES + OUT_LANE;
  const unsigned int place = OUT_LANE * SUM_LANES + SUM_LANE;
  {sum} total[{count}] = {{}};
  if (o < outputs) {{
    {kept}
    const long long stop = min((blockIdx.y + 1) * chunk, terms);
    for (long long r = blockIdx.y * chunk + SUM_LANE; r < stop; r += SUM_LANES) {{
      {summed}
      {body}
    }}
  }}
  for (int k = 0; k < {count}; ++k) shared[k][place] = total[k];
  __syncthreads();
  for (unsigned int n = SUM_LANES >> 1; n > 0; n >>= 1) {{
    if (SUM_LANE < n) for (int k = 0; k < {count}; ++k) shared[k][place] += shared[k][place + n];
    __syncthreads();
  }}
  for (int k = 0; k < {count}; ++k) total[k] = shared[k][place];
  const bool writes = SUM_LANE == 0 && o < outputs;
  if (gridDim.y > 1) {{
    if (writes) for (int k = 0; k < {count}; ++k) partials[(blockIdx.y * {count} + k) * outputs + o] = total[k];
    if (!gpuad_is_last_block(counters + blockIdx.x, gridDim.y) || !writes) return;
    for (int k = 0; k < {count}; ++k) {{
      total[k] = 0;
      for (unsigned int y = 0; y < gridDim.y; ++y) total[k] += partials[(y * {count} + k) * outputs + o];
    }}
  }}
  if (writes) {{
    {stores}
  }}
}}
"""


class _Plan(NamedTuple):
    """How a call is launched, made once for each set of shapes and strides."""

    kernel: Any
    grid: tuple[int, int]
    block: tuple[int, int]
    layout: np.ndarray
    partials: int
    shape: tuple[int, ...]


class SumKernel:
    """The sums over axes of the outputs of a formula, called with arrays and numbers in the order of its inputs."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._kernels: dict[tuple, Any] = {}
        self._plans: dict[tuple, _Plan] = {}

    def __call__(
        self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], keepdims: bool, scale: float, out: Any,
        elements: Any = None,
    ) -> Any:  # fmt: skip
        """scale · the sum, a list for several outputs; numbers are computed in `dtype` (float32 for float16).

        out: where the sum of the only output goes. elements: where what is summed goes; it may be an argument.
        """
        import cupy

        arrays = [a if isinstance(a, cupy.ndarray) else None for a in arguments]
        codes = dtype_codes(arguments, cupy.ndarray)
        written = [] if elements is None else [elements]
        arrays += written
        key = (codes, dtype, axes, tuple([None if a is None else (a.shape, a.strides) for a in arrays]))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 1000:
                self._plans.clear()
            plan = self._plans[key] = self._plan(arrays, codes, dtype, axes, bool(written))
        stored = self.formula.out_dtype(0, dtype)
        made = out if out is not None and out.flags.c_contiguous and out.dtype == stored else None
        if made is None:
            made = cupy.ndarray(plan.shape, stored)
        others = [
            cupy.ndarray(plan.shape, self.formula.out_dtype(i, dtype)) for i in range(1, len(self.formula.outputs))
        ]
        if made.size:
            summed = compute_dtype(dtype)
            partials = cupy.ndarray((plan.partials,), _sum_dtype(summed)) if plan.partials else made
            counters = last_block.counters() if plan.partials else made
            number = _scale_dtype(summed).type
            values = [
                a if a is not None else np.int64(x) if v.kind == "label" else np.bool_(x) if v.kind == "mask"
                else summed.type(x)
                for a, x, v in zip(arrays, arguments, self.formula.inputs)
            ]  # fmt: skip
            values += written
            plan.kernel(plan.grid, plan.block, (*values, made, *others, partials, counters, plan.layout, number(scale)))
        if out is not None:
            if made is not out:
                cupy.copyto(out, made.reshape(out.shape), casting="unsafe")
            return out
        results = [made, *others]
        if keepdims:
            full = np.broadcast_shapes(*[a.shape for a in arrays if a is not None])
            results = [r.reshape([1 if i in axes else n for i, n in enumerate(full)]) for r in results]
        return results if others else results[0]

    def _plan(
        self, arrays: Sequence[Any], codes: tuple, dtype: np.dtype, axes: tuple[int, ...], written: bool
    ) -> _Plan:
        shape = np.broadcast_shapes(*[a.shape for a in arrays if a is not None])
        strides = [None if a is None else _strides(a, shape) for a in arrays]
        moving = [s for s in strides if s is not None]
        kept_axes = [i for i in range(len(shape)) if i not in axes]
        kept = _merged(shape, moving, kept_axes)
        summed = _merged(shape, moving, list(axes))
        outputs = math.prod(n for n, _ in kept)
        terms = math.prod(n for n, _ in summed)
        across = bool(kept) and (not summed or _innermost(kept, summed))  # whether neighbours are neighbouring outputs
        block, grid, chunk = _geometry(outputs, terms, across)
        words = [outputs, terms, chunk]
        for n, steps in (*kept, *summed):
            words += [n, *steps]
        layout = np.zeros((), [("v", np.int64, (len(words),))])
        layout["v"] = words
        kernel_key = (codes, dtype, len(kept), len(summed), across, written)
        kernel = self._kernels.get(kernel_key)
        if kernel is None:
            import cupy

            source = self.source(dtype_names(codes), dtype, len(kept), len(summed), across, written)
            kernel = self._kernels[kernel_key] = cupy.RawKernel(source, f"gpuad_{self.formula.name}_sum")
        partials = outputs * grid[1] * len(self.formula.outputs) if grid[1] > 1 else 0
        return _Plan(kernel, grid, block, layout, partials, tuple(shape[i] for i in kept_axes))

    def source(
        self, key: Sequence[str | None], dtype: np.dtype, kept: int, summed: int, across: bool, written: bool = False
    ) -> str:
        """The CUDA C++ for arrays of the dtypes in `key` and so many merged axes.

        across: the innermost one is kept. written: what is summed is written too.
        """
        formula = self.formula
        compute = C_TYPES[compute_dtype(dtype).name]
        parameters, loads = [], []
        names: dict[Expr, str] = {}
        arrays = [i for i, given in enumerate(key) if given is not None]
        for i, (variable, given) in enumerate(zip(formula.inputs, key, strict=True)):
            kind = {"number": compute, "mask": "bool", "label": "long long"}[variable.kind]
            names[variable] = f"u{i}"
            if given is None:
                parameters.append(f"const {kind} u{i}, ")
            else:
                parameters.append(f"const {RAW_TYPES[given]}* p{i}, ")
                loads.append(f"const {kind} u{i} = ({kind})p{i}[e{i}];")
        body = [*loads, *write_statements(formula.outputs, names, compute)]
        if written:
            stored = RAW_TYPES[formula.out_dtype(0, dtype).name]
            parameters.append(f"{stored}* elements, ")
            body.append(f"elements[e{len(key)}] = ({stored}){names[formula.outputs[0]]};")
            arrays.append(len(key))
        total = C_TYPES[_sum_dtype(compute_dtype(dtype)).name]
        stores = []
        for k, output in enumerate(formula.outputs):
            body.append(f"total[{k}] += ({total}){names[output]};")
            stored = RAW_TYPES[formula.out_dtype(k, dtype).name]
            parameters.append(f"{stored}* out{k}, ")
            stores.append(f"out{k}[o] = ({stored})(total[{k}] * scale);")
        return _SOURCE.format(
            headers=headers((*key, dtype.name)),
            preamble=PREAMBLE,
            last_block=last_block.SOURCE,
            words=3 + (kept + summed) * (1 + len(arrays)),
            out_lane="x" if across else "y",
            sum_lane="y" if across else "x",
            threads=THREADS,
            name=f"gpuad_{formula.name}_sum",
            parameters="".join(parameters),
            sum=total,
            count=len(formula.outputs),
            stores="\n    ".join(stores),
            scale=C_TYPES[_scale_dtype(compute_dtype(dtype)).name],
            kept=_offsets("o", "k", arrays, kept, 3, [None] * len(arrays)),
            summed=_offsets("r", "e", arrays, summed, 3 + kept * (1 + len(arrays)), [f"k{i}" for i in arrays]),
            body="\n      ".join(body),
        )


def _sum_dtype(compute: np.dtype) -> np.dtype:
    return np.dtype(np.int64) if compute == np.bool_ else compute


def _scale_dtype(compute: np.dtype) -> np.dtype:
    return compute if compute.char in FLOATING else np.dtype(np.int64)


def _offsets(index: str, name: str, arrays: list[int], axes: int, word: int, start: list[str | None]) -> str:
    """Statements that turn a linear index over merged axes into an offset for each array, from `start` on."""
    step = 1 + len(arrays)
    lines = [f"long long {name}{i} = {begin or 0};" for i, begin in zip(arrays, start, strict=True)]
    if axes > 1:
        lines.append(f"long long {name}_rest = {index};")
    for axis in reversed(range(axes)):
        at = index if axes == 1 else f"{name}_at{axis}"
        if axes > 1 and axis:
            lines.append(f"const long long {at} = {name}_rest % layout.v[{word + axis * step}];")
            lines.append(f"{name}_rest /= layout.v[{word + axis * step}];")
        elif axes > 1:
            lines.append(f"const long long {at} = {name}_rest;")
        for k, i in enumerate(arrays):
            lines.append(f"{name}{i} += {at} * layout.v[{word + axis * step + 1 + k}];")
    return "\n      ".join(lines)


def _strides(array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides over the broadcast shape, in elements."""
    size = array.dtype.itemsize
    own = [0 if n == 1 else s // size for n, s in zip(array.shape, array.strides, strict=True)]
    return (*(0,) * (len(shape) - len(own)), *own)


def _merged(
    shape: tuple[int, ...], strides: list[tuple[int, ...]], axes: list[int]
) -> list[tuple[int, tuple[int, ...]]]:
    """The axes as few as can be: (length, stride of each array); those of length 1 are left out."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for axis in axes:
        n, steps = shape[axis], tuple(s[axis] for s in strides)
        if n == 1:
            continue
        if found and found[-1][1] == tuple(n * s for s in steps):
            found[-1] = (found[-1][0] * n, steps)
        else:
            found.append((n, steps))
    return found


def _innermost(kept: list[tuple[int, tuple[int, ...]]], summed: list[tuple[int, tuple[int, ...]]]) -> bool:
    """Whether more arrays lie with the last kept axis innermost than with the last summed one."""
    ours, theirs = kept[-1][1], summed[-1][1]
    return sum(0 < abs(a) < abs(b) or (a and not b) for a, b in zip(ours, theirs)) > sum(
        0 < abs(b) < abs(a) or (b and not a) for a, b in zip(ours, theirs)
    )


def _geometry(outputs: int, terms: int, across: bool) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(block, grid, terms of each row of blocks): lanes for the outputs and for the sum, powers of two."""
    if across:
        out_lanes = min(32, _power(outputs))
        sum_lanes = min(THREADS // out_lanes, _power(terms))
    else:
        sum_lanes = min(THREADS, max(32, _power(-(-terms // 4))))
        out_lanes = min(THREADS // sum_lanes, _power(outputs))
    tiles = max(1, -(-outputs // out_lanes))
    parts = 1
    if tiles < min(last_block.BLOCKS, last_block.COUNTERS):
        parts = max(1, min(last_block.BLOCKS // tiles, terms // (sum_lanes * TERMS)))
    chunk = -(-terms // parts) if terms else 0
    parts = max(1, -(-terms // chunk)) if chunk else 1
    block = (out_lanes, sum_lanes) if across else (sum_lanes, out_lanes)
    return block, (tiles, parts), chunk


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
