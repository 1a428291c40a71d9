"""An update as a NumPy program: for each parameter the formula's ufuncs, writing into the parameter and its state.

The formula is written out once as a loop over parameters, so that a small parameter costs little more than its ufuncs.
Numbers come as 0-d arrays of the parameters' dtype (a ufunc takes 180 ns with one and 410 ns with a Python number,
measured on 16 elements). Large parameters go through the formula's own program, in blocks and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.kernels.expr import Expr
from gpuad.kernels.numpy_program import BLOCK, _Writer, lower
from gpuad.kernels.scalar import where

if TYPE_CHECKING:
    from gpuad.kernels.update import Update


class NumpyUpdate:
    """Runs an update on host arrays of one dtype; not for two threads at a time, since it holds scratch memory."""

    def __init__(self, update: Update, dtype: np.dtype) -> None:
        self.update, self.dtype = update, dtype
        self._loop, self._kinds = _compiled(update)
        self._scratch: dict[tuple[int, ...], tuple[np.ndarray, ...]] = {}
        self._given: tuple[float, ...] | None = None
        self._values = np.zeros(update.numbers, dtype)
        self._numbers = [self._values[i : i + 1].reshape(()) for i in range(update.numbers)]

    def prepare(self, arrays: Sequence[Any]) -> Any:
        """What `run` wants to know of a parameter's arrays: the scratch they need, None where they go in blocks."""
        p = arrays[0]
        if p.size > BLOCK or p.dtype == np.float16:
            return None
        found = self._scratch.get(p.shape)
        if found is None:
            found = tuple(np.empty(p.shape, bool if kind == "bool" else self.dtype) for kind in self._kinds)
            self._scratch[p.shape] = found
        return found

    def run(self, sets: Sequence[tuple[tuple[float, ...], list]]) -> None:
        """Update the parameters of each (numbers, [(prepared, p, grad, *states), …])."""
        for numbers, items in sets:
            if numbers is not self._given:
                self._values[:] = self._given = numbers
            self._loop(items, self._large, self._numbers)

    def _large(self, *arrays: np.ndarray) -> None:
        program = self.update.formula.runner("numpy")
        program([*arrays, *self._given], self.dtype, [arrays[0], *arrays[2:]])  # type: ignore[misc]


class _Positional(_Writer):
    """Hands buffers to ufuncs by position: 40 ns a call less than out=."""

    def call(self, node: Expr, arguments: list[str], out: str | None) -> tuple[str, bool]:
        function = "select" if node.function is where else self.function(node)
        return f"{function}({', '.join([*arguments, str(out)])})", True


def _compiled(update: Update) -> tuple[Callable, tuple[str, ...]]:
    """The loop over parameters, and the kinds of scratch that it needs."""
    found = update.compiled.get("numpy")
    if found is not None:
        return found
    formula, count = update.formula, update.arrays
    outputs = lower(formula.outputs)
    # The new p goes where p is, the new states where they are; the gradient, input 1, is only read.
    places = {i: 0 if i == 0 else i + 1 for i in range(len(outputs))}
    numbers = frozenset(range(count, len(formula.inputs)))
    writer = _Positional(formula, outputs, numbers, True, frozenset(places.items()))
    writer.write(frozenset(formula.inputs[:count]))
    arrays = ", ".join(f"x{i}" for i in range(count))
    body = [f"o{i} = x{place}" for i, place in places.items()]
    if writer.scratch:
        body.append(f"{', '.join(writer.scratch)}, = scratch")
    body += writer.lines
    body += [f"copyto(o{i}, {writer.text(e)})" for i, e in enumerate(outputs) if writer.text(e) != f"o{i}"]
    unpacked = "".join(f"x{i}, " for i in sorted(numbers))
    writer.lines = [
        *([f"{unpacked}= numbers"] if numbers else []),
        f"for scratch, {arrays} in items:",
        "    if scratch is None:",
        f"        large({arrays})",
        "        continue",
        *(f"    {line}" for line in body),
    ]
    header = "def program(items, large, numbers):"
    found = update.compiled["numpy"] = writer.compile(header, []), tuple(writer.scratch.values())
    return found
