"""Compiles what collect.py wrote with NVRTC itself: python compile.py FILE LIBRARY INCLUDE ARCH...; no GPU is needed.

Prints, as JSON, how many units there were and which were refused: (arch, where it came from, NVRTC's log). The options
are CuPy's, with the headers of the CUDA wheels (INCLUDE) in the place of those that CuPy found. Each unit is compiled
to machine code for one of the architectures, in turn, and goes through the compiler's front end for each of the others:
code for all of them would take three times as long, and what an emitter does wrong the front end sees. Sources that
differ in nothing but the number of dimensions of CuPy's arrays count as one.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

# What CuPy itself adds in compile_using_nvrtc and _compile_with_cache_cuda; the headers are parsed once a process.
CUPYS_OWN = ("-ftz=true", "--device-as-default-execution-space", "--pch")


BATCH = 40  # units merged into one


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
                return None
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            return f"status {status}\n{log.value.decode()}"
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def options_of(unit: dict, include: str, arch: str) -> list[str]:
    """CuPy's options for the unit, with the real headers."""
    cupys = [o for o in unit["options"] if not o.startswith("-I") or f"{os.sep}cupy{os.sep}" in o]
    return [*cupys, f"-I{include}", f"-arch={arch}", *CUPYS_OWN]


def batches(units: list[dict]) -> Iterator[list[dict]]:
    """The units in handfuls with the same includes and options, so that headers are read once for many kernels."""
    alike = defaultdict(list)
    for unit in units:
        includes = tuple(line for line in unit["source"].splitlines() if line.startswith("#include"))
        alike[includes, tuple(unit["options"])].append(unit)
    for group in alike.values():
        for i in range(0, len(group), BATCH):
            yield group[i : i + BATCH]


def merged(batch: list[dict]) -> str:
    """One translation unit of several: the includes they share, then each in a namespace of its own."""
    if len(batch) == 1:
        return batch[0]["source"]
    lines = batch[0]["source"].splitlines()
    parts = [line for line in lines if line.startswith("#include")]
    for i, unit in enumerate(batch):
        own = [line for line in unit["source"].splitlines() if not line.startswith("#include")]
        macros = re.findall(r"^\s*#define (\w+)", unit["source"], re.MULTILINE)
        text = "\n".join(own).replace('extern "C" ', "")  # a C name is the same in every namespace
        parts += [f"namespace unit{i} {{", text, "}", *(f"#undef {macro}" for macro in macros)]
    return "\n".join(parts)


def compile_share(arguments: tuple[list[dict], str, str, str, bool]) -> list[tuple[str, str, str]]:
    """Compile some units for one architecture, or let the front end alone see them; what was refused."""
    units, library, include, arch, check_only = arguments
    nvrtc = Nvrtc(library)
    refused = []
    for batch in batches(units):
        options = options_of(batch[0], include, arch) + ["-fdevice-syntax-only"] * check_only
        if nvrtc.compile(merged(batch), options) is None:
            continue
        for unit in batch:  # which of them, and why
            why = nvrtc.compile(unit["source"], options)
            if why is not None:
                refused.append((arch, unit["of"][0], why))
    return refused


def distinct(units: list[dict]) -> list[dict]:
    """One of all units that differ in numbers of dimensions only."""
    dimensions = re.compile(r"(CArray<[\w:<>]+?, |CIndexer<)\d+")
    return list({(dimensions.sub(r"\1N", u["source"]), tuple(u["options"])): u for u in units}.values())


def main() -> None:
    """Deals the units out, and prints what became of them."""
    file, library, include, *archs = sys.argv[1:]
    units = distinct(json.loads(Path(file).read_text()))
    cores = len(os.sched_getaffinity(0))
    shares = []
    for turn, arch in enumerate(archs):
        to_code = [u for i, u in enumerate(units) if i % len(archs) == turn]
        to_check = [u for i, u in enumerate(units) if i % len(archs) != turn]
        shares += [(to_code[i::cores], library, include, arch, False) for i in range(cores)]
        shares += [(to_check[i::cores], library, include, arch, True) for i in range(cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        refused = [r for share in pool.map(compile_share, shares, chunksize=1) for r in share]
    print(json.dumps({"units": len(units), "refused": refused}))


if __name__ == "__main__":
    main()
