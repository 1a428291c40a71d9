"""Rules that change parameters and their state in place, as optimisers do: a Python function of one element, traced.

`UpdateRule` is such a function. For each setting of its flags, and of which terms are switched off by a 0, it becomes
an `Update`: one formula of the parameter, its gradient, the state that is in use, and of numbers; and a `prelude`, the
part of the rule that is the same for all elements, computed on the host once a step. A new value of a hyperparameter
compiles nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuad.errors import FormulaError
from gpuad.kernels.expr import Constant, Expr, Variable, apply, as_expr, constant, substitute, topological, variable
from gpuad.kernels.formula import Formula
from gpuad.kernels.update_cuda import CudaUpdate
from gpuad.kernels.update_numpy import NumpyUpdate

_PROGRAMS: dict[str, Callable[[Update, np.dtype], Any]] = {"numpy": NumpyUpdate, "cuda": CudaUpdate}


class UpdateRule:
    """An optimiser's rule: `rule(p, grad, *state, *, hyperparameters…)` returns the new p and the new state.

    It is traced with symbolic numbers. Keyword-only parameters are hyperparameters, by the names of the parameter
    groups: one with a bool default is a plain bool, to be asked with `if`; one whose default is 0 is a number whose
    terms are left out where it is 0; a tuple, such as betas, comes as a tuple of numbers. `step` counts a parameter's
    updates, from 1. State that the new p does not depend on under a setting is not made, nor computed.
    """

    def __init__(self, function: Callable) -> None:
        parameters = list(inspect.signature(function).parameters.values())
        arrays = [q.name for q in parameters if q.kind is q.POSITIONAL_OR_KEYWORD]
        named = [q for q in parameters if q.kind is q.KEYWORD_ONLY]
        if len(arrays) < 2 or len(arrays) + len(named) != len(parameters):
            raise FormulaError(
                f"The rule {function.__name__}{inspect.signature(function)} cannot be an update; its parameters are "
                "the parameter, its gradient and each state by position, then hyperparameters after a *, e.g. "
                "rule(p, grad, velocity, *, lr, momentum=0.0)."
            )
        self.function = function
        owner = function.__qualname__.removesuffix(".rule").rpartition(".")[2]
        self.name = re.sub(r"\W", "_", owner, flags=re.ASCII)  # a kernel is called so
        self.__doc__ = function.__doc__
        self.arrays = tuple(arrays)
        self.states = self.arrays[2:]
        self.counts_steps = any(q.name == "step" for q in named)
        self.hyperparameters = tuple(q.name for q in named if q.name != "step")
        self._defaults = tuple(q.default for q in named if q.name != "step")
        self._updates: dict[tuple, Update] = {}

    def __repr__(self) -> str:
        return f"<update rule {self.name}({', '.join(self.arrays)})>"

    def update(self, values: Sequence[Any]) -> Update:
        """The formula for hyperparameters that have these values."""
        key = tuple(_known(value, default) for value, default in zip(values, self._defaults, strict=True))
        found = self._updates.get(key)
        if found is None:
            found = self._updates[key] = self._trace(key)
        return found

    def _trace(self, key: tuple) -> Update:
        arrays = [variable(name) for name in self.arrays]
        named: dict[str, Any] = {}
        numbers: list[Variable] = []
        zeros: set[Expr] = set()
        for name, known in zip(self.hyperparameters, key, strict=True):
            if isinstance(known, bool):
                named[name] = known
                continue
            several = known if isinstance(known, int) else 0
            symbols = [variable(f"{name}{i}") for i in range(several)] or [variable(name)]
            named[name] = tuple(symbols) if several else symbols[0]
            numbers += symbols
            if known == "zero":
                zeros.update(symbols)
        if self.counts_steps:
            named["step"] = variable("step")
            numbers.append(named["step"])
        results = self.function(*arrays, **named)
        outputs = [as_expr(r) for r in (results if isinstance(results, tuple) else (results,))]
        if len(outputs) != len(arrays) - 1:
            raise FormulaError(
                f"The rule {self.name} returns {len(outputs)} values; it must return the new {self.arrays[0]} and "
                f"each of its {len(self.states)} states."
            )
        return Update(self, arrays, numbers, _without(outputs, zeros))


class Update:
    """A rule under one setting.

    states: the names of the state in use. formula: of (p, grad, *states, *numbers), its outputs the new p and states.
    prelude: from the values of the hyperparameters (and the step) to the numbers.
    """

    def __init__(
        self, rule: UpdateRule, arrays: Sequence[Variable], numbers: Sequence[Variable], outputs: Sequence[Expr]
    ) -> None:
        used = _used(arrays[2:], outputs)
        self.name = rule.name
        self.states = tuple(rule.states[i] for i in used)
        kept = [outputs[0], *(outputs[1 + i] for i in used)]
        shared = _shared(kept, set(numbers))
        symbols = [variable(f"number {i}") for i in range(len(shared))]  # no name of a rule's has a blank
        body = substitute(kept, dict(zip(shared, symbols, strict=True)))
        inputs = [*arrays[:2], *(arrays[2 + i] for i in used)]
        self.arrays = len(inputs)
        self.numbers = len(symbols)
        self.formula = Formula(self.name, [*inputs, *symbols], body)
        self._prelude = _write_prelude(numbers, shared)
        self._numbers_of = numbers, shared
        self.compiled: dict[Any, Any] = {}  # what a language's programs share, by keys of theirs

    def given(self, values: Sequence[Any]) -> list[float]:
        """The hyperparameters as numbers in a row, without the flags."""
        given: list[float] = []
        for value in values:
            if type(value) is tuple:
                given += value
            elif type(value) is not bool:
                given.append(value)
        return given

    def prelude(self, values: Sequence[Any], step: float | None = None) -> tuple[float, ...]:
        """The numbers of the formula, from the values of the rule's hyperparameters."""
        given = self.given(values)
        if step is not None:
            given.append(step)
        try:
            return self._prelude(math.sqrt, *given)
        except (ArithmeticError, ValueError):  # 1 / 0 or the root of −1, perhaps of a branch not taken: inf and nan
            with np.errstate(all="ignore"):
                return tuple(map(float, self._prelude(np.sqrt, *map(np.float64, given))))

    @functools.cached_property
    def device_prelude(self) -> Formula:
        """The prelude of a rule that counts steps, as a formula for a device: step = attempts − skipped."""
        (*given, step), shared = self._numbers_of
        attempts, skipped = variable("attempts"), variable("skipped")
        results = substitute(shared, {step: attempts - skipped})
        return Formula(f"{self.name}_prelude", [*given, attempts, skipped], results)

    def program(self, language: str, dtype: np.dtype) -> Any:
        """A new program for arrays of one dtype, with scratch memory of its own."""
        return _PROGRAMS[language](self, dtype)


def _known(value: Any, default: Any) -> Any:
    """What a formula may depend on of a value: a bool itself, whether it switches its terms off, a tuple's length."""
    if isinstance(default, bool):
        return bool(value)
    if isinstance(value, tuple):
        return len(value)
    return "zero" if value == 0 and default is not inspect.Parameter.empty else "number"


def _without(outputs: Sequence[Expr], zeros: set[Expr]) -> list[Expr]:
    """The expressions where the variables `zeros` are exactly 0: what they multiply is gone, even if it is NaN."""
    zero = constant(0.0)
    done: dict[Expr, Expr] = {}
    for node in topological(outputs):
        if node in zeros:
            done[node] = zero
        elif not node.args:
            done[node] = node
        else:
            args = [done[a] for a in node.args]
            gone = {"mul": any(a is zero for a in args), "div": args[0] is zero}.get(node.function.name, False)
            done[node] = zero if gone else apply(node.function, *args)
    return [done[o] for o in outputs]


def _used(states: Sequence[Variable], outputs: Sequence[Expr]) -> list[int]:
    """The states that the new parameter depends on, now or through later steps."""
    index: dict[Expr, int] = {s: i for i, s in enumerate(states)}
    used: set[int] = set()
    pending = [outputs[0]]
    while pending:
        for node in topological([pending.pop()]):
            i = index.get(node)
            if i is not None and i not in used:
                used.add(i)
                pending.append(outputs[1 + i])
    return sorted(used)


def _shared(outputs: Sequence[Expr], numbers: set[Variable]) -> list[Expr]:
    """The largest subexpressions of hyperparameters alone."""
    alone: set[Expr] = set()
    found: dict[Expr, None] = {}
    for node in topological(outputs):
        if node in numbers or (node.args and all(a in alone or isinstance(a, Constant) for a in node.args)):
            alone.add(node)
        else:
            found.update(dict.fromkeys(a for a in node.args if a in alone))
    found.update(dict.fromkeys(o for o in outputs if o in alone))
    return list(found)


_PYTHON = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})", "neg": "(-{0})",
    "pow": "({0} ** {1})", "sqrt": "sqrt({0})", "maximum": "max({0}, {1})", "minimum": "min({0}, {1})",
    "lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})", "ge": "({0} >= {1})",
    "where": "({1} if {0} else {2})",
}  # fmt: skip


def _write_prelude(numbers: Sequence[Variable], results: Sequence[Expr]) -> Callable[..., tuple[float, ...]]:
    names: dict[Expr, str] = {v: v.name for v in numbers}
    lines = [f"def prelude(sqrt{''.join(f', {v.name}' for v in numbers)}):"]
    for i, node in enumerate(topological(results)):
        if node in names:
            continue
        if isinstance(node, Constant):
            names[node] = repr(node.value)
            continue
        form = _PYTHON.get(node.function.name)
        if form is None:
            raise FormulaError(
                f"A rule cannot compute {node.function.name} of hyperparameters alone; compute it in the optimiser and "
                "keep it in the group, or write it with + − × ÷ ** sqrt, maximum, minimum, where and comparisons."
            )
        names[node] = f"value{i}_"
        lines.append(f"    {names[node]} = {form.format(*(names[a] for a in node.args))}")
    lines.append(f"    return ({''.join(names[r] + ', ' for r in results)})")
    namespace: dict[str, Any] = {"inf": math.inf, "nan": math.nan}
    exec(compile("\n".join(lines), "<gpuad prelude>", "exec"), namespace)
    return namespace["prelude"]
