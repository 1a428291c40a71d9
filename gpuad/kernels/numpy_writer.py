"""NumPy programs as Python source: names for nodes, buffers for results, a line a ufunc call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.kernels.expr import Constant, Expr, Variable, substitute, topological
from gpuad.kernels.scalar import SpecialFunction, where

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Functions that warn about values (log of 0, overflow of exp): silent inside a program, where a `where` may drop them.
_WARNING = {"div", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "pow", "tan", "asin", "acos",
            "atanh", "acosh", "sinh", "cosh", "hypot", "remainder", "fmod", "floor_divide", "rsqrt"}  # fmt: skip

# The dtypes of scratch buffers that do not hold numbers.
SCRATCH = {"bool": np.bool_, "label": np.int64}


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


class Writer:
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
