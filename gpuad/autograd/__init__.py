"""Automatic differentiation: the tape, the reverse walk, forward mode, grad modes, custom functions, checks."""

from gpuad.autograd import forward_ad, functional
from gpuad.autograd import function_levels as _function_levels  # noqa: F401
from gpuad.autograd import interpret as _interpret  # noqa: F401  (puts forward mode and vmap in place)
from gpuad.autograd.function import Function
from gpuad.autograd.gradcheck import GradcheckError, check_devices, gradcheck, gradgradcheck
from gpuad.autograd.modes import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    no_grad,
    set_grad_enabled,
)
from gpuad.autograd.node import Node
from gpuad.autograd.walk import backward, grad

__all__ = [
    "Function", "GradcheckError", "Node", "backward", "check_devices", "enable_grad", "forward_ad", "functional",
    "grad", "gradcheck", "gradgradcheck", "inference_mode", "is_grad_enabled", "no_grad", "set_grad_enabled",
]  # fmt: skip
