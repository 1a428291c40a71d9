"""The interface of a backend: the handful of things in which NumPy and CuPy differ.

Everything that computes goes through these methods, so that no op, layer or optimiser asks which device it runs on, and
so that a recorder can stand in the one door. Arrays are bare numpy.ndarray or cupy.ndarray; an array that comes back
from `elementwise`, `reduce`, `rows` and `matmul` is fresh unless `out` was given. In which order it lies in memory, the
same on every device, is told in gpuad/array/order.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from gpuad.array.device import Device


class Formula(Protocol):
    """What a backend must know of a formula (gpuad.kernels.formula.Formula): its ufunc and its runners."""

    ufunc: np.ufunc | None
    promoted: tuple[int, ...]
    runners: dict[str, Any]

    def runner(self, language: str) -> Any:
        """The program or kernel for a language."""

    def out_dtype(self, i: int, dtype: np.dtype) -> np.dtype:
        """The dtype of output i when numbers are computed in `dtype`."""


# The methods that give the device something to run, a kernel, program, product or copy each: what the profiler counts.
RUNNING = ("elementwise", "rows", "reduce", "elementwise_and_sum", "sum", "row_total", "add", "add_into", "cast",
           "copy", "full", "gemm", "linear_activation", "weight_gradient", "input_gradient", "read_at", "add_at",
           "check_index", "receive", "run", "update")  # fmt: skip


class Backend:
    """What both backends share; `xp` is numpy or cupy."""

    xp: Any
    device: Device
    language: str
    array_type: type

    # The formula that hands its input on, for sums of arrays; gpuad/kernels/formula.py, a floor up, sets it.
    identity: Formula

    # Whether this device is the current one of its array library; the host always is.
    current: bool = True

    def inside(self, function: Callable, *arguments: Any, **named: Any) -> Any:
        """Call a function with this device as the current one; for rules that compute on bare arrays themselves."""
        return function(*arguments, **named)

    def explain(self, error: Exception) -> None:
        """Raise gpuad.cuda.OutOfMemoryError where `error` says that the memory of a CUDA device is used up."""

    def mark(self) -> Any:
        """An event behind the work given to the device so far, which tells the time; None on the host."""
        return None

    def milliseconds(self, start: Any, end: Any) -> float:
        """The time between two marks, after a wait for the second."""
        return 0.0

    def range_push(self, name: str) -> None:
        """Open a range of this name in the timeline of the vendor's profiler (NVTX)."""

    def range_pop(self) -> None:
        """Close the innermost range."""

    def enter(self) -> None:
        """Make this device the current one of the array library."""

    def leave(self) -> None:
        """Undo `enter`."""

    def asarray(self, values: Any, dtype: np.dtype | None = None) -> Any:
        """Values (nested lists, numbers, host arrays, arrays of this device) as an array here; copies if it must."""
        raise NotImplementedError

    def receive(self, array: Any) -> Any:
        """A copy here, in its order of memory, of an array that may lie on another device."""
        raise NotImplementedError

    def to_host(self, array: Any) -> np.ndarray:
        """The array as a numpy.ndarray, in its order of memory; waits for the device, which gpuad.cuda counts."""
        raise NotImplementedError

    def offload(self, array: Any, pinned: bool) -> Any:
        """The array on the host, until restore() brings it back; with `pinned` neither of them waits.

        The array itself where it lies on the host.
        """
        return array

    def restore(self, host: Any) -> Any:
        """An array here again of what offload() gave."""
        return host

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
        """scale · the sum over `axes` of a formula's output, a list for several; numbers are computed in `dtype`."""
        return formula.runner(self.language).reduce(arguments, dtype, axes, keepdims, scale)

    def elementwise_and_sum(
        self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, out: Any, axes: tuple[int, ...], total: Any
    ) -> Any:
        """The output of a formula in `out`, perhaps an argument; returns its sum over axes, in `total` where given."""
        self.elementwise(formula, arguments, dtype, [out])
        return self.sum(out, axes, False, total)

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

    def cast(self, array: Any, dtype: np.dtype) -> Any:
        """The array in another dtype; itself where it has that."""
        return array.astype(dtype, copy=False)

    def copy(self, array: Any) -> Any:
        """A fresh C-contiguous copy."""
        return array.copy("C")

    def contiguous(self, array: Any) -> Any:
        """The array in C order: itself where it is."""
        return array if array.flags.c_contiguous else self.copy(array)

    def gemm(self, a: Any, b: Any, out: Any = None, alpha: float = 1.0, beta: float = 0.0) -> Any:
        """alpha · a @ b + beta · out, on matrices or stacks of them (numpy.matmul's rules for shapes)."""
        raise NotImplementedError

    # Whether an activation behind a linear layer is computed with it, which saves launches: see gpuad/ops/linear.py.
    fuses_activations: bool = False

    def linear_activation(self, x: Any, weight: Any, bias: Any, activation: str | None, keep: bool) -> Any:
        """(activation(x @ weight.T + bias), with `keep` what input_gradient needs of it) in one call, or None."""
        return None

    def weight_gradient(self, g: Any, x: Any, out: Any, beta: float, total: Any) -> Any:
        """The sum of the rows of g, in `total` where given, with out = g.T @ x + beta · out, in one call, or None."""
        return None

    def input_gradient(self, g: Any, weight: Any, kept: Any, summed: bool, total: Any) -> Any:
        """(g @ weight times the activation's derivative, with `summed` the sum of its rows) in one call, or None."""
        return None

    def linear(self, x: Any, weight: Any, bias: Any) -> Any:
        """x @ weight.T + bias for matrices; bias may be None."""
        raise NotImplementedError

    def check_index(self, index: Any, length: int, what: str, wrap_negative: bool = True) -> None:
        """See that the integers in `index` name entries of a dimension; with wrap_negative, also from its end.

        Raises IndexError that names the first offender, its position and what is valid. On CUDA that is at the next
        point at which the host waits for the device (item(), cpu(), cuda.synchronize()); until then CuPy's indexing
        wraps around.
        """
        raise NotImplementedError

    def check_labels(self, labels: Any, classes: int, ignore: int) -> bool:
        """See that labels name classes or are `ignore`; True when it is known, without a wait, that none is `ignore`.

        On CUDA the kernel that reads at the labels checks them, see check_index.
        """
        raise NotImplementedError

    def rows(self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...]) -> list[Any]:
        """The outputs of a row formula, a list in C order; `axes` of the elements, ascending, are the columns."""
        return formula.runner(self.language)(arguments, dtype, axes)

    def row_total(
        self, formula: Formula, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], weighted: bool,
        scale: float, mean: bool,
    ) -> tuple[Any, Any, list[Any]]:  # fmt: skip
        """(scale · Σ terms, Σ weights, the other outputs) of a row formula with outputs (term, weight, *others).

        With `mean` the first is Σ terms / Σ weights. Not weighted: there is no weight among the outputs.
        """
        raise NotImplementedError

    def read_at(self, array: Any, key: Any) -> Any:
        """array[key], a copy, for a tuple `key` that holds integer or bool arrays."""
        return self.xp.asarray(array[key])

    def add_at(self, out: Any, key: Any, values: Any) -> None:
        """out[key] += values, where places that `key` names several times take all of theirs.

        On CUDA by atomic additions: sums of floats are then rounded in an order that changes from run to run, unless
        gpuad.use_deterministic_algorithms(True).
        """
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""

    def uploader(self, depth: int) -> Any:
        """What copies batches here beside computation (gpuad.array.streams.Uploader); None where nothing is gained."""
        return None

    def record_stream(self, array: Any, stream: Any) -> None:
        """Keep the memory of an array from being reused before the work of `stream` is done; the host has no streams.

        stream: CuPy's.
        """

    def check_faults(self) -> None:
        """Raise what check_index found, where the host has waited for the device by other means than `synchronize`."""

    def cast_operands(self, formula: Any, arguments: Sequence[Any], dtype: np.dtype) -> Sequence[Any]:
        """The arguments as this backend's programs take them when dtypes differ."""
        return arguments

    def elementwise_mixed(self, formula: Any, arguments: Sequence[Any], dtype: np.dtype, outs: Any = None) -> Any:
        """`elementwise` where arguments may have other dtypes than `dtype`, and may not broadcast (ValueError)."""
        return self.elementwise(formula, self.cast_operands(formula, arguments, dtype), dtype, outs)

    def prepare_update(self, program: Any, sets: Sequence[tuple[Any, list]]) -> None:
        """Do what `update` needs memory for: it then runs to its end, and no step is left half done."""

    def update(self, program: Any, sets: Sequence[tuple[Any, list]], *skip: Any) -> None:
        """Run a program of gpuad.kernels.update on the parameters of each set, in place.

        skip: where `peek` does not know it, a number on the device; where it is not 0 nothing changes.
        """
        if self.current:
            program.run(sets, *skip)
        else:
            self.inside(program.run, sets, *skip)

    def peek(self, flag: Any) -> bool | None:
        """Whether a 0-d array is not 0, or None where the host would have to wait for it."""
        raise NotImplementedError

    def run(self, function: Callable, *arguments: Any) -> Any:
        """Call a function of gpuad.kernels that starts something on arrays of this device."""
        return function(*arguments)
