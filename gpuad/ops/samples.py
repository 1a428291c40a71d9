"""Sample inputs for the generic tests, declared beside the ops.

A sample is a tuple with one entry for each operand: `S(shape, low, high)` asks for a floating tensor with elements
drawn uniformly from [low, high); anything else (a number, a bool, None) is passed as it is. Where the op has keyword
parameters, a dict with them stands last:

    samples=[(S((3, 4)), {"axes": (0,), "keepdims": False}), (S((2, 3, 4)), {"axes": (0, 2), "keepdims": True})]

In parameters (and in tuples there) `Array(values)` asks for a bare array of integers or bools on the device of the
test, and `HERE` for that device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

HERE = object()


class Array(NamedTuple):
    """A bare array of the nested `values` on the device of the test."""

    values: Any


class S(NamedTuple):
    """A floating tensor of `shape` with elements in [low, high), kept `away` from the points in `avoid`."""

    shape: tuple[int, ...]
    low: float = -2.0
    high: float = 2.0
    avoid: tuple[float, ...] = ()
    kind: str = "float"  # "bool" for a condition, "int" for labels in [low, high)


def unary(low: float = -2.0, high: float = 2.0, *avoid: float) -> list[tuple]:
    """Samples of an op with one operand on the domain (low, high), away from kinks at `avoid`."""
    return [(S(shape, low, high, avoid),) for shape in ((3, 4), (), (0, 3), (2, 1, 5))]


def binary(low: float = -2.0, high: float = 2.0, *avoid: float) -> list[tuple]:
    """Samples of an op with two operands: equal shapes, broadcast both ways, 0-d, empty, a number."""
    shapes = [((3, 4), (3, 4)), ((3, 1), (1, 4)), ((4,), (2, 3, 4)), ((), (3,)), ((0, 3), (3,)), ((), ())]
    samples: list[tuple] = [(S(a, low, high, avoid), S(b, low, high, avoid)) for a, b in shapes]
    return [*samples, (S((3, 4), low, high, avoid), 1.5), (0.75, S((3,), low, high, avoid))]


def reductions(*, empty: bool = True, **parameters: Any) -> list[tuple]:
    """Samples of a reduction with the parameters `axes` and `keepdims`; `empty`: whether it takes sums of nothing."""
    given: list[tuple] = [((3, 4), (0,), False), ((3, 4), (0, 1), False), ((2, 3, 4), (0, 2), True), ((), (), False),
                          ((2, 3, 4), (1,), False)]  # fmt: skip
    given.append(((0, 3), (0,), False) if empty else ((0, 3), (1,), False))
    return [(S(shape), {"axes": axes, "keepdims": keepdims, **parameters}) for shape, axes, keepdims in given]


def class_indices(shape: tuple[int, ...], classes: int) -> S:
    """A tensor of class indices below `classes`."""
    return S(shape, 0, classes, (), "int")
