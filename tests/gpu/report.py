"""On a machine with a GPU: runs the CUDA tests and times training steps, and writes a Markdown page of both.

    pip install -e ".[cuda13,test]"; pip install torch      # torch is optional: without it its columns are left out
    python tests/gpu/report.py [--output report.md] [--rounds 30] [--batches 128 4096] [--tests tests]

The steps are those of tests/benchmarks/workloads.py. Timed beside gpuad are PyTorch eager, PyTorch replaying the step
as one CUDA graph, and the bound that cuBLAS sets: the matrix products of the step alone, back to back in one CUDA
graph. All take turns in each round, in an order that changes, so that a clock that moves harms all alike; a time is
that of a step when many are given to the device and waited for together. Shown are medians over the rounds.

--dry-run goes through all of it with tiny sizes, also on a simulated device, and gives no figures worth reading.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import workloads  # noqa: E402

import gpuad.nn  # noqa: E402
import gpuad.optim  # noqa: E402

ROUND_SECONDS = 0.05
# What each workload multiplies: the sizes of its layers.
LAYERS = {"mlp_2_16_16_1": (2, 16, 16, 1), "mlp_64_128_10": (64, 128, 10), "mlp_784_512_512_10": (784, 512, 512, 10)}
COLUMNS = ("gpuad", "PyTorch eager", "PyTorch CUDA graph", "cuBLAS alone")

Step = Callable[[], Any]


def torch_on_cuda() -> tuple[Any, str]:
    """(torch, "") where it can use the device, else (None, why not)."""
    if importlib.util.find_spec("torch") is None:
        return None, "PyTorch is not installed, so its columns are left out (`pip install torch`)."
    import torch

    if not torch.cuda.is_available():
        return None, f"PyTorch {torch.__version__} sees no CUDA device, so its columns are left out."
    return torch, ""


# The contestants ------------------------------------------------------------------------------------------------------


def torch_graph(torch: Any, step: Step) -> Step:
    """The step as one CUDA graph, on the data of one batch; warmed up on a stream of its own, as PyTorch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def products(sizes: Sequence[int], batch: int) -> Step:
    """The matrix products of a training step, one after another in one CUDA graph."""
    import cupy

    backend = gpuad.device("cuda").backend

    def matrix(rows: int, columns: int) -> Any:
        return gpuad.randn(rows, columns, device="cuda")._data

    calls = []
    for number, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        x, weight, gradient = matrix(batch, fan_in), matrix(fan_out, fan_in), matrix(batch, fan_out)
        calls.append((x, weight.T, matrix(batch, fan_out)))  # forward
        calls.append((gradient.T, x, matrix(fan_out, fan_in)))  # the weight's gradient
        if number:
            calls.append((gradient, weight, matrix(batch, fan_in)))  # the input's; nobody wants that of the data

    def run() -> None:
        for a, b, out in calls:
            backend.gemm(a, b, out)

    run()  # cuBLAS makes its workspace before the capture
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        run()
        stream.synchronize()
        stream.begin_capture()
        run()
        graph = stream.end_capture()
    return lambda: graph.launch(stream)


def contestants(name: str, batch: int, torch: Any) -> dict[str, Step]:
    """What is timed for a workload, by column."""
    make = getattr(workloads, name)
    found: dict[str, Step] = {"gpuad": make(gpuad, "cuda", batch)[0]}
    if torch is not None:
        found["PyTorch eager"] = make(torch, "cuda", batch)[0]
        found["PyTorch CUDA graph"] = torch_graph(torch, make(torch, "cuda", batch)[0])
    if name in LAYERS:
        found["cuBLAS alone"] = products(LAYERS[name], batch)
    return found


# Timing ---------------------------------------------------------------------------------------------------------------


def seconds_a_step(step: Step, repeats: int) -> float:
    """The mean time of `repeats` steps that the device is given and that are waited for at the end."""
    gpuad.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    gpuad.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(steps: dict[str, Step], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a step of each contestant in each round, taken in turns."""
    repeats = {}
    for name, step in steps.items():
        seconds_a_step(step, 3)
        repeats[name] = max(1, round(seconds / seconds_a_step(step, 5)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        order = [*order[1:], order[0]]
        for name in order:
            times[name].append(seconds_a_step(steps[name], repeats[name]))
    return times


def table(found: dict[tuple[str, int], dict[str, list[float]]]) -> list[str]:
    """The lines of the Markdown table: medians in µs, and of each round's ratio of gpuad to PyTorch eager."""
    shown = [column for column in COLUMNS if any(column in times for times in found.values())]
    ratio = "PyTorch eager" in shown
    heading = ["step", "batch", *(f"{column}, µs" for column in shown), *(["gpuad / PyTorch eager"] if ratio else [])]
    lines = [f"| {' | '.join(heading)} |", f"|{' --- |' * 2}{' ---: |' * (len(heading) - 2)}"]
    for (name, batch), times in found.items():
        cells = [name, str(batch)]
        cells += [f"{statistics.median(times[c]) * 1e6:,.1f}" if c in times else "–" for c in shown]
        if ratio:
            pairs = zip(times["gpuad"], times["PyTorch eager"], strict=True)
            cells.append(f"{statistics.median(ours / theirs for ours, theirs in pairs):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# The rest of the page -------------------------------------------------------------------------------------------------


def machine(torch: Any) -> list[str]:
    """The device and the versions of everything that the figures depend on."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = gpuad.cuda.get_device_properties()
    versions = {"gpuad": gpuad.__version__, "Python": platform.python_version(), "CuPy": cupy.__version__}
    for package in ("numpy", "nvmath-python"):
        versions[package] = importlib.metadata.version(package)
    for name, number in (("CUDA runtime", runtime.runtimeGetVersion()), ("driver's CUDA", runtime.driverGetVersion())):
        versions[name] = f"{number // 1000}.{number % 1000 // 10}"
    if torch is not None:
        versions["PyTorch"] = f"{torch.__version__} (CUDA {torch.version.cuda})"
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    capability = f"compute capability {properties.major}.{properties.minor}"
    return [
        f"Device: {properties.name}, {capability}, {properties.multi_processor_count} multiprocessors, {memory}.",
        f"Host: {platform.machine()}, {os.cpu_count()} cores.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]


def run_tests(target: str) -> tuple[bool, str]:
    """Whether the tests on CUDA devices passed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0, lines[-1].strip("= ") if lines else f"pytest ended with {done.returncode}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page. Returns 0, 1 when a test failed, or 2 when there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("report.md"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--tests", default="tests", help="what pytest is to run")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes and one round, on any device")
    options = parser.parse_args(arguments)
    if not gpuad.cuda.is_available():
        print("There is no CUDA device to measure on; gpuad.device('cuda') says what is missing.", file=sys.stderr)
        return 2
    if importlib.util.find_spec("cudasim") is not None and not options.dry_run:
        print("This device is simulated, its times mean nothing; go through the code with --dry-run.", file=sys.stderr)
        return 2
    seconds = ROUND_SECONDS
    if options.dry_run:
        options.rounds, options.batches, seconds, workloads.BATCHES = 1, [4], 0.0, 2
    torch, missing = torch_on_cuda()
    lines = ["# gpuad on " + gpuad.cuda.get_device_name(), ""]
    if options.dry_run:
        lines += ["**A dry run: the figures mean nothing.**", ""]
    lines += [line + "\n" for line in machine(torch)]
    passed, summary = run_tests(options.tests)
    lines += [f"Tests on CUDA devices (`pytest -m cuda {options.tests}`): {summary}.", ""]
    found = {}
    for batch in options.batches:
        for workload in workloads.TARGETS:
            name = workload.__name__
            found[name, batch] = measure(contestants(name, batch, torch), options.rounds, seconds)
            gpuad.cuda.empty_cache()
            print(f"{name}, batch {batch}: done", flush=True)
    lines += ["Time of a training step, all contestants in turns:", "", *table(found), ""]
    lines += [missing] if missing else []
    options.output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(options.output.read_text(encoding="utf-8"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
