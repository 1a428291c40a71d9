"""Products of matrices and vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuad.array.device import of_array
from gpuad.array.dtypes import FLOATING
from gpuad.autograd.batching import Batch
from gpuad.autograd.op import describe, function
from gpuad.autograd.primitive import multilinear, primitive
from gpuad.errors import DtypeError, ShapeError
from gpuad.ops.reduction import sum_to_size
from gpuad.ops.samples import S
from gpuad.tensor import Tensor


def mT(x: Any) -> Any:
    """x with its last two dimensions swapped: a view; bare arrays and Tensors."""
    return x.swapaxes(-1, -2)


def _check_shapes(name: str, a: Any, b: Any, fits: bool) -> None:
    if not fits:
        raise ShapeError(
            f"{name} got shapes that do not fit together:\n  a  {describe(a)}\n  b  {describe(b)}\n"
            "The last dimension of a must equal the second last (or only) one of b; transpose one of them, e.g. b.T."
        )


def _gemm(backend: Any, a: Any, b: Any) -> Any:
    _check_shapes("matmul", a, b, a.shape[-1] == b.shape[-2])
    if a.dtype != b.dtype:
        raise DtypeError(
            f"matmul got operands of different dtypes:\n  a  {describe(a)}\n  b  {describe(b)}\n"
            f"Convert one of them, e.g. b.to(gpuad.{a.dtype})."
        )
    if a.ndim > 2 or b.ndim > 2:
        try:
            np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        except ValueError as error:
            raise ShapeError(
                "matmul got stacks of matrices whose shapes do not broadcast:\n"
                f"  a  {describe(a)}\n  b  {describe(b)}\n"
                "All dimensions before the last two must be equal or 1."
            ) from error
    if a.dtype.char not in FLOATING:
        return backend.xp.matmul(a, b)
    return backend.gemm(a, b)


def _sum_to(g: Any, shape: tuple[int, ...]) -> Any:
    """g summed over the dimensions in which an operand of `shape` was broadcast."""
    return g if tuple(g.shape) == tuple(shape) else sum_to_size(g, shape)


def _gemm_of_all(batch: Batch, op: Any, inputs: Any, params: dict) -> Any:
    a, b = inputs
    if a.ndim == b.ndim == 2 and not batch.has(b):  # one large product instead of many small ones
        rows, inner = a._data.shape
        return gemm(a.value.reshape((batch.size * rows, inner)), b).reshape((batch.size, rows, b.shape[1]))
    ndim = max(a.ndim, b.ndim)
    return gemm(batch.aligned(a, ndim), batch.aligned(b, ndim))


# Matrices and stacks of matrices; vectors are made matrices by matmul() below.
gemm = primitive(
    "gemm",
    _gemm,
    vjp={
        "a": lambda g, b, a_shape, into: _into(g, mT(b), a_shape, into),
        "b": lambda g, a, b_shape, into: _into(mT(a), g, b_shape, into),
    },
    jvp=multilinear,
    samples=[(S((3, 4)), S((4, 5))), (S((2, 3, 4)), S((2, 4, 5))), (S((2, 1, 3, 4)), S((5, 4, 2))),
             (S((0, 4)), S((4, 5))), (S((3, 0)), S((0, 5)))],
    doc="a @ b for matrices and stacks of matrices.", autocast="lower", batch=_gemm_of_all,
)  # fmt: skip


def _into(a: Any, b: Any, shape: tuple[int, ...], into: Any) -> Any:
    """a @ b summed to `shape`, written into the leaf's buffer where there is one and nothing is to be summed."""
    if into is None:
        return _sum_to(gemm(a, b), shape)
    buffer, beta = into
    backend = of_array(buffer).backend
    if a.ndim == 2 and b.ndim == 2:
        return backend.gemm(a, b, buffer, 1.0, beta)
    product = _sum_to(gemm(a, b), shape)
    if beta:
        backend.add_into(buffer, product)
    else:
        buffer[...] = product
    return buffer


@function(name="matmul")
def matmul(input: Any, other: Any) -> Any:
    """The product of matrices, stacks of matrices (which broadcast) or vectors, as numpy.matmul.

    input: (..., n, k) or (k,). other: (..., k, m) or (k,). One dtype. Raises ShapeError where they do not fit.
    """
    if (not isinstance(input, Tensor) or not isinstance(other, Tensor)) and (
        isinstance(input, Tensor) or isinstance(other, Tensor) or not hasattr(input, "ndim")
    ):
        raise TypeError(f"matmul takes two Tensors, got {type(input).__name__} and {type(other).__name__}.")
    rows, columns = input.ndim, other.ndim
    if rows == 0 or columns == 0:
        raise ShapeError(
            f"matmul takes operands with at least one dimension:\n  a  {describe(input)}\n  b  {describe(other)}\n"
            "Use a * b for scalars."
        )
    if rows > 1 and columns > 1:
        if columns == 2 and rows > 2:  # one large product instead of a stack of small ones
            _check_shapes("matmul", input, other, input.shape[-1] == other.shape[0])
            flat = input.reshape((-1, input.shape[-1])) if input.shape[-1] else None
            if flat is not None:
                return gemm(flat, other).reshape((*input.shape[:-1], other.shape[-1]))
        return gemm(input, other)
    a = input.reshape((1, -1)) if rows == 1 else input
    b = other.reshape((-1, 1)) if columns == 1 else other
    product = matmul(a, b)
    shape = list(product.shape)
    if columns == 1:
        del shape[-1]
    if rows == 1:
        del shape[-1 if columns == 1 else -2]
    return product.reshape(tuple(shape))


@function(name="mm")
def mm(input: Any, mat2: Any) -> Any:
    """The product of two matrices."""
    if input.ndim != 2 or mat2.ndim != 2:
        raise ShapeError(
            f"mm takes two matrices:\n  a  {describe(input)}\n  b  {describe(mat2)}\nUse matmul for others."
        )
    return gemm(input, mat2)


@function(name="bmm")
def bmm(input: Any, mat2: Any) -> Any:
    """The products of two stacks of matrices, (b, n, k) and (b, k, m)."""
    if input.ndim != 3 or mat2.ndim != 3 or input.shape[0] != mat2.shape[0]:
        raise ShapeError(
            f"bmm takes two stacks of matrices of equal length:\n  a  {describe(input)}\n  b  {describe(mat2)}\n"
            "Use matmul for others."
        )
    return gemm(input, mat2)


@function(name="mv")
def mv(input: Any, vec: Any) -> Any:
    """The product of a matrix and a vector."""
    if input.ndim != 2 or vec.ndim != 1:
        raise ShapeError(f"mv takes a matrix and a vector:\n  a  {describe(input)}\n  b  {describe(vec)}")
    return matmul(input, vec)


@function(name="dot")
def dot(input: Any, tensor: Any) -> Any:
    """The inner product of two vectors."""
    if input.ndim != 1 or tensor.ndim != 1:
        raise ShapeError(
            f"dot takes two vectors:\n  a  {describe(input)}\n  b  {describe(tensor)}\nUse matmul for others."
        )
    return matmul(input, tensor)


@function(name="outer")
def outer(input: Any, vec2: Any) -> Any:
    """The outer product of two vectors, (n,) and (m,) to (n, m)."""
    return input.reshape((-1, 1)) * vec2.reshape((1, -1))


@function(name="addmm")
def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """beta · input + alpha · mat1 @ mat2."""
    product = mm(mat1, mat2)
    product = product if alpha == 1 else product * alpha
    return product + (input if beta == 1 else input * beta)


@function(name="bilinear", nn=True)
def bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    """y_o = input1ᵀ weight_o input2 + bias_o.

    input1: (*, n). input2: (*, m). weight: (out, n, m). bias: (out,) or None. Returns (*, out).
    """
    left = matmul(input1.unsqueeze(-2).unsqueeze(-2), weight)  # (*, out, 1, m)
    y = (left.squeeze(-2) * input2.unsqueeze(-2)).sum(-1)
    return y if bias is None else y + bias
