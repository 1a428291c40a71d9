"""Automatic differentiation: the tape, the reverse walk, forward mode, grad modes, custom functions, checks."""

from gpuad.autograd import autocast as _autocast  # noqa: F401  (puts the dispatch of operands in place)
from gpuad.autograd import forward_ad, functional, graph
from gpuad.autograd import function_levels as _function_levels  # noqa: F401
from gpuad.autograd import interpret as _interpret  # noqa: F401  (puts forward mode and vmap in place)
from gpuad.autograd import level_hooks as _level_hooks  # noqa: F401
from gpuad.autograd import level_writes as _level_writes  # noqa: F401
from gpuad.autograd import live as _live  # noqa: F401  (tells gpuad.array.memory what is alive)
from gpuad.autograd.anomaly import detect_anomaly, set_detect_anomaly, settings
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.function import Function
from gpuad.autograd.gradcheck import GradcheckError, check_devices, gradcheck, gradgradcheck
from gpuad.autograd.gradients import backward, grad
from gpuad.autograd.modes import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    no_grad,
    set_grad_enabled,
)
from gpuad.autograd.node import Node
from gpuad.autograd.primitive import Primitive
from gpuad.autograd.reduced import Reduced

__all__ = [
    "Function", "GradcheckError", "Node", "backward", "check_devices", "detect_anomaly", "enable_grad", "forward_ad",
    "functional", "grad", "gradcheck", "gradgradcheck", "graph", "inference_mode", "is_grad_enabled", "no_grad",
    "set_detect_anomaly", "set_grad_enabled",
]  # fmt: skip

settings.classes.extend([Elementwise, Primitive, Reduced])
