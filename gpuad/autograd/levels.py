"""Levels: what is on a Tensor inside a transform. Dual carries a tangent, Batched hides a batch dimension.

Each use of forward mode and of vmap opens a level with a number higher than all before. A Tensor of several levels is
an onion with the highest outside, and an operation takes the highest level apart first, so what belongs to different
levels never mixes. Below all levels are plain Tensors, and only these are recorded on the tape.
Source: Griewank & Walther, section 3.1; levels as in Radul et al., "You Only Linearize Once", and JAX's autodidax.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import numpy as np

from gpuad.autograd.op import Interpreters
from gpuad.errors import AutogradError, ShapeError
from gpuad.tensor import Tensor, wrap

_counting = threading.Lock()
_numbers = itertools.count(1)


class _Levels(threading.local):
    def __init__(self) -> None:
        self.open: dict[int, Level] = {}


_levels = _Levels()


def counted(change: int) -> None:
    """Count a level or an autocast region that is entered (+1) or left (−1), in any thread."""
    with _counting:
        Interpreters.active += change


class Level:
    """A context in which one level is open; gives its number.

    size, randomness: those of vmap; a level of forward mode has none.
    """

    def __init__(self, size: int | None = None, randomness: str = "error") -> None:
        self.size, self.randomness = size, randomness
        self.moved: list[ref[Tensor]] = []  # tensors without tangents that took some in place, until the level closes

    def __enter__(self) -> int:
        counted(1)
        self.number = next(_numbers)
        _levels.open[self.number] = self
        return self.number

    def __exit__(self, *exc: object) -> None:
        del _levels.open[self.number]
        counted(-1)
        self.settle()

    def settle(self) -> None:
        """Take the tangents of this level from the tensors that got them in place."""
        for reference in self.moved:
            tensor: Any = reference()
            if isinstance(tensor, Dual) and tensor.level == self.number:
                become(tensor, tensor.primal)
        self.moved.clear()


def is_open(level: int) -> bool:
    """Whether a level of this thread is open."""
    return level in _levels.open


def open_batches() -> list[tuple[int, Level]]:
    """The open levels of vmap, from the outermost in."""
    return [(number, level) for number, level in sorted(_levels.open.items()) if level.size is not None]


def open_levels() -> dict[int, Level]:
    """The levels that are open in this thread, by their numbers."""
    return dict(_levels.open)


@contextmanager
def reopened(levels: dict[int, Level]) -> Iterator[None]:
    """A block in which the levels that `open_levels` gave are open again, for what ran there to run again."""
    before, _levels.open = _levels.open, dict(levels)
    counted(1)
    try:
        yield
    finally:
        counted(-1)
        _levels.open = before
        for number, level in levels.items():
            if number not in before:
                level.settle()


@contextmanager
def suspended(level: int) -> Iterator[None]:
    """A block in which a level of vmap is not open: what runs there sees all examples, as any other dimension."""
    opened = _levels.open.pop(level)
    try:
        yield
    finally:
        _levels.open[level] = opened


class Dual(Tensor):
    """A primal and its tangent at one level; everything a Tensor can do, differentiated forwards."""

    __slots__ = ()  # so that a tensor can become one in place

    primal: Tensor
    tangent: Tensor
    level: int

    @property  # type: ignore[misc]
    def data(self) -> Tensor:
        """The same memory outside the graph and without the tangent."""
        return self.primal.data

    def __repr__(self) -> str:
        return f"dual({self.primal!r}, tangent={self.tangent!r})"


def make_dual(primal: Tensor, tangent: Tensor, level: int) -> Dual:
    """primal + ε tangent at `level`; shapes, dtypes and devices must be equal."""
    if primal._data.shape != tangent._data.shape:
        raise ShapeError(f"A tangent has the shape of its primal, {tuple(primal.shape)}; got {tuple(tangent.shape)}.")
    made: Any = wrap(primal._data, primal._device, Dual)
    made._cell = primal._cell
    made._requires_grad, made._node = primal._requires_grad, primal._node
    made.primal, made.tangent, made.level = primal, tangent, level
    return made


def become(target: Any, result: Any) -> None:
    """Let a tensor take the value of another, with its place on the tape and its levels."""
    target.__class__ = type(result)
    for slot in ("_data", "_cell", "_node", "_requires_grad"):
        setattr(target, slot, getattr(result, slot))
    for name in ("primal", "tangent", "value", "level"):
        target.__dict__.pop(name, None)
    target.__dict__.update(result.__dict__)


class Batched(Tensor):
    """One example of many, inside vmap: `value` has them all, along a first dimension that operations do not see."""

    __slots__ = ()

    value: Tensor
    level: int

    @property  # type: ignore[misc]
    def data(self) -> Tensor:
        """The same memory outside the graph."""
        return make_batched(self.value.data, self.level)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: there is no one array of elements."""
        raise _no_elements("numpy()")

    __array__ = numpy

    def __repr__(self) -> str:
        count = self.value._data.shape[0]
        return f"<one of {count} examples of vmap: {self.dtype} {tuple(self.shape)} on {self._device}>"


def make_batched(value: Tensor, level: int) -> Batched:
    """The examples along the first dimension of `value`, seen as one."""
    made: Any = wrap(Logical(value._data.shape[1:], value._data.dtype), value._device, Batched)
    made._cell = value._cell
    made._requires_grad, made._node = value._requires_grad, value._node
    made.value, made.level = value, level
    return made


class NoElements(AutogradError, AttributeError):
    """The elements of a tensor were asked for inside vmap, where it stands for many."""


class Logical:
    """What an array of one example would be: shape and dtype, no elements. Stands in the place of Batched's array."""

    __slots__ = ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides", "flags", "base")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype, self.ndim, self.size = shape, dtype, len(shape), math.prod(shape)
        self.itemsize, self.nbytes = dtype.itemsize, self.size * dtype.itemsize
        stand_in = np.empty(0, dtype)
        self.strides = tuple(dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
        self.flags, self.base = stand_in.flags, None

    def __getitem__(self, key: Any) -> Logical:
        """The shape that an index of ints and slices leaves."""
        return Logical(np.broadcast_to(np.int8(0), self.shape)[key].shape, self.dtype)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise _no_elements("its elements")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "get":  # a protocol, or whether it is CuPy's, that is asked for
            raise AttributeError(name)
        raise _no_elements(f".{name}")


def _no_elements(what: str) -> NoElements:
    return NoElements(
        f"Inside vmap a tensor stands for many examples, so {what} cannot be had: no item(), no numpy(), no `if` on a "
        "value, no shape that depends on values, and no use after vmap has returned. Compute with gpuad's operations "
        "(gpuad.where for an `if`), or loop over the examples."
    )


def whole(x: Tensor) -> Any:
    """The bare array of a tensor, with all examples that vmap hides."""
    while isinstance(x, Batched):
        x = x.value
    return x._data


def as_index(x: Tensor) -> Any:
    """What an operation takes as an index: the bare array, or the tensor itself where it stands for many examples."""
    return x if isinstance(x._data, Logical) else x._data


def level_of(x: Any) -> int:
    """The outermost level of x; 0 for plain tensors and everything else."""
    return x.level if isinstance(x, (Dual, Batched)) else 0


def batches_of(xs: Iterable[Any]) -> set[int]:
    """The levels of vmap that the values (not the tangents) of tensors have."""
    found = set()
    for x in xs:
        while isinstance(x, (Dual, Batched)):
            if isinstance(x, Batched):
                found.add(x.level)
                x = x.value
            else:
                x = x.primal
    return found


# Taking levels apart, also below higher ones ------------------------------------------------------------------------


def unpack(x: Any, level: int) -> tuple[Any, Any]:
    """(primal, tangent) of x at `level`; the tangent is None where x does not depend on that level's inputs."""
    own = level_of(x)
    if own == level:
        return x.primal, x.tangent
    if own < level:
        return x, None
    if isinstance(x, Batched):
        primal, tangent = unpack(x.value, level)
        return make_batched(primal, own), None if tangent is None else make_batched(tangent, own)
    (primal, tangent), (primal_moves, tangent_moves) = unpack(x.primal, level), unpack(x.tangent, level)
    if tangent is None and tangent_moves is None:
        return x, None
    zeros = x.new_zeros(x._data.shape)
    tangent, tangent_moves = (zeros if t is None else t for t in (tangent, tangent_moves))
    return make_dual(primal, primal_moves, own), make_dual(tangent, tangent_moves, own)


def pack(primal: Any, tangent: Any, level: int) -> Any:
    """primal + ε tangent at `level`, which goes below the higher levels of both."""
    own = max(level_of(primal), level_of(tangent))
    if own < level:
        return make_dual(primal, tangent, level)
    outer = primal if level_of(primal) == own else tangent
    if isinstance(outer, Batched):
        size = outer.value._data.shape[0]
        return make_batched(pack(expose(primal, own, size), expose(tangent, own, size), level), own)
    pairs = [unpack(primal, own), unpack(tangent, own)]
    (p, p_moves), (t, t_moves) = [(a, a.new_zeros(a._data.shape) if b is None else b) for a, b in pairs]
    return make_dual(pack(p, t, level), pack(p_moves, t_moves, level), own)


def expose(x: Any, level: int, size: int) -> Any:
    """x with the examples of `level` along a first dimension that everybody sees; repeated where x has none."""
    own = level_of(x)
    if own == level:
        return x.value
    if own < level:
        return x.expand((size, *x._data.shape))
    if isinstance(x, Batched):
        return make_batched(expose(x.value, level, size).movedim(0, 1), own)
    return make_dual(expose(x.primal, level, size), expose(x.tangent, level, size), own)


def hide(x: Any, level: int) -> Any:
    """The reverse of expose."""
    own = level_of(x)
    if own < level:
        return make_batched(x, level)
    if isinstance(x, Batched):
        return make_batched(hide(x.value.movedim(1, 0), level), own)
    return make_dual(hide(x.primal, level), hide(x.tangent, level), own)
