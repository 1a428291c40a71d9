"""The NumPy backend: the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.array import indices
from gpuad.array.backend import Backend, Formula
from gpuad.array.host_memory import LARGE, memory


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

        return of_array(array).backend.to_host(array)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def ones_scalar(self, dtype: np.dtype) -> np.ndarray:
        found = self._ones.get(dtype)
        if found is None:
            found = self._ones[dtype] = np.ones((), dtype)
            found.flags.writeable = False
        return found

    def elementwise(self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, outs: Any = None) -> Any:
        ufunc = formula.ufunc
        if ufunc is not None:
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
                arguments[i] = arguments[i].astype(dtype)
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
        if a.dtype == np.float16:
            wide = product(a.astype(np.float32), b.astype(np.float32))
            result = wide if alpha == 1.0 else wide * np.float32(alpha)
            if beta:
                result = result + np.float32(beta) * out
            if out is None:
                return result.astype(np.float16)
            np.copyto(out, result, casting="same_kind")
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
        made = memory.empty(array.shape, array.dtype)
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
        if x.dtype.kind != "f" or x.dtype.itemsize == 2:
            result = self.gemm(x, weight.T) if x.dtype.kind == "f" else np.matmul(x, weight.T)
        else:
            result = np.dot(x, weight.T, out=_product_memory(x, weight.T))
        return result if bias is None else np.add(result, bias, out=result)


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
    """scale · the sum over axes, in the dtype of the array; float16 is accumulated in float32."""
    dtype = array.dtype
    if (
        len(axes) == array.ndim
        and out is None
        and not keepdims
        and 0 < array.size <= _SUM_BY_PRODUCT
        and dtype.kind == "f"
        and dtype.itemsize > 2
        and axes
        and array.flags.c_contiguous
    ):
        total = np.dot(array.reshape(-1), _ones(array.size, dtype))
        return np.asarray(total if scale == 1.0 else total * scale)
    result = _host_sum(array, dtype, axes, keepdims, out)
    return result if scale == 1.0 else np.multiply(result, scale, out=result)


def _host_sum(array: np.ndarray, dtype: np.dtype, axes: tuple[int, ...], keepdims: bool, out: Any) -> np.ndarray:
    if dtype == np.float16:
        wide = np.asarray(add_reduce(array, axes, np.float32, None, keepdims))
        if out is None:
            return wide.astype(np.float16)
        np.copyto(out, wide, casting="same_kind")
        return out
    if axes == (0,) and array.ndim == 2 and not keepdims and 0 < array.size <= _SUM_BY_PRODUCT and dtype.kind == "f":
        return np.dot(_ones(array.shape[0], dtype), array, out=out)
    result = add_reduce(array, axes, dtype, out, keepdims)
    return result if type(result) is np.ndarray else np.asarray(result)


_ones_by_dtype: dict[Any, np.ndarray] = {}


def _ones(n: int, dtype: np.dtype) -> np.ndarray:
    found = _ones_by_dtype.get(dtype)
    if found is None or found.size < n:
        found = _ones_by_dtype[dtype] = np.ones(max(n, 1024), dtype)
    return found[:n]
