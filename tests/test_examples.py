"""Each example, run as its reader would run it, with short settings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason='the examples need pip install "gpuad[examples]"')
pytest.importorskip("sklearn", reason='the examples need pip install "gpuad[examples]"')

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    """What `python examples/NAME ARGUMENTS` prints; it has to exit with status 0 and say nothing on stderr."""
    finished = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr == ""
    return finished.stdout


def test_train_mlp_keeps_its_promise(tmp_path):
    curve, plot = tmp_path / "curve.json", tmp_path / "curve.png"
    shown = run("train_mlp.py", "--device", "cpu", "--curve", curve, "--plot", plot)
    history = json.loads(curve.read_text())
    assert history["test_accuracy"][-1] >= 0.97
    assert len(history["loss"]) == 20
    assert shown.rstrip().endswith(
        f"seed 0  loss {history['loss'][-1]!r}  held-out accuracy {history['test_accuracy'][-1]!r}"
    )
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.cuda
def test_train_mlp_has_the_same_curve_on_cuda(tmp_path):
    curves = {}
    for device in ("cpu", "cuda"):
        run("train_mlp.py", "--device", device, "--epochs", 5, "--curve", tmp_path / device)
        curves[device] = json.loads((tmp_path / device).read_text())
    assert curves["cuda"]["device"] == "cuda:0"
    assert curves["cuda"]["loss"] == pytest.approx(curves["cpu"]["loss"], rel=1e-4)
    assert curves["cuda"]["accuracy"] == curves["cpu"]["accuracy"]
    assert curves["cuda"]["test_accuracy"] == curves["cpu"]["test_accuracy"]


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_train_mlp_reads_mnist_files(tmp_path, compressed):
    import gzip
    import struct

    import numpy as np

    numbers = np.random.default_rng(0)
    for split, count in (("train", 96), ("t10k", 32)):
        arrays = {
            "images-idx3": numbers.integers(0, 256, (count, 28, 28)),
            "labels-idx1": numbers.integers(0, 10, count),
        }
        for kind, array in arrays.items():
            raw = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.astype("u1").tobytes()
            name = f"{split}-{kind}-ubyte"
            if compressed:
                tmp_path.joinpath(name + ".gz").write_bytes(gzip.compress(raw))
            else:
                tmp_path.joinpath(name).write_bytes(raw)
    shown = run("train_mlp.py", "--device", "cpu", "--data", tmp_path, "--epochs", 2)
    assert "96 images to learn from, 32 held out" in shown
    assert "in_features=784" in shown


def largest_difference(shown):
    return float(re.search(r"largest relative difference: (\S+)", shown)[1])


def test_device_switch_within_one_device():
    assert largest_difference(run("device_switch.py", "--second", "cpu", "--epochs", 2)) == 0


def test_device_switch_says_what_is_missing():
    shown = run("device_switch.py", "--second", "cuda:99", "--epochs", 2)
    assert "CUDA" in shown.partition("\n")[0]
    assert "both runs stay on cpu" in shown
    assert largest_difference(shown) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("first, second", [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_device_switch_between_devices(first, second):
    shown = run("device_switch.py", "--first", first, "--second", second, "--epochs", 4)
    assert f"<- now on {second}" in shown
    assert largest_difference(shown) < 1e-4


def test_custom_kernel(device):
    shown = run("custom_kernel.py", "--device", device)
    assert "exp(" in shown  # of the CUDA source
    differences = [float(number) for number in re.findall(r"finite differences: (\S+)", shown)]
    assert len(differences) == 2
    assert max(differences) < 1e-7


def test_forward_and_reverse(device, tmp_path):
    page = tmp_path / "f.html"
    shown = run("forward_and_reverse.py", "--x", 1.5, "--y", -2, "--device", device, "--page", page)
    assert all(drawn in shown for drawn in ("├── v1 = x + y", "└── v2 = x − y", "b = x − y   value      3.5"))
    assert re.search(r"-0\.5 · 1 +|3\.5 · 1 ", shown)
    assert "All agree." in shown
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_cupy_kernel(cuda_device):
    shown = run("cupy_kernel.py", "--device", cuda_device)
    differences = [float(number) for number in re.findall(r"finite differences: (\S+)", shown)]
    assert len(differences) == 2
    assert max(differences) < 1e-7


def test_cupy_kernel_says_why_it_cannot_run_on_the_host():
    assert "CuPy's kernels run on CUDA devices, and this is cpu" in run("cupy_kernel.py", "--device", "cpu")


def test_newton_and_hvp_is_as_good_as_scipys_own_derivatives():
    shown = run("newton_and_hvp.py", "--device", "cpu")
    assert [float(n) for n in re.findall(r"difference from SciPy's (\S+)", shown)] == pytest.approx([0, 0], abs=1e-13)
    assert [float(n) for n in re.findall(r"distance from the minimum: (\S+)", shown)] == pytest.approx([0, 0], abs=1e-8)


def test_per_sample_gradients(device):
    shown = run("per_sample_gradients.py", "--device", device, "--examples", 32)
    assert "(32, 32, 64)" in shown
    assert float(re.search(r"largest difference (\S+)", shown)[1]) < 1e-6


def test_physics_solves_its_equation():
    shown = run("physics.py", "--device", "cpu")
    assert float(re.search(r"largest error of the solution: (\S+)", shown)[1]) < 2e-3


@pytest.mark.cuda
def test_physics_runs_on_cuda():
    assert "largest error of the solution" in run("physics.py", "--device", "cuda", "--steps", 3)
