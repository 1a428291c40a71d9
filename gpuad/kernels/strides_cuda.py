"""Operands of any strides in a CUDA kernel: their axes merged as far as they allow, linear indices made offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# An axis: its length, and the stride of each array along it, in elements.
Axis = tuple[int, tuple[int, ...]]


def broadcast_strides(array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides over the broadcast shape, in elements."""
    size = array.dtype.itemsize
    own = [0 if n == 1 else s // size for n, s in zip(array.shape, array.strides, strict=True)]
    return (*(0,) * (len(shape) - len(own)), *own)


def merged(shape: tuple[int, ...], strides: Sequence[tuple[int, ...]], axes: Sequence[int]) -> list[Axis]:
    """The axes as few as can be; those of length 1 are left out."""
    found: list[Axis] = []
    for axis in axes:
        n, steps = shape[axis], tuple(s[axis] for s in strides)
        if n == 1:
            continue
        if found and found[-1][1] == tuple(n * s for s in steps):
            found[-1] = (found[-1][0] * n, steps)
        else:
            found.append((n, steps))
    return found


def words(axes: Sequence[Axis]) -> list[int]:
    """The axes as the numbers that a kernel reads from its layout."""
    return [word for n, steps in axes for word in (n, *steps)]


def offsets(
    index: str, name: str, arrays: Sequence[Any], axes: int, word: int, start: Sequence[str | None] | None = None
) -> list[str]:
    """Statements that turn a linear index over merged axes into an offset for each array, from `start` on.

    word: where the axes stand in the layout, layout.v.
    """
    step = 1 + len(arrays)
    begins = start or [None] * len(arrays)
    lines = [f"long long {name}{i} = {begin or 0};" for i, begin in zip(arrays, begins, strict=True)]
    if axes > 1:
        lines.append(f"long long {name}_rest = {index};")
    for axis in reversed(range(axes)):
        at = index if axes == 1 else f"{name}_at{axis}"
        if axes > 1 and axis:
            lines.append(f"const long long {at} = {name}_rest % layout.v[{word + axis * step}];")
            lines.append(f"{name}_rest /= layout.v[{word + axis * step}];")
        elif axes > 1:
            lines.append(f"const long long {at} = {name}_rest;")
        for k, i in enumerate(arrays):
            lines.append(f"{name}{i} += {at} * layout.v[{word + axis * step + 1 + k}];")
    return lines
