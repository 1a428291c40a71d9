"""Tensors taken apart along a dimension: split, chunk, unbind. The pieces are views.

On the tape all pieces of a tensor are one operation, so that their gradients are joined in one launch instead of each
being written into zeros of the full size and added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.autograd.modes import state
from gpuad.autograd.node import Node, OutputNode
from gpuad.autograd.op import Interpreters, Op, function
from gpuad.autograd.views import view_of
from gpuad.errors import ShapeError
from gpuad.kernels import join_cuda, join_numpy
from gpuad.ops.indexing import slice_
from gpuad.ops.reduction import axis_of
from gpuad.ops.shape import cat, narrow_, unsqueeze
from gpuad.tensor import Tensor, wrap

_JOIN: dict[str, Any] = {"numpy": join_numpy.join, "cuda": join_cuda.join}


class Pieces(Op):
    """All pieces of a tensor along `dim`, each by the view operation and the parameters that make it alone.

    Changed in place, the pieces go on as those single views, see gpuad/autograd/views.py.
    """

    def __call__(self, input: Any, op: Any, each: Sequence[dict], dim: int, lengths: Sequence[int]) -> tuple[Any, ...]:
        recorded = isinstance(input, Tensor) and input._requires_grad and state.enabled
        if not recorded or Interpreters.active or len(each) < 2:
            return tuple(op(input, **params) for params in each)
        data, device, parent = input._data, input._device, input._node
        info = (dim, tuple(lengths), [None] * len(each), data.shape, data.dtype)
        node = Node(self, (input if parent is None else parent,), (), (), 0, info, device)
        pieces = []
        for i, params in enumerate(each):
            piece = view_of(op, input, params, op.forward(device.backend, data, **params))
            piece._node, piece._requires_grad = OutputNode(node, i), True
            pieces.append(piece)
        return tuple(pieces)

    def backward(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        dim, lengths, _, shape, dtype = node.info
        whole = [_with_dim(g, dim, len(shape)) for g in gradient]
        backend = node.device.backend
        out = backend.empty(shape, dtype)
        backend.run(_JOIN[backend.language], whole, lengths, dim, out)
        return [out]

    def backward_recorded(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        dim, lengths, _, shape, dtype = node.info
        parts = []
        for g, length in zip(gradient, lengths, strict=True):
            if g is None:
                zeros = node.device.backend.full((*shape[:dim], length, *shape[dim + 1 :]), 0, dtype)
                parts.append(wrap(zeros, node.device))
            else:
                parts.append(g if g.ndim == len(shape) else unsqueeze(g, dim))
        return [cat(parts, dim)]


def _with_dim(g: Any, dim: int, ndim: int) -> Any:
    """A gradient with the dimension that unbind() took away."""
    return g if g is None or g.ndim == ndim else g[(*[slice(None)] * dim, None)]


_split, _unbind = Pieces("split", register=False), Pieces("unbind", register=False)


@function
def split(input: Any, split_size_or_sections: Any, dim: int = 0) -> tuple[Any, ...]:
    """Pieces of one size (the last may be smaller), or of the sizes given, along `dim`: views."""
    at = axis_of("split", dim, input.ndim)
    n = input.shape[at]
    if isinstance(split_size_or_sections, int):
        size = split_size_or_sections
        if size <= 0:
            raise ShapeError(f"split() takes a positive size, got {size}.")
        sizes = [min(size, n - i) for i in range(0, n, size)] or [0]
    else:
        sizes = list(split_size_or_sections)
        if sum(sizes) != n:
            raise ShapeError(f"split() sizes {sizes} add up to {sum(sizes)}, but dimension {dim} has length {n}.")
    starts = np.cumsum([0, *sizes]).tolist()
    each = [{"dim": at, "start": s, "length": m} for s, m in zip(starts, sizes, strict=False)]
    return _split(input, narrow_, each, at, sizes)


@function
def chunk(input: Any, chunks: int, dim: int = 0) -> tuple[Any, ...]:
    """At most `chunks` pieces of equal size (the last may be smaller) along `dim`: views."""
    if chunks <= 0:
        raise ShapeError(f"chunk() takes a positive number of chunks, got {chunks}.")
    n = input.shape[axis_of("chunk", dim, input.ndim)]
    return split(input, max(1, -(-n // chunks)), dim)


@function
def unbind(input: Any, dim: int = 0) -> tuple[Any, ...]:
    """The entries along `dim`, without that dimension: views."""
    if not input.ndim:
        raise ShapeError("unbind() of a 0-d tensor: it has no dimension to take apart.")
    at = axis_of("unbind", dim, input.ndim)
    count = input.shape[at]
    each = [{"key": (*[slice(None)] * at, i)} for i in range(count)]
    return _unbind(input, slice_, each, at, (1,) * count)
