"""Gradient clipping, and parameters as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import gpuad
from gpuad import Tensor
from gpuad.ops import many


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in parameters if p.grad is not None]


def get_total_norm(tensors: Tensor | Iterable[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Any:
    """The norm of all the elements of the tensors together, as a 0-d tensor on the device of the first.

    norm_type: the order p of (Σ |x|ᵖ)^(1/p), or inf for the largest |x|.
    error_if_nonfinite raises RuntimeError for inf and nan; it waits for the device to see.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else [t for t in tensors if t.numel()]
    if not tensors:
        return gpuad.tensor(0.0)
    total = many.total_norm(tensors, float(norm_type))
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    return total


def clip_grads_with_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor) -> None:
    """Multiply the gradients in place by min(1, max_norm / (total_norm + 1e-6))."""
    many.clip_to_norm_(_gradients(parameters), max_norm, total_norm)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients in place so that their norm, of all together, is at most max_norm; return what it was.

    foreach is PyTorch's choice of implementation; it changes nothing here.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    total = get_total_norm(_gradients(parameters), norm_type, error_if_nonfinite)
    clip_grads_with_norm_(parameters, max_norm, total)
    return total


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Hold every element of the gradients between -clip_value and clip_value, in place."""
    with gpuad.no_grad():
        for grad in _gradients(parameters):
            grad.clamp_(min=-float(clip_value), max=float(clip_value))


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """All the elements of the parameters as one vector; a recorded operation."""
    return gpuad.cat([parameter.reshape(-1) for parameter in parameters])


def vector_to_parameters(vec: Tensor, parameters: Iterable[Tensor]) -> None:
    """Make consecutive parts of a vector the data of the parameters (sharing its memory)."""
    if not isinstance(vec, Tensor):
        raise TypeError(f"expected a Tensor, but got: {type(vec).__name__}")
    parameters = list(parameters)
    expected = sum(parameter.numel() for parameter in parameters)
    if vec.numel() != expected:
        raise ValueError(f"the vector has {vec.numel()} elements, the parameters have {expected}")
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.data = vec[start:end].detach().reshape(parameter.shape)
        start = end
