"""Forward mode: value and tangent in one pass, by dual numbers (levels.py says how they nest)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuad.autograd.levels import Level, make_dual, unpack
from gpuad.autograd.pytree import aligned, flatten, unflatten
from gpuad.errors import AutogradError, ShapeError
from gpuad.tensor import Tensor


def paired(primals: Any, tangents: Any) -> tuple[list[Tensor], list[Tensor], Any]:
    """The leaves of primals and of tangents, and their structure; raises where the two do not correspond."""
    points, structure = flatten(primals)
    directions = aligned(tangents, structure)
    if directions is None:
        other = flatten(tangents)[1]
        raise ShapeError(
            f"jvp takes one tangent for each primal, in the same structure: got {structure!r} and {other!r}."
        )
    for what, leaves in (("primal", points), ("tangent", directions)):
        for x in leaves:
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"jvp takes Tensors as primals and tangents, got a {type(x).__name__} as a {what}; wrap it in "
                    "gpuad.tensor(…)."
                )
    return points, directions, structure


def jvp(
    function: Callable, primals: Any, tangents: Any, *, strict: bool = False, has_aux: bool = False
) -> tuple[Any, ...]:
    """function(*primals) and its derivative along `tangents`, computed in one pass.

    primals, tangents: tuples with one entry for each argument, a Tensor or nested dicts, lists and tuples of them.
    Returns (value, tangent), both structured like what `function` returns, and with has_aux the second thing that it
    returns, which is not differentiated. A result that does not depend on the primals has a tangent of zeros; with
    strict that is an error.
    """
    if not isinstance(primals, (tuple, list)) or not isinstance(tangents, (tuple, list)):
        raise TypeError("jvp takes primals and tangents as tuples, one entry for each argument, e.g. (x,) and (v,).")
    points, directions, structure = paired(tuple(primals), tuple(tangents))
    with Level() as level:
        duals = [make_dual(p, t, level) for p, t in zip(points, directions, strict=True)]
        result = function(*unflatten(structure, duals))
        result, aux = result if has_aux else (result, None)
        outputs, out_structure = flatten(result)
        values, derivatives = [], []
        for out in outputs:
            value, tangent = unpack(out, level)
            if tangent is None and strict:
                raise AutogradError("jvp(strict=True): an output does not depend on the primals.")
            values.append(value)
            derivatives.append(value.new_zeros(value.shape) if tangent is None else tangent)
        aux_leaves, aux_structure = flatten(aux)
        aux = unflatten(aux_structure, [unpack(x, level)[0] for x in aux_leaves])
    pair = unflatten(out_structure, values), unflatten(out_structure, derivatives)
    return (*pair, aux) if has_aux else pair
