"""The interface of a backend: the handful of things in which NumPy and CuPy differ.

Everything that computes goes through these methods, so that no op, layer or optimiser asks which device it runs on, and
so that a recorder can stand in the one door. Arrays are bare numpy.ndarray or cupy.ndarray; an array that comes back
from `elementwise`, `reduce`, `rows` and `matmul` is fresh unless `out` was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from gpuad.array.device import Device


class Formula(Protocol):
    """What a backend must know of a formula (gpuad.kernels.formula.Formula): its ufunc and its runners."""

    ufunc: np.ufunc | None
    promoted: tuple[int, ...]

    def runner(self, language: str) -> Any:
        """The program or kernel for a language."""


class Backend:
    """What both backends share; `xp` is numpy or cupy."""

    xp: Any
    device: Device
    language: str
    array_type: type

    def enter(self) -> None:
        """Make this device the current one of the array library."""

    def leave(self) -> None:
        """Undo `enter`."""

    def asarray(self, values: Any, dtype: np.dtype | None = None) -> Any:
        """Values (nested lists, numbers, host arrays, arrays of this device) as an array here; copies if it must."""
        raise NotImplementedError

    def receive(self, array: Any) -> Any:
        """A copy here of an array that lies on another device."""
        raise NotImplementedError

    def to_host(self, array: Any) -> np.ndarray:
        """The array as a numpy.ndarray; waits for the device, which is counted (see gpuad.cuda)."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An array with any contents."""
        return self.xp.empty(shape, dtype)

    def full(self, shape: tuple[int, ...], value: Any, dtype: np.dtype) -> Any:
        """An array with one value everywhere."""
        return self.xp.full(shape, value, dtype)

    def ones_scalar(self, dtype: np.dtype) -> Any:
        """The 0-d array 1 of a dtype, made once and never written: the seed of every backward pass."""
        raise NotImplementedError

    def elementwise(self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, outs: Any = None) -> Any:
        """The output of a formula with one output, or the list of outputs; numbers are computed in `dtype`."""
        raise NotImplementedError

    def reduce(
        self,
        formula: Formula,
        arguments: Sequence[Any],
        dtype: np.dtype,
        axes: tuple[int, ...],
        keepdims: bool,
        scale: float = 1.0,
    ) -> Any:
        """scale · the sum over `axes` of a formula's output; arguments may have other dtypes than `dtype`."""
        arguments = self.cast_operands(formula, arguments, dtype)
        return formula.runner(self.language).reduce(arguments, dtype, axes, keepdims, scale)

    def sum(
        self, array: Any, axes: tuple[int, ...], keepdims: bool = False, out: Any = None, scale: float = 1.0
    ) -> Any:
        """scale · the sum of an array over axes, in the dtype of the array; accumulated in float32 for float16."""
        raise NotImplementedError

    def add(self, a: Any, b: Any) -> Any:
        """a + b in a fresh array: a second contribution to a gradient."""
        return self.xp.add(a, b)

    def add_into(self, buffer: Any, b: Any) -> None:
        """buffer += b."""
        self.xp.add(buffer, b, out=buffer)

    def copy(self, array: Any) -> Any:
        """A fresh C-contiguous copy."""
        return array.copy("C")

    def gemm(self, a: Any, b: Any, out: Any = None, alpha: float = 1.0, beta: float = 0.0) -> Any:
        """alpha · a @ b + beta · out, on matrices or stacks of them (numpy.matmul's rules for shapes)."""
        raise NotImplementedError

    def linear(self, x: Any, weight: Any, bias: Any) -> Any:
        """x @ weight.T + bias for matrices; bias may be None."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""

    def cast_operands(self, formula: Any, arguments: Sequence[Any], dtype: np.dtype) -> Sequence[Any]:
        """The arguments as this backend's programs take them when dtypes differ."""
        return arguments

    def elementwise_mixed(self, formula: Any, arguments: Sequence[Any], dtype: np.dtype, outs: Any = None) -> Any:
        """`elementwise` where arguments may have other dtypes than `dtype`, and may not broadcast (ValueError)."""
        return self.elementwise(formula, self.cast_operands(formula, arguments, dtype), dtype, outs)
