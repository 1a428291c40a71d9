"""What is installed and what an import brings with it; run against the wheel as well as the editable install."""

import importlib.metadata
import importlib.resources
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def isolated(code, tmp_path):
    """What `code` prints in a fresh interpreter that sees installed packages only."""
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_nothing_called_nn_or_optim_is_installed(tmp_path):
    found = isolated(
        """
import importlib.util, gpuad.nn, gpuad.optim
print(gpuad.nn.__name__, gpuad.optim.__name__, *(importlib.util.find_spec(name) for name in ("nn", "optim")))
""",
        tmp_path,
    )
    assert found.split() == ["gpuad.nn", "gpuad.optim", "None", "None"]


def test_every_installed_file_is_gpuads_own():
    ours = re.compile(r"gpuad$|gpuad-.*\.dist-info$|__editable__|__pycache__$")
    roots = {path.parts[0] for path in importlib.metadata.files("gpuad")}
    assert [root for root in roots if not ours.match(root)] == []


def test_every_package_of_the_repository_is_listed():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = set()
    for top, name in (("gpuad", "gpuad"), ("nn", "gpuad.nn"), ("optim", "gpuad.optim")):
        for init in (REPOSITORY / top).rglob("__init__.py"):
            present.add(".".join([name, *init.parent.relative_to(REPOSITORY / top).parts]))
    assert sorted(listed) == sorted(present)


def test_types_are_marked_as_present():
    assert importlib.resources.files("gpuad").joinpath("py.typed").is_file()


def test_no_extra_asks_for_the_source_package_cupy():
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in importlib.metadata.requires("gpuad")]
    assert "numpy" in names
    assert "cupy" not in names


@pytest.mark.parametrize("module", ["gpuad", "gpuad.nn", "gpuad.optim", "gpuad.utils.data"])
def test_an_import_brings_only_numpy_and_the_standard_library(module, tmp_path):
    code = f"""
import json, sys, numpy
before = set(sys.modules)
import {module}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    roots = {name.partition(".")[0] for name in json.loads(isolated(code, tmp_path))}
    assert sorted(roots - sys.stdlib_module_names - {"gpuad", "numpy"}) == []


def test_parts_are_there_without_an_import_of_their_own(tmp_path):
    """As PyTorch's are, and imported on first use only."""
    code = (
        "import sys, gpuad as torch\n"
        "assert not [m for m in sys.modules if m.startswith(('gpuad.nn', 'gpuad.optim', 'gpuad.graph'))]\n"
        "model = torch.nn.Linear(2, 1); torch.optim.SGD(model.parameters(), lr=0.1).step()\n"
        "torch.utils.data.DataLoader; torch.graph.trace\n"
        "try: torch.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    # Elsewhere: in a checkout `-c` would find its gpuad/, which has no nn, before the installed one.
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout == "module 'gpuad' has no attribute 'nothing'\n", found.stderr
