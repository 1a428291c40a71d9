"""gpuad.graph.of: the graph of a tensor, as far as the tape keeps it."""

from __future__ import annotations

import sys

from gpuad.errors import AutogradError
from gpuad.graph.building import Builder
from gpuad.graph.data import Graph
from gpuad.graph.source import Names
from gpuad.tensor import Tensor


def of(tensor: Tensor) -> Graph:
    """The computational graph of a tensor that was computed already, from what the tape keeps of it.

    The tape keeps operations, their operands that need a gradient, and what is saved for it; no values, no tangents and
    no source lines: for these run the function under `trace`. Leaves are named by the variables of the caller, and
    parameters by those of the caller's modules. `of(tensor).backward()` adds gradients, and with them shapes.

    Raises AutogradError for a tensor that is not on the tape.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"graph.of takes a Tensor, got {type(tensor).__name__}; for a function use graph.trace.")
    if not tensor._requires_grad:
        raise AutogradError(
            "graph.of got a tensor that does not require grad, so the tape knows nothing of it. Call "
            "x.requires_grad_() on an input first and compute outside no_grad(), or use graph.trace(f, x)."
        )
    frame = sys._getframe(1)
    names = Names()
    names.add_modules_of(frame)
    builder = Builder(names)
    builder.node_of(tensor, [frame])
    return builder.finish("the tape", [tensor])
