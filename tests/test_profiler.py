"""profile(): calls, launches and bytes by operation are exact; times add up; off, nothing is left of it."""

from __future__ import annotations

import json
import threading

import pytest

import gpuad
from gpuad import nn, optim, profiler
from gpuad.array.backend import RUNNING, Backend
from gpuad.autograd.live import subclasses
from gpuad.autograd.op import Op
from gpuad.autograd.walk import Walk
from gpuad.update import Updater


class Training:
    """A 6-5-3 relu network with cross-entropy on a device."""

    def __init__(self, device) -> None:
        self.model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(device)
        self.x = gpuad.randn(4, 6, device=device)
        self.labels = gpuad.randint(3, (4,), device=device)
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.labels).backward()
        self.optimizer.step()


def rows(p) -> dict:
    return {row.key: row for row in p.key_averages()}


def methods() -> list:
    """Every method that a profile replaces."""
    found = [Walk.run, Updater.step, gpuad.autograd.Function.__dict__["apply"]]
    for kind in [*subclasses(Op), *subclasses(Backend)]:
        names = RUNNING if issubclass(kind, Backend) else ("__call__", "in_place", "backward", "backward_recorded")
        found += [kind.__dict__[name] for name in names if name in kind.__dict__]
    return found


def test_a_training_step_by_operation(device):
    training = Training(device)
    with profiler.profile() as p:
        training.step()
        training.step()
    found = rows(p)
    expected = {"linear": 4, "linear backward": 4, "relu": 2, "relu backward": 2, "SGD step": 2}
    if device.backend.fuses_activations:  # the first layer takes its relu along, both ways
        expected = {"linear": 2, "linear_relu": 2, "linear backward": 4, "SGD step": 2}
    for name, calls in expected.items():
        assert found[name].count == calls, name
    assert found["backward()"].count == 2
    assert [row.count for name, row in found.items() if name.startswith("cross_entropy") and "back" in name] == [2]
    if not device.backend.fuses_activations:
        assert found["relu"].launches == 2 and found["relu"].bytes == 2 * 2 * 4 * 4 * 5
        assert found["relu backward"].bytes == 2 * 3 * 4 * 4 * 5  # the gradient, what was saved, the result
    assert found["SGD step"].launches == 2


@pytest.mark.cuda
def test_launches_are_those_of_the_device(cuda_device, counts):
    training = Training("cuda")
    with counts() as r:
        training.step()
    with profiler.profile() as p:
        training.step()
    total = p.key_averages().total_average()
    assert total["launches"] == r.kernel_launches + r.library_calls + r.stats["memsets"]


@pytest.mark.cuda
def test_measuring_starts_no_work_and_waits_for_nothing(cuda_device, counts):
    training = Training("cuda")
    with counts() as r:
        training.step()
    with profiler.profile():
        training.step()  # events are made
        with counts() as measured:
            training.step()
    assert measured.stats["kernels"] == r.stats["kernels"] and not measured.syncs and not measured.stats["copies"]


def test_times_of_calls_within_are_counted_once(device):
    x = gpuad.randn(8, 8, device=device, requires_grad=True)
    with profiler.profile() as p, profiler.record_function("everything"):
        (x @ x).sum().backward()
    found = rows(p)
    everything, walk = found["everything"], found["backward()"]
    assert everything.cpu_time_total >= walk.cpu_time_total >= found["gemm backward"].cpu_time_total > 0
    assert found["gemm"].count >= 1 and found["gemm backward"].count == 1
    total = p.key_averages().total_average()
    assert total["self_cpu_time_total"] == pytest.approx(everything.cpu_time_total)
    assert all(row.self_cpu_time_total >= 0 for row in found.values())
    on_device = [row.device_time_total for row in found.values()]
    assert any(t > 0 for t in on_device) == (device.type == "cuda")


def test_custom_functions_in_place_and_views(device):
    class Double(gpuad.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    x = gpuad.ones(3, 4, device=device, requires_grad=True)
    with profiler.profile() as p:
        y = Double.apply(x)
        y.mul_(3.0)
        y.t().contiguous().sum().backward()
    found = rows(p)
    assert found["Double"].count == found["Double backward"].count == found["mul_"].count == 1
    assert found["Double"].launches == 0  # its multiplication has it
    assert found["mul"].count >= 2
    view = next(row for name, row in found.items() if name in ("t", "transpose", "permute"))
    assert view.launches == 0 and view.bytes == 0
    assert x.grad.tolist() == [[6.0] * 4] * 3


def test_writing_a_formula_is_no_call():
    with profiler.profile() as p:
        double = gpuad.fuse(lambda x: gpuad.sigmoid(x) * 2)
        double(gpuad.ones(3))
    assert sum(row.count for row in p.key_averages()) == 1


def test_the_table(device):
    training = Training(device)
    with profiler.profile(record_shapes=True) as p:
        training.step()
    columns = {"count": "count", "self_cpu_time_total": "self_cpu_time_total", "launches": "launches",
               "bytes": "bytes", "self_cuda_time_total": "self_device_time_total"}  # fmt: skip
    for sort_by, attribute in columns.items():
        table = p.table(sort_by=sort_by)
        shown = [line.split("  ")[0] for line in table.splitlines()[2:-2]]
        values = [getattr(rows(p)[name], attribute) for name in shown]
        assert values == sorted(values, reverse=True) and len(shown) == len(rows(p))
    assert ("device µs" in p.table()) == (device.type == "cuda")
    assert len({len(line) for line in p.table().splitlines()}) == 1  # in columns
    assert len(p.table(row_limit=2).splitlines()) == 2 + 2 + 2
    by_shape = p.key_averages(group_by_input_shape=True)
    linears = [row for row in by_shape if row.key in ("linear", "linear_relu")]
    assert {row.input_shapes for row in linears} == {((4, 6), (5, 6), (5,)), ((4, 5), (3, 5), (3,))}
    assert "(4, 6)" in by_shape.table()
    with pytest.raises(ValueError, match="sort_by='speed'; give one of count, "):
        p.table(sort_by="speed")


def test_the_trace(device, tmp_path):
    training = Training(device)
    with profiler.profile() as p:
        training.step()
    p.export_chrome_trace(tmp_path / "trace.json")
    lines = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    on_host = [line for line in lines if line["tid"] == threading.get_ident()]
    assert [line["name"] for line in on_host] == [event.name for event in p.events()]
    assert all(line["ph"] == "X" and line["dur"] >= 0 and line["pid"] for line in lines)
    walk = next(line for line in on_host if line["name"] == "backward()")
    inner = [line for line in on_host if line["name"].endswith(" backward")]
    assert all(walk["ts"] <= line["ts"] <= line["ts"] + line["dur"] <= walk["ts"] + walk["dur"] for line in inner)
    on_device = [line for line in lines if line["tid"] == str(device)]
    timed = [event for event in p.events() if event.device is not None]
    assert len(on_device) == (len(timed) if device.type == "cuda" else 0)


@pytest.mark.cuda
def test_ranges_are_opened_for_nsight(cuda_device, monkeypatch):
    names, kind = [], type(cuda_device.backend)
    monkeypatch.setattr(kind, "range_push", lambda self, name: names.append(name))
    monkeypatch.setattr(kind, "range_pop", lambda self: names.append(None))
    x = gpuad.ones(3, device="cuda")
    with profiler.profile():
        x * 2
    assert names == ["mul", None]
    with profiler.profile(nvtx=False):
        x * 2
    assert names == ["mul", None]


def test_off_nothing_is_left(device):
    before = methods()
    with profiler.profile():
        during = methods()
        assert all(a is not b for a, b in zip(before, during, strict=True))
    assert all(a is b for a, b in zip(before, methods(), strict=True))
    with pytest.raises(ZeroDivisionError), profiler.profile():
        gpuad.ones(3, device=device) * (1 / 0)
    assert all(a is b for a, b in zip(before, methods(), strict=True))


def test_one_profile_at_a_time():
    with profiler.profile() as p:
        with pytest.raises(gpuad.errors.GpuadError, match="A profile is open already"):
            profiler.profile().__enter__()
        gpuad.ones(2) * 2
    assert rows(p)["mul"].count == 1
    with profiler.record_function("without a profile"):
        gpuad.ones(2) * 2


def test_an_operation_that_fails_is_closed(device):
    with profiler.profile() as p:
        with pytest.raises(gpuad.errors.ShapeError):
            gpuad.ones(2, device=device) @ gpuad.ones(3, device=device)
        gpuad.ones(2, device=device) * 2
    assert all(event.parent is None or event.parent.name != "mul" for event in p.events())
    assert next(event for event in p.events() if event.name == "mul").parent is None


def test_threads_have_their_own_nesting():
    def work():
        with profiler.record_function("outer"):
            gpuad.ones(3) * 2

    with profiler.profile() as p:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    inner = [event for event in p.events() if event.name == "mul"]
    assert len(inner) == 3 and all(e.parent.name == "outer" and e.parent.thread == e.thread for e in inner)
    assert gpuad.profiler is profiler
