"""What all CUDA kernels are written with: C types, functions that CUDA C has no operator for, statements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gpuad.array import dtypes
from gpuad.kernels.expr import Constant, Expr, topological

C_TYPES = {
    "float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double", "int8": "signed char",
    "int16": "short", "int32": "int", "int64": "long long", "uint8": "unsigned char", "bool": "bool",
}  # fmt: skip

# In kernels that are not made by CuPy's ElementwiseKernel, and the headers that these need.
RAW_TYPES = {**C_TYPES, "float16": "__half", "bfloat16": "__nv_bfloat16"}
_HEADERS = {"float16": "#include <cuda_fp16.h>\n", "bfloat16": "#include <cuda_bf16.h>\n"}

# What CUDA C has no operator for. Integers and floats differ in division, remainder, rounding; maxima let NaN through.
PREAMBLE = r"""
template <typename T> __device__ inline bool gpuad_isnan(T x) { return x != x; }
template <typename T> __device__ inline bool gpuad_isfinite(T x) { return x - x == T(0); }
template <typename T> __device__ inline bool gpuad_isinf(T x) { return x == x && !gpuad_isfinite(x); }
template <typename T> __device__ inline T gpuad_maximum(T a, T b) { return (a > b || a != a) ? a : b; }
template <typename T> __device__ inline T gpuad_minimum(T a, T b) { return (a < b || a != a) ? a : b; }
__device__ inline float gpuad_fmod(float a, float b) { return fmodf(a, b); }
__device__ inline double gpuad_fmod(double a, double b) { return fmod(a, b); }
template <typename T> __device__ inline T gpuad_fmod(T a, T b) { return b == T(0) ? T(0) : a % b; }
template <typename T> __device__ inline T gpuad_floor(T x) { return x; }
__device__ inline float gpuad_floor(float x) { return floorf(x); }
__device__ inline double gpuad_floor(double x) { return floor(x); }
template <typename T> __device__ inline T gpuad_ceil(T x) { return x; }
__device__ inline float gpuad_ceil(float x) { return ceilf(x); }
__device__ inline double gpuad_ceil(double x) { return ceil(x); }
template <typename T> __device__ inline T gpuad_rint(T x) { return x; }
__device__ inline float gpuad_rint(float x) { return rintf(x); }
__device__ inline double gpuad_rint(double x) { return rint(x); }
template <typename T> __device__ inline T gpuad_trunc(T x) { return x; }
__device__ inline float gpuad_trunc(float x) { return truncf(x); }
__device__ inline double gpuad_trunc(double x) { return trunc(x); }
template <typename T> __device__ inline T gpuad_remainder(T a, T b) {
  T r = gpuad_fmod(a, b);
  return (r != T(0) && ((r < T(0)) != (b < T(0)))) ? r + b : r;
}
__device__ inline float gpuad_floor_divide(float a, float b) {
  if (b == 0.0f) return a / b;
  float m = fmodf(a, b), d = (a - m) / b;
  if (m != 0.0f && (b < 0.0f) != (m < 0.0f)) d -= 1.0f;
  float f = floorf(d);
  return d - f > 0.5f ? f + 1.0f : f;
}
__device__ inline double gpuad_floor_divide(double a, double b) {
  if (b == 0.0) return a / b;
  double m = fmod(a, b), d = (a - m) / b;
  if (m != 0.0 && (b < 0.0) != (m < 0.0)) d -= 1.0;
  double f = floor(d);
  return d - f > 0.5 ? f + 1.0 : f;
}
template <typename T> __device__ inline T gpuad_floor_divide(T a, T b) {
  if (b == T(0)) return T(0);
  T q = a / b;
  return (a % b != T(0) && ((a < T(0)) != (b < T(0)))) ? q - T(1) : q;
}
__device__ inline float gpuad_pow(float a, float b) { return powf(a, b); }
__device__ inline double gpuad_pow(double a, double b) { return pow(a, b); }
template <typename T> __device__ inline T gpuad_pow(T a, T b) {
  if (b < T(0)) return a == T(1) ? T(1) : a == T(-1) ? (b % T(2) ? T(-1) : T(1)) : T(0);
  T r = 1;
  for (; b > T(0); b /= T(2)) { if (b % T(2)) r *= a; a *= a; }
  return r;
}
"""


def dtype_codes(arguments: Sequence[Any], array_type: Any) -> tuple[str | None, ...]:
    """What a kernel is looked up by: the dtype of each array, None for numbers. Names take a microsecond to make."""
    return tuple([a.dtype.char if isinstance(a, array_type) else None for a in arguments])


def dtype_names(codes: Sequence[str | None]) -> tuple[str | None, ...]:
    """The names of the dtypes in what dtype_codes made."""
    return tuple([None if c is None else "bfloat16" if c == dtypes.BFLOAT16 else np.dtype(c).name for c in codes])


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the arithmetic inside a kernel: float32 for those of 16 bits, else the dtype itself."""
    return dtypes.float32 if dtype.char in dtypes.HALF else dtype


def headers(names: Iterable[str | None]) -> str:
    """What a kernel that is not CuPy's must include for the dtypes of these names."""
    return "".join(_HEADERS[name] for name in sorted({name for name in names if name in _HEADERS}))


def literal(value: bool | int | float, c_type: str) -> str:
    """A Python number as a C expression of `c_type`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if math.isnan(value):
        return f"({c_type})(0.0 / 0.0)"
    if math.isinf(value):
        return f"({c_type})({'-' if value < 0 else ''}1.0 / 0.0)"
    if c_type in ("float", "double"):
        return f"({c_type})({float(value)!r})"
    return f"({c_type})({value!r})"


def write_statements(outputs: Sequence[Expr], names: dict[Expr, str], c_type: str) -> list[str]:
    """One C statement for each node that is not in `names` yet; `names` gets the name of each."""
    lines = []
    for node in topological(outputs):
        if node in names:
            continue
        if isinstance(node, Constant):
            names[node] = literal(node.value, c_type)
            continue
        kind = "bool" if node.function.result == "bool" else c_type
        expression = node.function.cuda.format(*(names[a] for a in node.args), T=c_type)
        names[node] = f"v{len(names)}"
        lines.append(f"const {kind} {names[node]} = {expression};")
    return lines
