"""An update as a NumPy program: for each parameter the formula's ufuncs, writing into the parameter and its state.

The formula is written out once as a loop over parameters, so that a small parameter costs little more than its ufuncs.
Numbers come as 0-d arrays of the parameters' dtype (a ufunc takes 180 ns with one and 410 ns with a Python number,
measured on 16 elements). Large parameters go through the same loop in blocks that stay in the cache, spread over
threads where that pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.array.dtypes import HALF
from gpuad.kernels.expr import Expr
from gpuad.kernels.numpy_writer import SCRATCH, Writer, lower
from gpuad.kernels.scalar import maximum, minimum, where
from gpuad.kernels.threads import parallel

if TYPE_CHECKING:
    from gpuad.kernels.update import Update

# Elements in a block of a large parameter: as many parts as keep two threads busy with matrices of 512 x 512.
BLOCK = 131072


class NumpyUpdate:
    """Runs an update on host arrays of one dtype; not for two threads at a time, since it holds scratch memory."""

    def __init__(self, update: Update, dtype: np.dtype) -> None:
        self.update, self.dtype = update, dtype
        self._loop, self._kinds, self._calls = _compiled(update)
        self._scratch: dict[tuple[int, ...], tuple[np.ndarray, ...]] = {}
        self._given: tuple[float, ...] | None = None
        self._values = np.zeros(update.numbers, dtype)
        self._numbers = [self._values[i : i + 1].reshape(()) for i in range(update.numbers)]

    def prepare(self, arrays: Sequence[Any]) -> Any:
        """What `run` wants to know of a parameter's arrays: the scratch they need, None where they go in blocks."""
        p = arrays[0]
        if p.size > BLOCK or p.dtype.char in HALF:
            return None
        found = self._scratch.get(p.shape)
        if found is None:
            found = tuple(np.empty(p.shape, SCRATCH.get(kind, self.dtype)) for kind in self._kinds)
            self._scratch[p.shape] = found
        return found

    def run(self, sets: Sequence[tuple[tuple[float, ...], list]]) -> None:
        """Update the parameters of each (numbers, [(prepared, p, grad, *states), …])."""
        large: list[tuple[np.ndarray, ...]] = []
        for numbers, items in sets:
            if numbers is not self._given:
                self._values[:] = self._given = numbers
            self._loop(items, large.append, self._numbers)
            if large:
                self._run_large(large, numbers)
                large.clear()

    def _run_large(self, parameters: list[tuple[np.ndarray, ...]], numbers: tuple[float, ...]) -> None:
        """Update parameters in blocks; those of 16 bits, or whose arrays differ in layout, by the formula's program."""
        flat = []
        for arrays in parameters:
            if arrays[0].dtype.char not in HALF and all([a.flags.c_contiguous for a in arrays]):
                flat.append([a.reshape(-1) for a in arrays])
            elif arrays[0].dtype.char not in HALF and all([a.flags.f_contiguous for a in arrays]):
                flat.append([a.T.reshape(-1) for a in arrays])
            else:
                program = self.update.formula.runner("numpy")
                program([*arrays, *numbers], self.dtype, [arrays[0], *arrays[2:]])
        ends = list(accumulate([-(-arrays[0].size // BLOCK) for arrays in flat], initial=0))

        def work(start: int, stop: int) -> None:
            self._loop(self._blocks(flat, ends, start, stop), None, self._numbers)

        parallel(work, ends[-1], ends[-1] * BLOCK * self._calls)

    def _blocks(
        self, flat: list[list[np.ndarray]], ends: list[int], start: int, stop: int
    ) -> Iterator[tuple[Any, ...]]:
        """Blocks number `start` to `stop` of all parameters, as items of the loop; ends counts blocks up to each."""
        scratch = [np.empty(BLOCK, SCRATCH.get(kind, self.dtype)) for kind in self._kinds]
        for arrays, first, end in zip(flat, ends, ends[1:]):
            for block in range(max(start, first) - first, min(stop, end) - first):
                i, j = block * BLOCK, min((block + 1) * BLOCK, arrays[0].size)
                yield [s[: j - i] for s in scratch], *[a[i:j] for a in arrays]


class _Positional(Writer):
    """Hands buffers to ufuncs by position: 40 ns a call less than out=."""

    def call(self, node: Expr, arguments: list[str], out: str | None) -> tuple[str, bool]:
        if node.function in (maximum, minimum):  # deprecated there since NumPy 2.4
            return super().call(node, arguments, out)
        function = "select" if node.function is where else self.function(node)
        return f"{function}({', '.join([*arguments, str(out)])})", True


def _compiled(update: Update) -> tuple[Callable, tuple[str, ...], int]:
    """The loop over parameters, the kinds of scratch that it needs, and how many calls it makes for each."""
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
    calls = len(writer.lines)
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
        f"        large(({arrays}))",
        "        continue",
        *(f"    {line}" for line in body),
    ]
    program = writer.compile("def program(items, large, numbers):", [])
    found = update.compiled["numpy"] = program, tuple(writer.scratch.values()), calls
    return found
