"""Row formulas as NumPy source: the row functions, and the writer of programs that call them.

Elements are (rows, columns), or any array of which some axes are the columns: `axes`, else None. What has one value a
row or column broadcasts against them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.kernels import derive
from gpuad.kernels.expr import Expr, ScalarFunction, Variable, apply, substitute, topological
from gpuad.kernels.numpy_writer import Writer
from gpuad.kernels.scalar import add, column, eq, neg, row_at, sub, where

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Rows up to this long are reduced by their transpose: a reduction along short rows costs 2 to 4 times as much (measured
# at 10 columns: 1.4 against 3.3 us for 64 rows; at 1000 columns the transpose is 5 times slower).
SHORT = 64

_ones: dict[Any, np.ndarray] = {}
_ranges: dict[tuple[int, int], np.ndarray] = {}


def _ones_of(n: int, dtype: np.dtype) -> np.ndarray:
    ones = _ones.get((n, dtype))
    if ones is None:
        ones = _ones[n, dtype] = np.ones(n, dtype)
    return ones


def _row_sum(x: np.ndarray, columns: int, axes: tuple[int, ...] | None) -> np.ndarray:
    if axes is None:
        return np.dot(x, _ones_of(columns, x.dtype))[:, None] if x.shape[1] == columns else x * columns
    if columns != 1 and all([x.shape[i] == 1 for i in axes]):
        return x * columns
    if axes == (0,) and x.ndim == 2:
        return np.dot(_ones_of(columns, x.dtype), x)[None]
    if axes[-1] == x.ndim - 1 and x.flags.c_contiguous:  # BLAS first: a quarter of the time of add.reduce (measured)
        length = x.shape[-1]
        x = np.dot(x.reshape(-1, length), _ones_of(length, x.dtype)).reshape(*x.shape[:-1], 1)
        axes = axes[:-1]
    return np.add.reduce(x, axes, keepdims=True) if axes else x


def _row_max(x: np.ndarray, columns: int, axes: tuple[int, ...] | None) -> np.ndarray:
    if axes is not None:
        return np.maximum.reduce(x, axes, keepdims=True)
    if x.shape[1] <= SHORT:
        return np.maximum.reduce(x.T.copy(), 0)[:, None]
    return np.maximum.reduce(x, 1, keepdims=True)


def _row_logsumexp(x: np.ndarray, columns: int, axes: tuple[int, ...] | None) -> np.ndarray:
    highest = _row_max(x, columns, axes)
    shifted = np.subtract(x, highest)
    np.exp(shifted, shifted)
    total = _row_sum(shifted, columns, axes)
    flat = total.reshape(-1)
    if not math.isfinite(np.dot(flat, flat)):
        # inf − inf: a row of −inf, or with +inf, has that as its result, and nothing to subtract.
        highest = np.where(np.isfinite(highest), highest, x.dtype.type(0))
        total = _row_sum(np.exp(x - highest), columns, axes)
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
        out = x.copy()
    elif out is not x:
        np.copyto(out, x)
    added = np.broadcast_to(value, (x.shape[0], 1)).reshape(-1) if np.ndim(value) else value
    if out.flags.c_contiguous:
        out.reshape(-1)[(place + _offsets(x.shape[0], columns)).reshape(-1)] += added
    else:
        out[_offsets(x.shape[0], 1).reshape(-1), np.reshape(place, -1)] += added
    return out


add_at = ScalarFunction("add_at", None, "")


def use_add_at(outputs: Sequence[Expr]) -> list[Expr]:
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


class RowWriter(Writer):
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
        if node.function is row_at:
            return f"row_at({', '.join(arguments)}, C)", False
        if node.function.across == "row":
            return f"{node.function.name}({', '.join(arguments)}, C, axes)", False
        return super().call(node, arguments, out)
