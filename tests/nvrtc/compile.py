"""Compiles what collect.py wrote with NVRTC itself: python compile.py FILE LIBRARY INCLUDE ARCH...; no GPU is needed.

Prints, as JSON, how many units there were and which were refused: (arch, where it came from, NVRTC's log). Every unit
goes through the front end, the optimiser and the assembler to machine code for every one of the architectures. The
options are CuPy's, with the headers of the CUDA wheels (INCLUDE) in the place of those that CuPy found, and one more,
FAST. Units that are the same code count as one, see `same`; and what units begin with, headers above all, is compiled
once for many of them, see `merged`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# What CuPy adds to a kernel's options in _compile_with_cache_cuda and compile_using_nvrtc.
CUPYS_OWN = ("-ftz=true", "--device-as-default-execution-space")
FAST = "--Ofast-compile=max"  # machine code that is optimised less, in half the time; what is accepted is the same
BATCH = 200  # units merged into one: more, and the load at the end is uneven


class Nvrtc:
    """The few functions of the library that compiling takes."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)

    def compile(self, source: str, options: list[str]) -> str | None:
        """None, or why NVRTC refused the source."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        nvrtc = self.library
        status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
        assert status == 0, f"nvrtcCreateProgram: {status}"
        try:
            encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
            if status == 0:
                nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
                assert size.value, "no machine code"
                return None
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            return f"status {status}\n{log.value.decode()}"
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


loaded = functools.cache(Nvrtc)  # once a process


def options_of(unit: dict, include: str, arch: str) -> list[str]:
    """CuPy's options for the unit, with the real headers."""
    cupys = [o for o in unit["options"] if not o.startswith("-I") or f"{os.sep}cupy{os.sep}" in o]
    return [*cupys, f"-I{include}", f"-arch={arch}", *CUPYS_OWN, FAST]


def parts_of(unit: dict) -> tuple[list[str], str, str]:
    """The unit's includes, what else stands before its kernel (the head), and the kernel.

    That has no C linkage, with which its name would have to differ from those of all that it is merged with; and not
    its own name either, which in a namespace would hide functions of the head that are called the same.
    """
    head, _, kernel = unit["source"].partition('extern "C" ')
    include = re.compile(r"^\s*#include.*\n", re.MULTILINE)
    kernel = re.sub(r"^(__global__ void (?:__launch_bounds__\(\d+\)\s+)?)\w+", r"\1kernel", kernel)
    return include.findall(head), include.sub("", head), kernel


def same(unit: dict) -> tuple:
    """Equal for units that are the same code: all but the kernel's name and what CuPy's array types say of a shape.

    That is the number of dimensions, whether the array is contiguous and how wide its indices are: gpuad writes none
    of them, and the templates that they choose between are CuPy's.
    """
    includes, head, kernel = parts_of(unit)
    kernel = re.sub(r"(CArray<[\w:<>]+?|CIndexer<)[\d, ]+>", r"\1>", kernel)
    return includes, unit["options"], head, kernel


def batches(units: list[dict]) -> Iterator[list[dict]]:
    """The units in handfuls with the same includes and options, those with the same head together."""
    units = sorted(units, key=same)
    for _, group in itertools.groupby(units, lambda unit: (parts_of(unit)[0], unit["options"])):
        alike = list(group)
        yield from (alike[i : i + BATCH] for i in range(0, len(alike), BATCH))


def merged(batch: list[dict]) -> str:
    """One translation unit of several: their includes, then each head once, and each kernel in a namespace."""
    if len(batch) == 1:
        return batch[0]["source"]
    lines = parts_of(batch[0])[0]
    for i, (head, units) in enumerate(itertools.groupby(batch, lambda unit: parts_of(unit)[1])):
        lines += [f"namespace head{i} {{", head]
        lines += [f"namespace unit{j} {{\n{parts_of(unit)[2]}\n}}" for j, unit in enumerate(units)]
        lines += ["}", *(f"#undef {macro}" for macro in re.findall(r"^\s*#define (\w+)", head, re.MULTILINE))]
    return "\n".join(lines)


def compile_batch(library: str, include: str, work: tuple[list[dict], str]) -> list[tuple[str, str, str]]:
    """Compile some units for one architecture; what was refused, which is looked for by halves."""
    batch, arch = work
    why = loaded(library).compile(merged(batch), options_of(batch[0], include, arch))
    if why is None:
        return []
    if len(batch) == 1:
        return [(arch, batch[0]["of"][0], why)]
    half = len(batch) // 2
    halves = [compile_batch(library, include, (part, arch)) for part in (batch[:half], batch[half:])]
    return sum(halves, []) or [(arch, "units that are refused only together", why)]


def main() -> None:
    """Deals the units out, and prints what became of them."""
    file, library, include, *archs = sys.argv[1:]
    units = list({json.dumps(same(unit)): unit for unit in json.loads(Path(file).read_text())}.values())
    work = list(itertools.product(batches(units), archs))
    work.sort(key=lambda batch_and_arch: -len(merged(batch_and_arch[0])))  # the longest first: an even load at the end
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        task = functools.partial(compile_batch, library, include)
        refused = [each for some in pool.imap_unordered(task, work) for each in some]
    print(json.dumps({"units": len(units), "refused": sorted(refused)}))


if __name__ == "__main__":
    main()
