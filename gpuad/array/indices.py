"""Indices on the host: bounds, and sums at indices that may repeat."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from gpuad.array.dtypes import HALF


def index_error(what: str, index: int, position: int, low: int, length: int) -> str:
    """The sentence on an index that is not in low … length − 1; position: in the flattened array of indices."""
    valid = f"{low} to {length - 1} are valid" if length else "the dimension has length 0"
    return f"{what} {index} at position {position} is out of range: {valid}."


def check(index: np.ndarray, length: int, what: str, wrap_negative: bool) -> None:
    """Raise IndexError for the first of `index` that is not in 0 … length − 1 (−length … with wrap_negative)."""
    if not index.size or index.dtype.kind not in "iu":
        return
    low = -length if wrap_negative else 0
    if low == 0 and index.dtype.kind == "i":
        # Negative numbers are the largest unsigned ones: one pass tells.
        if np.maximum.reduce(index.view(index.dtype.str.replace("i", "u")), axis=None) < length:
            return
    elif np.maximum.reduce(index, axis=None) < length and np.minimum.reduce(index, axis=None) >= low:
        return
    flat = int(np.argmax((index < low) | (index >= length)))
    raise IndexError(index_error(what, int(index.reshape(-1)[flat]), flat, low, length))


def add_at(out: np.ndarray, key: tuple, values: Any) -> None:
    """out[key] += values, where places that are named several times take all of theirs.

    numpy.add.at does this too, but takes 0.4 us a row of 64 and 0.1 us an element behind a general index. Rows of a
    matrix (the gradient of an embedding) are summed as a product with a sparse matrix of ones, and other places through
    their position in memory, of which numpy.add.at is fast: 60 and 6 times faster (measured, 4096 rows of 64).
    """
    if out.dtype.char in HALF:  # accumulated in float32, as every sum
        wide = out.astype(np.float32)
        add_at(wide, key, values)
        np.copyto(out, wide, casting="unsafe")
        return
    arrays = [k for k in key if isinstance(k, (np.ndarray, np.generic))]
    if all(k.dtype.kind == "b" for k in arrays):  # a mask names no place twice
        out[key] += values
        return
    contiguous = out.flags.c_contiguous and out.size > 0
    product = _sparse_product() if len(key) == 1 and contiguous and out.ndim > 1 and out.dtype.kind in "fi" else None
    if product is not None:
        _add_rows(product, out, key[0], values)
    elif contiguous and out.size < 4 * np.size(values):
        places = np.arange(out.size).reshape(out.shape)[key]
        np.add.at(out.reshape(-1), places.reshape(-1), np.broadcast_to(values, places.shape).reshape(-1))
    else:
        np.add.at(out, key, values)


def _add_rows(product: Callable, out: np.ndarray, index: np.ndarray, values: Any) -> None:
    """out[index] += values for rows of `out`: the product of the sparse 0-1 matrix of `index` with the values."""
    rows, count = out.shape[0], index.size
    width = out.size // rows
    if not count or not width:
        return
    at = np.ascontiguousarray(index, np.int64).reshape(-1)
    if np.maximum.reduce(at.view(np.uint64)) >= rows:  # the product below writes wherever it is told
        check(at, rows, "index", True)
        at = np.where(at < 0, at + rows, at)
    terms = values
    if type(terms) is not np.ndarray or terms.size != count * width:
        terms = np.broadcast_to(terms, (*index.shape, *out.shape[1:]))
    terms = np.ascontiguousarray(terms, out.dtype)
    ones = np.ones(count, out.dtype)
    product(rows, count, width, np.arange(count + 1), at, ones, terms.reshape(-1), out.reshape(-1))


@cache
def _sparse_product() -> Callable | None:
    """scipy.sparse's kernel Y += A X for a matrix A of compressed columns and dense X, Y.

    The public product makes a dense result first, which for an embedding is the size of its table.
    """
    try:
        from scipy.sparse._sparsetools import csc_matvecs
    except ImportError:
        return None
    return csc_matvecs
