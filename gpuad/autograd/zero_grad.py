"""zero_grad: gradients forgotten, their buffers kept for the next backward where nobody else looks at them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpuad.array.host_memory import LARGE, alone
from gpuad.tensor import Tensor, wrap


def zero_grad(tensors: Iterable[Tensor], set_to_none: bool = True) -> None:
    """Set the .grad of each tensor to None, or to zero in place.

    With set_to_none the next backward writes into the same buffer, so small gradients cost nothing but their kernels
    from step to step. Large ones (1 MiB) are let go: the forward pass may need the memory, and takes it from a pool. So
    are those that are held elsewhere too (`g = p.grad`, a view or the array of it): they stay as they are.
    """
    for tensor in tensors:
        grad = tensor._grad
        if grad is None:
            continue
        if not set_to_none:
            _fill_with_zero(tensor, grad)
        elif (
            grad._node is None
            and not grad._requires_grad
            and grad._data.nbytes < LARGE
            and _holders(grad) == _SOLE
            and alone(grad._data)
        ):
            tensor._grad_buffer = grad
            tensor._grad = None
        else:
            tensor._grad = None


def _fill_with_zero(tensor: Tensor, grad: Tensor) -> None:
    if grad._requires_grad or grad._node is not None:  # of a create_graph backward: others may need its value
        tensor._grad = wrap(grad._device.backend.full(grad._data.shape, 0, grad._data.dtype), grad._device)
        return
    backend = grad._device.backend
    if backend.current:
        grad._data.fill(0)
    else:
        backend.inside(grad._data.fill, 0)
    grad._cell[0] += 1


def _holders(grad: Tensor) -> tuple[int, int, int]:
    """How many references there are to a gradient, to its array (its views hold it too) and to its version cell."""
    count = sys.getrefcount
    return count(grad), count(grad._data), count(grad._cell)


def _measure() -> tuple[int, int, int]:
    """`_holders` of a gradient that its tensor alone holds, called as zero_grad does."""
    made: Any = wrap(np.empty(1, np.float32))
    made._grad = wrap(np.empty(1, np.float32))
    for tensor in [made]:
        grad = tensor._grad
        return _holders(grad)
    raise AssertionError


# Measured, since interpreters count temporaries differently.
_SOLE = _measure()
