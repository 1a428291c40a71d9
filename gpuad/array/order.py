"""The order in memory of what operations make: one rule, the same on every device.

What elementwise operations make lies in memory in the order of their operands, as NumPy's ufuncs have it: of two
dimensions that is the inner one along which all operands take the smaller steps; where they disagree, or none tells,
it is the last one. roll(), casts and copies to another device keep the order of their input too. Everything else that
is no view is C-contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple


class Order(NamedTuple):
    """Dimensions from the outermost in memory to the innermost.

    back: what undoes `axes`. is_c: whether that is C order. agreed: whether each operand by itself has this order.
    """

    axes: tuple[int, ...]
    back: tuple[int, ...]
    is_c: bool
    agreed: bool

    def turn(self, array: Any) -> Any:
        """A view of an operand in which this order is C order; broadcasts as the operand does."""
        missing = len(self.axes) - array.ndim
        if not missing:
            return array.transpose(self.axes)
        return array.reshape((1,) * missing + array.shape).transpose(self.axes) if array.ndim else array

    def turn_back(self, arrays: Sequence[Any]) -> list[Any]:
        """Results in C order, made of operands that were turned, as those that were asked for."""
        return [array.transpose(self.back) for array in arrays]


def memory_order(arrays: Sequence[Any]) -> Order:
    """The order of what an operation makes of arrays that broadcast."""
    return _order(tuple([(a.shape, a.strides) for a in arrays]))


@lru_cache(4096)
def _order(layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> Order:
    ndim = max(len(shape) for shape, _ in layouts)
    steps = [
        (*[0] * (ndim - len(shape)), *[abs(s) if n > 1 else 0 for n, s in zip(shape, strides, strict=True)])
        for shape, strides in layouts
    ]
    # An insertion sort from the innermost outwards, as NumPy's iterator sorts: comparisons are not transitive.
    inwards: list[int] = []
    for axis in reversed(range(ndim)):
        at = len(inwards)
        for place in reversed(range(at)):
            told = [s[axis] < s[inwards[place]] for s in steps if s[axis] and s[inwards[place]]]
            if told and not all(told):
                break
            if told:
                at = place
        inwards.insert(at, axis)
    axes = tuple(reversed(inwards))
    moving = [[s[axis] for axis in axes if s[axis]] for s in steps]
    agreed = all(own == sorted(own, reverse=True) for own in moving)
    return Order(axes, tuple(sorted(range(ndim), key=axes.__getitem__)), axes == tuple(range(ndim)), agreed)


def keeping_order(copy: Callable[[Any], Any], array: Any) -> Any:
    """copy(array), which is in C order, in the order of `array`."""
    if array.flags.c_contiguous:
        return copy(array)
    order = memory_order([array])
    return order.turn_back([copy(order.turn(array))])[0]
