"""Times of gpuad alone, with pytest-benchmark: training steps, the cost of one op, and the import.

    pip install -e ".[benchmarks]"
    pytest tests/benchmarks/bench_steps.py [--benchmark-save NAME] [--benchmark-compare]

Not part of the suite: the file is named on the command line.
"""

import subprocess
import sys

import numpy as np
import pytest
from workloads import TARGETS

import gpuad.nn
import gpuad.optim


@pytest.mark.parametrize("workload", TARGETS, ids=lambda workload: workload.__name__)
def test_step(workload, device, benchmark):
    step, _ = workload(gpuad, device)

    def finished():
        step().item()  # the one host read waits for the device, so that its work is timed and not only its launch

    benchmark.pedantic(finished, rounds=30, warmup_rounds=3)


@pytest.mark.parametrize("mode", ["recorded", "no_grad", "numpy"])
def test_one_op(mode, benchmark):
    """x + y of 16 numbers: what the tape adds to the bare NumPy call."""
    x, y = np.ones(16, np.float32), np.ones(16, np.float32)
    if mode == "numpy":
        benchmark(np.add, x, y)
        return
    x, y = gpuad.from_numpy(x).requires_grad_(), gpuad.from_numpy(y)
    with gpuad.set_grad_enabled(mode == "recorded"):
        benchmark(gpuad.add, x, y)


def test_import_beyond_numpy(benchmark):
    """Seconds that `import gpuad` takes after `import numpy`, in a fresh interpreter (extra_info: the median)."""
    code = "import numpy, time; t = time.perf_counter(); import gpuad; print(time.perf_counter() - t)"
    seconds = []

    def fresh():
        seconds.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))

    benchmark.pedantic(fresh, rounds=7, warmup_rounds=1)
    benchmark.extra_info["import_seconds"] = float(np.median(seconds))
    print(f"\nimport gpuad, beyond NumPy: {np.median(seconds):.3f} s")
