"""A row formula as a NumPy program: elementwise parts as ufunc calls, row functions as products and reductions.

Arrays are (rows, columns) for elements, (rows,) and (columns,) for one value a row or column, 0-d or numbers for one
value in all. Large arrays are cut into blocks of rows, spread over threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.array.dtypes import HALF
from gpuad.array.host_memory import memory
from gpuad.array.order import memory_order
from gpuad.kernels import derive
from gpuad.kernels.expr import Expr, ScalarFunction, Variable, apply, substitute, topological
from gpuad.kernels.numpy_writer import Writer, lower
from gpuad.kernels.scalar import add, column, eq, neg, row_at, row_logsumexp, row_max, row_sum, sub, where
from gpuad.kernels.threads import parallel

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Rows up to this long are reduced by their transpose: a reduction along short rows costs 2 to 4 times as much (measured
# at 10 columns: 1.4 against 3.3 us for 64 rows; at 1000 columns the transpose is 5 times slower).
SHORT = 64

_ones: dict[Any, np.ndarray] = {}
_ranges: dict[tuple[int, int], np.ndarray] = {}

# Up to so many elements whole arrays are fastest; larger ones go in blocks of rows (measured on rows of 64 to 32000).
WHOLE = 262144
BLOCK = 32768


def _row_sum(x: np.ndarray, columns: int) -> np.ndarray:
    if x.shape[1] != columns:
        return x * columns
    ones = _ones.get((columns, x.dtype))
    if ones is None:
        ones = _ones[columns, x.dtype] = np.ones(columns, x.dtype)
    return np.dot(x, ones)[:, None]


def _row_max(x: np.ndarray, columns: int) -> np.ndarray:
    if x.shape[1] <= SHORT:
        return np.maximum.reduce(x.T.copy(), 0)[:, None]
    return np.maximum.reduce(x, 1, keepdims=True)


def _row_logsumexp(x: np.ndarray, columns: int) -> np.ndarray:
    highest = _row_max(x, columns)
    shifted = np.subtract(x, highest)
    np.exp(shifted, shifted)
    total = _row_sum(shifted, columns)
    flat = total.reshape(-1)
    if not math.isfinite(np.dot(flat, flat)):
        # inf − inf: a row of −inf, or with +inf, has that as its result, and nothing to subtract.
        highest = np.where(np.isfinite(highest), highest, x.dtype.type(0))
        total = _row_sum(np.exp(x - highest), columns)
    np.log(total, total)
    return np.add(total, highest, total)


def _offsets(rows: int, columns: int) -> np.ndarray:
    found = _ranges.get((rows, columns))
    if found is None:
        if len(_ranges) > 64:
            _ranges.clear()
        found = _ranges[rows, columns] = np.arange(rows, dtype=np.int64)[:, None] * columns
    return found


def _row_at(x: np.ndarray, place: Any, columns: int) -> np.ndarray:
    return x.take(place + _offsets(x.shape[0], columns))


def _column(columns: int) -> np.ndarray:
    return _offsets(columns, 1).reshape(-1)


def _add_at(x: np.ndarray, place: Any, value: Any, columns: int, out: np.ndarray | None = None) -> np.ndarray:
    """x with value added at one place of each row: what the derivative of row_at adds up to."""
    if out is None:
        out = x.copy("K")
    elif out is not x:
        np.copyto(out, x)
    added = np.broadcast_to(value, (x.shape[0], 1)).reshape(-1) if np.ndim(value) else value
    if out.flags.c_contiguous:
        out.reshape(-1)[(place + _offsets(x.shape[0], columns)).reshape(-1)] += added
    else:
        out[_offsets(x.shape[0], 1).reshape(-1), np.reshape(place, -1)] += added
    return out


add_at = ScalarFunction("add_at", None, "")


def _use_add_at(outputs: Sequence[Expr]) -> list[Expr]:
    """E + where(column == place, r, 0) as add_at(E, place, r): one element a row instead of a whole comparison."""
    known: dict[Expr, str] = {}

    def masked(node: Expr) -> tuple[Expr, Expr] | None:
        sign = node
        flip = node.function is neg
        if flip:
            sign = node.args[0]
        if sign.function is not where or sign.args[2] is not derive.ZERO or sign.args[0].function is not eq:
            return None
        sides = sign.args[0].args
        for here, there in (sides, sides[::-1]):
            if (
                here.function is column
                and derive.level(there, known) == "row"
                and derive.level(sign.args[1], known) != "element"
            ):
                return there, (neg(sign.args[1]) if flip else sign.args[1])
        return None

    todo: dict[Expr, Expr] = {}
    for node in topological(outputs):
        if node.function is add or node.function is sub:
            for i in (1, 0):
                if node.function is sub and i == 0:
                    continue
                found = masked(node.args[i])
                other = node.args[1 - i]
                if found is not None and derive.level(other, known) == "element" and masked(other) is None:
                    place, value = found
                    todo[node] = apply(add_at, other, place, neg(value) if node.function is sub else value)
                    break
    return substitute(outputs, todo) if todo else list(outputs)


class _RowWriter(Writer):
    """The writer of elementwise programs, with the row functions."""

    def __init__(self, formula: Formula, outputs: Sequence[Expr], scalars: frozenset[int]) -> None:
        super().__init__(formula, outputs, scalars, given=False)
        self.known: dict[Expr, str] = {}
        self.namespace.update(
            row_sum=_row_sum, row_max=_row_max, row_logsumexp=_row_logsumexp, row_at=_row_at, add_at=_add_at,
            column=_column,
        )  # fmt: skip

    def buffer_class(self, node: Expr, whole: frozenset[Variable]) -> tuple:
        depends = self.depends[node]
        if derive.level(node, self.known) == "element" and depends & whole:
            return (self.kind(node), "full")
        return (self.kind(node), derive.level(node, self.known), depends)

    def call(self, node: Expr, arguments: list[str], out: str | None) -> tuple[str, bool]:
        if node.function is add_at:
            return f"add_at({', '.join(arguments)}, C{f', out={out}' if out else ''})", bool(out)
        if node.function in (row_sum, row_max, row_logsumexp, row_at):
            return f"{node.function.name}({', '.join(arguments)}, C)", False
        return super().call(node, arguments, out)


class RowProgram:
    """The NumPy side of a row formula."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.outputs = _use_add_at(lower(formula.outputs))
        self.copies = [isinstance(o, Variable) for o in self.outputs]  # an input handed on is copied
        self.elements = [i for i, v in enumerate(formula.inputs) if v.level == "element"]
        self._programs: dict[frozenset[int], Callable] = {}
        self._calls: dict[tuple, tuple[Callable, list[int], list[int], list[int], Any]] = {}

    def program(self, scalars: frozenset[int]) -> Callable:
        """The program over (rows, columns) arrays, `scalars` being Python numbers."""
        found = self._programs.get(scalars)
        if found is None:
            writer = _RowWriter(self.formula, self.outputs, scalars)
            inputs = self.formula.inputs
            writer.write(frozenset(v for v in inputs if v.level == "element"))
            header = f"def program(C, {', '.join(f'x{i}' for i in range(len(inputs)))}, dtype):"
            found = writer.compile(header, [f"return ({', '.join(writer.text(o) for o in self.outputs)},)"])
            self._programs[scalars] = found
        return found

    def __call__(self, arguments: Sequence[Any], dtype: np.dtype, outs: Sequence[Any] | None = None) -> list[Any]:
        """The outputs, a list; numbers computed in `dtype` (float32 for float16)."""
        if dtype.char in HALF:
            order = self._order(arguments)
            wide = [a.astype(np.float32, order) if type(a) is np.ndarray and a.dtype == dtype else a for a in arguments]
            results = self(wide, np.dtype(np.float32))
            return [r.astype(self.formula.out_dtype(i, dtype), copy=False) for i, r in enumerate(results)]
        key = tuple(
            [type(a) is np.ndarray and ((a.ndim or -1) if a.flags.c_contiguous else (a.shape, a.strides))
             for a in arguments]
        )  # fmt: skip
        call = self._calls.get(key)
        if call is None:
            call = self._prepare(arguments, key)
        program, rows_at, columns_at, zero_d, order = call
        shape = arguments[self.elements[0]].shape
        rows, columns = shape
        prepared = list(arguments)
        for i in rows_at:
            prepared[i] = prepared[i][:, None]
        for i in columns_at:
            prepared[i] = prepared[i][None]
        for i in zero_d:
            prepared[i] = prepared[i].item()
        if not rows or not columns:
            return [np.zeros(self._shape(i, shape), self.formula.out_dtype(i, dtype)) for i in range(len(self.outputs))]
        if rows * columns <= WHOLE:
            results = [self._finish(r, i, shape, dtype) for i, r in enumerate(program(columns, *prepared, dtype))]
            return results if order is None else [r if r.ndim < 2 else np.asarray(r, order=order) for r in results]
        made = [self._empty(i, shape, dtype, order) for i in range(len(self.outputs))]
        step = max(1, BLOCK // columns)

        def work(start: int, stop: int) -> None:
            for i in range(start, stop, step):
                j = min(i + step, stop)
                part = [
                    a[i:j] if type(a) is np.ndarray and v.level in ("element", "row") else a
                    for a, v in zip(prepared, self.formula.inputs, strict=True)
                ]
                for out, result, level in zip(made, program(columns, *part, dtype), self.formula.levels, strict=True):
                    out[i:j] = result.reshape(-1) if level == "row" and type(result) is np.ndarray else result

        parallel(work, rows, rows * columns * 8)
        return made

    def _prepare(self, arguments: Sequence[Any], key: tuple) -> tuple[Callable, list[int], list[int], list[int], Any]:
        """For arguments like these: the program, which have one value a row, a column, in all, and the results' order.

        The order is None where all are C-contiguous, and the results then by themselves; what a program makes of
        operands that disagree has the order of some of them.
        """
        inputs = self.formula.inputs
        ndims = [a.ndim if type(a) is np.ndarray else None for a in arguments]
        scalars = frozenset(i for i, ndim in enumerate(ndims) if not ndim)
        rows_at = [i for i, v in enumerate(inputs) if v.level == "row" and ndims[i] == 1]
        columns_at = [i for i, v in enumerate(inputs) if v.level == "column"]
        zero_d = [i for i, ndim in enumerate(ndims) if ndim == 0]
        in_order = all([a.flags.c_contiguous for a in arguments if type(a) is np.ndarray])
        order = None if in_order else self._order(arguments)
        if len(self._calls) > 1000:
            self._calls.clear()
        call = self._calls[key] = self.program(scalars), rows_at, columns_at, zero_d, order
        return call

    def _order(self, arguments: Sequence[Any]) -> Any:
        elements = [arguments[i] for i in self.elements if type(arguments[i]) is np.ndarray]
        return "C" if memory_order(elements).is_c else "F"

    def _shape(self, i: int, shape: tuple[int, int]) -> tuple[int, ...]:
        return {"element": shape, "row": shape[:1], "scalar": ()}[self.formula.levels[i]]

    def _empty(self, i: int, shape: tuple[int, int], dtype: np.dtype, order: Any) -> np.ndarray:
        own, stored = self._shape(i, shape), self.formula.out_dtype(i, dtype)
        return memory.empty(own[::-1], stored).T if order == "F" else memory.empty(own, stored)

    def _finish(self, result: Any, i: int, shape: tuple[int, int], dtype: np.dtype) -> Any:
        wanted = self._shape(i, shape)
        if type(result) is np.ndarray and not self.copies[i]:
            if result.shape == wanted:
                return result
            if len(wanted) == 1 and result.shape == (shape[0], 1):
                return result.reshape(-1)
        made = np.empty(wanted, self.formula.out_dtype(i, dtype))
        made[...] = result.reshape(-1) if type(result) is np.ndarray and len(wanted) == 1 and result.ndim else result
        return made
