"""A row formula as a NumPy program: elementwise parts as ufunc calls, row functions as products and reductions.

Rows that lie one after the other are the rows of a matrix; others are computed where they lie. Large arrays are cut
into blocks of rows, spread over threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuad.array.dtypes import HALF
from gpuad.array.host_memory import memory
from gpuad.array.numpy_backend import host_sum
from gpuad.kernels.column_sums import apart
from gpuad.kernels.expr import Variable, topological
from gpuad.kernels.numpy_writer import lower
from gpuad.kernels.rows_writer import RowWriter, add_at, use_add_at
from gpuad.kernels.scalar import column, row_at
from gpuad.kernels.threads import parallel

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Up to so many elements whole arrays are fastest; larger ones go in blocks of rows (measured on rows of 64 to 32000).
WHOLE = 262144
BLOCK = 32768

# Where rows are apart, elements are computed where they lie if so many of them are neighbours, or all are few: else the
# loops inside NumPy are too short, and putting rows together costs less (measured on 3 to 128 neighbours).
NEIGHBOURS = 32
FEW = 8192


class _Call(NamedTuple):
    """A program, and which arguments have one value a row or column, or in all."""

    program: Callable
    by_row: list[int]
    by_column: list[int]
    zero_d: list[int]


class RowProgram:
    """The NumPy side of a row formula."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.apart = apart(formula)
        self.rows = None if self.apart.rows is None else _ByRow(self.apart.rows)
        self._plain = len(self.apart.by_row) == len(formula.outputs) and not self.apart.full and not formula.states

    def __call__(self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...]) -> list[Any]:
        """The outputs, a list of arrays in C order, without those that are written to states; float16 in float32.

        axes: which axes of the elements are the columns, ascending.
        """
        if self.rows is not None and self._plain and dtype.itemsize > 2:
            return self.rows(arguments, dtype, axes)
        if dtype.char in HALF:
            wide = [a.astype(np.float32) if type(a) is np.ndarray and a.dtype == dtype else a for a in arguments]
            results = self._compute(wide, np.dtype(np.float32), axes)
            results = [r.astype(self.formula.out_dtype(i, dtype), copy=False) for i, r in enumerate(results)]
        else:
            results = self._compute(arguments, dtype, axes)
        for i, state in self.formula.states.items():
            np.copyto(arguments[state], results[i], casting="unsafe")
        return results[: len(results) - len(self.formula.states)]

    def _compute(self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...]) -> list[Any]:
        rows = self.rows
        places = self.apart
        if rows is not None and not places.by_column and not places.full:
            return rows(arguments, dtype, axes)
        found = dict(zip(places.by_row, rows(arguments, dtype, axes) if rows is not None else (), strict=True))
        first = next(i for i, v in enumerate(self.formula.inputs) if v.level == "element")
        ndim = arguments[first].ndim
        over = tuple([i for i in range(ndim) if i not in axes])
        for i in places.full:
            found[i] = host_sum(found[i], over)
        if places.sums is not None:
            operands = places.sums.operands(arguments, ndim, axes)
            sums = places.sums.formula.runner("numpy").reduce(operands, dtype, over, False)
            found.update(zip(places.by_column, sums if len(places.by_column) > 1 else [sums], strict=True))
        return [found[i] for i in range(len(found))]


class _ByRow:
    """The program of outputs with one value an element, a row, or in all."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.outputs = use_add_at(lower(formula.outputs))
        self.copies = [isinstance(o, Variable) for o in self.outputs]  # an input handed on is copied
        self.elements = [i for i, v in enumerate(formula.inputs) if v.level == "element"]
        self.first_element = self.elements[0]
        # What goes by the place in a row needs its elements along one axis.
        self.flat = any(n.function in (row_at, add_at, column) for n in topological(self.outputs))
        self._programs: dict[frozenset[int], Callable] = {}
        self._calls: dict[tuple, _Call] = {}

    def program(self, scalars: frozenset[int]) -> Callable:
        """The program, `scalars` being Python numbers."""
        found = self._programs.get(scalars)
        if found is None:
            writer = RowWriter(self.formula, self.outputs, scalars)
            inputs = self.formula.inputs
            writer.write(frozenset(v for v in inputs if v.level == "element"))
            header = f"def program(C, axes, {', '.join(f'x{i}' for i in range(len(inputs)))}, dtype):"
            found = writer.compile(header, [f"return ({', '.join(writer.text(o) for o in self.outputs)},)"])
            self._programs[scalars] = found
        return found

    def _call(self, arguments: Sequence[Any]) -> _Call:
        kinds = tuple([type(a) is np.ndarray and (a.ndim or -1) for a in arguments])
        call = self._calls.get(kinds)
        if call is None:
            levels = [v.level for v in self.formula.inputs]
            call = self._calls[kinds] = _Call(
                self.program(frozenset(i for i, k in enumerate(kinds) if not k or k == -1)),
                [i for i, level in enumerate(levels) if level == "row" and kinds[i] > 0],
                [i for i, level in enumerate(levels) if level == "column"],
                [i for i, k in enumerate(kinds) if k == -1],
            )
        return call

    def __call__(self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...]) -> list[Any]:
        call = self._call(arguments)
        given = list(arguments)
        for i in call.zero_d:
            given[i] = given[i].item()
        shape = given[self.first_element].shape
        if 0 in shape:
            rows = tuple([n for i, n in enumerate(shape) if i not in axes])
            sizes = {"element": shape, "row": rows, "scalar": ()}
            return [np.zeros(sizes[v], self.formula.out_dtype(i, dtype)) for i, v in enumerate(self.formula.levels)]
        if len(shape) == 2 and axes == (1,):
            return self._matrix(call, given, shape, dtype)
        neighbours = shape[-1] >= NEIGHBOURS or math.prod(shape) <= FEW
        trailing = axes[0] == len(shape) - len(axes) and all([given[i].flags.c_contiguous for i in self.elements])
        if self.flat or trailing or not neighbours or len(axes) == len(shape):
            return self._as_matrix(call, given, shape, dtype, axes)
        return self._in_place(call, given, shape, dtype, axes)

    def _matrix(self, call: _Call, given: list[Any], shape: tuple[int, int], dtype: np.dtype) -> list[np.ndarray]:
        """The outputs for elements (rows, columns)."""
        for i in call.by_row:
            given[i] = given[i][:, None]
        for i in call.by_column:
            given[i] = given[i][None]
        results = self._results(call.program, shape[1], None, given, shape, dtype)
        return self._finished(results, {"element": shape, "row": (shape[0], 1), "scalar": ()}, shape[:1], dtype)

    def _as_matrix(
        self, call: _Call, given: list[Any], shape: tuple[int, ...], dtype: np.dtype, axes: tuple[int, ...]
    ) -> list[np.ndarray]:
        """The outputs for elements whose rows are put one after the other."""
        order = (*[i for i in range(len(shape)) if i not in axes], *axes)
        turned = tuple([shape[i] for i in order])
        split = len(shape) - len(axes)
        flat = math.prod(turned[:split]), math.prod(turned[split:])
        for i in self.elements:
            given[i] = np.ascontiguousarray(given[i].transpose(order).reshape(flat))
        for i in call.by_row:
            given[i] = given[i].reshape(-1)
        for i in call.by_column:
            given[i] = given[i].reshape(-1)
        found = self._matrix(call, given, flat, dtype)
        back = [order.index(i) for i in range(len(order))]
        shapes = {"element": turned, "row": turned[:split], "scalar": ()}
        for i, level in enumerate(self.formula.levels):
            found[i] = found[i].reshape(shapes[level])
            if level == "element":
                found[i] = _c_order(found[i].transpose(back))
        return found

    def _in_place(
        self, call: _Call, given: list[Any], shape: tuple[int, ...], dtype: np.dtype, axes: tuple[int, ...]
    ) -> list[np.ndarray]:
        """The outputs for elements whose rows lie along any axes."""
        by_row = tuple([1 if i in axes else n for i, n in enumerate(shape)])
        for i in call.by_row:
            given[i] = given[i].reshape(by_row)
        for i in call.by_column:
            given[i] = given[i].reshape([n if i in axes else 1 for i, n in enumerate(shape)])
        columns = math.prod([shape[i] for i in axes])
        results = self._results(call.program, columns, axes, given, shape, dtype)
        rows = tuple([n for i, n in enumerate(shape) if i not in axes])
        return self._finished(results, {"element": shape, "row": by_row, "scalar": ()}, rows, dtype)

    def _results(
        self, program: Callable, columns: int, axes: tuple[int, ...] | None, given: list[Any], shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> Sequence[Any]:  # fmt: skip
        """What the program gives; of large arrays by blocks of rows."""
        size = math.prod(shape)
        if size <= WHOLE:
            return program(columns, axes, *given, dtype)
        levels, inputs = self.formula.levels, self.formula.inputs
        cut = 0 if axes is None else next(i for i in range(len(shape)) if i not in axes)
        by_row = (shape[0], 1) if axes is None else tuple([1 if i in axes else n for i, n in enumerate(shape)])
        forms = {"element": shape, "row": by_row, "scalar": ()}
        made = [memory.empty(forms[level], self.formula.out_dtype(i, dtype)) for i, level in enumerate(levels)]
        step = max(1, BLOCK * shape[cut] // size)

        def work(start: int, stop: int) -> None:
            for i in range(start, stop, step):
                part = (*(slice(None),) * cut, slice(i, min(i + step, stop)))
                block = [
                    a[part] if type(a) is np.ndarray and v.level in ("element", "row") else a
                    for a, v in zip(given, inputs, strict=True)
                ]
                for out, result, level in zip(made, program(columns, axes, *block, dtype), levels, strict=True):
                    out[... if level == "scalar" else part] = result

        parallel(work, shape[cut], size * 8)
        return made

    def _finished(
        self, results: Sequence[Any], forms: dict[str, tuple[int, ...]], rows: tuple[int, ...], dtype: np.dtype
    ) -> list[np.ndarray]:
        """The results as fresh arrays in C order; forms: the shape of each level as computed."""
        found = []
        for i, (result, level) in enumerate(zip(results, self.formula.levels, strict=True)):
            form = forms[level]
            if type(result) is not np.ndarray or result.shape != form or self.copies[i]:
                made = memory.empty(form, self.formula.out_dtype(i, dtype))
                np.copyto(made, result, casting="unsafe")
                result = made
            found.append(result.reshape(rows) if level == "row" else _c_order(result))
        return found


def _c_order(array: np.ndarray) -> np.ndarray:
    if array.flags.c_contiguous:
        return array
    made = memory.empty(array.shape, array.dtype)
    np.copyto(made, array)
    return made
