"""A formula as a NumPy program: straight-line ufunc calls with `out=`, scratch reused, large arrays in blocks.

Two programs are written for a formula, as Python source, and compiled once:

- `whole`: every call works on whole arrays; the first calls make the buffers, later ones write into those that nobody
  reads any more. For arrays that fit the cache.
- `block`: every buffer is given. Large arrays are cut into blocks that stay in the cache, and the blocks are spread
  over threads (NumPy releases the GIL in its loops) when there is enough work to pay for it.

A formula that is one ufunc is that ufunc.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.array.host_memory import memory
from gpuad.array.numpy_backend import add_reduce, host_sum
from gpuad.kernels.expr import Constant, Expr, Variable, substitute, topological
from gpuad.kernels.scalar import SpecialFunction, where

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Elements in a block. Small ones stay in the nearest cache, but every ufunc call holds Python's lock for 0.5 us, which
# two threads pass to and fro: with 16384 elements (1 us of work) a second thread makes gelu's derivative slower, with
# 262144 it halves the time, and one thread alone gains 25 %. 131072 is 20 % slower, 1048576 falls out of the last cache
# (measured with float32, 1 MiB of cache a core and 32 MiB for all).
BLOCK = 262144
# Element-operations from which a second thread pays: handing work over takes 50 us, as 600,000 operations do.
THREADED_WORK = 4_000_000
# Functions that warn about values (log of 0, overflow of exp): silent inside a program, where a `where` may drop them.
_WARNING = {"div", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "pow", "tan", "asin", "acos",
            "atanh", "acosh", "sinh", "cosh", "hypot", "remainder", "fmod", "floor_divide", "rsqrt"}  # fmt: skip

# The dtypes of scratch buffers that do not hold numbers.
SCRATCH = {"bool": np.bool_, "label": np.int64}

_threads: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_pool: ThreadPoolExecutor | None = None


def get_num_threads() -> int:
    """The number of threads that large elementwise work on the host is spread over."""
    return _threads


def set_num_threads(n: int) -> None:
    """Spread large elementwise work on the host over `n` threads (1: none but the caller's)."""
    global _threads, _pool
    if n < 1:
        raise ValueError(f"set_num_threads takes a positive number, got {n}.")
    _threads, _pool = int(n), None


def parallel(work: Callable[[int, int], None], length: int, operations: int) -> None:
    """work(start, stop) over 0..length, cut between threads when `operations` pays for it."""
    global _pool
    parts = min(_threads, length)
    if parts < 2 or operations < THREADED_WORK:
        work(0, length)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(_threads, thread_name_prefix="gpuad")
    bounds = [length * i // parts for i in range(parts + 1)]
    others = [_pool.submit(work, bounds[i], bounds[i + 1]) for i in range(1, parts)]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads

    def _forget_pool() -> None:
        global _pool
        _pool = None

    os.register_at_fork(after_in_child=_forget_pool)


def lower(outputs: Sequence[Expr]) -> list[Expr]:
    """The expressions with functions that NumPy lacks written out."""
    while True:
        todo = {
            node: node.function.lowered(*node.args)
            for node in topological(outputs)
            if node.function.lowered is not None and node.args
        }
        if not todo:
            return list(outputs)
        # Inner ones first: a replacement may hold another function to lower, which the next round finds.
        innermost = {n: e for n, e in todo.items() if not any(m is not n and m in todo for m in topological(n.args))}
        outputs = substitute(outputs, innermost)


def single_ufunc(formula: Formula) -> np.ufunc | None:
    """The ufunc that a formula is, if it is one called with the formula's inputs in order."""
    (root,) = lower(formula.outputs) if len(formula.outputs) == 1 else (None,)
    if root is None or not isinstance(root.function.numpy, np.ufunc) or root.function.across:
        return None
    if len(root.args) != len(formula.inputs) or any(a is not v for a, v in zip(root.args, formula.inputs)):
        return None
    return root.function.numpy


def select(condition: Any, a: Any, b: Any, out: np.ndarray | None = None, number: Any = None) -> np.ndarray:
    """np.where(condition, a, b), but with `out` and, for floats, by masking bits: half the time (measured).

    number: the dtype of a result between two Python numbers.
    """
    dtype = out.dtype if out is not None else np.result_type(a, b) if number is None else number
    if type(condition) is not np.ndarray or condition.dtype != np.bool_ or dtype.itemsize not in (4, 8):
        return _plain_select(condition, a, b, out, dtype)
    a_is_array, b_is_array = type(a) is np.ndarray, type(b) is np.ndarray
    if (a_is_array and a.dtype != dtype) or (b_is_array and b.dtype != dtype):
        return _plain_select(condition, a, b, out, dtype)
    bits = np.int32 if dtype.itemsize == 4 else np.int64
    result = None if out is None else out.view(bits)
    if a_is_array and not b_is_array and _is_plain_zero(b) and condition.shape == a.shape:
        mask = np.negative(condition.view(np.int8), dtype=bits)
        return np.bitwise_and(a.view(bits), mask, out=mask if result is None else result).view(dtype)
    if b_is_array and not a_is_array and _is_plain_zero(a) and condition.shape == b.shape:
        mask = np.subtract(condition.view(np.int8), 1, dtype=bits)
        return np.bitwise_and(b.view(bits), mask, out=mask if result is None else result).view(dtype)
    if not a_is_array and not b_is_array and 0 < a < math.inf and _is_plain_zero(b):
        return np.multiply(condition, a, dtype=dtype, out=out)
    if a_is_array and b_is_array and condition.shape == a.shape == b.shape:
        mask = np.negative(condition.view(np.int8), dtype=bits)
        np.bitwise_and(np.bitwise_xor(a.view(bits), b.view(bits)), mask, out=mask)
        return np.bitwise_xor(mask, b.view(bits), out=mask if result is None else result).view(dtype)
    return _plain_select(condition, a, b, out, dtype)


def _is_plain_zero(number: Any) -> bool:
    """0, whose bits are all 0: not -0.0."""
    return number == 0 and math.copysign(1.0, number) > 0.0


def _plain_select(condition: Any, a: Any, b: Any, out: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    if not isinstance(a, np.ndarray):
        a = dtype.type(a)
    if not isinstance(b, np.ndarray):
        b = dtype.type(b)
    made = np.where(condition, a, b)
    if out is None:
        return made
    np.copyto(out, made)
    return out


class _Writer:
    """Writes one program: names for nodes, buffers for results, a line a ufunc call."""

    def __init__(
        self,
        formula: Formula,
        outputs: Sequence[Expr],
        scalars: frozenset[int],
        given: bool,
        aliases: frozenset[tuple[int, int]] = frozenset(),
    ) -> None:
        self.aliases = aliases  # (output, input) pairs that are one buffer: an update in place
        self.inputs = formula.inputs
        self.order = topological(outputs)
        self.outputs = outputs
        self.given = given  # whether buffers are given (block) or made (whole)
        self.name: dict[Expr, str] = {v: f"x{i}" for i, v in enumerate(formula.inputs)}
        self.scalar: set[Expr] = {v for i, v in enumerate(formula.inputs) if i in scalars}
        self.namespace: dict[str, Any] = {"asarray": np.asarray, "copyto": np.copyto, "select": select}
        self.namespace["errstate"] = np.errstate
        self.lines: list[str] = []
        self.free: dict[Any, list[str]] = {}
        self.scratch: dict[str, str] = {}
        self.kinds: dict[Expr, str] = {}
        self.last_use: dict[Expr, int] = {}
        for i, node in enumerate(self.order):
            for argument in node.args:
                self.last_use[argument] = i
        for output in outputs:
            self.last_use[output] = len(self.order)

    def function(self, node: Expr) -> str:
        name = node.function.name
        numpy = node.function.numpy
        if isinstance(numpy, SpecialFunction):
            numpy = numpy.resolve()
        self.namespace[name] = numpy
        return name

    def text(self, node: Expr) -> str:
        if isinstance(node, Constant):
            return repr(node.value) if abs(float(node.value)) < float("inf") else f'float("{node.value}")'
        return self.name[node]

    def kind(self, node: Expr) -> str:
        """What a node's buffer holds: "bool", "label" (int64) or "number" (the dtype of the program)."""
        found = self.kinds.get(node)
        if found is None:
            found = self.kinds[node] = self._kind(node)
        return found

    def _kind(self, node: Expr) -> str:
        if isinstance(node, Variable):
            return {"mask": "bool", "label": "label"}.get(node.kind, "number")
        if node.function.result == "bool" or (isinstance(node, Constant) and isinstance(node.value, bool)):
            return "bool"
        if node.function.result == "float" or not node.args:
            return "number"
        operands = node.args[1:] if node.function is where else node.args
        kinds = {self.kind(a) for a in operands if not (isinstance(a, Constant) and type(a.value) is int)}
        return "number" if "number" in kinds or not kinds else "label" if "label" in kinds else "bool"

    def buffer_class(self, node: Expr, whole: frozenset[Variable]) -> tuple:
        """Nodes of one class have one shape and dtype: those that depend on a full-shaped input, or on the same."""
        depends = self.depends[node]
        return (self.kind(node), "full" if depends & whole else depends)

    def write(self, whole: frozenset[Variable]) -> None:
        self.depends: dict[Expr, frozenset[Expr]] = {}
        in_buffer: dict[Expr, str] = {}
        outputs_at: dict[Expr, list[int]] = {}
        for i, output in enumerate(self.outputs):
            outputs_at.setdefault(output, []).append(i)
        counter = 0
        for i, node in enumerate(self.order):
            if isinstance(node, Variable):
                self.depends[node] = frozenset() if node in self.scalar else frozenset([node])
                continue
            if isinstance(node, Constant):
                self.depends[node] = frozenset()
                continue
            if node.function.across in ("column", "length"):
                self.depends[node] = frozenset([node] if node.function.across == "column" else [])
                self.name[node] = "column(C)" if node.function.across == "column" else "C"
                continue
            self.depends[node] = frozenset().union(*(self.depends[a] for a in node.args))
            arguments = [self.text(a) for a in node.args]
            if not self.depends[node]:  # of Python numbers alone: stays a Python number, so it promotes nothing
                self.name[node] = f"c{i}"
                self.lines.append(f"c{i} = {self.function(node)}({', '.join(arguments)}).item()")
                continue
            kind = self.buffer_class(node, whole)
            dying = {
                (in_buffer[a], self.buffer_class(a, whole))
                for a in node.args
                if a in in_buffer and self.last_use[a] == i and a not in outputs_at
            }
            out = None
            if self.given and node in outputs_at and not self.read_later(outputs_at[node][0], i):
                out = f"o{outputs_at[node][0]}"
            else:
                out = next((b for b, k in sorted(dying) if k == kind), None)
                dying = {(b, k) for b, k in dying if b != out}
                if out is None and self.free.get(kind):
                    out = self.free[kind].pop()
                if out is None and self.given:
                    out = f"s{len(self.scratch)}"
                    self.scratch[out] = kind[0]
            call, written = self.call(node, arguments, out)
            if not written and out is not None and not self.given:
                self.free.setdefault(kind, []).append(out)
                out = None
            if out is None:
                out = f"t{counter}"
                counter += 1
                self.lines.append(f"{out} = {call}")
            else:
                self.lines.append(call)
            self.name[node] = in_buffer[node] = out
            for freed, freed_kind in sorted(dying):
                self.free.setdefault(freed_kind, []).append(freed)

    def between_numbers(self, node: Expr) -> bool:
        """Whether a `where` chooses between Python numbers, which alone would make a float64."""
        return not any(
            self.depends[a] or (isinstance(a, Constant) and isinstance(a.value, bool)) for a in node.args[1:]
        )

    def call(self, node: Expr, arguments: list[str], out: str | None) -> tuple[str, bool]:
        """The call that computes a node, and whether it writes into `out`."""
        function = "select" if node.function is where else self.function(node)
        if out:
            arguments = [*arguments, f"out={out}"]
        elif node.function is where and self.between_numbers(node):
            arguments = [*arguments, "number=dtype"]
        return f"{function}({', '.join(arguments)})", bool(out)

    def read_later(self, output: int, now: int) -> bool:
        """Whether the input whose memory output number `output` takes over is still needed after line `now`."""
        return any(self.last_use.get(self.inputs[i], -1) > now for o, i in self.aliases if o == output)

    def warns(self) -> bool:
        return any(n.function.name in _WARNING for n in self.order)

    def compile(self, header: str, footer: list[str]) -> Callable:
        body = self.lines
        if self.warns():
            body = ["with errstate(all='ignore'):"] + ["    " + line for line in self.lines or ["pass"]]
        source = "\n    ".join([header, *(body or ["pass"]), *footer])
        exec(compile(source, "<gpuad numpy program>", "exec"), self.namespace)
        program = self.namespace["program"]
        program.source = source
        return program


class NumpyProgram:
    """The NumPy side of a formula: call it with arrays and Python numbers in the order of the formula's inputs."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.outputs = lower(formula.outputs)
        self.work = sum(1 for n in topological(self.outputs) if n.args)
        self.copies = [isinstance(o, Variable) for o in self.outputs]  # an input handed on is copied
        self._whole: dict[tuple, Callable] = {}
        self._calls: dict[tuple, tuple[Callable | None, tuple, list[int]]] = {}
        self._singles: dict[int, NumpyProgram] = {}
        self._block: dict[tuple, tuple[Callable, list[str]]] = {}

    def whole(self, scalars: frozenset[int], full: frozenset[int]) -> Callable:
        """The program on whole arrays, `full` being the inputs that have the shape of the result."""
        program = self._whole.get((scalars, full))
        if program is None:
            writer = _Writer(self.formula, self.outputs, scalars, given=False)
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
            writer = _Writer(self.formula, self.outputs, scalars, True, aliases)
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
        if dtype == np.float16:
            return self._in_float32(arguments, outs)
        if outs is None:
            key = tuple([a.shape if type(a) is np.ndarray else None for a in arguments])
            call = self._calls.get(key)
            if call is None:
                call = self._prepare(arguments, key)
            program, shape, zero_d = call
            if program is not None:
                if zero_d:
                    arguments = list(arguments)
                    for i in zero_d:
                        arguments[i] = arguments[i].item() if shape else arguments[i].reshape(1)
                results = program(*arguments, dtype)
                if len(self.outputs) == 1:
                    if type(results) is np.ndarray and results.shape == shape and not self.copies[0]:
                        return [results]
                    results = (results,)
                return [self._finish(r, i, arguments, shape, dtype) for i, r in enumerate(results)]
        scalars, shape, size, _ = _survey(arguments)
        if outs is None:
            outs = [memory.empty(shape, self.formula.out_dtype(i, dtype)) for i in range(len(self.outputs))]
        self._in_blocks(arguments, scalars, shape, size, dtype, list(outs))
        return list(outs)

    def _prepare(self, arguments: Sequence[Any], key: tuple) -> tuple[Callable | None, tuple, list[int]]:
        """The program for arguments of these shapes (None for blocks), the result's shape, and which are 0-d.

        A 0-d array beside larger ones is passed as a number, a result of shape () is computed in shape (1,): ufuncs
        turn 0-d arrays into scalars, which take no `out=`.
        """
        scalars, shape, size, uniform = _survey(arguments)
        program = None
        zero_d: list[int] = []
        if size <= BLOCK:
            zero_d = [i for i, a in enumerate(arguments) if i not in scalars and a.shape == ()]
            if shape:
                scalars = _frozen(tuple(sorted({*scalars, *zero_d})))
            full = frozenset(i for i, a in enumerate(arguments) if i not in scalars and (uniform or a.shape == shape))
            program = self.whole(scalars, full)
        if len(self._calls) > 1000:
            self._calls.clear()
        call = self._calls[key] = program, shape, zero_d
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

    def _in_float32(self, arguments: Sequence[Any], outs: Sequence[Any] | None) -> list[np.ndarray]:
        half = np.dtype(np.float16)
        wide = [a.astype(np.float32) if type(a) is np.ndarray and a.dtype == half else a for a in arguments]
        results = self(wide, np.dtype(np.float32))
        if outs is None:
            with np.errstate(over="ignore"):
                return [r.astype(half) if r.dtype == np.float32 else r for r in results]
        for out, result in zip(outs, results, strict=True):
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
        if dtype == np.float16:
            arguments = [a.astype(np.float32) if type(a) is np.ndarray and a.dtype == dtype else a for a in arguments]
            return self.reduce(arguments, np.dtype(np.float32), axes, keepdims, scale).astype(np.float16)
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


__all__ = ["NumpyProgram", "get_num_threads", "lower", "select", "set_num_threads", "single_ufunc"]
