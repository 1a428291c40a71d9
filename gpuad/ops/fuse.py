"""gpuad.fuse: a user's function of elements as one kernel, with its derivatives."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from gpuad.array import dtypes
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.op import function
from gpuad.kernels.formula import Formula
from gpuad.kernels.numpy_program import NumpyProgram


class Fused(Elementwise):
    """A function made one kernel by gpuad.fuse; call it like the function."""

    def cuda_source(self, dtype: Any = "float32") -> str:
        """The body of the CUDA kernel for operands of a dtype."""
        return self.formula.runner("cuda").source(dtypes.as_dtype(dtype))

    def cuda_source_of_gradient(self, dtype: Any = "float32") -> str:
        """The body of the CUDA kernel that computes the gradients of all operands."""
        return self._derivative().runner("cuda").source(dtypes.as_dtype(dtype))

    def numpy_source(self) -> str:
        """The NumPy program for operands of one shape, as Python source."""
        return _numpy_source(self.formula)

    def numpy_source_of_gradient(self) -> str:
        """The NumPy program of the gradients of all operands."""
        return _numpy_source(self._derivative())

    def _derivative(self) -> Formula:
        wanted = tuple(i for i, v in enumerate(self.formula.inputs) if v.kind == "number")
        return self.formula.vjp(wanted).formula


def _numpy_source(formula: Formula) -> str:
    everything = frozenset(range(len(formula.inputs)))
    return NumpyProgram(formula).whole(frozenset(), everything).source  # type: ignore[attr-defined]


@function(method=False)
def fuse(f: Callable | None = None, *, name: str | None = None) -> Any:
    """Make a function of corresponding elements one kernel, with one more for all its gradients; a decorator.

    f takes numbers and returns a number or a tuple of them, written with operators and gpuad's elementwise functions
    (gpuad.exp, gpuad.where …). It is called once, with symbolic numbers; parameters with defaults may be left out of
    calls. The result takes Tensors (which broadcast) and numbers, and is differentiable to any order, in both modes.

    Raises FormulaError for what is not elementwise and for an `if` on a value; it says what to write instead.
    """
    if f is None:
        return functools.partial(fuse, name=name)
    given: str = name if name else getattr(f, "__name__", "fused")
    title = re.sub(r"\W", "_", given).strip("_") or "fused"
    made = Fused(title if not title[0].isdigit() else f"f_{title}", f, doc=f.__doc__ or "", register=False)
    made.__wrapped__ = f  # type: ignore[attr-defined]
    return made
