"""A formula: named inputs and output expressions, its derivatives as formulas again, and its runners.

`trace` makes one from a Python function by calling it once with symbolic numbers. `Formula.vjp` and `Formula.jvp`
derive formulas and say what they need; a formula runs through `Formula.runner(backend)`, a NumPy program or a CUDA
kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpuad.array import dtypes
from gpuad.array.backend import Backend
from gpuad.errors import FormulaError
from gpuad.kernels import derive, simplify  # noqa: F401  (simplify registers its rules)
from gpuad.kernels.cuda_kernel import CudaKernel
from gpuad.kernels.cuda_source import compute_dtype
from gpuad.kernels.expr import Constant, Expr, Variable, as_expr, substitute, topological, variable, variables
from gpuad.kernels.numpy_program import NumpyProgram, single_ufunc
from gpuad.kernels.rows_cuda import RowKernel
from gpuad.kernels.rows_numpy import RowProgram
from gpuad.kernels.scalar import where

# By the backend's language and whether it is a row formula.
_RUNNERS: dict[tuple[str, bool], Callable[[Formula], Any]] = {
    ("numpy", False): NumpyProgram,
    ("cuda", False): CudaKernel,
    ("numpy", True): RowProgram,
    ("cuda", True): RowKernel,
}


class Formula:
    """Output expressions over input variables, in the order in which they are passed."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[Variable],
        outputs: Sequence[Expr],
        levels: Sequence[str] | None = None,
        is_row: bool = False,
    ) -> None:
        self.name = name
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.runners: dict[str, Any] = {}
        self._vjp: dict[tuple, Derivative] = {}
        self._jvp: dict[tuple[int, ...], Derivative] = {}
        self.needs_float = any(
            n.function.result == "float" or (isinstance(n, Constant) and isinstance(n.value, float))
            for n in topological(self.outputs)
        )
        # As in NumPy and PyTorch, bools have no negative and no difference.
        self.refuses_bools = any(
            n.args and n.function.name in ("neg", "sub", "relu") for n in topological(self.outputs)
        )
        # Conditions and labels keep their own dtype; the others are promoted together.
        self.promoted = tuple(i for i, v in enumerate(self.inputs) if v.kind == "number")
        self.bool_outputs = tuple(_is_bool(o) for o in self.outputs)
        # A row formula has row functions, or inputs with one value a row or column, or is derived from one that has.
        known: dict[Expr, str] = {}
        found = [derive.level(o, known) for o in self.outputs]
        self.is_row = (
            is_row or any(n.function.across for n in known) or any(v.level in ("row", "column") for v in self.inputs)
        )
        # An output of level "column" is a sum over rows; what merely depends on columns is given for each element.
        self.levels = tuple(
            ["element" if level == "column" else level for level in found] if levels is None else levels
        )
        # Outputs that are kept for the derivative only, the statistics of rows: not rounded to float16.
        self.statistics: frozenset[int] = frozenset()
        # Outputs that are written to an input (a state), by that input's place; they come last and are not returned.
        self.states: dict[int, int] = {}
        self.ufunc: np.ufunc | None = None if self.is_row else single_ufunc(self)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(v.name for v in self.inputs)}) = {', '.join(map(str, self.outputs))}"

    def out_dtype(self, i: int, dtype: np.dtype) -> np.dtype:
        """The dtype of output i when numbers are computed in `dtype`."""
        if i in self.statistics:
            return compute_dtype(dtype)
        return dtypes.bool_ if self.bool_outputs[i] else dtype

    def runner(self, language: str) -> Any:
        """What runs this formula where a backend speaks `language`: "numpy" or "cuda"."""
        found = self.runners.get(language)
        if found is None:
            found = self.runners[language] = _RUNNERS[language, self.is_row](self)
        return found

    def of(self, outputs: Sequence[Expr], levels: Sequence[str] | None = None, name: str = "") -> Formula | None:
        """Other outputs of the same inputs; None when there are none."""
        return Formula(name or self.name, self.inputs, outputs, levels, self.is_row) if outputs else None

    def vjp(self, wanted: tuple[int, ...], visible: int | None = None, keep_output: bool = True) -> Derivative:
        """The cotangents of the wanted inputs, as a formula of the outputs' cotangents and what must be saved.

        visible: how many outputs have cotangents (all unless given); the rest is only there to be saved. keep_output:
        whether the visible outputs may be saved too.
        """
        visible = len(self.outputs) if visible is None else visible
        found = self._vjp.get((wanted, visible, keep_output))
        if found is None:
            cotangents = self.fresh_like(range(visible), "g")
            results = derive.vjp(self.outputs[:visible], cotangents, [self.inputs[i] for i in wanted])
            found = self._saving(results, cotangents, wanted, visible, keep_output)
            self._vjp[wanted, visible, keep_output] = found
        return found

    def fresh_like(self, outputs: Iterable[int], prefix: str) -> list[Variable]:
        """New variables of the levels of the given outputs."""
        outputs = list(outputs)
        suffixes = [""] if len(outputs) == 1 else [str(i) for i in outputs]
        return [self._fresh(prefix + s, self.levels[i]) for s, i in zip(suffixes, outputs, strict=True)]

    def _saving(
        self, results: list[Expr], first: Sequence[Variable], wanted: tuple[int, ...], visible: int, keep_output: bool
    ) -> Derivative:
        """The gradients as a formula of cotangents and of what is cheapest to keep: inputs, or outputs for them."""
        placeholders: dict[Expr, Variable] = {}
        hidden: dict[Expr, Expr] = {}
        for i, output in enumerate(self.outputs):
            if output.args and output not in placeholders and (keep_output or i >= visible):
                placeholders[output] = self._fresh(f"y{i}", self.levels[i])
                if i >= visible:
                    hidden[placeholders[output]] = output
        levels = [self.inputs[i].level for i in wanted]
        from_inputs = self._kept(results, first, {}, {}, levels)
        if not placeholders:
            return from_inputs
        replaced = substitute(results, dict(placeholders))
        from_outputs = self._kept(replaced, first, placeholders, hidden, levels)
        # On a tie the output: it is there already, and what it stands for need not be computed again.
        return from_outputs if self._weight(from_outputs) <= self._weight(from_inputs) else from_inputs

    def _kept(
        self, results: list[Expr], first: Sequence[Variable], placeholders: dict, hidden: dict, levels: list[str]
    ) -> Derivative:
        written_out = substitute(results, hidden) if hidden else results
        used = set(variables([*results, *written_out]))
        if self.is_row and not any(v.level == "element" for v in (*used, *first)):
            used.add(next(v for v in self.inputs if v.level == "element"))  # for the shape of what is computed
        inputs = tuple(i for i, v in enumerate(self.inputs) if v in used)
        chosen = {placeholders[o]: i for i, o in reversed(list(enumerate(self.outputs))) if o in placeholders}
        outputs = tuple(sorted(i for v, i in chosen.items() if v in used))
        parameters = [*first, *(self.inputs[i] for i in inputs), *(placeholders[self.outputs[i]] for i in outputs)]
        name = f"{self.name}_vjp"
        recorded = Formula(name, parameters, written_out, levels, self.is_row)
        return Derivative(Formula(name, parameters, results, levels, self.is_row), inputs, outputs, recorded)

    def _weight(self, derivative: Derivative) -> int:
        """How many full-sized buffers it keeps alive; one value a row is next to nothing."""
        kept = [self.inputs[i].level for i in derivative.inputs] + [self.levels[i] for i in derivative.outputs]
        return sum(level == "element" or not self.is_row for level in kept)

    def _fresh(self, name: str, level: str = "element", others: Iterable[Expr] = ()) -> Variable:
        """A variable with a name that neither an input nor one of `others` has."""
        taken = {v.name for v in (*self.inputs, *others)}
        while name in taken:
            name += "_"
        return variable(name, "number", level)

    def jvp(self, moving: tuple[int, ...]) -> Derivative:
        """Values and tangents of the outputs, as a formula of all inputs and the tangents of the `moving` inputs."""
        found = self._jvp.get(moving)
        if found is None:
            tangents: dict[Variable, Variable] = {}
            for v in [self.inputs[i] for i in moving]:
                tangents[v] = self._fresh(f"d{v.name}", v.level, tangents.values())
            results = derive.jvp(self.outputs, tangents)
            parameters = [*self.inputs, *tangents.values()]
            outputs = [*self.outputs, *results]
            formula = Formula(f"{self.name}_jvp", parameters, outputs, self.levels * 2, self.is_row)
            found = self._jvp[moving] = Derivative(formula, tuple(range(len(self.inputs))), (), formula)
        return found


class Derivative(NamedTuple):
    """A derived formula and which inputs and outputs of the original it takes (besides cotangents or tangents).

    recorded: the same formula to differentiate again, with hidden outputs written out in terms of the inputs.
    """

    formula: Formula
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    recorded: Formula


def _is_bool(node: Expr) -> bool:
    if node.function is where:
        return _is_bool(node.args[1]) and _is_bool(node.args[2])
    if isinstance(node, Constant):
        return isinstance(node.value, bool)
    return node.function.result == "bool" or (isinstance(node, Variable) and node.kind == "mask")


def _masks(outputs: Sequence[Expr], inputs: Sequence[Variable]) -> set[Variable]:
    """The inputs that are used as conditions only."""
    as_condition: set[Expr] = set()
    as_number: set[Expr] = set(outputs)
    for node in topological(outputs):
        for i, argument in enumerate(node.args):
            logical = node.function.name.startswith("logical_") or (node.function is where and i == 0)
            (as_condition if logical else as_number).add(argument)
    return {v for v in inputs if v in as_condition and v not in as_number}


def trace(
    function: Callable,
    name: str | None = None,
    rows: Sequence[str] = (),
    labels: Sequence[str] = (),
    scalars: Sequence[str] = (),
    columns: Sequence[str] = (),
    absent: Sequence[str] = (),
) -> Formula:
    """Call `function` once with symbolic numbers, one for each of its parameters, and return its formula.

    rows, columns, scalars: parameters with one value a row, a column, or in all (in row formulas); labels: integers
    (left out of promotion); absent: those that the function gets None for, and the formula does not have.
    Raises FormulaError, saying what to write instead, where the function is not elementwise.
    """
    title: str = name if name else getattr(function, "__name__", "formula")
    parameters = list(inspect.signature(function).parameters.values())
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise FormulaError(
                f"The formula {title} takes *{p.name}; name each input, so that the kernel knows how many."
            )
    levels = {**dict.fromkeys(rows, "row"), **dict.fromkeys(columns, "column"), **dict.fromkeys(scalars, "scalar")}
    inputs = [
        variable(p.name, "label" if p.name in labels else "number", levels.get(p.name, "element"))
        for p in parameters
        if p.name not in absent
    ]
    given = iter(inputs)
    result = function(*[None if p.name in absent else next(given) for p in parameters])
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    if not results:
        raise FormulaError(f"The formula {title} returns nothing; return the expression to compute.")
    for r in results:
        if r is None:
            raise FormulaError(f"The formula {title} returns None; return the expression to compute.")
    outputs = [as_expr(r) for r in results]
    masks = _masks(outputs, inputs)
    if masks:
        swap: dict[Expr, Expr] = {v: variable(v.name, "mask", v.level) for v in masks}
        outputs = substitute(outputs, swap)
        inputs = [swap.get(v, v) for v in inputs]  # type: ignore[misc]
    return Formula(title, inputs, outputs)


Backend.identity = trace(lambda input: input, "input")
