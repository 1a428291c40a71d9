"""Gradients of a row formula's inputs with one value a column (a layer norm's weight): sums over the rows, one launch.

Where such a gradient is a formula of elements and of saved statistics alone, its sum runs straight behind the formula;
what has row functions in it comes out of the row kernel at full size first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from gpuad.kernels import derive
from gpuad.kernels.expr import Expr, Variable, substitute, topological, variable, variables
from gpuad.kernels.formula import Formula


class ColumnSums:
    """The gradients of the inputs at `places`, from the arguments of the formula that they are part of."""

    def __init__(self, full: Formula, results: Mapping[int, Expr]) -> None:
        """results: of `full`, by place, each without row functions."""
        self.places = tuple(results)
        used = set(variables(results.values()))
        self.arguments = tuple(i for i, v in enumerate(full.inputs) if v in used)
        self.by_row = frozenset(i for i in self.arguments if full.inputs[i].level == "row")
        inputs = [full.inputs[i] for i in self.arguments]
        # To a formula of elements, statistics are arrays that broadcast.
        plain: dict[Expr, Expr] = {v: variable(v.name, v.kind) for v in inputs if v.level != "scalar"}
        outputs = substitute(list(results.values()), plain)
        self.formula = Formula(f"{full.name}_columns", [cast("Variable", plain.get(v, v)) for v in inputs], outputs)

    def __call__(self, backend: Any, arguments: Sequence[Any], dtype: np.dtype) -> Sequence[Any]:
        """One array for each place."""
        given: Sequence[Any] = [
            arguments[i].reshape((-1, 1)) if i in self.by_row else arguments[i] for i in self.arguments
        ]
        if dtype.itemsize > 2:  # float16 is computed in float32, which statistics have already
            given = backend.cast_operands(self.formula, given, dtype)
        found = backend.reduce(self.formula, given, dtype, (0,), False)
        return found if len(self.places) > 1 else (found,)


def column_sums(full: Formula, results: Mapping[int, Expr], places: Sequence[int]) -> ColumnSums | None:
    """What sums those of the results at `places` that a formula of elements gives; None where there is none."""
    levels: dict[Expr, str] = {}
    plain = {
        i: results[i]
        for i in places
        if derive.level(results[i], levels) == "element"
        and not any(n.function.across for n in topological([results[i]]))
    }
    return ColumnSums(full, plain) if plain else None
