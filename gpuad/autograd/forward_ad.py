"""Forward mode by hand, as torch.autograd.forward_ad: make duals in a dual_level, compute, unpack.

    with dual_level():
        x = make_dual(primal, tangent)
        value, derivative = unpack_dual(f(x))

Unlike PyTorch's, dual levels nest; make_dual and unpack_dual mean the innermost unless told otherwise.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from gpuad.array.dtypes import FLOATING
from gpuad.autograd import levels
from gpuad.errors import AutogradError, DtypeError
from gpuad.tensor import Tensor

__all__ = ["UnpackedDualTensor", "dual_level", "enter_dual_level", "exit_dual_level", "make_dual", "unpack_dual"]


class _Entered(threading.local):
    def __init__(self) -> None:
        self.levels: list[levels.Level] = []


_entered = _Entered()


class UnpackedDualTensor(NamedTuple):
    """A primal and its tangent, None where it has none."""

    primal: Tensor
    tangent: Tensor | None


def enter_dual_level() -> int:
    """Open a level and give its number; prefer `with dual_level():`."""
    level = levels.Level()
    level.__enter__()
    _entered.levels.append(level)
    return level.number


def exit_dual_level(*, level: int | None = None) -> None:
    """Close the innermost level; the tensors made in it have no tangents from then on."""
    if not _entered.levels or (level is not None and _entered.levels[-1].number != level):
        raise AutogradError("exit_dual_level() closes the innermost level, the one that was entered last.")
    _entered.levels.pop().__exit__()


class dual_level:  # noqa: N801  (PyTorch's name)
    """A context in which make_dual gives tensors a tangent; gives the number of the level."""

    def __enter__(self) -> int:
        return enter_dual_level()

    def __exit__(self, *exc: object) -> None:
        exit_dual_level()


def _level(level: int | None, who: str) -> int:
    if not _entered.levels:
        raise AutogradError(f"{who}() works inside `with gpuad.autograd.forward_ad.dual_level():`.")
    if level is None:
        return _entered.levels[-1].number
    if not levels.is_open(level):
        raise AutogradError(f"{who}(level={level}): there is no such open level; dual_level() gives its number.")
    return level


def make_dual(tensor: Tensor, tangent: Tensor, *, level: int | None = None) -> Tensor:
    """`tensor` with a tangent: what is computed from it has one too, its derivative along it.

    Both floating, of one shape, dtype and device. Raises AutogradError outside a dual_level.
    """
    number = _level(level, "make_dual")
    for x in (tensor, tangent):
        if not isinstance(x, Tensor):
            raise TypeError(f"make_dual() takes Tensors, got a {type(x).__name__}; wrap it in gpuad.tensor(…).")
    if tensor.dtype != tangent.dtype or tensor.dtype.char not in FLOATING:
        raise DtypeError(
            f"A tangent has the floating dtype of its primal; got {tensor.dtype} with a tangent of {tangent.dtype}."
        )
    if levels.level_of(tensor) >= number:
        raise AutogradError("make_dual() of a tensor that has a tangent at this level; unpack_dual() it first.")
    return levels.make_dual(tensor, tangent, number)


def unpack_dual(tensor: Tensor, *, level: int | None = None) -> UnpackedDualTensor:
    """(primal, tangent) of a tensor; the tangent is None where it depends on no dual of the level."""
    if not _entered.levels and level is None:
        while isinstance(tensor, levels.Dual) and not levels.is_open(tensor.level):
            tensor = tensor.primal
        return UnpackedDualTensor(tensor, None)
    return UnpackedDualTensor(*levels.unpack(tensor, _level(level, "unpack_dual")))
