"""A formula as a CUDA kernel: the source text, and its launch through CuPy.

The elementwise kernel is handed to cupy.ElementwiseKernel, which adds broadcasting, strides and the index loop; a
formula with a sum behind it is in sum_cuda.py. Python numbers are kernel arguments, so a new value never compiles
a new kernel. float16 is read and written as such and computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.array.order import Order, memory_order
from gpuad.kernels.cuda_source import C_TYPES, PREAMBLE, compute_dtype, dtype_codes, dtype_names, write_statements
from gpuad.kernels.expr import Expr
from gpuad.kernels.sum_cuda import SumKernel

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula


class CudaKernel:
    """The CUDA side of a formula: call it with CuPy arrays and Python numbers in the order of the inputs."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._kernels: dict[tuple, Any] = {}
        self._sum: SumKernel | None = None

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
        order: Order | None = None
        if outs is not None:
            arguments = (*arguments, *outs)
        elif any([isinstance(a, cupy.ndarray) and not a._c_contiguous for a in arguments]):
            order = memory_order([a for a in arguments if isinstance(a, cupy.ndarray)])
            if order.is_c:
                order = None
            else:  # CuPy's results are always in C order
                arguments = [order.turn(a) if isinstance(a, cupy.ndarray) else a for a in arguments]
        result = kernel(*arguments)
        results = [result] if len(self.formula.outputs) == 1 else list(result)
        return results if order is None else order.turn_back(results)

    def reduce(
        self,
        arguments: Sequence[Any],
        dtype: np.dtype,
        axes: tuple[int, ...],
        keepdims: bool,
        scale: float = 1.0,
        out: Any = None,
        elements: Any = None,
    ) -> Any:
        """scale · the sum over `axes` of the output (a list for several; `out`: of one), one launch; see SumKernel."""
        if self._sum is None:
            self._sum = SumKernel(self.formula)
        return self._sum(arguments, dtype, axes, keepdims, scale, out, elements)


# CuPy's names of the compute types, as it writes them in parameter declarations.
_NAMES = {"float": "float32", "double": "float64", "signed char": "int8", "short": "int16", "int": "int32",
          "long long": "int64", "unsigned char": "uint8", "bool": "bool"}  # fmt: skip
