"""Every kernel that gpuad generates compiles under NVIDIA's own compiler, for three generations of GPUs.

The simulator compiles with g++, which takes some things that NVRTC does not. Here NVRTC itself, a wheel that needs no
GPU, gets the translation units that CuPy would hand to it: tests/nvrtc/collect.py writes them down while every
operation, derivative to the third order, optimiser and random draw runs, in every dtype; tests/nvrtc/compile.py
compiles them to machine code. What the suite itself compiles is written down by tests/nvrtc/record.py, for looking by
hand whether a kind of kernel is missing here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuad import optim
from gpuad.autograd.op import table

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
SCRIPTS = Path(__file__).parent / "nvrtc"


def installed(package: str, name: str) -> Path:
    """Where a file of a wheel lies; the test is skipped where there is none."""
    try:
        found = [f for f in importlib.metadata.files(package) or () if f.name == name]
    except importlib.metadata.PackageNotFoundError:
        found = []
    if not found:
        pytest.skip(f'NVRTC is not installed ({name} of {package} is missing): pip install "gpuad[nvrtc]"')
    return Path(found[0].locate())


@pytest.fixture
def compile():
    """compile(file) runs compile.py outside the simulator, which has libraries of the same names."""
    library = installed("nvidia-cuda-nvrtc", "libnvrtc.so.13")
    include = installed("nvidia-cuda-runtime", "cuda_fp16.h").parent
    installed("nvidia-cuda-crt", "host_defines.h")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_PATH")}

    def run(file: Path) -> dict:
        command = [sys.executable, SCRIPTS / "compile.py", file, library, include, *ARCHITECTURES]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.cuda
def test_every_generated_kernel_compiles(compile, cuda_device, tmp_path):
    file = tmp_path / "units.json"
    done = subprocess.run([sys.executable, SCRIPTS / "collect.py", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    units = json.loads(file.read_text())

    # That the collection has what it is for.
    origins = {origin for unit in units for origin in unit["of"]}
    names, dtypes, orders = ({origin.split("\t")[i] for origin in origins} for i in range(3))
    assert {op.name for op in table.values() if hasattr(op, "formula")} <= names
    no_rules = {"Optimizer", "lr_scheduler", "AdamW"}  # AdamW is Adam with other settings, and has its kernels
    assert {f"optim.{name}" for name in optim.__all__ if name not in no_rules} <= names
    assert {"random", "network", "softmax", "layer_norm", "cross_entropy", "sum over axes", "pieces"} <= names
    assert {"float16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64"} <= dtypes
    assert {"float32 and float16", "float32 and int64", "float32 and 2.0"} <= dtypes
    modes = ("vjp", "jvp")
    second = {f"{a} of {b}" for a in modes for b in modes}
    third = {f"{a} of {b}" for a in modes for b in second}
    assert {"forward", *modes, *second, *third, "vmap of vjp", "step", "draw"} <= orders
    sources = [unit["source"] for unit in units]
    for kind in (
        "CIndexer",
        "SUM_LANE",
        "gpuad_is_last_block",
        "gpuad_norm",
        "gpuad_clip",
        "gpuad_unscale",
        "gpuad_amp_update",
        "gpuad_Adam_prelude",
        "gpuad_write_table",
        "gpuad_join",
        "gpuad_fault",
        "gpuad_add_at_in_order",
        "gpuad_update_",
        "gpuad_draw",
        "gpuad_set_random_state",
        "gpuad_check_index",
        "row",
    ):
        assert any(kind in source for source in sources), f"no source with {kind}"

    result = compile(file)
    assert result["units"] > 5000
    text = "\n\n".join(f"{arch}, {origin!r}: {log}" for arch, origin, log in result["refused"][:5])
    assert not result["refused"], f"NVRTC refuses {len(result['refused'])} units, of them:\n{text}"


def test_what_nvrtc_refuses_is_reported(compile, tmp_path):
    """Of a batch with one bad unit, that one, for every architecture, and why."""
    good, bad = (
        {"source": f'#include <cuda_fp16.h>\nextern "C" __global__ void k(float* x) {{ {body} }}', "options": [],
         "of": [name]}
        for name, body in (("good", "*x = __half2float(__float2half(*x));"), ("bad", "*x = undeclared(*x);"))
    )  # fmt: skip
    file = tmp_path / "units.json"
    file.write_text(json.dumps([good, bad]))
    result = compile(file)
    assert result["units"] == 2
    assert [(arch, origin) for arch, origin, _ in result["refused"]] == [(arch, "bad") for arch in ARCHITECTURES]
    assert all("undeclared" in log for *_, log in result["refused"])
