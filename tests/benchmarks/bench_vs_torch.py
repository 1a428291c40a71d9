"""Times gpuad against PyTorch eager on the CPU, both in this process, in interleaved rounds.

    pip install ".[benchmarks]" torch        # in an environment of its own
    python tests/benchmarks/bench_vs_torch.py [--rounds 60] [--threads 2] [--only gelu]

Each round times both libraries, in an order that changes from round to round, for about 20 ms each. Shown are the
medians over the rounds and the median of the rounds' ratios, so that a busy neighbour harms both alike. Before the
clock starts both do some steps on the same data from the same weights, and their losses and gradients are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUND_SECONDS = 0.02


def processor() -> str:
    """The name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(threads: int) -> str:
    """Processor, versions and the BLAS in use: what is needed to read the figures."""
    import numpy
    import torch
    from threadpoolctl import threadpool_info

    import gpuad

    blas = [
        f"{info['internal_api']} {info.get('version')} ({info.get('architecture', '?')}, {info['num_threads']} threads)"
        for info in threadpool_info()
        if info["user_api"] == "blas"
    ]
    versions = f"Python {platform.python_version()}, NumPy {numpy.__version__}, PyTorch {torch.__version__}"
    return (
        f"{processor()}, {os.cpu_count()} cores, {threads} threads for each library\n"
        f"gpuad {gpuad.__version__}, {versions}\nBLAS: {'; '.join(blas)}\n"
        f"load average {os.getloadavg()[0]:.2f} (figures taken beside other work mean little)"
    )


def check_same_work(name: str, makers: dict[str, tuple]) -> None:
    """Both libraries, ten steps from the same weights: the same losses, and the same gradients to rounding."""
    import numpy as np

    losses = {library: [step().item() for _ in range(10)] for library, (step, _) in makers.items()}
    np.testing.assert_allclose(losses["gpuad"], losses["torch"], rtol=1e-4, atol=1e-6, err_msg=f"{name}: losses")
    for ours, theirs in zip(makers["gpuad"][1], makers["torch"][1], strict=True):
        expected = theirs.grad.numpy()
        # As a whole and not entry by entry: rounding may put single inputs on the other side of a relu's kink.
        difference = np.linalg.norm(ours.grad.numpy() - expected) / np.linalg.norm(expected)
        assert difference < 1e-2, f"{name}: gradients differ by {difference:.1e} of their norm"


def seconds_per_step(step: Callable[[], Any], repeats: int) -> float:
    """The mean time of `repeats` steps."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def compare(makers: dict[str, tuple], rounds: int) -> tuple[float, float, float]:
    """Median seconds of gpuad, of PyTorch, and the median of the ratios of the rounds."""
    steps = {library: step for library, (step, _) in makers.items()}
    repeats = {}
    for library, step in steps.items():
        seconds_per_step(step, 3)
        repeats[library] = max(1, round(ROUND_SECONDS / seconds_per_step(step, 5)))
    times: dict[str, list[float]] = {library: [] for library in steps}
    order = list(steps)
    for _ in range(rounds):
        order.reverse()
        for library in order:
            times[library].append(seconds_per_step(steps[library], repeats[library]))
    ratios = [ours / theirs for ours, theirs in zip(times["gpuad"], times["torch"], strict=True)]
    return statistics.median(times["gpuad"]), statistics.median(times["torch"]), statistics.median(ratios)


def main() -> int:
    """Time every workload. Returns 0 when all are within their targets, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", help="a part of a workload's name")
    options = parser.parse_args()
    # Read by the libraries when they are loaded, so they are loaded only now.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    import torch
    from workloads import TARGETS

    import gpuad.nn
    import gpuad.optim

    for library in (gpuad, torch):
        library.set_num_threads(options.threads)
    print(describe(options.threads))
    print(f"\n{'workload':20} {'gpuad µs':>10} {'torch µs':>10} {'ratio':>7} {'target':>7}")
    missed = 0
    for workload, target in TARGETS.items():
        name = workload.__name__
        if options.only and options.only not in name:
            continue
        makers = {"gpuad": workload(gpuad), "torch": workload(torch)}
        check_same_work(name, makers)
        ours, theirs, ratio = compare(makers, options.rounds)
        missed += ratio > target
        verdict = "" if ratio <= target else "  missed"
        print(f"{name:20} {ours * 1e6:10.1f} {theirs * 1e6:10.1f} {ratio:7.2f} {target:7.2f}{verdict}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
