"""A formula as a NumPy program: straight-line ufunc calls with `out=`, scratch reused, large arrays in blocks.

Two programs are written for a formula, as Python source (numpy_writer.py), and compiled once:

- `whole`: every call works on whole arrays; the first calls make the buffers, later ones write into those that nobody
  reads any more. For arrays that fit the cache.
- `block`: every buffer is given. Large arrays are cut into blocks that stay in the cache, and the blocks are spread
  over threads (threads.py) when there is enough work to pay for it.

A formula that is one ufunc is that ufunc.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.array.dtypes import HALF
from gpuad.array.host_memory import memory
from gpuad.array.numpy_backend import add_reduce, host_sum
from gpuad.array.order import Order, memory_order
from gpuad.kernels.expr import Variable, topological
from gpuad.kernels.numpy_writer import SCRATCH, Writer, lower
from gpuad.kernels.threads import parallel

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Elements in a block. Small ones stay in the nearest cache, but every ufunc call holds Python's lock for 0.5 us, which
# two threads pass to and fro: with 16384 elements (1 us of work) a second thread makes gelu's derivative slower, with
# 262144 it halves the time, and one thread alone gains 25 %. 131072 is 20 % slower, 1048576 falls out of the last cache
# (measured with float32, 1 MiB of cache a core and 32 MiB for all).
BLOCK = 262144


def single_ufunc(formula: Formula) -> np.ufunc | None:
    """The ufunc that a formula is, if it is one called with the formula's inputs in order."""
    (root,) = lower(formula.outputs) if len(formula.outputs) == 1 else (None,)
    if root is None or not isinstance(root.function.numpy, np.ufunc) or root.function.across:
        return None
    if len(root.args) != len(formula.inputs) or any(a is not v for a, v in zip(root.args, formula.inputs)):
        return None
    return root.function.numpy


class NumpyProgram:
    """The NumPy side of a formula: call it with arrays and Python numbers in the order of the formula's inputs."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.outputs = lower(formula.outputs)
        self.work = sum(1 for n in topological(self.outputs) if n.args)
        self.copies = [isinstance(o, Variable) for o in self.outputs]  # an input handed on is copied
        self._whole: dict[tuple, Callable] = {}
        self._calls: dict[tuple, tuple[Callable | None, tuple, list[int], Order | None]] = {}
        self._singles: dict[int, NumpyProgram] = {}
        self._block: dict[tuple, tuple[Callable, list[str]]] = {}

    def whole(self, scalars: frozenset[int], full: frozenset[int]) -> Callable:
        """The program on whole arrays, `full` being the inputs that have the shape of the result."""
        program = self._whole.get((scalars, full))
        if program is None:
            writer = Writer(self.formula, self.outputs, scalars, given=False)
            writer.write(frozenset(self.formula.inputs[i] for i in full))
            header = f"def program({', '.join(f'x{i}' for i in range(len(self.formula.inputs)))}, dtype):"
            names = [
                f"{writer.text(o)}.copy()" if o in set(self.outputs[:i]) and writer.depends[o] else writer.text(o)
                for i, o in enumerate(self.outputs)
            ]
            program = writer.compile(header, [f"return {', '.join(names)}" if len(names) > 1 else f"return {names[0]}"])
            self._whole[scalars, full] = program
        return program

    def block(self, scalars: frozenset[int], aliases: frozenset[tuple[int, int]]) -> tuple[Callable, list[str]]:
        """The program on blocks of one shape with all buffers given, and the kinds of its scratch buffers."""
        found = self._block.get((scalars, aliases))
        if found is None:
            writer = Writer(self.formula, self.outputs, scalars, True, aliases)
            writer.write(frozenset(v for i, v in enumerate(self.formula.inputs) if i not in scalars))
            outs = [f"o{i}" for i in range(len(self.outputs))]
            names = [f"x{i}" for i in range(len(self.formula.inputs))] + outs + list(writer.scratch)
            footer, taken = [], []
            for i, (out, node) in enumerate(zip(outs, self.outputs, strict=True)):
                source = writer.text(node)
                if source == out:
                    continue
                if any(o != i and self.formula.inputs[k] is node for o, k in aliases):  # its memory is an output's too
                    footer.append(f"k{i} = {source}.copy()")
                    source = f"k{i}"
                taken.append(f"copyto({out}, {source})")
            footer += taken
            found = writer.compile(f"def program({', '.join(names)}):", footer), list(writer.scratch.values())
            self._block[scalars, aliases] = found
        return found

    def __call__(self, arguments: Sequence[Any], dtype: np.dtype, outs: Sequence[Any] | None = None) -> Any:
        """The outputs, a list; numbers computed in `dtype`. `outs` are buffers to write into; they may be inputs."""
        if dtype.char in HALF:
            return self._in_float32(arguments, dtype, outs)
        order: Order | None = None
        if outs is None:
            key = tuple(
                [(a.shape if a.flags.c_contiguous else (a.shape, a.strides)) if type(a) is np.ndarray else None
                 for a in arguments]
            )  # fmt: skip
            call = self._calls.get(key)
            if call is None:
                call = self._prepare(arguments, key)
            program, shape, zero_d, order = call
            if order is not None:
                arguments = [order.turn(a) if type(a) is np.ndarray else a for a in arguments]
            if program is not None:
                if zero_d:
                    arguments = list(arguments)
                    for i in zero_d:
                        arguments[i] = arguments[i].item() if shape else arguments[i].reshape(1)
                results = program(*arguments, dtype)
                if len(self.outputs) == 1:
                    if type(results) is np.ndarray and results.shape == shape and not self.copies[0]:
                        return [results if order is None else results.transpose(order.back)]
                    results = (results,)
                results = [self._finish(r, i, arguments, shape, dtype) for i, r in enumerate(results)]
                return results if order is None else order.turn_back(results)
        scalars, shape, size, _ = _survey(arguments)
        if outs is None:
            outs = [memory.empty(shape, self.formula.out_dtype(i, dtype)) for i in range(len(self.outputs))]
        self._in_blocks(arguments, scalars, shape, size, dtype, list(outs))
        return list(outs) if order is None else order.turn_back(outs)

    def _prepare(self, arguments: Sequence[Any], key: tuple) -> tuple[Callable | None, tuple, list[int], Order | None]:
        """How to call with arguments like these: a program (None for blocks), the result's shape, which are 0-d, order.

        A 0-d array beside larger ones is passed as a number, a result of shape () is computed in shape (1,): ufuncs
        turn 0-d arrays into scalars, which take no `out=`. order: of the result, where it is not C order; the other
        three are for arguments that are turned by it.
        """
        order = memory_order([a for a in arguments if type(a) is np.ndarray])
        if not order.is_c:
            arguments = [order.turn(a) if type(a) is np.ndarray else a for a in arguments]
        scalars, shape, size, uniform = _survey(arguments)
        program = None
        zero_d: list[int] = []
        if size <= BLOCK and order.agreed:  # what a program makes of operands that disagree has the order of some
            zero_d = [i for i, a in enumerate(arguments) if i not in scalars and a.shape == ()]
            if shape:
                scalars = _frozen(tuple(sorted({*scalars, *zero_d})))
            full = frozenset(i for i, a in enumerate(arguments) if i not in scalars and (uniform or a.shape == shape))
            program = self.whole(scalars, full)
        if len(self._calls) > 1000:
            self._calls.clear()
        call = self._calls[key] = program, shape, zero_d, None if order.is_c else order
        return call

    def _finish(self, result: Any, i: int, arguments: Sequence[Any], shape: tuple, dtype: np.dtype) -> np.ndarray:
        """Outputs are fresh arrays of the full shape, also where the formula is a constant or one of its inputs."""
        if type(result) is not np.ndarray or result.shape != shape or self.copies[i]:
            if type(result) is np.ndarray and shape == () and result.size == 1 and result.base is None:
                return result.reshape(())
            made = np.empty(shape, self.formula.out_dtype(i, dtype))
            made[...] = result.reshape(()) if shape == () and type(result) is np.ndarray else result
            return made
        return result

    def _in_float32(self, arguments: Sequence[Any], half: np.dtype, outs: Sequence[Any] | None) -> list[np.ndarray]:
        single = np.dtype(np.float32)

        def wide(a: Any) -> Any:
            return a.astype(single, "C") if type(a) is np.ndarray and a.dtype == half else a

        if outs is None:
            # Found before the copies, which write out what is broadcast.
            order = memory_order([a for a in arguments if type(a) is np.ndarray])
            results = self([wide(order.turn(a)) if type(a) is np.ndarray else a for a in arguments], single)
            with np.errstate(over="ignore"):
                return order.turn_back([r.astype(half) if r.dtype == single else r for r in results])
        for out, result in zip(outs, self([wide(a) for a in arguments], single), strict=True):
            np.copyto(out, result, casting="unsafe")
        return list(outs)

    def _in_blocks(
        self, arguments: Sequence[Any], scalars: frozenset[int], shape: tuple, size: int, dtype: np.dtype, outs: list
    ) -> None:
        arrays = [i for i in range(len(arguments)) if i not in scalars]
        aliases = frozenset((o, i) for o, out in enumerate(outs) for i in arrays if arguments[i] is out)
        program, kinds = self.block(scalars, aliases)
        views, flat_outs = _flat([arguments[i] for i in arrays], outs, shape)
        rows = flat_outs[0].shape[0] if flat_outs[0].ndim else 1
        if flat_outs[0].ndim == 0:
            views, flat_outs = [v.reshape(1) for v in views], [o.reshape(1) for o in flat_outs]

        def work(start: int, stop: int) -> None:
            length = min(size, BLOCK)
            scratch = [np.empty(length, SCRATCH.get(kind, dtype)) for kind in kinds]
            call = list(arguments)
            for block_views, block_outs in _blocks(views, flat_outs, start, stop):
                for i, view in zip(arrays, block_views, strict=True):
                    call[i] = view
                block_shape = block_outs[0].shape
                count = block_outs[0].size
                if len(block_shape) == 1:
                    buffers = [s[:count] for s in scratch]
                else:
                    buffers = [s[:count].reshape(block_shape) for s in scratch]
                program(*call, *block_outs, *buffers)

        parallel(work, rows, size * self.work)

    def reduce(
        self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], keepdims: bool, scale: float = 1.0
    ) -> Any:
        """scale · the sum over `axes` of the output (a list for several), without a full temporary when it is large."""
        if len(self.outputs) > 1:
            return [self._sum_of(i, arguments, dtype, axes, keepdims, scale) for i in range(len(self.outputs))]
        if dtype.char in HALF:
            arguments = [a.astype(np.float32) if type(a) is np.ndarray and a.dtype == dtype else a for a in arguments]
            return self.reduce(arguments, np.dtype(np.float32), axes, keepdims, scale).astype(dtype)
        call = self._calls.get(tuple([a.shape if type(a) is np.ndarray else None for a in arguments]))
        if call is None or call[0] is None:
            scalars, shape, size, _ = _survey(arguments)
            if size > 4 * BLOCK:
                total = self._reduce_in_blocks(arguments, dtype, axes, scalars, shape)
                if not keepdims:
                    total = total.reshape([n for i, n in enumerate(shape) if i not in axes])
                return total if scale == 1.0 else np.multiply(total, scale, out=total)
        elif not call[2]:
            term = call[0](*arguments, dtype)
            if type(term) is np.ndarray and term.shape == call[1]:
                return host_sum(term, axes, keepdims, None, scale)
        return host_sum(self(arguments, dtype)[0], axes, keepdims, None, scale)

    def _sum_of(
        self, i: int, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], keepdims: bool, scale: float
    ) -> np.ndarray:
        """The sum of one output; of an input handed on, that of the input."""
        output, shape = self.formula.outputs[i], _survey(arguments)[1]
        if self.copies[i]:
            given = arguments[self.formula.inputs.index(output)]
            if type(given) is np.ndarray and given.shape == shape and given.dtype == dtype:
                return host_sum(given, axes, keepdims, None, scale)
        if i not in self._singles:
            single: Any = self.formula.of([output])
            self._singles[i] = NumpyProgram(single)
        return self._singles[i].reduce(arguments, dtype, axes, keepdims, scale)

    def _reduce_in_blocks(
        self, arguments: Sequence[Any], dtype: np.dtype, axes: tuple[int, ...], scalars: frozenset[int], shape: tuple
    ) -> np.ndarray:
        kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
        out_dtype = self.formula.out_dtype(0, dtype)
        flat = None
        if len(axes) == len(shape) and all(
            a.shape == shape and a.flags.c_contiguous for i, a in enumerate(arguments) if i not in scalars
        ):
            flat = [a if i in scalars else a.reshape(-1) for i, a in enumerate(arguments)]
        views = flat or [a if i in scalars else np.broadcast_to(a, shape) for i, a in enumerate(arguments)]
        length = next(v for i, v in enumerate(views) if i not in scalars).shape[0]
        row = 1 if flat else max(1, int(np.prod(shape[1:])))
        step = max(1, BLOCK // row)
        inner = (0,) if flat else axes
        total = np.zeros(kept, out_dtype)
        partials: dict[int, np.ndarray] = {}

        def work(start: int, stop: int) -> None:
            for i in range(start, stop, step):
                part = [v if k in scalars else v[i : min(i + step, stop)] for k, v in enumerate(views)]
                (block,) = self(part, dtype)
                if 0 in axes:
                    partials[i] = add_reduce(block, inner, out_dtype, None, not flat)
                else:
                    total[i : i + step] = add_reduce(block, inner, out_dtype, None, True)

        parallel(work, length, int(np.prod(shape)) * self.work)
        if 0 in axes:  # in pairs, as NumPy sums: rounding grows with the logarithm of the number of blocks
            stacked = np.stack([np.reshape(partials[i], kept) for i in sorted(partials)])
            total = np.sum(stacked, axis=0, dtype=out_dtype)
        return total


def _survey(arguments: Sequence[Any]) -> tuple[frozenset[int], tuple[int, ...], int, bool]:
    """Which arguments are Python numbers, and the broadcast shape of the others, its size, whether all have it."""
    numbers = []
    shape: tuple[int, ...] | None = None
    uniform = True
    for i, argument in enumerate(arguments):
        if type(argument) is not np.ndarray:
            numbers.append(i)
        elif shape is None:
            shape = argument.shape
        elif argument.shape != shape:
            uniform = False
    if not uniform:
        shape = np.broadcast_shapes(*(a.shape for a in arguments if type(a) is np.ndarray))
    if shape is None:
        shape = ()
    size = 1
    for n in shape:
        size *= n
    return _FROZEN[tuple(numbers)] if tuple(numbers) in _FROZEN else _frozen(tuple(numbers)), shape, size, uniform


_FROZEN: dict[tuple[int, ...], frozenset[int]] = {}


def _frozen(numbers: tuple[int, ...]) -> frozenset[int]:
    return _FROZEN.setdefault(numbers, frozenset(numbers))


def _flat(arrays: list, outs: list, shape: tuple) -> tuple[list, list]:
    """Views of one shape: one-dimensional where all are C-contiguous and of full size, else broadcast."""
    if all(a.shape == shape and a.flags.c_contiguous for a in (*arrays, *outs)):
        return [a.reshape(-1) for a in arrays], [o.reshape(-1) for o in outs]
    return [np.broadcast_to(a, shape) for a in arrays], outs


def _blocks(views: list, outs: list, start: int, stop: int) -> Any:
    """Cut views and outs along their first axis, or inside it where a row is larger than a block."""
    row = 1
    for n in outs[0].shape[1:]:
        row *= n
    if row > BLOCK:
        for i in range(start, stop):
            yield from _blocks([v[i] for v in views], [o[i] for o in outs], 0, outs[0].shape[1])
        return
    step = max(1, BLOCK // row) if row else max(1, stop - start)
    for i in range(start, stop, step):
        j = min(i + step, stop)
        yield [v[i:j] for v in views], [o[i:j] for o in outs]
