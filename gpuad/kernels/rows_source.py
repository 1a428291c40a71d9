"""The CUDA C of a row formula: a warp a row, or all threads of a block for long rows.

The row functions are put in stages: those of one stage need only the results of earlier stages, so one pass over the
row feeds them all, and a last pass writes the elements. Elements are read again in each pass (from cache) rather than
kept. Rows and columns may each be several axes of an array: their strides are in the layout, see strides_cuda.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuad.kernels import derive, last_block
from gpuad.kernels.cuda_source import C_TYPES, PREAMBLE, RAW_TYPES, compute_dtype, headers, literal
from gpuad.kernels.expr import Constant, Expr, Variable, topological
from gpuad.kernels.scalar import column, row_at, row_length, row_logsumexp, row_max, row_sum, where
from gpuad.kernels.strides_cuda import offsets

if TYPE_CHECKING:
    from gpuad.kernels.formula import Formula

# Warps of a block: where each has a row, so many rows; no barriers, and no idle threads.
ROWS = 8

# The levels of what differs along a row.
_ACROSS = ("element", "column")

# Which threads share a row, and which rows a block has at a time.
_WARP_LANES = """
#define LANE threadIdx.x
#define LANES 32
#define ROW_LANE threadIdx.y
#define ROW_LANES blockDim.y
"""
_BLOCK_LANES = """
#define LANE (threadIdx.y * 32 + threadIdx.x)
#define LANES (blockDim.y * 32)
#define ROW_LANE 0
#define ROW_LANES 1
"""

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
  shared[LANE] = x;
  __syncthreads();
  for (unsigned n = LANES >> 1; n > 0; n >>= 1) {
    if (LANE < n) shared[LANE] += shared[LANE + n];
    __syncthreads();
  }
  return shared[0];
}
template <typename T> __device__ inline T gpuad_row_max(T x, T* shared) {
  __syncthreads();
  shared[LANE] = x;
  __syncthreads();
  for (unsigned n = LANES >> 1; n > 0; n >>= 1) {
    if (LANE < n) shared[LANE] = gpuad_maximum(shared[LANE], shared[LANE + n]);
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
if (LANE == 0) {{ totals[0][ROW_LANE] = term_sum; totals[1][ROW_LANE] = weight_sum; }}
__syncthreads();
if (threadIdx.x == 0 && threadIdx.y == 0) {{
  for (unsigned i = 1; i < ROW_LANES; ++i) {{ term_sum += totals[0][i]; weight_sum += totals[1][i]; }}
  partials[2 * blockIdx.x] = term_sum; partials[2 * blockIdx.x + 1] = weight_sum;
}}
if (!gpuad_is_last_block(counters, gridDim.x) || threadIdx.y > 0) return;
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


class RowSource:
    """Writes the kernel of a row formula for arrays of given dtypes."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.known: dict[Expr, str] = {}
        for output in formula.outputs:
            derive.level(output, self.known)
        self.checks = any(node.function is row_at for node in topological(formula.outputs))

    def level(self, node: Expr) -> str:
        """Over what a node varies."""
        return derive.level(node, self.known)

    def stages(self) -> list[list[Expr]]:
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

    def arrays(self, key: Sequence[str | None], summed: int) -> tuple[list[int], list[int]]:
        """The inputs and the outputs whose strides are in the layout, in its order."""
        inputs = [i for i, v in enumerate(self.formula.inputs) if key[i] is not None and v.level != "scalar"]
        return inputs, [i for i, level in enumerate(self.formula.levels) if level == "element" and i >= summed]

    def write(
        self, dtype: np.dtype, key: Sequence[str | None], warp: bool, summed: int, row_axes: int, column_axes: int,
        beside: Beside | None = None,
    ) -> str:  # fmt: skip
        """The CUDA C source for numbers computed in `dtype`; key: the dtype name of each array, None for numbers.

        warp: a warp a row instead of a block. summed: how many of the first outputs (terms, and their weights) are only
        summed over the rows. row_axes, column_axes: how many axes rows and columns have, merged. beside: what the first
        blocks of the launch do instead.
        """
        formula = self.formula
        T = C_TYPES[compute_dtype(dtype).name]
        parameters, loads_scalar, loads_row = [], [], []
        names: dict[Expr, str] = {}
        loads: dict[Variable, str] = {}
        for i, (variable, given) in enumerate(zip(formula.inputs, key, strict=True)):
            kind = {"mask": "bool", "label": "long long"}.get(variable.kind, T)
            names[variable] = f"u{i}"
            if given is None:
                parameters.append(f"const {kind} u{i}")
                self.known[variable] = "scalar"
                continue
            parameters.append(f"{'' if variable.kind == 'state' else 'const '}{RAW_TYPES[given]}* p{i}")
            if variable.level == "scalar":
                loads_scalar.append(f"const {kind} u{i} = ({kind})p{i}[0];")
            elif variable.level == "row":
                loads_row.append(f"const {kind} u{i} = ({kind})p{i}[k{i}];")
            else:
                loads[variable] = f"const {kind} u{i} = ({kind})p{i}[e{i}];"
        stores: list[tuple[str, str]] = []  # of each output: where in which array, and its type
        for i, level in enumerate(formula.levels):
            state = formula.states.get(i)
            if state is not None:
                stores.append((f"p{state}[k{state}]", RAW_TYPES[str(key[state])]))
                continue
            place = {"element": f"o{i}[eo{i}]", "row": f"o{i}[row]", "scalar": f"o{i}[0]"}[level]
            stores.append((place, RAW_TYPES[formula.out_dtype(i, dtype).name]))
            if i >= summed:
                parameters.append(f"{stores[i][1]}* o{i}")
        ins, outs = self.arrays(key, summed)
        strided = [*ins, *(f"o{i}" for i in outs)]
        at_column = offsets("c", "e", strided, column_axes, 2 + row_axes * (1 + len(strided)),
                            [f"k{i}" for i in strided])  # fmt: skip
        body = _Body(self, T, names, loads, at_column).write(stores, summed)
        before, after = "", ""
        if summed:
            parameters += [f"{stores[0][1]}* total", f"{T}* partials", "unsigned int* counters", f"const {T} scale"]
            parameters.append("const bool mean")
            before = f"{T} term_sum = 0, weight_sum = 0;\n"
            after = _TOTALS.format(T=T, rows=ROWS, stored=stores[0][1])
        if self.checks:
            parameters += ["const unsigned long long u_fault", "const int u_code"]
        parameters.append("const Layout layout")
        words = 2 + (row_axes + column_axes) * (1 + len(strided))
        pieces = [
            headers((*key, dtype.name)),
            PREAMBLE,
            _fault_source() if self.checks else "",
            _WARP_LANES if warp else _BLOCK_LANES,
            _WARP if warp else _BLOCK,
            _LOGSUMEXP,
            last_block.SOURCE if summed or beside else "",
            beside.source if beside else "",
            f"struct Layout {{ long long v[{words}]; }};\n",
            f'extern "C" __global__ void gpuad_{formula.name}(',
            ", ".join([*parameters, *(beside.parameters if beside else ())]),
            ") {\n",
            beside.call if beside else "const unsigned int row_block = blockIdx.x, row_blocks = gridDim.x;\n",
            f"extern __shared__ double gpuad_shared[];\n{T}* shared = ({T}*)gpuad_shared;\n",
            "const long long rows = layout.v[0], C = layout.v[1];\n",
            "\n".join(loads_scalar),
            "\n",
            before,
            "for (long long row = (long long)row_block * ROW_LANES + ROW_LANE; row < rows;\n",
            "     row += (long long)row_blocks * ROW_LANES) {\n",
            "\n".join([*offsets("row", "k", strided, row_axes, 2), *loads_row, *body]),
            "\n}\n",
            after,
            "}\n",
        ]
        return "".join(pieces)


class Beside(NamedTuple):
    """Other work for the first blocks of a launch: functions, kernel parameters, and the call.

    The call ends those blocks, and says which the others are: row_block, row_blocks.
    """

    source: str
    parameters: Sequence[str]
    call: str


class _Body:
    """The statements for one row. names: of what is known; loads: the statement for each input along a row."""

    def __init__(
        self, source: RowSource, T: str, names: dict[Expr, str], loads: dict[Variable, str], at_column: list[str]
    ) -> None:
        self.source, self.T, self.names, self.loads, self.at_column = source, T, names, loads, at_column
        self.lines: list[str] = []

    def write(self, stores: list[tuple[str, str]], summed: int) -> list[str]:
        for n, stage in enumerate(self.source.stages()):
            self._rows([a for node in stage for a in node.args])
            for node in stage:
                if node.function is row_at:
                    self._at(node)
            sweeping = [node for node in stage if node.function is not row_at]
            if sweeping:
                self._sweep(n, sweeping)
        self._outputs(stores, summed)
        return self.lines

    def _sweep(self, n: int, sweeping: list[Expr]) -> None:
        """One pass over the row for the row functions of stage n."""
        T, lines = self.T, self.lines
        for k, node in enumerate(sweeping):
            start = "0" if node.function is row_sum else "-1.0 / 0.0"
            lines.append(f"{T} a{n}_{k} = ({T})({start});")
            if node.function is row_logsumexp:
                lines.append(f"{T} b{n}_{k} = ({T})0;")
        inside = self._columns([node.args[0] for node in sweeping])
        for k, node in enumerate(sweeping):
            value = self._text(node.args[0], inside)
            if node.function is row_sum:
                lines.append(f"a{n}_{k} += {value};")
            elif node.function is row_max:
                lines.append(f"a{n}_{k} = gpuad_maximum(a{n}_{k}, {value});")
            else:
                lines.append(f"gpuad_online({value}, a{n}_{k}, b{n}_{k});")
        lines.append("}")
        for k, node in enumerate(sweeping):
            self.names[node] = f"w{n}_{k}"
            call = {row_sum: "sum", row_max: "max", row_logsumexp: "logsumexp"}[node.function]
            partial = f"a{n}_{k}, b{n}_{k}" if node.function is row_logsumexp else f"a{n}_{k}"
            lines.append(f"const {T} w{n}_{k} = gpuad_row_{call}({partial}, shared);")

    def _outputs(self, stores: list[tuple[str, str]], summed: int) -> None:
        outputs, levels, lines = self.source.formula.outputs, self.source.formula.levels, self.lines
        self._rows(outputs)
        for name, output in zip(("term_sum", "weight_sum"), outputs[:summed], strict=False):
            lines.append(f"if (LANE == 0) {name} += {self._text(output, self.names)};")
        for i in range(summed, len(outputs)):
            if levels[i] != "element":
                place, kind = stores[i]
                lines.append(f"if (LANE == 0) {place} = ({kind})({self._text(outputs[i], self.names)});")
        elements = [i for i, level in enumerate(levels) if level == "element"]
        if elements:
            inside = self._columns([outputs[i] for i in elements])
            for i in elements:
                place, kind = stores[i]
                lines.append(f"{place} = ({kind})({self._text(outputs[i], inside)});")
            lines.append("}")

    def _text(self, node: Expr, names: dict[Expr, str]) -> str:
        return literal(node.value, self.T) if isinstance(node, Constant) else names[node]

    def _statement(self, node: Expr, names: dict[Expr, str]) -> None:
        T = self.T
        if _is_label(node):
            kind = "long long"
            arguments = [literal(a.value, kind) if isinstance(a, Constant) else names[a] for a in node.args]
        else:
            kind = "bool" if node.function.result == "bool" else T
            arguments = [self._text(a, names) for a in node.args]
        names[node] = f"v{len(self.lines)}_{len(names)}"
        self.lines.append(f"const {kind} {names[node]} = {node.function.cuda.format(*arguments, T=T)};")

    def _rows(self, roots: Sequence[Expr]) -> None:
        """Statements for the nodes below the roots that have one value a row (or in all)."""
        names = self.names
        for node in topological(roots):
            if node in names or isinstance(node, (Constant, Variable)) or self.source.level(node) in _ACROSS:
                continue
            if node.function is row_length:
                names[node] = f"(({self.T})C)"
            elif node.function.across != "row" and all(isinstance(a, Constant) or a in names for a in node.args):
                self._statement(node, names)

    def _columns(self, roots: Sequence[Expr]) -> dict[Expr, str]:
        """Open the loop over the columns, with the roots' elements; names for them."""
        self.lines.append("for (long long c = LANE; c < C; c += LANES) {")
        return self._elements(roots)

    def _elements(self, roots: Sequence[Expr]) -> dict[Expr, str]:
        """Statements for the elements at column c."""
        names = dict(self.names)
        self.lines += self.at_column
        for node in _needed(roots, names, self.loads):
            if isinstance(node, Variable):
                self.lines.append(self.loads[node])
            elif node.function is column:
                names[node] = "c"
            elif not isinstance(node, Constant):
                self._statement(node, names)
        return names

    def _at(self, node: Expr) -> None:
        """row_at: one element, computed by every thread; a place outside the row gives NaN."""
        source, place = node.args
        at = self._text(place, self.names)
        result = f"at{len(self.lines)}"
        self.lines += [f"{self.T} {result} = ({self.T})(0.0 / 0.0);", f"if ({at} >= 0 && {at} < C) {{"]
        self.lines.append(f"const long long c = {at};")
        inside = self._elements([source])
        self.lines += [f"{result} = {self._text(source, inside)};",
                       f"}} else if (LANE == 0) gpuad_fault(u_fault, u_code, {at}, row, 0, C);"]  # fmt: skip
        self.names[node] = result


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
