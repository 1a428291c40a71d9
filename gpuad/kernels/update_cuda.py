"""An update as a CUDA kernel: one launch for all parameters of a device and dtype.

The kernel walks a table with a row for each parameter: its first block, its set of numbers, its length, its pointers.
The table and the numbers are kernel arguments, passed by value, so nothing is copied to the device; a table too long
for that lies on the device and is written anew only when a row changes. All that changes from step to step are the
numbers (what the prelude made of hyperparameters and step counts), and the kernel reads them through NUMBER only.

`skip` is a number on the device: where it is not 0 the kernel changes nothing, and the host need not know. What the
numbers are then depends on how many steps were skipped, so they too may lie on the device (see gpuad/update.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.kernels.cuda_source import C_TYPES, PREAMBLE, RAW_TYPES, compute_dtype, headers, write_statements
from gpuad.kernels.expr import Expr

if TYPE_CHECKING:
    from gpuad.kernels.update import Update

THREADS = 256
EACH = 4  # elements of a thread, whose loads are under way together
# All arguments of a kernel take 4096 bytes at most (CUDA programming guide, "__global__ function parameters"; 32764
# only from CUDA 12.1 and Volta on). A quarter for the numbers, 64 for the rest.
NUMBERS_BYTES = 1024
TABLE_WORDS = (4096 - NUMBERS_BYTES - 64) // 8

# The row of a block is the last whose first block is not behind it.
ROW_OF_BLOCK = r"""int row = 0;
  for (int end = rows; end - row > 1;) {
    const int middle = (row + end) / 2;
    if ((unsigned int)ROW(middle, 0) <= blockIdx.x) row = middle; else end = middle;
  }"""
_SOURCE = r"""
{preamble}
struct Words {{ unsigned long long word[{words}]; }};
struct Numbers {{ {compute} value[{room}]; }};
#define NUMBER(set, k) {number}
#define ROW(row, column) table{member}[(row) * {columns} + (column)]

extern "C" __global__ void __launch_bounds__({threads})
{name}({table} table, {given} numbers, const int rows, const float* skip) {{
  if (skip && *skip != 0.0f) return;
  {row}
  const int set = int(ROW(row, 0) >> 32);
  const long long length = ROW(row, 1);
  const long long start = (long long)(blockIdx.x - (unsigned int)ROW(row, 0)) * {chunk} + threadIdx.x;
  {setup}
  #pragma unroll
  for (int k = 0; k < {each}; ++k) {{
    const long long i = start + k * {threads};
    if (i < length) {{ {load} }}
  }}
  #pragma unroll
  for (int k = 0; k < {each}; ++k) {{
    const long long i = start + k * {threads};
    if (i < length) {{
      {body}
    }}
  }}
}}
"""


class CudaUpdate:
    """Runs an update on the arrays of one CUDA device and dtype."""

    def __init__(self, update: Update, dtype: np.dtype) -> None:
        self.update, self.dtype = update, dtype
        number = compute_dtype(dtype)
        self._sets = NUMBERS_BYTES // (number.itemsize * max(1, update.numbers))  # in a launch
        self._numbers = np.zeros((), [("value", number, NUMBERS_BYTES // number.itemsize)])
        self._tables: dict[int, Table] = {}

    def prepare(self, arrays: Sequence[Any]) -> Any:
        """What `run` wants to know of a parameter's arrays: (length, pointers…), None where their layouts differ."""
        if all([a.flags.c_contiguous for a in arrays]) or all([a.flags.f_contiguous for a in arrays]):
            return (arrays[0].size, *[a.data.ptr for a in arrays])
        return None

    def ready(self, sets: Sequence[tuple[Any, list]]) -> None:
        """Write the tables that `run` walks for these sets; all that is allocated is allocated here."""
        for first, part in self._launches(sets):
            rows = [[item[0] for item in items] for _, items in part]
            table = self._tables.get(first)
            if table is None or table.of != rows:
                self._tables[first] = Table(rows)

    def run(self, sets: Sequence[tuple[Any, list]], skip: Any = None) -> None:
        """Update the parameters of each (numbers, [(prepared, p, grad, *states), …]), unless `skip` is not 0.

        numbers: a tuple; or an array of float64 on the device, and then each set is a launch. `ready` was called for
        these sets.
        """
        for first, part in self._launches(sets):
            self._launch(self._tables[first], part, skip)

    def _launches(self, sets: Sequence[tuple[Any, list]]) -> Iterator[tuple[int, Sequence[tuple[Any, list]]]]:
        step = self._sets if sets and isinstance(sets[0][0], tuple) else 1
        for first in range(0, len(sets), step):
            yield first, sets[first : first + step]

    def _launch(self, table: Table, sets: Sequence[tuple[Any, list]], skip: Any) -> None:
        values = self._numbers["value"]
        on_device = not isinstance(sets[0][0], tuple)
        for i, (numbers, items) in enumerate(sets):
            if not on_device:
                values[i * len(numbers) : (i + 1) * len(numbers)] = numbers
            if table.gaps:
                self._strided(numbers, items, skip)
        if table.rows:
            given = sets[0][0] if on_device else self._numbers
            arguments = (table.words, given, np.int32(table.rows), np.uintp(0) if skip is None else skip)
            self._kernel(table.by_value, on_device)((table.blocks,), (THREADS,), arguments)

    def _strided(self, numbers: Any, items: list, skip: Any) -> None:
        """A launch for each parameter that has not the layout of its gradient and state: strides take indexing."""
        program = self.update.formula.runner("cuda")
        for prepared, *arrays in items:
            if prepared is not None:
                continue
            targets = [arrays[0], *arrays[2:]]
            if skip is None:
                program([*arrays, *numbers], self.dtype, targets)
                continue
            import cupy

            # Numbers on the device are views of 0 dimensions, which kernels take as they take scalars.
            scalars = numbers if isinstance(numbers, tuple) else [n.astype(self.dtype) for n in numbers]
            for target, new in zip(targets, program([*arrays, *scalars], self.dtype), strict=True):
                cupy.copyto(target, new, where=skip == 0)

    def _kernel(self, by_value: bool, on_device: bool) -> Any:
        compiled, key = self.update.compiled, ("cuda", self.dtype, by_value, on_device)
        found = compiled.get(key)
        if found is None:
            import cupy

            name = f"gpuad_update_{self.update.name}"
            found = compiled[key] = cupy.RawKernel(self.source(by_value, on_device), name)
        return found

    def source(self, by_value: bool = True, on_device: bool = False) -> str:
        """The CUDA C++ of the kernel; by_value, on_device: where the table and the numbers are."""
        formula, count = self.update.formula, self.update.arrays
        compute = C_TYPES[compute_dtype(self.dtype).name]
        stored = RAW_TYPES[self.dtype.name]
        names: dict[Expr, str] = {v: f"u{i}" for i, v in enumerate(formula.inputs[:count])}
        names.update({v: f"n{k}" for k, v in enumerate(formula.inputs[count:])})
        setup = [f"{stored}* a{i} = ({stored}*)ROW(row, {2 + i}); {stored} r{i}[{EACH}];" for i in range(count)]
        setup += [f"const {compute} n{k} = NUMBER(set, {k});" for k in range(self.update.numbers)]
        body = [f"const {compute} u{i} = ({compute})r{i}[k];" for i in range(count)]
        body += write_statements(formula.outputs, names, compute)
        # The new p goes where p is, the new states where they are; the gradient, input 1, is only read.
        for i, output in enumerate(formula.outputs):
            body.append(f"a{i + 1 if i else 0}[i] = ({stored}){names[output]};")
        return _SOURCE.format(
            preamble=headers([self.dtype.name]) + PREAMBLE,
            words=TABLE_WORDS,
            compute=compute,
            room=NUMBERS_BYTES // compute_dtype(self.dtype).itemsize,
            number="numbers[k]" if on_device else f"numbers.value[(set) * {self.update.numbers} + (k)]",
            given="const double*" if on_device else "const Numbers",
            row=ROW_OF_BLOCK,
            member=".word" if by_value else "",
            columns=2 + count,
            threads=THREADS,
            each=EACH,
            chunk=THREADS * EACH,
            name=f"gpuad_update_{self.update.name}",
            table="const Words" if by_value else "const unsigned long long*",
            setup="\n  ".join(setup),
            load=" ".join(f"r{i}[k] = a{i}[i];" for i in range(count)),
            body="\n      ".join(body),
        )


class Table:
    """The rows of a launch, made of the (length, pointers…) of each parameter in each set."""

    def __init__(self, of: list[list[Any]]) -> None:
        self.of = of
        self.gaps = any(row is None for rows in of for row in rows)
        self.blocks = 0
        words: list[tuple[int, ...]] = []
        for number, rows in enumerate(of):
            for row in rows:
                if row is not None and row[0]:
                    words.append((number << 32 | self.blocks, *row))
                    self.blocks += -(-row[0] // (THREADS * EACH))
        self.rows = len(words)
        flat = np.array(words, np.uint64).reshape(-1)
        self.by_value = flat.size <= TABLE_WORDS
        self.words: Any
        if self.by_value:
            self.words = np.zeros((), [("word", np.uint64, TABLE_WORDS)])
            self.words["word"][: flat.size] = flat
        else:
            self.words = _on_device(flat)


def _on_device(words: np.ndarray) -> Any:
    """Words in device memory, written by kernels that get them as arguments: no copy from the host, no wait."""
    import cupy

    made = cupy.ndarray(words.shape, np.uint64)
    part = np.zeros((), [("word", np.uint64, TABLE_WORDS)])
    for first in range(0, words.size, TABLE_WORDS):
        count = min(TABLE_WORDS, words.size - first)
        part["word"][:count] = words[first : first + count]
        _writer()((1,), (THREADS,), (made[first:], part, np.int32(count)))
    return made


@functools.cache
def _writer() -> Any:
    import cupy

    source = f"""
struct Words {{ unsigned long long word[{TABLE_WORDS}]; }};
extern "C" __global__ void gpuad_write_table(unsigned long long* table, const Words words, const int count) {{
  for (int i = threadIdx.x; i < count; i += blockDim.x) table[i] = words.word[i];
}}
"""
    return cupy.RawKernel(source, "gpuad_write_table")
