"""A row formula as one CUDA launch: how it is cut into blocks, and the call.

The source is in rows_source.py. Strides are arguments, so broadcast and transposed operands are read where they lie,
and rows and columns may each be several axes. A sum over the rows (a loss) is part of the same launch, see
last_block.py; so are outputs with one value a column, see column_sums.py: blocks of their own compute them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuad.array.backend import Backend
from gpuad.array.device import of_array
from gpuad.kernels import last_block
from gpuad.kernels.column_sums import apart
from gpuad.kernels.cuda_source import compute_dtype, dtype_codes, dtype_names
from gpuad.kernels.rows_source import ROWS, Beside, RowSource
from gpuad.kernels.strides_cuda import merged, words
from gpuad.kernels.sum_cuda import SumKernel

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Rows of up to so many elements have a warp each, ROWS of them in a block: no barriers, and no idle threads.
WARP_COLUMNS = 1024


class _Plan(NamedTuple):
    """How a call is launched, made once for each set of shapes and strides."""

    kernel: Any
    blocks: int
    block: tuple[int, int]
    shared: int
    layout: np.ndarray
    shapes: list[tuple[int, ...]]  # of the outputs
    beside: Any  # the plan of the column sums in the same launch


class RowKernel:
    """The CUDA side of a row formula: one launch."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.apart = apart(formula)
        self._rows: Any = None if self.apart.rows is None else RowSource(self.apart.rows)
        self._sums: Any = None if self.apart.sums is None else SumKernel(self.apart.sums.formula)
        self._kernels: dict[tuple, Any] = {}
        self._plans: dict[tuple, _Plan] = {}

    def source(self, dtype: np.dtype | None = None) -> str:
        """The CUDA C source for C-ordered matrices of `dtype` (float32 unless given)."""
        dtype = np.dtype(np.float32) if dtype is None else dtype
        of_kind = {"label": "int64", "mask": "bool"}
        key = [of_kind.get(v.kind, dtype.name) for v in self.formula.inputs]
        places = () if self.apart.sums is None else self.apart.sums.arguments
        sums = self._sums and self._sums.source([key[i] for i in places], dtype, (1, 1, True, False))
        if self._rows is None:
            return sums[0]
        return self._rows.write(dtype, key, True, 0, 1, 1, sums and _beside(*sums))

    def __call__(self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...]) -> list[Any]:
        """The outputs, a list of arrays in C order, without those that are written to states.

        axes: which axes of the elements are the columns, ascending.
        """
        shape = next(a.shape for a, v in zip(arguments, self.formula.inputs, strict=True) if v.level == "element")
        if self.apart.sums is None:
            found = dict(zip(self.apart.by_row, self._run(arguments, dtype, axes, shape), strict=False))
        else:
            found = self._beside(arguments, dtype, axes, shape)
        for i in self.apart.full:
            found[i] = Backend.identity.runner("cuda").reduce((found[i],), found[i].dtype, _others(shape, axes), False)
        return [found[i] for i in sorted(found)]

    def total(
        self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], summed: int, scale: float, mean: bool
    ) -> list[Any]:
        """[(scale · Σ terms, Σ weights), *the other outputs]; with `mean` the first is Σ terms / Σ weights."""
        shape = next(a.shape for a, v in zip(arguments, self.formula.inputs, strict=True) if v.level == "element")
        return self._run(arguments, dtype, axes, shape, summed, (compute_dtype(dtype).type(scale), np.bool_(mean)))

    def _beside(
        self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], shape: tuple[int, ...]
    ) -> dict[int, Any]:
        """The outputs by their places: sums over the rows in the first blocks of the launch, rows in the others."""
        sums: Any = self.apart.sums
        kernel: Any = self._sums
        operands = sums.operands(arguments, len(shape), axes)
        over = _others(shape, axes)
        if self._rows is None or not math.prod(shape):
            results = kernel(operands, dtype, over, False, 1.0, None)
            results = results if len(self.apart.by_column) > 1 else [results]
            found = dict(zip(self.apart.by_column, results, strict=True))
            rows = self._run(arguments, dtype, axes, shape) if self._rows else []
            return {**found, **dict(zip(self.apart.by_row, rows, strict=True))}
        made: list[Any] = []
        rows = self._run(arguments, dtype, axes, shape, beside=(operands, over, made))
        return dict(zip((*self.apart.by_row, *self.apart.by_column), [*rows, *made], strict=True))

    def _run(
        self,
        arguments: Sequence[Any],
        dtype: np.dtype,
        axes: tuple[int, ...],
        shape: tuple[int, ...],
        summed: int = 0,
        settings: tuple = (),
        beside: Any = None,
    ) -> list[Any]:
        import cupy

        formula: Any = self.apart.rows
        codes = dtype_codes(arguments, cupy.ndarray)
        key = (
            codes, dtype, axes, summed, beside is not None,
            tuple([(a.shape, a.strides) if isinstance(a, cupy.ndarray) else None for a in arguments]),
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 1000:
                self._plans.clear()
            plan = self._plans[key] = self._plan(arguments, codes, dtype, axes, shape, summed, beside)
        made = [
            cupy.ndarray(of, formula.out_dtype(i, dtype))
            for i, of in enumerate(plan.shapes, summed)
            if i not in formula.states
        ]
        rows, columns = plan.layout["v"][:2].tolist()
        if not columns or not (rows or summed):
            for out in made:
                out.fill(0)
            return [_empty_total(cupy, dtype, rows, settings), *made] if summed else made
        compute = compute_dtype(dtype)
        call: list[Any] = [
            a if isinstance(a, cupy.ndarray) else np.int64(a) if v.kind == "label" else compute.type(a)
            for a, v in zip(arguments, formula.inputs, strict=True)
        ]
        call += made
        if summed:
            total = cupy.ndarray((2,), dtype)
            call += [total, cupy.ndarray((2 * plan.blocks,), compute), last_block.counters(), *settings]
            made = [total, *made]
        if self._rows.checks:
            backend: Any = of_array(next(a for a in call if isinstance(a, cupy.ndarray))).backend
            address, code = backend.fault("class index")
            call += [np.uint64(address), np.int32(code)]
        call.append(plan.layout)
        blocks = plan.blocks
        if beside is not None:
            operands, _, columns_made = beside
            columns_made += self._sums.outputs(plan.beside, dtype)
            call += [*self._sums.call(plan.beside, operands, dtype, 1.0, columns_made), np.uint32(plan.beside.blocks)]
            blocks += plan.beside.blocks
        plan.kernel((blocks,), plan.block, tuple(call), shared_mem=plan.shared)
        return made

    def _plan(
        self, arguments: Sequence[Any], codes: tuple, dtype: np.dtype, axes: tuple[int, ...], shape: tuple[int, ...],
        summed: int, beside: Any,
    ) -> _Plan:  # fmt: skip
        formula: Any = self.apart.rows
        others = _others(shape, axes)
        sizes = {"element": shape, "row": tuple(shape[i] for i in others), "scalar": ()}
        inputs, outputs = self._rows.arrays(codes, summed)
        strides = [_strides(arguments[i], formula.inputs[i].level, len(shape), axes) for i in inputs]
        strides += [_c_strides(shape)] * len(outputs)
        # At least one axis each, so that lengths of 1 make no variants.
        none = [(1, (0,) * len(strides))]
        row_axes, column_axes = merged(shape, strides, others) or none, merged(shape, strides, axes) or none
        rows, columns = (math.prod(shape[i] for i in of) for of in (others, axes))
        numbers = [rows, columns, *words(row_axes), *words(column_axes)]
        layout = np.zeros((), [("v", np.int64, (len(numbers),))])
        layout["v"] = numbers
        warp = columns <= WARP_COLUMNS
        block = (32, ROWS if warp or columns <= 4096 or beside else 2 * ROWS)
        blocks = max(1, min(-(-rows // (ROWS if warp else 1)), last_block.BLOCKS if summed else 1 << 20))
        sum_plan = None
        if beside is not None:
            import cupy

            operands = [a if isinstance(a, cupy.ndarray) else None for a in beside[0]]
            sum_plan = self._sums.plan(operands, beside[1], block)
        variant = (warp, summed, len(row_axes), len(column_axes))
        kernel = self._kernel(codes, dtype, variant, beside, sum_plan)
        shared = 0 if warp else block[0] * block[1] * compute_dtype(dtype).itemsize
        shapes = [sizes[level] for level in formula.levels[summed:]]
        return _Plan(kernel, blocks, block, shared, layout, shapes, sum_plan)

    def _kernel(
        self, codes: tuple, dtype: np.dtype, variant: tuple[bool, int, int, int], beside: Any, plan: Any
    ) -> Any:
        import cupy

        key = (codes, dtype, variant, plan and (dtype_codes(beside[0], cupy.ndarray), plan.variant))
        found = self._kernels.get(key)
        if found is None:
            others = plan and _beside(*self._sums.source(dtype_names(key[-1][0]), dtype, plan.variant))
            source = self._rows.write(dtype, dtype_names(codes), *variant, others)
            found = self._kernels[key] = cupy.RawKernel(source, f"gpuad_{self.formula.name}")
        return found


def _beside(source: str, parameters: Sequence[str]) -> Beside:
    """The sums as what the first blocks of a launch do."""
    names = [f"sums_{i}" for i in range(len(parameters))]
    declared = [f"{p.rpartition(' ')[0]} {name}" for p, name in zip(parameters, names, strict=True)]
    call = f"""if (blockIdx.x < sum_blocks) {{ gpuad_sums({", ".join(names)}); return; }}
const unsigned int row_block = blockIdx.x - sum_blocks, row_blocks = gridDim.x - sum_blocks;
"""
    return Beside(source, [*declared, "const unsigned int sum_blocks"], call)


def _others(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that are not columns."""
    return tuple([i for i in range(len(shape)) if i not in axes])


def _strides(array: Any, level: str, ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides over all axes of the elements, in elements; a 0-d array has one value for all rows."""
    own = iter([s // array.dtype.itemsize for s in array.strides])
    if level == "element":
        return tuple(own)
    return tuple([next(own, 0) if (i in axes) == (level == "column") else 0 for i in range(ndim)])


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([math.prod(shape[i + 1 :]) for i in range(len(shape))])


def _empty_total(cupy: Any, dtype: np.dtype, rows: int, settings: tuple) -> Any:
    """The totals where rows have no elements: as NumPy's, 0 · scale and 0 / 0."""
    scale, mean = settings
    return cupy.asarray(np.array([np.nan if mean else np.float64(0) * scale, 0], dtype))
