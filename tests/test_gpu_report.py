"""tests/gpu/report.py goes through from end to end; its figures are for machines with a GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpuad

SCRIPT = Path(__file__).parent / "gpu" / "report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_leaves_out_what_was_not_measured(report):
    found = {
        ("mlp", 128): {"gpuad": [2e-6, 4e-6, 3e-6], "cuBLAS alone": [1e-6, 1e-6, 1e-6]},
        ("gelu", 128): {"gpuad": [1.5e-3]},
    }
    assert report.table(found) == [
        "| step | batch | gpuad, µs | cuBLAS alone, µs |",
        "| --- | --- | ---: | ---: |",
        "| mlp | 128 | 3.0 | 1.0 |",
        "| gelu | 128 | 1,500.0 | – |",
    ]


def test_the_ratio_is_the_median_of_those_of_the_rounds(report):
    found = {("mlp", 4): {"gpuad": [1.0, 2.0, 9.0], "PyTorch eager": [2.0, 2.0, 3.0], "PyTorch CUDA graph": [1.0]}}
    lines = report.table(found)
    assert lines[0].endswith("| PyTorch CUDA graph, µs | gpuad / PyTorch eager |")
    assert lines[2].endswith("| 1,000,000.0 | 1.00 |")


def test_everybody_takes_a_turn_in_each_round(report, monkeypatch):
    turns = []
    monkeypatch.setattr(report, "seconds_a_step", lambda step, repeats: turns.append((step(), repeats)) or 0.01)
    times = report.measure({"a": lambda: "a", "b": lambda: "b"}, rounds=3, seconds=0.04)
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    assert turns[:4] == [("a", 3), ("a", 5), ("b", 3), ("b", 5)]
    assert [name for name, _ in turns[4:]] == ["b", "a", "a", "b", "b", "a"] and turns[4][1] == 4


def test_without_a_device_it_says_so(report, monkeypatch, capsys):
    monkeypatch.setattr(report.gpuad.cuda, "is_available", lambda: False)
    assert report.main([]) == 2
    assert "There is no CUDA device to measure on" in capsys.readouterr().err


@pytest.mark.cuda
def test_a_simulated_device_is_not_timed(report, tmp_path, capsys):
    pytest.importorskip("cudasim")
    assert report.main(["--output", str(tmp_path / "report.md")]) == 2
    assert "simulated" in capsys.readouterr().err and not (tmp_path / "report.md").exists()


@pytest.mark.cuda
def test_a_dry_run_writes_the_page(tmp_path):
    page = tmp_path / "report.md"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--output", str(page), "--tests", "tests/test_sync_debug.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert text.startswith("# gpuad on ") and "the figures mean nothing" in text
    assert re.search(r"Tests on CUDA devices .*: \d+ passed", text)
    assert re.search(r"^Versions: gpuad .*CuPy .*CUDA runtime ", text, re.M)
    rows = [line for line in text.splitlines() if line.startswith(("| mlp_", "| gelu"))]
    assert len(rows) == 4 and all(re.search(r"\| 4 \| [\d.,]+ ", row) for row in rows)
    assert "PyTorch" in text  # its columns, or why they are not there


def test_products_of_a_step_are_those_of_the_layers(report, cuda_device, counts):
    run = report.products((6, 5, 3), 4)
    with counts() as r:
        run()
        gpuad.cuda.synchronize()
    assert r.stats["graph_launches"] == 1 and r.graph_kernels == 5  # 2 forward, 2 of weights, 1 of an input
