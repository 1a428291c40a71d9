"""A formula: named inputs and output expressions, its derivatives as formulas again, and its runners.

`trace` makes one from a Python function by calling it once with symbolic numbers. `Formula.vjp` and `Formula.jvp`
derive formulas and say what they need; a formula runs through `Formula.runner(backend)`, a NumPy program or a CUDA
kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpuad.array import dtypes
from gpuad.errors import FormulaError
from gpuad.kernels import derive, simplify  # noqa: F401  (simplify registers its rules)
from gpuad.kernels.cuda_kernel import CudaKernel
from gpuad.kernels.expr import Constant, Expr, Variable, as_expr, substitute, topological, variable, variables
from gpuad.kernels.numpy_program import NumpyProgram, single_ufunc
from gpuad.kernels.scalar import where

_RUNNERS: dict[str, Callable[[Formula], Any]] = {"numpy": NumpyProgram, "cuda": CudaKernel}


class Formula:
    """Output expressions over input variables, in the order in which they are passed."""

    def __init__(self, name: str, inputs: Sequence[Variable], outputs: Sequence[Expr]) -> None:
        self.name = name
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._runners: dict[str, Any] = {}
        self._vjp: dict[tuple[int, ...], Derivative] = {}
        self._jvp: dict[tuple[int, ...], Derivative] = {}
        self.needs_float = any(
            n.function.result == "float" or (isinstance(n, Constant) and isinstance(n.value, float))
            for n in topological(self.outputs)
        )
        # Conditions and labels keep their own dtype; the others are promoted together.
        self.promoted = tuple(i for i, v in enumerate(self.inputs) if v.kind == "number")
        self.bool_outputs = tuple(_is_bool(o) for o in self.outputs)
        self.ufunc: np.ufunc | None = single_ufunc(self)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(v.name for v in self.inputs)}) = {', '.join(map(str, self.outputs))}"

    def out_dtype(self, i: int, dtype: np.dtype) -> np.dtype:
        """The dtype of output i when numbers are computed in `dtype`."""
        return dtypes.bool_ if self.bool_outputs[i] else dtype

    def runner(self, language: str) -> Any:
        """What runs this formula where a backend speaks `language`: "numpy" or "cuda"."""
        found = self._runners.get(language)
        if found is None:
            found = self._runners[language] = _RUNNERS[language](self)
        return found

    def vjp(self, wanted: tuple[int, ...]) -> Derivative:
        """The cotangents of the wanted inputs, as a formula of the outputs' cotangents and what must be saved."""
        found = self._vjp.get(wanted)
        if found is None:
            found = self._vjp[wanted] = self._derive_vjp(wanted)
        return found

    def _derive_vjp(self, wanted: tuple[int, ...]) -> Derivative:
        suffix = "" if len(self.outputs) == 1 else "{}"
        cotangents = [self._fresh("g" + suffix.format(i)) for i in range(len(self.outputs))]
        results = derive.vjp(self.outputs, cotangents, [self.inputs[i] for i in wanted])
        placeholders = {o: self._fresh(f"y{i}") for i, o in enumerate(self.outputs) if o.args}
        from_inputs = self._derivative(results, cotangents, {})
        from_outputs = self._derivative(substitute(results, dict(placeholders)), cotangents, placeholders)
        # On a tie the output: it is there already, and what it stands for need not be computed again.
        return from_outputs if from_outputs.weight() <= from_inputs.weight() else from_inputs

    def _derivative(self, results: list[Expr], cotangents: list[Variable], placeholders: dict) -> Derivative:
        used = set(variables(results))
        inputs = tuple(i for i, v in enumerate(self.inputs) if v in used)
        outputs = tuple(i for i, o in enumerate(self.outputs) if placeholders.get(o) in used)
        parameters = [*cotangents, *(self.inputs[i] for i in inputs), *(placeholders[self.outputs[i]] for i in outputs)]
        return Derivative(Formula(f"{self.name}_vjp", parameters, results), inputs, outputs)

    def _fresh(self, name: str) -> Variable:
        taken = {v.name for v in self.inputs}
        while name in taken:
            name += "_"
        return variable(name)

    def jvp(self, moving: tuple[int, ...]) -> Derivative:
        """Values and tangents of the outputs, as a formula of all inputs and the tangents of the `moving` inputs."""
        found = self._jvp.get(moving)
        if found is None:
            tangents = {self.inputs[i]: self._fresh(f"d{self.inputs[i].name}") for i in moving}
            results = derive.jvp(self.outputs, tangents)
            formula = Formula(
                f"{self.name}_jvp", [*self.inputs, *tangents.values()], [*self.outputs, *results]
            )
            found = self._jvp[moving] = Derivative(formula, tuple(range(len(self.inputs))), ())
        return found


class Derivative(NamedTuple):
    """A derived formula and which inputs and outputs of the original it takes (besides cotangents or tangents)."""

    formula: Formula
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def weight(self) -> int:
        """How many buffers it keeps alive."""
        return len(self.inputs) + len(self.outputs)


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


def trace(function: Callable, name: str | None = None, rows: Sequence[str] = (), labels: Sequence[str] = ()) -> Formula:
    """Call `function` once with symbolic numbers, one for each of its parameters, and return its formula.

    rows: parameters with one value a row; labels: parameters that are integers (left out of promotion).
    Raises FormulaError, saying what to write instead, where the function is not elementwise.
    """
    name = name or getattr(function, "__name__", "formula")
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise FormulaError(f"The formula {name} takes *{p.name}; name each input, so that the kernel knows how many.")
    inputs = [
        variable(p.name, "label" if p.name in labels else "number", "row" if p.name in rows else "element")
        for p in parameters
    ]
    result = function(*inputs)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    if not results:
        raise FormulaError(f"The formula {name} returns nothing; return the expression to compute.")
    for r in results:
        if r is None:
            raise FormulaError(f"The formula {name} returns None; return the expression to compute.")
    outputs = [as_expr(r) for r in results]
    masks = _masks(outputs, inputs)
    if masks:
        swap: dict[Expr, Expr] = {v: variable(v.name, "mask", v.level) for v in masks}
        outputs = substitute(outputs, swap)
        inputs = [swap.get(v, v) for v in inputs]  # type: ignore[misc]
    return Formula(name, inputs, outputs)
