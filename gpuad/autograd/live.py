"""What is alive: every array that tensors and the tape hold, found only when somebody asks (out of memory)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from gpuad.array import memory
from gpuad.autograd.node import Node
from gpuad.tensor import Tensor


def holders() -> Iterator[tuple[Any, str]]:
    """(array, what it is) for each array of a leaf, a gradient, a node, and of every other Tensor, in this order.

    They are found among the objects that Python's garbage collector knows, which costs nothing until then. An array
    that several hold comes several times.
    """
    tensors, nodes = _alive(Tensor), _alive(Node)
    for t in tensors:
        if t._requires_grad and t._node is None:
            yield t._data, "a leaf that requires grad"
    for t in tensors:
        for gradient in (t._grad, t._grad_buffer):
            if gradient is not None:
                yield gradient._data, "a gradient"
    for node in nodes:
        for value in node.saved or ():
            yield value, f"saved by {node.op.name} for its gradient"
    for t in tensors:
        yield t._data, "a tensor" if t._node is None else f"the result of {t._node.op.name}"


def let_go() -> None:
    """Drop the gradient buffers that zero_grad left for the next backward."""
    for t in _alive(Tensor):
        if t._grad_buffer is not None:
            t._grad_buffer = None


def _alive(kind: type) -> list[Any]:
    """The objects of a class and those below it; a look-up by type takes half the time of issubclass."""
    kinds = set(subclasses(kind))
    return [each for each in gc.get_objects() if type(each) in kinds]


def subclasses(kind: type) -> list[type]:
    """A class and all below it, each once."""
    found: dict[type, None] = {kind: None}
    below: list[type] = kind.__subclasses__()
    for each in below:
        found.update(dict.fromkeys(subclasses(each)))
    return list(found)


memory.holders, memory.let_go = holders, let_go
