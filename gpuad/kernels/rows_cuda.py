"""A row formula as one CUDA kernel: a block of threads a row.

The row functions are put in stages: those of one stage need only the results of earlier stages, so one pass over the
row feeds them all, and a last pass writes the elements. Elements are read again in each pass (from cache) rather than
kept. Strides are arguments, so broadcast and transposed operands are read where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.array.device import of_array
from gpuad.kernels import derive
from gpuad.kernels.cuda_kernel import C_TYPES, PREAMBLE, compute_dtype, dtype_codes, dtype_names, literal
from gpuad.kernels.expr import Constant, Expr, Variable, topological
from gpuad.kernels.scalar import column, row_at, row_length, row_logsumexp, row_max, row_sum, where

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Reductions by all threads of a block, through shared memory; every thread gets the result. A running maximum and sum
# make logsumexp one pass (Milakov & Gimelshein, arXiv:1805.02867); an infinite maximum is its own result.
_REDUCTIONS = r"""
template <typename T> __device__ inline T gpuad_block_sum(T x, T* shared) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (unsigned n = blockDim.x >> 1; n > 0; n >>= 1) {
    if (threadIdx.x < n) shared[threadIdx.x] += shared[threadIdx.x + n];
    __syncthreads();
  }
  return shared[0];
}
template <typename T> __device__ inline T gpuad_block_max(T x, T* shared) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (unsigned n = blockDim.x >> 1; n > 0; n >>= 1) {
    if (threadIdx.x < n) shared[threadIdx.x] = gpuad_maximum(shared[threadIdx.x], shared[threadIdx.x + n]);
    __syncthreads();
  }
  return shared[0];
}
template <typename T> __device__ inline void gpuad_online(T x, T& highest, T& total) {
  if (x != x) { highest = x; total = x; }
  else if (x > highest) { total = total * exp(highest - x) + T(1); highest = x; }
  else if (x - x == T(0)) total += exp(x - highest);
  else if (x > T(0)) total += T(1);
}
template <typename T> __device__ inline T gpuad_block_logsumexp(T highest, T total, T* shared) {
  T top = gpuad_block_max(highest, shared);
  if (!(top - top == T(0))) return top;
  T sum = gpuad_block_sum(total == T(0) ? T(0) : total * exp(highest - top), shared);
  return top + log(sum);
}
"""


def _fault_source() -> str:
    from gpuad.array.cupy_backend import FAULT_SOURCE

    return FAULT_SOURCE


class RowKernel:
    """The CUDA side of a row formula: one launch."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._kernels: dict[tuple, Any] = {}
        self.known: dict[Expr, str] = {}
        for output in formula.outputs:
            derive.level(output, self.known)
        self.checks = any(node.function is row_at for node in topological(formula.outputs))

    def _level(self, node: Expr) -> str:
        return derive.level(node, self.known)

    def _stages(self) -> list[list[Expr]]:
        """The row functions in order, those of one stage feeding on one pass."""
        depth: dict[Expr, int] = {}
        stages: list[list[Expr]] = []
        for node in topological(self.formula.outputs):
            below = max((depth[a] for a in node.args), default=0)
            depth[node] = below
            if node.function.across == "row":
                depth[node] = below + 1
                while len(stages) <= below:
                    stages.append([])
                stages[below].append(node)
        return stages

    def source(self, dtype: np.dtype | None = None, key: tuple | None = None) -> str:
        """The CUDA C source for numbers computed in `dtype`; key: the dtype name of each array, None for numbers."""
        dtype = np.dtype(np.float32) if dtype is None else dtype
        formula = self.formula
        if key is None:
            of_kind = {"number": dtype.name, "label": "int64", "mask": "bool"}
            key = tuple(of_kind[v.kind] for v in formula.inputs)
        T = C_TYPES[compute_dtype(dtype).name]
        c_types = {**C_TYPES, "float16": "__half"}
        parameters, loads_scalar, loads_row = [], [], []
        names: dict[Expr, str] = {}
        loads_element: dict[Variable, str] = {}
        for i, (variable, given) in enumerate(zip(formula.inputs, key, strict=True)):
            kind = {"number": T, "mask": "bool", "label": "long long"}[variable.kind]
            names[variable] = f"u{i}"
            if given is None:
                parameters.append(f"const {kind} u{i}")
                self.known[variable] = "scalar"
                continue
            parameters.append(f"const {c_types[given]}* p{i}")
            if variable.level == "scalar":
                loads_scalar.append(f"const {kind} u{i} = ({kind})p{i}[0];")
            elif variable.level == "row":
                parameters.append(f"const long long r{i}")
                loads_row.append(f"const {kind} u{i} = ({kind})p{i}[row * r{i}];")
            else:
                parameters += [f"const long long r{i}", f"const long long s{i}"]
                loads_element[variable] = f"const {kind} u{i} = ({kind})p{i}[row * r{i} + c * s{i}];"
        for i in range(len(formula.outputs)):
            parameters.append(f"{c_types[formula.out_dtype(i, dtype).name]}* o{i}")
        body = self._body(T, names, loads_element, dtype, c_types)
        fault = ["const unsigned long long u_fault", "const int u_code"] if self.checks else []
        pieces = [
            "#include <cuda_fp16.h>\n" if "float16" in (*key, dtype.name) else "",
            PREAMBLE,
            _fault_source() if self.checks else "",
            _REDUCTIONS,
            f'extern "C" __global__ void gpuad_{formula.name}(',
            ", ".join([*parameters, *fault, "const long long rows", "const long long C"]),
            ") {\n",
            f"extern __shared__ double gpuad_shared[];\n{T}* shared = ({T}*)gpuad_shared;\n",
            "\n".join(loads_scalar),
            "\nfor (long long row = blockIdx.x; row < rows; row += gridDim.x) {\n",
            "\n".join([*loads_row, *body]),
            "\n}\n}\n",
        ]
        return "".join(pieces)

    def _body(
        self, T: str, names: dict[Expr, str], loads: dict[Variable, str], dtype: np.dtype, c_types: dict
    ) -> list[str]:
        lines: list[str] = []
        for n, stage in enumerate(self._stages()):
            sweeping = [node for node in stage if node.function is not row_at]
            self._write_rows([a for node in stage for a in node.args], names, lines, T)
            for node in stage:
                if node.function is row_at:
                    self._write_at(node, names, loads, lines, T)
            if not sweeping:
                continue
            for k, node in enumerate(sweeping):
                start = "0" if node.function is row_sum else "-1.0 / 0.0"
                lines.append(f"{T} a{n}_{k} = ({T})({start});")
                if node.function is row_logsumexp:
                    lines.append(f"{T} b{n}_{k} = ({T})0;")
            lines.append("for (long long c = threadIdx.x; c < C; c += blockDim.x) {")
            inside = dict(names)
            self._write_elements([node.args[0] for node in sweeping], inside, loads, lines, T)
            for k, node in enumerate(sweeping):
                value = inside[node.args[0]]
                if node.function is row_sum:
                    lines.append(f"a{n}_{k} += {value};")
                elif node.function is row_max:
                    lines.append(f"a{n}_{k} = gpuad_maximum(a{n}_{k}, {value});")
                else:
                    lines.append(f"gpuad_online({value}, a{n}_{k}, b{n}_{k});")
            lines.append("}")
            for k, node in enumerate(sweeping):
                names[node] = f"w{n}_{k}"
                call = {row_sum: "sum", row_max: "max", row_logsumexp: "logsumexp"}[node.function]
                partial = f"a{n}_{k}, b{n}_{k}" if node.function is row_logsumexp else f"a{n}_{k}"
                lines.append(f"const {T} w{n}_{k} = gpuad_block_{call}({partial}, shared);")
        self._write_outputs(T, names, loads, dtype, c_types, lines)
        return lines

    def _write_outputs(
        self, T: str, names: dict[Expr, str], loads: dict, dtype: np.dtype, c_types: dict, lines: list[str]
    ) -> None:
        formula = self.formula
        types = [c_types[formula.out_dtype(i, dtype).name] for i in range(len(formula.outputs))]
        self._write_rows(list(formula.outputs), names, lines, T)
        by_row = [i for i, level in enumerate(formula.levels) if level != "element"]
        for i in by_row:
            lines.append(f"if (threadIdx.x == 0) o{i}[row] = ({types[i]})({self._text(formula.outputs[i], names, T)});")
        elements = [i for i, level in enumerate(formula.levels) if level == "element"]
        if elements:
            lines.append("for (long long c = threadIdx.x; c < C; c += blockDim.x) {")
            inside = dict(names)
            self._write_elements([formula.outputs[i] for i in elements], inside, loads, lines, T)
            for i in elements:
                lines.append(f"o{i}[row * C + c] = ({types[i]})({self._text(formula.outputs[i], inside, T)});")
            lines.append("}")

    def _text(self, node: Expr, names: dict[Expr, str], T: str) -> str:
        return literal(node.value, T) if isinstance(node, Constant) else names[node]

    def _statement(self, node: Expr, names: dict[Expr, str], lines: list[str], T: str) -> None:
        arguments = [self._text(a, names, T) for a in node.args]
        if _is_label(node):
            kind, arguments = "long long", [self._text(a, names, "long long") for a in node.args]
        else:
            kind = "bool" if node.function.result == "bool" else T
        names[node] = f"v{len(lines)}_{len(names)}"
        lines.append(f"const {kind} {names[node]} = {node.function.cuda.format(*arguments, T=T)};")

    def _write_rows(self, roots: Sequence[Expr], names: dict[Expr, str], lines: list[str], T: str) -> None:
        """Statements for the nodes below the roots that have one value a row (or in all)."""
        for node in topological(roots):
            if node in names or isinstance(node, (Constant, Variable)) or self._level(node) == "element":
                continue
            if node.function is row_length:
                names[node] = f"(({T})C)"
            elif node.function.across != "row" and all(isinstance(a, Constant) or a in names for a in node.args):
                self._statement(node, names, lines, T)

    def _write_elements(
        self, roots: Sequence[Expr], names: dict[Expr, str], loads: dict[Variable, str], lines: list[str], T: str
    ) -> None:
        """Statements for the elements at column c; `names` has what is known for the whole row."""
        for node in _needed(roots, names, loads):
            if isinstance(node, Variable):
                lines.append(loads[node])
            elif node.function is column:
                names[node] = "c"
            elif not isinstance(node, Constant):
                self._statement(node, names, lines, T)

    def _write_at(
        self, node: Expr, names: dict[Expr, str], loads: dict[Variable, str], lines: list[str], T: str
    ) -> None:
        """row_at: one element, computed by every thread; a place outside the row gives NaN."""
        source, place = node.args
        result = f"at{len(lines)}"
        lines += [f"{T} {result} = ({T})(0.0 / 0.0);", f"if ({names[place]} >= 0 && {names[place]} < C) {{"]
        lines.append(f"const long long c = {names[place]};")
        inside = dict(names)
        self._write_elements([source], inside, loads, lines, T)
        code = f"(u_fault, u_code, {names[place]}, row, 0, C)"
        lines += [f"{result} = {inside[source]};", f"}} else if (threadIdx.x == 0) gpuad_fault{code};"]
        names[node] = result

    def __call__(self, arguments: Sequence[Any], dtype: np.dtype, outs: Sequence[Any] | None = None) -> list[Any]:
        """The outputs, a list of arrays."""
        import cupy

        formula = self.formula
        key = dtype_codes(arguments, cupy.ndarray)
        shape = next(a.shape for a, v in zip(arguments, formula.inputs, strict=True) if v.level == "element")
        rows, columns = shape
        made = [
            cupy.empty({"element": shape, "row": shape[:1], "scalar": ()}[level], formula.out_dtype(i, dtype))
            for i, level in enumerate(formula.levels)
        ]
        if not rows or not columns:
            for out in made:
                out.fill(0)
            return made
        kernel = self._kernels.get((key, dtype))
        if kernel is None:
            name = f"gpuad_{formula.name}"
            kernel = self._kernels[key, dtype] = cupy.RawKernel(self.source(dtype, dtype_names(key)), name)
        scalar = compute_dtype(dtype).type
        call: list[Any] = []
        for argument, variable in zip(arguments, formula.inputs, strict=True):
            if not isinstance(argument, cupy.ndarray):
                call.append(np.int64(argument) if variable.kind == "label" else scalar(argument))
                continue
            call.append(argument)
            size = argument.dtype.itemsize
            if variable.level == "row":
                call.append(np.int64(argument.strides[0] // size if argument.ndim else 0))
            elif variable.level == "element":
                call += [np.int64(s // size) for s in argument.strides]
        # Threads: enough for the row, a power of two, at most 256; blocks: one a row.
        threads = 32
        while threads < 256 and threads < columns:
            threads *= 2
        if self.checks:
            backend: Any = of_array(made[0]).backend
            address, code = backend.fault("class index")
            made_arguments = [*made, np.uint64(address), np.int32(code)]
        else:
            made_arguments = made
        kernel((min(rows, 1 << 20),), (threads,), (*call, *made_arguments, np.int64(rows), np.int64(columns)),
               shared_mem=threads * compute_dtype(dtype).itemsize)  # fmt: skip
        return made


_WEIGHTED_MEAN = r"""
extern "C" __global__ void gpuad_weighted_mean(const {s}* terms, const {s}* weights, {s}* out, const long long n) {{
  __shared__ {T} a[256], b[256];
  {T} x = 0, w = 0;
  for (long long i = threadIdx.x; i < n; i += 256) {{ x += ({T})terms[i]; w += ({T})weights[i]; }}
  a[threadIdx.x] = x; b[threadIdx.x] = w;
  __syncthreads();
  for (unsigned k = 128; k > 0; k >>= 1) {{
    if (threadIdx.x < k) {{ a[threadIdx.x] += a[threadIdx.x + k]; b[threadIdx.x] += b[threadIdx.x + k]; }}
    __syncthreads();
  }}
  if (threadIdx.x == 0) {{ out[0] = ({s})(a[0] / b[0]); out[1] = ({s})b[0]; }}
}}
"""
_weighted_mean: dict[str, Any] = {}


def weighted_mean(terms: Any, weights: Any) -> Any:
    """(Σ terms / Σ weights, Σ weights) of two contiguous vectors: one launch of one block."""
    import cupy

    name = terms.dtype.name
    kernel = _weighted_mean.get(name)
    if kernel is None:
        stored = {**C_TYPES, "float16": "__half"}[name]
        source = "#include <cuda_fp16.h>\n" + _WEIGHTED_MEAN.format(
            s=stored, T=C_TYPES[compute_dtype(terms.dtype).name]
        )
        kernel = _weighted_mean[name] = cupy.RawKernel(source, "gpuad_weighted_mean")
    out = cupy.empty(2, terms.dtype)
    kernel((1,), (256,), (terms, weights, out, np.int64(terms.size)))
    return out


def _is_label(node: Expr) -> bool:
    """Whether a node is an index: a label, or a choice between labels and whole numbers."""
    if isinstance(node, Variable):
        return node.kind == "label"
    if node.function is where:
        branches = node.args[1:]
        return any(_is_label(b) for b in branches) and all(isinstance(b, Constant) or _is_label(b) for b in branches)
    return False


def _needed(roots: Sequence[Expr], names: dict[Expr, str], loads: dict[Variable, str]) -> list[Expr]:
    """The nodes to compute for the roots, arguments first, stopping at what has a name already."""
    order: list[Expr] = []
    seen: set[Expr] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen and (node in loads or node not in names):
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))
    return order
