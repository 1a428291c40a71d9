"""gpuad: automatic differentiation for NumPy and CuPy arrays, in the style of PyTorch."""

from __future__ import annotations

from typing import Any

from gpuad import autograd, cuda, errors, func, ops
from gpuad.array import dtypes as _dtypes
from gpuad.array.device import Device, set_default_device
from gpuad.array.device import Device as device
from gpuad.array.device import default_device as get_default_device
from gpuad.array.dtypes import (
    bool_,
    can_cast,
    double,
    float16,
    float32,
    float64,
    get_default_dtype,
    half,
    int8,
    int16,
    int32,
    int64,
    long,
    promote_types,
    set_default_dtype,
    short,
    uint8,
)
from gpuad.array.random import Generator, initial_seed, seed
from gpuad.autograd.modes import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    is_inference_mode_enabled,
    no_grad,
    set_grad_enabled,
)
from gpuad.autograd.op import for_nn as _for_nn
from gpuad.autograd.op import functions as _functions
from gpuad.cuda import get_float32_matmul_precision, set_float32_matmul_precision
from gpuad.kernels.numpy_program import get_num_threads, set_num_threads
from gpuad.tensor import Size, Tensor

__version__ = "0.1.0"

bool = bool_
float = float32
int = int32
dtype = type(float32)

for _name in _functions.keys() - _for_nn:
    globals()[_name] = _functions[_name]
del _name
