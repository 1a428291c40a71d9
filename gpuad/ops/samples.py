"""Sample inputs for the generic tests, declared beside the ops.

A sample is a tuple with one entry for each operand: `S(shape, low, high)` asks for a floating tensor with elements
drawn uniformly from [low, high); anything else (a number, a bool) is passed as it is.
"""

from __future__ import annotations

from typing import NamedTuple


class S(NamedTuple):
    """A floating tensor of `shape` with elements in [low, high), kept `away` from the points in `avoid`."""

    shape: tuple[int, ...]
    low: float = -2.0
    high: float = 2.0
    avoid: tuple[float, ...] = ()
    kind: str = "float"  # "bool" for a condition


def unary(low: float = -2.0, high: float = 2.0, *avoid: float) -> list[tuple]:
    """Samples of an op with one operand on the domain (low, high), away from kinks at `avoid`."""
    return [(S(shape, low, high, avoid),) for shape in ((3, 4), (), (0, 3), (2, 1, 5))]


def binary(low: float = -2.0, high: float = 2.0, *avoid: float) -> list[tuple]:
    """Samples of an op with two operands: equal shapes, broadcast both ways, 0-d, empty, a number."""
    shapes = [((3, 4), (3, 4)), ((3, 1), (1, 4)), ((4,), (2, 3, 4)), ((), (3,)), ((0, 3), (3,)), ((), ())]
    samples: list[tuple] = [(S(a, low, high, avoid), S(b, low, high, avoid)) for a, b in shapes]
    return [*samples, (S((3, 4), low, high, avoid), 1.5), (0.75, S((3,), low, high, avoid))]
