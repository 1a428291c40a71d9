"""A row formula as one CUDA kernel: a warp a row, or a block of threads for long rows.

The row functions are put in stages: those of one stage need only the results of earlier stages, so one pass over the
row feeds them all, and a last pass writes the elements. Elements are read again in each pass (from cache) rather than
kept. Strides are arguments, so broadcast and transposed operands are read where they lie, and results lie as they do.
A sum over the rows (a loss) is part of the same launch, see last_block.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.array.device import of_array
from gpuad.array.order import memory_order
from gpuad.kernels import cuda_source, derive, last_block
from gpuad.kernels.cuda_source import C_TYPES, PREAMBLE, compute_dtype, dtype_codes, dtype_names, literal
from gpuad.kernels.expr import Constant, Expr, Variable, topological
from gpuad.kernels.scalar import column, row_at, row_length, row_logsumexp, row_max, row_sum, where

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Rows of up to so many elements have a warp each, ROWS of them in a block: no barriers, and no idle threads.
WARP_COLUMNS = 1024
ROWS = 8

# What a kernel is told of the matrices: their lengths (C: the columns), and the strides of those that it makes.
_SIZES = ("rows", "C", "out_row", "out_column")

# The levels of what differs along a row.
_ACROSS = ("element", "column")

# Reductions by all threads of a row; every thread gets the result. A running maximum and sum make logsumexp one pass
# (Milakov & Gimelshein, arXiv:1805.02867); an infinite maximum is its own result.
_WARP = r"""
template <typename T> __device__ inline T gpuad_row_sum(T x, T* shared) {
  for (int n = 16; n > 0; n >>= 1) x += __shfl_xor_sync(0xffffffffu, x, n);
  return x;
}
template <typename T> __device__ inline T gpuad_row_max(T x, T* shared) {
  for (int n = 16; n > 0; n >>= 1) x = gpuad_maximum(x, __shfl_xor_sync(0xffffffffu, x, n));
  return x;
}
"""
_BLOCK = r"""
template <typename T> __device__ inline T gpuad_row_sum(T x, T* shared) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (unsigned n = blockDim.x >> 1; n > 0; n >>= 1) {
    if (threadIdx.x < n) shared[threadIdx.x] += shared[threadIdx.x + n];
    __syncthreads();
  }
  return shared[0];
}
template <typename T> __device__ inline T gpuad_row_max(T x, T* shared) {
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (unsigned n = blockDim.x >> 1; n > 0; n >>= 1) {
    if (threadIdx.x < n) shared[threadIdx.x] = gpuad_maximum(shared[threadIdx.x], shared[threadIdx.x + n]);
    __syncthreads();
  }
  return shared[0];
}
"""
_LOGSUMEXP = r"""
template <typename T> __device__ inline void gpuad_online(T x, T& highest, T& total) {
  if (x != x) { highest = x; total = x; }
  else if (x > highest) { total = total * exp(highest - x) + T(1); highest = x; }
  else if (x - x == T(0)) total += exp(x - highest);
  else if (x > T(0)) total += T(1);
}
template <typename T> __device__ inline T gpuad_row_logsumexp(T highest, T total, T* shared) {
  T top = gpuad_row_max(highest, shared);
  if (!(top - top == T(0))) return top;
  T sum = gpuad_row_sum(total == T(0) ? T(0) : total * exp(highest - top), shared);
  return top + log(sum);
}
"""

# After the rows: their terms and weights summed over the block, then, by the last block, over all.
_TOTALS = r"""
__shared__ {T} totals[2][{rows}];
if (threadIdx.x == 0) {{ totals[0][threadIdx.y] = term_sum; totals[1][threadIdx.y] = weight_sum; }}
__syncthreads();
if (threadIdx.x == 0 && threadIdx.y == 0) {{
  for (unsigned i = 1; i < blockDim.y; ++i) {{ term_sum += totals[0][i]; weight_sum += totals[1][i]; }}
  partials[2 * blockIdx.x] = term_sum; partials[2 * blockIdx.x + 1] = weight_sum;
}}
if (!gpuad_is_last_block(counters, gridDim.x) || threadIdx.y > 0 || threadIdx.x >= 32) return;
term_sum = 0; weight_sum = 0;
for (unsigned i = threadIdx.x; i < gridDim.x; i += 32) {{
  term_sum += partials[2 * i]; weight_sum += partials[2 * i + 1];
}}
for (int n = 16; n > 0; n >>= 1) {{
  term_sum += __shfl_xor_sync(0xffffffffu, term_sum, n); weight_sum += __shfl_xor_sync(0xffffffffu, weight_sum, n);
}}
if (threadIdx.x == 0) {{
  total[0] = ({stored})(mean ? term_sum / weight_sum : term_sum * scale); total[1] = ({stored})weight_sum;
}}
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

    def source(
        self, dtype: np.dtype | None = None, key: tuple | None = None, warp: bool = True, summed: int = 0
    ) -> str:
        """The CUDA C source for numbers computed in `dtype`; key: the dtype name of each array, None for numbers.

        warp: a warp a row instead of a block. summed: how many of the first outputs (terms, and their weights) are only
        summed over the rows.
        """
        dtype = np.dtype(np.float32) if dtype is None else dtype
        formula = self.formula
        if key is None:
            of_kind = {"number": dtype.name, "label": "int64", "mask": "bool"}
            key = tuple(of_kind[v.kind] for v in formula.inputs)
        T = C_TYPES[compute_dtype(dtype).name]
        c_types = cuda_source.RAW_TYPES
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
            elif variable.level == "column":
                parameters.append(f"const long long s{i}")
                loads_element[variable] = f"const {kind} u{i} = ({kind})p{i}[c * s{i}];"
            else:
                parameters += [f"const long long r{i}", f"const long long s{i}"]
                loads_element[variable] = f"const {kind} u{i} = ({kind})p{i}[row * r{i} + c * s{i}];"
        stored = c_types[formula.out_dtype(0, dtype).name]
        for i in range(summed, len(formula.outputs)):
            parameters.append(f"{c_types[formula.out_dtype(i, dtype).name]}* o{i}")
        body = self._body(T, names, loads_element, dtype, c_types, summed)
        before, after = "", ""
        if summed:
            parameters += [f"{stored}* total", f"{T}* partials", "unsigned int* counters", f"const {T} scale"]
            parameters.append("const bool mean")
            before = f"{T} term_sum = 0, weight_sum = 0;\n"
            after = _TOTALS.format(T=T, rows=ROWS, stored=stored)
        fault = ["const unsigned long long u_fault", "const int u_code"] if self.checks else []
        pieces = [
            cuda_source.headers((*key, dtype.name)),
            PREAMBLE,
            _fault_source() if self.checks else "",
            _WARP if warp else _BLOCK,
            _LOGSUMEXP,
            last_block.SOURCE if summed else "",
            f'extern "C" __global__ void gpuad_{formula.name}(',
            ", ".join([*parameters, *fault, *[f"const long long {name}" for name in _SIZES]]),
            ") {\n",
            f"extern __shared__ double gpuad_shared[];\n{T}* shared = ({T}*)gpuad_shared;\n",
            "\n".join(loads_scalar),
            "\n",
            before,
            "for (long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y; row < rows;\n",
            "     row += (long long)gridDim.x * blockDim.y) {\n",
            "\n".join([*loads_row, *body]),
            "\n}\n",
            after,
            "}\n",
        ]
        return "".join(pieces)

    def _body(
        self, T: str, names: dict[Expr, str], loads: dict[Variable, str], dtype: np.dtype, c_types: dict, summed: int
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
                lines.append(f"const {T} w{n}_{k} = gpuad_row_{call}({partial}, shared);")
        self._write_outputs(T, names, loads, dtype, c_types, summed, lines)
        return lines

    def _write_outputs(
        self, T: str, names: dict[Expr, str], loads: dict, dtype: np.dtype, c_types: dict, summed: int, lines: list[str]
    ) -> None:
        formula = self.formula
        types = [c_types[formula.out_dtype(i, dtype).name] for i in range(len(formula.outputs))]
        self._write_rows(list(formula.outputs), names, lines, T)
        for name, output in zip(("term_sum", "weight_sum"), formula.outputs[:summed], strict=False):
            lines.append(f"if (threadIdx.x == 0) {name} += {self._text(output, names, T)};")
        by_row = [i for i, level in enumerate(formula.levels) if level != "element" and i >= summed]
        for i in by_row:
            lines.append(f"if (threadIdx.x == 0) o{i}[row] = ({types[i]})({self._text(formula.outputs[i], names, T)});")
        elements = [i for i, level in enumerate(formula.levels) if level == "element"]
        if elements:
            lines.append("for (long long c = threadIdx.x; c < C; c += blockDim.x) {")
            inside = dict(names)
            self._write_elements([formula.outputs[i] for i in elements], inside, loads, lines, T)
            for i in elements:
                place = f"o{i}[row * out_row + c * out_column]"
                lines.append(f"{place} = ({types[i]})({self._text(formula.outputs[i], inside, T)});")
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
            if node in names or isinstance(node, (Constant, Variable)) or self._level(node) in _ACROSS:
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
        return self._run(arguments, dtype, 0, ())

    def total(self, arguments: Sequence[Any], dtype: np.dtype, summed: int, scale: float, mean: bool) -> list[Any]:
        """[(scale · Σ terms, Σ weights), *the other outputs]; with `mean` the first is Σ terms / Σ weights."""
        return self._run(arguments, dtype, summed, (compute_dtype(dtype).type(scale), np.bool_(mean)))

    def _run(self, arguments: Sequence[Any], dtype: np.dtype, summed: int, settings: tuple) -> list[Any]:
        import cupy

        formula = self.formula
        key = dtype_codes(arguments, cupy.ndarray)
        elements = [
            a for a, v in zip(arguments, formula.inputs, strict=True)
            if v.level == "element" and isinstance(a, cupy.ndarray)
        ]  # fmt: skip
        shape = elements[0].shape
        rows, columns = shape
        in_c = all([a._c_contiguous for a in elements]) or memory_order(elements).is_c
        shapes = {"element": shape, "row": shape[:1], "scalar": ()}
        made = [
            cupy.ndarray(shapes[formula.levels[i]], formula.out_dtype(i, dtype), order="C" if in_c else "F")
            for i in range(summed, len(formula.outputs))
        ]
        if not columns or not (rows or summed):
            for out in made:
                out.fill(0)
            return [_empty_total(cupy, dtype, rows, settings), *made] if summed else made
        warp = columns <= WARP_COLUMNS
        kernel = self._kernels.get((key, dtype, warp, summed))
        if kernel is None:
            source = self.source(dtype, dtype_names(key), warp, summed)
            kernel = self._kernels[key, dtype, warp, summed] = cupy.RawKernel(source, f"gpuad_{formula.name}")
        compute = compute_dtype(dtype)
        call: list[Any] = []
        for argument, variable in zip(arguments, formula.inputs, strict=True):
            if not isinstance(argument, cupy.ndarray):
                call.append(np.int64(argument) if variable.kind == "label" else compute.type(argument))
                continue
            call.append(argument)
            size = argument.dtype.itemsize
            if variable.level == "row":
                call.append(np.int64(argument.strides[0] // size if argument.ndim else 0))
            elif variable.level == "column":
                call.append(np.int64(argument.strides[0] // size))
            elif variable.level == "element":
                call += [np.int64(s // size) for s in argument.strides]
        call += made
        block = (32, ROWS) if warp else (256 if columns <= 4096 else 512, 1)
        grid = max(1, min(-(-rows // block[1]), last_block.BLOCKS if summed else 1 << 20))
        if summed:
            total = cupy.ndarray((2,), dtype)
            call += [total, cupy.ndarray((2 * grid,), compute), last_block.counters(), *settings]
            made = [total, *made]
        if self.checks:
            backend: Any = of_array(made[0]).backend
            address, code = backend.fault("class index")
            call += [np.uint64(address), np.int32(code)]
        steps = (columns, 1) if in_c else (1, rows)
        call += [np.int64(n) for n in (*shape, *steps)]
        kernel((grid,), block, tuple(call), shared_mem=0 if warp else block[0] * compute.itemsize)
        return made


def _empty_total(cupy: Any, dtype: np.dtype, rows: int, settings: tuple) -> Any:
    """The totals where rows have no elements: as NumPy's, 0 · scale and 0 / 0."""
    scale, mean = settings
    return cupy.asarray(np.array([np.nan if mean else np.float64(0) * scale, 0], dtype))


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
