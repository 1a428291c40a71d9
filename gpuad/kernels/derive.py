"""Derivatives of expressions: reverse mode (vjp) and forward mode (jvp) on the formula itself.

Both walk the expression graph once and apply the partials of `scalar.py`; the result is again expressions, so it can
be derived again, to any order. Common subexpressions of value and derivative are shared because equal nodes are one
object.
Source: Griewank & Walther, "Evaluating Derivatives", 2nd ed., sections 3.1 (forward) and 3.2 (reverse).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpuad.kernels.expr import Constant, Expr, ScalarFunction, Variable, constant, topological
from gpuad.kernels.scalar import add, column_index, mul, neg, row_at, row_size, row_sum, where

ZERO = constant(0.0)
ONE = constant(1.0)


def level(node: Expr, known: dict[Expr, str]) -> str:
    """Over what a node varies: "scalar", "row" (one value a row), "column" or "element"; `known` caches."""
    for each in topological([node], known):
        if isinstance(each, Variable):
            known[each] = each.level
        elif each.function.across:
            known[each] = {"row": "row", "column": "element", "length": "scalar"}[each.function.across]
        else:
            levels = {known[a] for a in each.args} - {"scalar"}
            known[each] = "scalar" if not levels else levels.pop() if len(levels) == 1 else "element"
    return known[node]


def _is_masked(node: Expr) -> bool:
    """Whether a node is where(c, a, b) with a branch that is 0 by structure."""
    return node.function is where and (node.args[1] is ZERO or node.args[2] is ZERO)


def _chain(cotangent: Expr, partial: Expr) -> Expr:
    """cotangent · partial, where what is 0 by structure stays 0 whatever the other factor (inf, nan) is.

    That makes the derivative of where(c, f(x), g(x)) safe: the branch not taken contributes nothing, even where its
    own derivative is not finite.
    """
    for one, other in ((cotangent, partial), (partial, cotangent)):
        if isinstance(one, Constant):
            value = one.value
            return ZERO if value == 0 else other if value == 1 else neg(other) if value == -1 else mul(other, one)
    if cotangent.function is neg:
        return neg(_chain(cotangent.args[0], partial))
    if partial.function is neg:
        return neg(_chain(cotangent, partial.args[0]))
    if _is_masked(cotangent):
        condition, a, b = cotangent.args
        return where(condition, _chain(a, partial), _chain(b, partial))
    if partial.function is where and any(isinstance(branch, Constant) for branch in partial.args[1:]):
        condition, a, b = partial.args
        return where(condition, _chain(cotangent, a), _chain(cotangent, b))
    return mul(cotangent, partial)


def _sum(a: Expr | None, b: Expr) -> Expr:
    """a + b; two terms masked by one condition become one where."""
    if a is None or a is ZERO:
        return b
    if b is ZERO:
        return a
    if _is_masked(a) and _is_masked(b) and a.args[0] is b.args[0]:
        return where(a.args[0], _sum(a.args[1], b.args[1]), _sum(a.args[2], b.args[2]))
    return add(a, b)


def vjp(outputs: Sequence[Expr], cotangents: Sequence[Expr], wanted: Sequence[Variable]) -> list[Expr]:
    """The cotangent of each wanted variable: Σ over outputs of cotangent · ∂output/∂variable; 0 where unconnected."""
    order = topological(outputs)
    if len(outputs) == 1 and not _by_row(order):
        # Elementwise with one output: the derivative itself first, so that its parts are shared with the value.
        return [_chain(cotangents[0], d) for d in _partials(outputs[0], wanted, order)]
    return _reverse(outputs, cotangents, wanted, order)


def _by_row(order: Sequence[Expr]) -> bool:
    """Whether sums along rows are among the derivatives."""
    return any(n.function.across or (isinstance(n, Variable) and n.level == "row") for n in order)


def _reverse(
    outputs: Sequence[Expr], cotangents: Sequence[Expr], wanted: Sequence[Variable], order: list[Expr]
) -> list[Expr]:
    levels: dict[Expr, str] = {}
    for node in order:
        level(node, levels)
    # Only nodes through which an output depends on a wanted variable take part.
    active: set[Expr] = set(wanted)
    for node in order:
        if any(a in active and _partial(node.function, i) is not None for i, a in enumerate(node.args)):
            active.add(node)
    adjoint: dict[Expr, Expr] = {}

    def contribute(node: Expr, value: Expr, along: bool) -> None:
        """Add to an adjoint; along: what uses the node does so for each element of a row."""
        # What is summed over the rows, for an input of one value a column, is summed behind the formula.
        if levels[node] in ("row", "scalar") and value is not ZERO:
            if level(value, levels) in ("element", "column"):
                value = row_sum(value)
            elif along:
                value = mul(value, row_size())
        adjoint[node] = _sum(adjoint.get(node), value)

    for output, cotangent in zip(outputs, cotangents, strict=True):
        if output in active:
            contribute(output, cotangent, False)
    for node in reversed(order):
        if node not in adjoint or node not in active:
            continue
        cotangent = adjoint[node]
        along = node.function.across == "row" or levels[node] in ("element", "column")
        if node.function is row_at:
            source, place = node.args
            contribute(source, where(column_index() == place, cotangent, ZERO), along)
        else:
            for i, argument in enumerate(node.args):
                partial = _partial(node.function, i)
                if argument in active and partial is not None:
                    contribute(argument, _chain(cotangent, partial(*node.args, node)), along)
    return [adjoint.get(variable, ZERO) for variable in wanted]


def _partial(function: ScalarFunction, i: int) -> Callable[..., Expr] | None:
    """The partial derivative for argument i; None where the derivative is 0."""
    if function is row_at:
        return _one if i == 0 else None
    return function.partials[i] if i < len(function.partials) else None


def _one(*_: Expr) -> Expr:
    return ONE


def jvp(outputs: Sequence[Expr], tangents: Mapping[Variable, Expr]) -> list[Expr]:
    """The tangent of each output: Σ over variables of ∂output/∂variable · tangent; 0 where unconnected."""
    order = topological(outputs)
    if not _by_row(order):
        return [_elementwise_tangent(output, tangents) for output in outputs]
    return _forward(outputs, tangents, order)


def _forward(outputs: Sequence[Expr], tangents: Mapping[Any, Expr], order: list[Expr]) -> list[Expr]:
    tangent: dict[Expr, Expr] = dict(tangents)
    for node in order:
        total: Expr | None = None
        for i, argument in enumerate(node.args):
            if argument not in tangent:
                continue
            partial = _partial(node.function, i)
            if node.function is row_at and i == 0:
                total = row_at(tangent[argument], node.args[1])
            elif partial is not None:
                term = _chain(tangent[argument], partial(*node.args, node))
                total = _sum(total, row_sum(term) if node.function.across == "row" else term)
        if total is not None:
            tangent[node] = total
    return [tangent.get(output, ZERO) for output in outputs]


def _partials(output: Expr, wanted: Sequence[Variable], order: list[Expr]) -> list[Expr]:
    """∂output/∂variable for each wanted variable of an elementwise expression.

    Forward for one variable (its products nest from the inside, so less is multiplied), in reverse for several.
    """
    if len(wanted) == 1:
        return _forward([output], {wanted[0]: ONE}, order)
    return _reverse([output], [ONE], wanted, order)


def _elementwise_tangent(output: Expr, tangents: Mapping[Variable, Expr]) -> Expr:
    total: Expr = ZERO
    partials = _partials(output, list(tangents), topological([output]))
    for tangent, partial in zip(tangents.values(), partials, strict=True):
        total = _sum(total, _chain(tangent, partial))
    return total
