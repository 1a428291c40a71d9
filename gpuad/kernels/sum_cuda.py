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
from gpuad.kernels.strides_cuda import Axis, broadcast_strides, merged, offsets, words

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

THREADS = 256
# Terms that each thread should add before a sum is cut between blocks.
TERMS = 16

# A tile is what one block has of the outputs, a part what it has of the sum; they follow each other along the grid.
_SOURCE = r"""
struct SumLayout {{ long long v[{words}]; }};
#define OUT_LANE threadIdx.{out_lane}
#define SUM_LANE threadIdx.{sum_lane}
#define OUT_LANES blockDim.{out_lane}
#define SUM_LANES blockDim.{sum_lane}

__device__ inline void gpuad_sums({parameters}) {{
  __shared__ {sum} shared[{count}][{threads}];
  const long long outputs = layout.v[0], terms = layout.v[1], chunk = layout.v[2];
  const unsigned int tiles = layout.v[3], parts = layout.v[4];
  const unsigned int tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
  const long long o = (long long)tile * OUT_LANES + OUT_LANE;
  const unsigned int place = OUT_LANE * SUM_LANES + SUM_LANE;
  {sum} total[{count}] = {{}};
  if (o < outputs) {{
    {kept}
    const long long stop = min((part + 1) * chunk, terms);
    for (long long r = part * chunk + SUM_LANE; r < stop; r += SUM_LANES) {{
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
  if (parts > 1) {{
    if (writes) for (int k = 0; k < {count}; ++k) partials[(part * {count} + k) * outputs + o] = total[k];
    if (!gpuad_is_last_block(counters + tile, parts) || !writes) return;
    for (int k = 0; k < {count}; ++k) {{
      total[k] = 0;
      for (unsigned int y = 0; y < parts; ++y) total[k] += partials[(y * {count} + k) * outputs + o];
    }}
  }}
  if (writes) {{
    {stores}
  }}
}}
"""
_KERNEL = r"""
{headers}{preamble}{last_block}{source}
extern "C" __global__ void __launch_bounds__({threads}) {name}({parameters}) {{ gpuad_sums({names}); }}
"""


class SumPlan(NamedTuple):
    """How a call is cut into blocks, made once for each set of shapes and strides."""

    blocks: int
    block: tuple[int, int]
    layout: np.ndarray
    partials: int
    shape: tuple[int, ...]
    # How many merged axes are kept and summed; whether the innermost is kept, and what is summed is written.
    variant: tuple[int, int, bool, bool]


class SumKernel:
    """The sums over axes of the outputs of a formula, called with arrays and numbers in the order of its inputs."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._kernels: dict[tuple, Any] = {}
        self._plans: dict[tuple, tuple[SumPlan, Any]] = {}

    def __call__(
        self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], keepdims: bool, scale: float, out: Any,
        elements: Any = None,
    ) -> Any:  # fmt: skip
        """scale · the sum, a list for several outputs; numbers are computed in `dtype` (float32 for 16 bits).

        out: where the sum of the only output goes. elements: where what is summed goes; it may be an argument.
        """
        import cupy

        arrays = [a if isinstance(a, cupy.ndarray) else None for a in arguments]
        codes = dtype_codes(arguments, cupy.ndarray)
        written = [] if elements is None else [elements]
        arrays += written
        key = (codes, dtype, axes, tuple([None if a is None else (a.shape, a.strides) for a in arrays]))
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) > 1000:
                self._plans.clear()
            plan = self.plan(arrays, axes, written=bool(written))
            found = self._plans[key] = plan, self._kernel(codes, dtype, plan)
        plan, kernel = found
        stored = self.formula.out_dtype(0, dtype)
        given = out if out is not None and out.flags.c_contiguous and out.dtype == stored else None
        results = self.outputs(plan, dtype, given)
        made = results[0]
        if made.size:
            kernel((plan.blocks,), plan.block, self.call(plan, arguments, dtype, scale, [*written, *results]))
        if out is not None:
            if made is not out:
                cupy.copyto(out, made.reshape(out.shape), casting="unsafe")
            return out
        if keepdims:
            full = np.broadcast_shapes(*[a.shape for a in arrays if a is not None])
            results = [r.reshape([1 if i in axes else n for i, n in enumerate(full)]) for r in results]
        return results if len(results) > 1 else results[0]

    def outputs(self, plan: SumPlan, dtype: np.dtype, first: Any = None) -> list[Any]:
        """Arrays for the sums; `first` is that of the first, where given."""
        import cupy

        dtypes = [self.formula.out_dtype(i, dtype) for i in range(len(self.formula.outputs))]
        made = [cupy.ndarray(plan.shape, d) for d in (dtypes if first is None else dtypes[1:])]
        return made if first is None else [first, *made]

    def call(
        self, plan: SumPlan, arguments: Sequence[Any], dtype: np.dtype, scale: float, outputs: Sequence[Any]
    ) -> tuple[Any, ...]:
        """The arguments of the kernel."""
        import cupy

        compute = compute_dtype(dtype)
        partials = cupy.ndarray((plan.partials,), _sum_dtype(compute)) if plan.partials else outputs[0]
        counters = last_block.counters() if plan.partials else outputs[0]
        values = [
            a if isinstance(a, cupy.ndarray)
            else np.int64(a) if v.kind == "label" else np.bool_(a) if v.kind == "mask" else compute.type(a)
            for a, v in zip(arguments, self.formula.inputs, strict=True)
        ]  # fmt: skip
        return (*values, *outputs, partials, counters, plan.layout, _scale_dtype(compute).type(scale))

    def plan(
        self,
        arrays: Sequence[Any],
        axes: tuple[int, ...],
        block: tuple[int, int] | None = None,
        written: bool = False,
    ) -> SumPlan:
        """The plan for arrays (None for numbers); block: the threads of a block, where they are given.

        written: whether what is summed is written too, to the last of the arrays.
        """
        shape = np.broadcast_shapes(*[a.shape for a in arrays if a is not None])
        moving = [broadcast_strides(a, shape) for a in arrays if a is not None]
        kept_axes = [i for i in range(len(shape)) if i not in axes]
        kept = merged(shape, moving, kept_axes)
        summed = merged(shape, moving, list(axes))
        outputs = math.prod(n for n, _ in kept)
        terms = math.prod(n for n, _ in summed)
        across = bool(kept) and (not summed or _innermost(kept, summed))  # whether neighbours are neighbouring outputs
        block, (tiles, parts), chunk = _geometry(outputs, terms, across, block)
        numbers = [outputs, terms, chunk, tiles, parts, *words(kept), *words(summed)]
        layout = np.zeros((), [("v", np.int64, (len(numbers),))])
        layout["v"] = numbers
        partials = outputs * parts * len(self.formula.outputs) if parts > 1 else 0
        variant = (len(kept), len(summed), across, written)
        return SumPlan(tiles * parts, block, layout, partials, tuple(shape[i] for i in kept_axes), variant)

    def _kernel(self, codes: tuple, dtype: np.dtype, plan: SumPlan) -> Any:
        import cupy

        found = self._kernels.get((codes, dtype, plan.variant))
        if found is None:
            names = dtype_names(codes)
            source, parameters = self.source(names, dtype, plan.variant)
            name = f"gpuad_{self.formula.name}_sum"
            text = _KERNEL.format(
                headers=headers((*names, dtype.name)),
                preamble=PREAMBLE,
                last_block=last_block.SOURCE,
                source=source,
                threads=THREADS,
                name=name,
                parameters=", ".join(parameters),
                names=names_of(parameters),
            )
            found = self._kernels[codes, dtype, plan.variant] = cupy.RawKernel(text, name)
        return found

    def source(
        self, key: Sequence[str | None], dtype: np.dtype, variant: tuple[int, int, bool, bool]
    ) -> tuple[str, list[str]]:
        """The CUDA C++ function gpuad_sums for arrays of the dtypes in `key`, and its parameters."""
        formula = self.formula
        kept, summed, across, written = variant
        compute = C_TYPES[compute_dtype(dtype).name]
        parameters, loads = [], []
        names: dict[Expr, str] = {}
        arrays = [i for i, given in enumerate(key) if given is not None]
        for i, (variable, given) in enumerate(zip(formula.inputs, key, strict=True)):
            kind = {"number": compute, "mask": "bool", "label": "long long"}[variable.kind]
            names[variable] = f"u{i}"
            if given is None:
                parameters.append(f"const {kind} u{i}")
            else:
                parameters.append(f"const {RAW_TYPES[given]}* p{i}")
                loads.append(f"const {kind} u{i} = ({kind})p{i}[e{i}];")
        body = [*loads, *write_statements(formula.outputs, names, compute)]
        if written:
            stored = RAW_TYPES[formula.out_dtype(0, dtype).name]
            parameters.append(f"{stored}* elements")
            body.append(f"elements[e{len(key)}] = ({stored}){names[formula.outputs[0]]};")
            arrays.append(len(key))
        total = C_TYPES[_sum_dtype(compute_dtype(dtype)).name]
        stores = []
        for k, output in enumerate(formula.outputs):
            body.append(f"total[{k}] += ({total}){names[output]};")
            stored = RAW_TYPES[formula.out_dtype(k, dtype).name]
            parameters.append(f"{stored}* out{k}")
            stores.append(f"out{k}[o] = ({stored})(total[{k}] * scale);")
        parameters += [f"{total}* partials", "unsigned int* counters", "const SumLayout layout"]
        parameters.append(f"const {C_TYPES[_scale_dtype(compute_dtype(dtype)).name]} scale")
        source = _SOURCE.format(
            words=5 + (kept + summed) * (1 + len(arrays)),
            out_lane="x" if across else "y",
            sum_lane="y" if across else "x",
            threads=THREADS,
            parameters=", ".join(parameters),
            sum=total,
            count=len(formula.outputs),
            stores="\n    ".join(stores),
            kept="\n    ".join(offsets("o", "k", arrays, kept, 5)),
            summed="\n      ".join(
                offsets("r", "e", arrays, summed, 5 + kept * (1 + len(arrays)), [f"k{i}" for i in arrays])
            ),
            body="\n      ".join(body),
        )
        return source, parameters


def names_of(parameters: Sequence[str]) -> str:
    """The names in declarations of parameters, as the arguments of a call."""
    return ", ".join(p.rpartition(" ")[2] for p in parameters)


def _sum_dtype(compute: np.dtype) -> np.dtype:
    return np.dtype(np.int64) if compute == np.bool_ else compute


def _scale_dtype(compute: np.dtype) -> np.dtype:
    return compute if compute.char in FLOATING else np.dtype(np.int64)


def _innermost(kept: list[Axis], summed: list[Axis]) -> bool:
    """Whether more arrays lie with the last kept axis innermost than with the last summed one."""
    ours, theirs = kept[-1][1], summed[-1][1]
    return sum(0 < abs(a) < abs(b) or (a and not b) for a, b in zip(ours, theirs)) > sum(
        0 < abs(b) < abs(a) or (b and not a) for a, b in zip(ours, theirs)
    )


def _geometry(
    outputs: int, terms: int, across: bool, block: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(block, (tiles, parts), terms of each part): lanes for the outputs and for the sum, powers of two."""
    if block is not None:
        out_lanes, sum_lanes = block if across else block[::-1]
    elif across:
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
    return (out_lanes, sum_lanes) if across else (sum_lanes, out_lanes), (tiles, parts), chunk


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
