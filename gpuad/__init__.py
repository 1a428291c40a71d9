"""gpuad: automatic differentiation for NumPy and CuPy arrays, in the style of PyTorch."""

from __future__ import annotations

import importlib as _importlib
from typing import Any as _Any

import numpy as _np

from gpuad import amp, autograd, cuda, errors, func, ops, profiler
from gpuad.array.deterministic import are_deterministic_algorithms_enabled, use_deterministic_algorithms
from gpuad.array.device import Device, set_default_device
from gpuad.array.device import Device as device
from gpuad.array.device import default_device as get_default_device
from gpuad.array.dtypes import (
    bfloat16 as _bfloat16,
)
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
from gpuad.autograd.autocast import autocast, get_autocast_dtype, is_autocast_enabled
from gpuad.autograd.modes import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    is_inference_mode_enabled,
    no_grad,
    set_grad_enabled,
)
from gpuad.autograd.vmap import vmap
from gpuad.cuda import get_float32_matmul_precision, set_float32_matmul_precision
from gpuad.errors import OutOfMemoryError
from gpuad.kernels.threads import get_num_threads, set_num_threads
from gpuad.ops.activations import (
    celu,
    logit,
    prelu,
    relu,
    selu,
    sigmoid,
)
from gpuad.ops.arithmetic import (
    abs,
    add,
    addcdiv,
    addcmul,
    div,
    eq,
    floor_divide,
    fmod,
    ge,
    gt,
    hypot,
    isfinite,
    isinf,
    isnan,
    le,
    lerp,
    logical_and,
    logical_not,
    logical_or,
    logical_xor,
    lt,
    maximum,
    minimum,
    mul,
    ne,
    neg,
    pow,
    reciprocal,
    remainder,
    rsub,
    sign,
    square,
    sub,
    where,
)
from gpuad.ops.arithmetic import (
    abs as absolute,
)
from gpuad.ops.arithmetic import (
    div as divide,
)
from gpuad.ops.arithmetic import (
    div as true_divide,
)
from gpuad.ops.arithmetic import (
    ge as greater_equal,
)
from gpuad.ops.arithmetic import (
    gt as greater,
)
from gpuad.ops.arithmetic import (
    le as less_equal,
)
from gpuad.ops.arithmetic import (
    lt as less,
)
from gpuad.ops.arithmetic import (
    mul as multiply,
)
from gpuad.ops.arithmetic import (
    ne as not_equal,
)
from gpuad.ops.arithmetic import (
    neg as negative,
)
from gpuad.ops.arithmetic import (
    sub as subtract,
)
from gpuad.ops.convert import (
    cpu,
    to,
    type_as,
)
from gpuad.ops.creation import (
    arange,
    as_tensor,
    asarray,
    bernoulli,
    empty,
    empty_like,
    eye,
    from_dlpack,
    from_numpy,
    full,
    full_like,
    linspace,
    logspace,
    manual_seed,
    normal,
    ones,
    ones_like,
    rand,
    rand_like,
    randint,
    randn,
    randn_like,
    randperm,
    tensor,
    zeros,
    zeros_like,
)
from gpuad.ops.fuse import (
    fuse,
)
from gpuad.ops.indexing import (
    argsort,
    gather,
    index_select,
    masked_fill,
    masked_select,
    nonzero,
    scatter,
    scatter_add,
    sort,
    topk,
)
from gpuad.ops.linalg import (
    addmm,
    bmm,
    dot,
    matmul,
    mm,
    mv,
    outer,
)
from gpuad.ops.maths import (
    acos,
    acosh,
    asin,
    asinh,
    atan,
    atan2,
    atanh,
    ceil,
    clamp,
    clamp_max,
    clamp_min,
    cos,
    cosh,
    deg2rad,
    erf,
    erfc,
    erfinv,
    exp,
    exp2,
    expm1,
    floor,
    frac,
    log,
    log1p,
    log2,
    log10,
    logaddexp,
    nan_to_num,
    rad2deg,
    round,
    rsqrt,
    sin,
    sinh,
    sqrt,
    tan,
    tanh,
    trunc,
    xlogy,
)
from gpuad.ops.maths import (
    acos as arccos,
)
from gpuad.ops.maths import (
    acosh as arccosh,
)
from gpuad.ops.maths import (
    asin as arcsin,
)
from gpuad.ops.maths import (
    asinh as arcsinh,
)
from gpuad.ops.maths import (
    atan as arctan,
)
from gpuad.ops.maths import (
    atan2 as arctan2,
)
from gpuad.ops.maths import (
    atanh as arctanh,
)
from gpuad.ops.maths import (
    clamp as clip,
)
from gpuad.ops.maths import (
    trunc as fix,
)
from gpuad.ops.pieces import (
    chunk,
    split,
    unbind,
)
from gpuad.ops.reduction import (
    all,
    amax,
    amin,
    any,
    argmax,
    argmin,
    count_nonzero,
    cumsum,
    logsumexp,
    max,
    mean,
    min,
    norm,
    prod,
    safe_sqrt,
    std,
    std_mean,
    sum,
    sum_to_size,
    var,
    var_mean,
)
from gpuad.ops.rows import (
    log_softmax,
    softmax,
)
from gpuad.ops.shape import (
    broadcast_shapes,
    broadcast_tensors,
    broadcast_to,
    cat,
    clone,
    contiguous,
    diag,
    diagonal,
    expand,
    expand_as,
    flatten,
    flip,
    hstack,
    movedim,
    narrow,
    permute,
    ravel,
    repeat,
    repeat_interleave,
    reshape,
    reshape_as,
    roll,
    squeeze,
    stack,
    t,
    tile,
    trace,
    transpose,
    tril,
    triu,
    unflatten,
    unsqueeze,
    view,
    view_as,
    vstack,
)
from gpuad.ops.shape import (
    cat as concat,
)
from gpuad.ops.shape import (
    cat as concatenate,
)
from gpuad.ops.shape import (
    transpose as swapaxes,
)
from gpuad.ops.shape import (
    transpose as swapdims,
)
from gpuad.tensor import Size, Tensor

__all__ = [
    "abs", "absolute", "acos", "acosh", "add", "addcdiv", "addcmul", "addmm", "all", "amax", "amin", "amp", "Any",
    "any", "arange", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2", "arctanh",
    "are_deterministic_algorithms_enabled", "argmax", "argmin", "argsort", "as_tensor", "asarray", "asin", "asinh",
    "atan", "atan2", "atanh", "autocast", "autograd", "bernoulli", "bmm", "bool_", "broadcast_shapes",
    "broadcast_tensors", "broadcast_to", "can_cast", "cat", "ceil", "celu", "chunk", "clamp", "clamp_max", "clamp_min",
    "clip", "clone", "concat", "concatenate", "contiguous", "cos", "cosh", "count_nonzero", "cpu", "cuda", "cumsum",
    "deg2rad", "Device", "device", "diag", "diagonal", "div", "divide", "dot", "double", "empty", "empty_like",
    "enable_grad", "eq", "erf", "erfc", "erfinv", "errors", "exp", "exp2", "expand", "expand_as", "expm1", "eye", "fix",
    "flatten", "flip", "float16", "float32", "float64", "floor", "floor_divide", "fmod", "frac", "from_dlpack",
    "from_numpy", "full", "full_like", "func", "fuse", "gather", "ge", "Generator", "get_autocast_dtype",
    "get_default_device", "get_default_dtype", "get_float32_matmul_precision", "get_num_threads", "greater",
    "greater_equal", "gt", "half", "hstack", "hypot", "index_select", "inference_mode", "initial_seed", "int16",
    "int32", "int64", "int8", "is_autocast_enabled", "is_grad_enabled", "is_inference_mode_enabled", "isfinite",
    "isinf", "isnan", "le", "lerp", "less", "less_equal", "linspace", "log", "log10", "log1p", "log2", "log_softmax",
    "logaddexp", "logical_and", "logical_not", "logical_or", "logical_xor", "logit", "logspace", "logsumexp", "long",
    "lt", "manual_seed", "masked_fill", "masked_select", "matmul", "max", "maximum", "mean", "min", "minimum", "mm",
    "movedim", "mul", "multiply", "mv", "nan_to_num", "narrow", "ne", "neg", "negative", "no_grad", "nonzero", "norm",
    "normal", "not_equal", "ones", "ones_like", "ops", "outer", "OutOfMemoryError", "permute", "pow", "prelu", "prod",
    "profiler", "promote_types", "rad2deg", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "ravel",
    "reciprocal", "relu", "remainder", "repeat", "repeat_interleave", "reshape", "reshape_as", "roll", "round", "rsqrt",
    "rsub", "safe_sqrt", "scatter", "scatter_add", "seed", "selu", "set_default_device", "set_default_dtype",
    "set_float32_matmul_precision", "set_grad_enabled", "set_num_threads", "short", "sigmoid", "sign", "sin", "sinh",
    "Size", "softmax", "sort", "split", "sqrt", "square", "squeeze", "stack", "std", "std_mean", "sub", "subtract",
    "sum", "sum_to_size", "swapaxes", "swapdims", "t", "tan", "tanh", "Tensor", "tensor", "tile", "to", "topk", "trace",
    "transpose", "tril", "triu", "true_divide", "trunc", "type_as", "uint8", "unbind", "unflatten", "unsqueeze",
    "use_deterministic_algorithms", "var", "var_mean", "view", "view_as", "vmap", "vstack", "where", "xlogy", "zeros",
    "zeros_like",
]  # fmt: skip

__version__ = "0.1.0"

# Names that Python has too; PyTorch's code reads torch.bool, torch.int and torch.float.
bool = bool_
float = float32
int = int32
dtype = _np.dtype


# Imported on their first use: what a program does not need costs nothing.
_LATER = ("graph", "nn", "optim", "utils")


def __getattr__(name: str) -> _Any:
    """gpuad.graph, gpuad.nn, gpuad.optim and gpuad.utils; gpuad.bfloat16, which needs the package ml_dtypes."""
    if name in _LATER:
        return _importlib.import_module(f"gpuad.{name}")
    if name == "bfloat16":
        return _bfloat16()
    raise AttributeError(f"module 'gpuad' has no attribute {name!r}")
