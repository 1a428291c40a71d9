"""Outputs of a row formula with one value a column (the gradient of a layer norm's weight): sums over the rows.

Where such an output is a formula of elements and of saved statistics alone, its sum runs straight behind the formula,
beside the rows; what has row functions in it comes out of the rows at full size first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from gpuad.kernels import derive
from gpuad.kernels.expr import Expr, Variable, substitute, topological, variable, variables

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula


class Sums(NamedTuple):
    """Sums over the rows as a formula of elements: `arguments` says which inputs of the row formula it takes."""

    formula: Formula
    arguments: tuple[int, ...]
    levels: tuple[str, ...]

    def operands(self, arguments: Sequence[Any], ndim: int, axes: Sequence[int]) -> list[Any]:
        """The inputs of the formula, those with one value a row or a column as arrays that broadcast."""
        found = []
        for i, level in zip(self.arguments, self.levels, strict=True):
            given = arguments[i]
            if level in ("row", "column") and getattr(given, "ndim", 0) > 0:
                own = iter(given.shape)
                given = given.reshape([next(own) if (k in axes) == (level == "column") else 1 for k in range(ndim)])
            found.append(given)
        return found


class Apart(NamedTuple):
    """The outputs of a row formula apart: by rows, and by columns.

    rows: the formula of those `by_row` (places among the outputs); some, `full`, are to be summed over the rows then.
    sums: what gives those `by_column` at once.
    """

    rows: Formula | None
    by_row: tuple[int, ...]
    full: tuple[int, ...]
    sums: Sums | None
    by_column: tuple[int, ...]


def apart(formula: Formula) -> Apart:
    """Take the outputs of a row formula with one value a column from the others."""
    known: dict[Expr, str] = {}
    columns = [i for i, level in enumerate(formula.levels) if level == "column"]
    by_column = tuple(
        i
        for i in columns
        if derive.level(formula.outputs[i], known) == "element"
        and not any(n.function.across for n in topological([formula.outputs[i]]))
    )
    by_row = tuple(i for i in range(len(formula.outputs)) if i not in by_column)
    full = tuple(i for i in columns if i not in by_column)
    if not columns:
        return Apart(formula, by_row, (), None, ())
    levels = ["element" if i in full else formula.levels[i] for i in by_row]
    rows = formula.of([formula.outputs[i] for i in by_row], levels)
    if rows is not None:
        rows.statistics = frozenset(k for k, i in enumerate(by_row) if i in formula.statistics)
    return Apart(rows, by_row, full, _sums(formula, by_column) if by_column else None, by_column)


def _sums(formula: Formula, outputs: Sequence[int]) -> Sums:
    results = [formula.outputs[i] for i in outputs]
    used = set(variables(results))
    arguments = tuple(i for i, v in enumerate(formula.inputs) if v in used)
    inputs = [formula.inputs[i] for i in arguments]
    # To a formula of elements, statistics are arrays that broadcast.
    plain: dict[Expr, Expr] = {v: variable(v.name, v.kind) for v in inputs if v.level != "scalar"}
    made = type(formula)(
        f"{formula.name}_columns", [cast("Variable", plain.get(v, v)) for v in inputs], substitute(results, plain)
    )
    return Sums(made, arguments, tuple(v.level for v in inputs))
