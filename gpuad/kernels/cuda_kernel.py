"""A formula as a CUDA kernel: the source text, and its launch through CuPy.

The elementwise kernel is handed to cupy.ElementwiseKernel, which adds broadcasting, strides and the index loop; a
formula with a sum behind it to cupy.ReductionKernel. Python numbers are kernel arguments, so a new value never compiles
a new kernel. float16 is read and written as such and computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.kernels.expr import Constant, Expr, topological

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

C_TYPES = {
    "float16": "float16", "float32": "float", "float64": "double", "int8": "signed char", "int16": "short",
    "int32": "int", "int64": "long long", "uint8": "unsigned char", "bool": "bool",
}  # fmt: skip

# What CUDA C has no operator for. Integers and floats differ in division and remainder; maxima let NaN through.
PREAMBLE = r"""
template <typename T> __device__ inline bool gpuad_isnan(T x) { return x != x; }
template <typename T> __device__ inline bool gpuad_isfinite(T x) { return x - x == T(0); }
template <typename T> __device__ inline bool gpuad_isinf(T x) { return x == x && !gpuad_isfinite(x); }
template <typename T> __device__ inline T gpuad_maximum(T a, T b) { return (a > b || a != a) ? a : b; }
template <typename T> __device__ inline T gpuad_minimum(T a, T b) { return (a < b || a != a) ? a : b; }
__device__ inline float gpuad_fmod(float a, float b) { return fmodf(a, b); }
__device__ inline double gpuad_fmod(double a, double b) { return fmod(a, b); }
template <typename T> __device__ inline T gpuad_fmod(T a, T b) { return b == T(0) ? T(0) : a % b; }
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
    return tuple([None if c is None else np.dtype(c).name for c in codes])


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the arithmetic inside a kernel: float32 for float16, else the dtype itself."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


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


class CudaKernel:
    """The CUDA side of a formula: call it with CuPy arrays and Python numbers in the order of the inputs."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._kernels: dict[tuple, Any] = {}

    def _parameters(self, key: tuple, dtype: np.dtype) -> tuple[list[str], list[str], dict[Expr, str]]:
        """Parameter declarations, the statements that convert them to the compute type, the names of the variables."""
        c_type = C_TYPES[compute_dtype(dtype).name]
        declarations, lines = [], []
        names: dict[Expr, str] = {}
        for i, (variable, given) in enumerate(zip(self.formula.inputs, key, strict=True)):
            wanted = c_type if variable.kind == "number" else "bool" if variable.kind == "mask" else "long long"
            declarations.append(f"{(given or _NAMES[wanted])} x{i}")
            names[variable] = f"u{i}"
            lines.append(f"const {wanted} u{i} = ({wanted})x{i};")
        return declarations, lines, names

    def source(self, dtype: np.dtype | None = None, arrays: Sequence[Any] | None = None) -> str:
        """The CUDA C body of the elementwise kernel for arrays of `dtype` (float32 unless given)."""
        dtype = np.dtype(np.float32) if dtype is None else dtype
        key = tuple(
            a.dtype.name if hasattr(a, "dtype") else None
            for a in (arrays if arrays is not None else [np.empty(0, dtype)] * len(self.formula.inputs))
        )
        return self._elementwise_source(key, dtype)[2]

    def _elementwise_source(self, key: tuple, dtype: np.dtype) -> tuple[str, str, str]:
        formula = self.formula
        c_type = C_TYPES[compute_dtype(dtype).name]
        declarations, lines, names = self._parameters(key, dtype)
        lines += write_statements(formula.outputs, names, c_type)
        out = []
        for i, output in enumerate(formula.outputs):
            out.append(f"{formula.out_dtype(i, dtype).name} o{i}")
            lines.append(f"o{i} = {names[output]};")
        return ", ".join(declarations), ", ".join(out), "\n".join(lines)

    def __call__(self, arguments: Sequence[Any], dtype: np.dtype, outs: Sequence[Any] | None = None) -> Any:
        """The outputs, a list; numbers computed in `dtype`. `outs` are arrays to write into; they may be inputs."""
        import cupy

        key = dtype_codes(arguments, cupy.ndarray)
        kernel = self._kernels.get((key, dtype))
        if kernel is None:
            ins, out, body = self._elementwise_source(dtype_names(key), dtype)
            name = "gpuad_" + self.formula.name
            kernel = cupy.ElementwiseKernel(ins, out, body, name, preamble=PREAMBLE)
            self._kernels[key, dtype] = kernel
        if outs is None:
            for a in arguments:
                if isinstance(a, cupy.ndarray) and not a._c_contiguous:
                    return _keeping_order(cupy, kernel, arguments, len(self.formula.outputs))
        result = kernel(*arguments) if outs is None else kernel(*arguments, *outs)
        return [result] if len(self.formula.outputs) == 1 else list(result)

    def reduce(
        self,
        arguments: Sequence[Any],
        dtype: np.dtype,
        axes: tuple[int, ...],
        keepdims: bool,
        scale: float = 1.0,
        out: Any = None,
    ) -> Any:
        """scale · the sum over `axes` of the (one) output, in `out` where it is given: one launch."""
        import cupy

        key = dtype_codes(arguments, cupy.ndarray)
        kernel = self._kernels.get(("sum", key, dtype))
        if kernel is None:
            kernel = self._kernels["sum", key, dtype] = self._reduction(cupy, dtype_names(key), dtype)
        return kernel(*arguments, scale, axis=axes, keepdims=keepdims, out=out)

    def _reduction(self, cupy: Any, key: tuple, dtype: np.dtype) -> Any:
        formula = self.formula
        c_type = C_TYPES[compute_dtype(dtype).name]
        declarations, lines, names = self._parameters(key, dtype)
        lines += write_statements(formula.outputs, names, c_type)
        typed = ", ".join(f"{C_TYPES[d.split()[0]]} {d.split()[1]}" for d in declarations)
        function = f"__device__ inline {c_type} gpuad_map({typed}) {{\n" + "\n".join(lines)
        function += f"\nreturn ({c_type}){names[formula.outputs[0]]};\n}}\n"
        scale_type = c_type if c_type in ("float", "double") else "long long"
        return cupy.ReductionKernel(
            ", ".join([*declarations, f"{_NAMES[scale_type]} scale"]),
            f"{formula.out_dtype(0, dtype).name} o0",
            f"gpuad_map({', '.join(f'x{i}' for i in range(len(formula.inputs)))})",
            "a + b",
            "o0 = a * scale",
            "0",
            f"gpuad_{formula.name}_sum",
            reduce_type=c_type if c_type != "bool" else "long long",
            preamble=PREAMBLE + function,
        )


def _keeping_order(cupy: Any, kernel: Any, arguments: Sequence[Any], outputs: int) -> list[Any]:
    """The results in the order of memory of their operands, as NumPy's ufuncs have it; CuPy's are always in C order."""
    arrays = [a for a in arguments if isinstance(a, cupy.ndarray)]
    ndim = max(a.ndim for a in arrays)
    full = [a for a in arrays if a.ndim == ndim]
    axes = list(range(ndim))
    # Stable: dimensions that no operand tells apart stay as they are.
    for a in reversed(full):
        lengths = [s if n > 1 else -1 for s, n in zip(a.strides, a.shape, strict=True)]
        axes = _by_stride(axes, lengths)
    back = sorted(range(ndim), key=axes.__getitem__)
    turned = [
        a.reshape((1,) * (ndim - a.ndim) + a.shape).transpose(axes) if isinstance(a, cupy.ndarray) and a.ndim else a
        for a in arguments
    ]
    result = kernel(*turned)
    return [r.transpose(back) for r in ([result] if outputs == 1 else result)]


def _by_stride(axes: list[int], strides: Sequence[int]) -> list[int]:
    """The axes by falling stride; those of stride −1 keep their places among the others."""
    ordered = sorted((i for i in axes if strides[i] > 0), key=lambda i: -strides[i])
    return [ordered.pop(0) if strides[i] > 0 else i for i in axes]


# CuPy's names of the compute types, as it writes them in parameter declarations.
_NAMES = {"float": "float32", "double": "float64", "signed char": "int8", "short": "int16", "int": "int32",
          "long long": "int64", "unsigned char": "uint8", "bool": "bool"}  # fmt: skip
