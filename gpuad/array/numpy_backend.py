"""The NumPy backend: the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.array import indices
from gpuad.array.backend import Backend, Formula
from gpuad.array.dtypes import BFLOAT16, FLOATING, HALF
from gpuad.array.host_memory import LARGE, aligned, memory
from gpuad.array.order import keeping_order


class NumpyBackend(Backend):
    """Arrays are numpy.ndarray; formulas run as NumPy programs, products in NumPy's BLAS."""

    xp = np
    language = "numpy"
    array_type = np.ndarray

    def __init__(self, device: Any) -> None:
        self.device = device
        self._ones: dict[np.dtype, np.ndarray] = {}

    def asarray(self, values: Any, dtype: np.dtype | None = None) -> np.ndarray:
        return np.asarray(values, dtype)

    def receive(self, array: Any) -> np.ndarray:
        from gpuad.array.device import of_array

        if isinstance(array, np.ndarray):
            return keeping_order(self.copy, array)
        return of_array(array).backend.to_host(array)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return memory.aligned(shape, dtype)

    def full(self, shape: tuple[int, ...], value: Any, dtype: np.dtype) -> np.ndarray:
        if value == 0 and math.copysign(1.0, value) > 0.0:
            return aligned(shape, dtype, np.zeros)  # pages that nobody has touched are zero already
        made = memory.aligned(shape, dtype)
        np.copyto(made, value, casting="unsafe")
        return made

    def ones_scalar(self, dtype: np.dtype) -> np.ndarray:
        found = self._ones.get(dtype)
        if found is None:
            found = self._ones[dtype] = np.ones((), dtype)
            found.flags.writeable = False
        return found

    def elementwise(self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, outs: Any = None) -> Any:
        ufunc = formula.ufunc
        if ufunc is not None and dtype.char != BFLOAT16:  # with a number bfloat16 would give float32
            if outs is not None:
                return ufunc(*arguments, out=outs[0], casting="unsafe")
            first = arguments[0]
            if type(first) is not np.ndarray or first.nbytes < LARGE:
                result = ufunc(*arguments)
                return result if type(result) is np.ndarray else np.asarray(result)
        runner = formula.runners.get("numpy") or formula.runner("numpy")
        results = runner(arguments, dtype, outs)
        return results[0] if len(results) == 1 else results

    def cast_operands(self, formula: Any, arguments: Sequence[Any], dtype: np.dtype) -> Sequence[Any]:
        if formula.is_row and dtype.itemsize == 2:
            return arguments  # computed in float32, which a row's statistics have already
        arguments = list(arguments)
        for i in formula.promoted:
            if type(arguments[i]) is np.ndarray and arguments[i].dtype != dtype:
                arguments[i] = _as_dtype(arguments[i], dtype)
        return arguments

    def cast(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if dtype.itemsize != 2:
            return array.astype(dtype, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):  # what float16 cannot hold is inf, without a word
            return array.astype(dtype, copy=False)

    def sum(
        self, array: np.ndarray, axes: tuple[int, ...], keepdims: bool = False, out: Any = None, scale: float = 1.0
    ) -> np.ndarray:
        return host_sum(array, axes, keepdims, out, scale)

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = np.add(a, b)
        return result if type(result) is np.ndarray else np.asarray(result)

    def gemm(self, a: np.ndarray, b: np.ndarray, out: Any = None, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
        product = np.dot if a.ndim == 2 and b.ndim == 2 else np.matmul
        if a.dtype.char in HALF:
            wide = product(a.astype(np.float32), b.astype(np.float32))
            result = wide if alpha == 1.0 else wide * np.float32(alpha)
            if beta:
                result = result + np.float32(beta) * out
            if out is None:
                return result.astype(a.dtype)
            np.copyto(out, result, casting="unsafe")
            return out
        if beta == 0.0:
            if out is not None and not out.flags.c_contiguous:
                np.copyto(out, product(a, b))
                result = out
            else:
                result = product(a, b, out=_product_memory(a, b) if out is None else out)
            if alpha != 1.0:
                result *= alpha
            return result
        result = product(a, b)
        if alpha != 1.0:
            result *= alpha
        if beta != 1.0:
            out *= beta
        out += result
        return out

    def copy(self, array: np.ndarray) -> np.ndarray:
        made = memory.aligned(array.shape, array.dtype)
        np.copyto(made, array)
        return made

    def peek(self, flag: np.ndarray) -> bool | None:
        return bool(flag)

    def check_index(self, index: np.ndarray, length: int, what: str, wrap_negative: bool = True) -> None:
        indices.check(index, length, what, wrap_negative)

    def read_at(self, array: np.ndarray, key: Any) -> np.ndarray:
        read = np.asarray(array[key])
        return read if read.flags.c_contiguous else read.copy("C")  # as CuPy and PyTorch lay it out

    def add_at(self, out: np.ndarray, key: Any, values: Any) -> None:
        indices.add_at(out, key, values)

    def check_labels(self, labels: np.ndarray, classes: int, ignore: int) -> bool:
        # Negative numbers are the largest unsigned ones: one pass tells that all labels are classes.
        flat = labels.view(labels.dtype.str.replace("i", "u"))
        if not flat.size or np.maximum.reduce(flat, axis=None) < classes:
            return not 0 <= ignore < classes or not (labels == ignore).any()
        indices.check(np.where(labels == ignore, 0, labels), classes, "class index", False)
        return False

    def rows(
        self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...]
    ) -> list[np.ndarray]:
        return formula.runner("numpy")(self.cast_operands(formula, arguments, dtype), dtype, axes)

    def row_total(
        self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], weighted: bool,
        scale: float, mean: bool,
    ) -> tuple[Any, Any, list[Any]]:  # fmt: skip
        results = self.rows(formula, arguments, dtype, axes)
        over = tuple(range(results[0].ndim))
        if not weighted:
            return host_sum(results[0], over, False, None, scale), None, results[1:]
        weights = host_sum(results[1], over)
        total = host_sum(results[0], over, False, None, scale)
        if mean:
            with np.errstate(all="ignore"):
                total = np.asarray(total / weights)
        return total, weights, results[2:]

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        if x.dtype.char not in FLOATING or x.dtype.itemsize == 2:
            result = self.gemm(x, weight.T) if x.dtype.char in FLOATING else np.matmul(x, weight.T)
        else:
            result = np.dot(x, weight.T, out=_product_memory(x, weight.T))
        return result if bias is None else np.add(result, bias, out=result)


def _as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in another dtype; what is broadcast stays so, and then has no say in the order of results."""
    if array.flags.c_contiguous or 0 not in array.strides:
        return array.astype(dtype)
    once = array[tuple([slice(None) if step else slice(1) for step in array.strides])]
    return np.broadcast_to(once.astype(dtype), array.shape)


def _product_memory(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """Where a product of two matrices goes: memory of the pool when it is large, else None."""
    if a.ndim == b.ndim == 2 and a.shape[0] * b.shape[1] * a.dtype.itemsize >= LARGE and a.dtype == b.dtype:
        return memory.empty((a.shape[0], b.shape[1]), a.dtype)
    return None


# Up to this many elements a sum over all, or over the rows of a matrix, is a product with ones: BLAS takes a third to
# half of the time of add.reduce (measured). Beyond, add.reduce's summation in pairs rounds less.
_SUM_BY_PRODUCT = 16384

# Called with keepdims by position, which NumPy's stubs do not know.
add_reduce: Any = np.add.reduce


def host_sum(
    array: np.ndarray, axes: tuple[int, ...], keepdims: bool = False, out: Any = None, scale: float = 1.0
) -> np.ndarray:
    """scale · the sum over axes, in the dtype of the array; of 16 bits in float32."""
    dtype = array.dtype
    if (
        len(axes) == array.ndim
        and out is None
        and not keepdims
        and 0 < array.size <= _SUM_BY_PRODUCT
        and dtype.char in "fd"
        and axes
        and array.flags.c_contiguous
    ):
        total = np.dot(array.reshape(-1), _ones(array.size, dtype))
        return np.asarray(total if scale == 1.0 else total * scale)
    if dtype.char in HALF:
        wide = np.asarray(add_reduce(array, axes, np.float32, None, keepdims) * np.float32(scale))
        made = np.empty(wide.shape, dtype) if out is None else out
        with np.errstate(over="ignore"):
            np.copyto(made, wide, casting="unsafe")
        return made
    result = _host_sum(array, dtype, axes, keepdims, out)
    return result if scale == 1.0 else np.multiply(result, scale, out=result)


def _host_sum(array: np.ndarray, dtype: np.dtype, axes: tuple[int, ...], keepdims: bool, out: Any) -> np.ndarray:
    small = 0 < array.size <= _SUM_BY_PRODUCT
    if small and axes == (0,) and array.ndim == 2 and not keepdims and dtype.char in "fd":
        return np.dot(_ones(array.shape[0], dtype), array, out=out)
    result = add_reduce(array, axes, dtype, out, keepdims)
    return result if type(result) is np.ndarray and result.ndim < 2 else np.asarray(result, order="C")


_ones_by_dtype: dict[Any, np.ndarray] = {}


def _ones(n: int, dtype: np.dtype) -> np.ndarray:
    found = _ones_by_dtype.get(dtype)
    if found is None or found.size < n:
        found = _ones_by_dtype[dtype] = np.ones(max(n, 1024), dtype)
    return found[:n]
