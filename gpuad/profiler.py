"""Where a program spends its time and memory traffic, by operation: `with gpuad.profiler.profile() as p:`.

While a profile is open, the methods through which operations run (`__call__`, `in_place`, `backward` of every kind of
op, the walk, an optimiser's update, and those of a backend that start something) are replaced by ones that measure.
Closed, they are the same functions as ever: a profiler that is off costs nothing.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gpuad.array.backend import RUNNING, Backend
from gpuad.array.device import Device, of_array
from gpuad.autograd.function import Function, _Applied
from gpuad.autograd.live import subclasses
from gpuad.autograd.op import Op
from gpuad.autograd.walk import Walk
from gpuad.errors import GpuadError
from gpuad.kernels.expr import Expr
from gpuad.profile_report import Event, EventList
from gpuad.tensor import Tensor
from gpuad.update import Updater

__all__ = ["Event", "EventList", "profile", "record_function"]

_open: profile | None = None


class _Stack(threading.local):
    """The events of this thread that are under way, and whether a backend's method is."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.running = False


class profile:  # noqa: N801  (PyTorch's name)
    """A context manager that measures every operation of all threads; read it after the block.

    record_shapes keeps the shapes of operands, for `key_averages(group_by_input_shape=True)`. nvtx opens a range for
    each operation on a CUDA device, which Nsight Systems shows.

    Host time is that of the calls. Device time lies between two CUDA events around what an operation gave to its
    stream: pauses in which the device waits for the host count too. Launches are kernels, programs, products and
    copies that the backend was asked for (what CuPy starts within one of them is not told apart; an operation that
    makes an array by other ways counts one). Bytes are those of the arrays that these read and write, each once.
    """

    def __init__(self, *, record_shapes: bool = False, nvtx: bool = True) -> None:
        self.record_shapes, self.nvtx = record_shapes, nvtx
        self._events: list[Event] = []
        self._stack = _Stack()
        self._undo: list[tuple[type, str, Any]] = []
        self._starts: dict[Device, tuple[int, Any]] = {}
        self._locked = threading.Lock()

    def __enter__(self) -> profile:
        global _open
        if _open is not None:
            raise GpuadError("A profile is open already, and its figures would hold those of this one; close it first.")
        _open = self
        self._install()
        return self

    def __exit__(self, *exc: object) -> None:
        global _open
        for owner, name, was in reversed(self._undo):
            setattr(owner, name, was)
        self._undo.clear()
        _open = None
        for event in self._events:
            if event.marks is not None:
                device, start, end = event.marks
                backend = device.backend
                host, first = self._starts[device]
                event.device_start = host + round(backend.milliseconds(first, start) * 1e6)
                event.device_time = round(backend.milliseconds(start, end) * 1e6)
                event.marks = None
        for event in self._events:
            if event.parent is not None:
                event.parent.inside += event.end - event.start
                if event.parent.device is event.device:
                    event.parent.device_inside += event.device_time

    # What is found ----------------------------------------------------------------------------------------------------

    def events(self) -> list[Event]:
        """Every call, in the order in which they began."""
        return sorted(self._events, key=lambda event: event.start)

    def key_averages(self, group_by_input_shape: bool = False) -> EventList:
        """The calls of the same name (and, if asked, shapes) together."""
        return EventList(self._events, group_by_input_shape)

    def table(self, sort_by: str | None = None, row_limit: int = 100) -> str:
        """key_averages() as text: a row for each name, the one with the most `sort_by` first."""
        return self.key_averages().table(sort_by, row_limit)

    def export_chrome_trace(self, path: str | os.PathLike) -> None:
        """Write the calls as a JSON file that chrome://tracing and https://ui.perfetto.dev show.

        Each host thread is a row, and each CUDA device.
        """
        found = [line for event in self.events() for line in event.trace()]
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": found, "displayTimeUnit": "ms"}, file)

    # Measuring --------------------------------------------------------------------------------------------------------

    def begin(self, name: str, kind: str, device: Device | None, key: Any = None) -> Event:
        """Open an event under the one that is under way in this thread."""
        stack = self._stack.events
        event = Event(name, kind, device, stack[-1] if stack else None, key)
        stack.append(event)
        if device is not None:
            backend = device.backend
            if self.nvtx:
                backend.range_push(name)
            start = backend.mark()
            if start is not None:
                if device not in self._starts:
                    with self._locked:
                        self._starts.setdefault(device, (time.perf_counter_ns(), start))
                event.marks = (device, start, None)
        event.start = time.perf_counter_ns()
        return event

    def end(self, event: Event) -> None:
        """Close an event."""
        event.end = time.perf_counter_ns()
        if event.device is not None:
            if event.marks is not None:
                event.marks = (*event.marks[:2], event.device.backend.mark())
            if self.nvtx:
                event.device.backend.range_pop()
        self._stack.events.pop()
        self._events.append(event)

    def _measured(self, name: str, kind: str, device: Device | None, call: Callable[[], Any], given: Any = (),
                  key: Any = None) -> Any:  # fmt: skip
        event = self.begin(name, kind, device, key)
        if self.record_shapes:
            event.shapes = tuple([tuple(a.shape) for a in _arrays(given)])
        try:
            result = call()
            if not event.launches and not event.has_children:
                made = [a for a in _arrays(result) if a.base is None]
                known = [id(a) for a in _arrays(given)]
                if any(id(a) not in known for a in made):
                    event.launches, event.bytes = 1, sum(a.nbytes for a in made + _arrays(given))
            return result
        finally:
            self.end(event)

    # Putting it in place ----------------------------------------------------------------------------------------------

    def _install(self) -> None:
        for kind in [*subclasses(Op), _Applied]:
            for name in ("__call__", "in_place"):
                if name in kind.__dict__:
                    self._replace(kind, name, self._forward)
            for name in ("backward", "backward_recorded"):
                if name in kind.__dict__:
                    self._replace(kind, name, self._backward)
        for kind in subclasses(Backend):
            for name in RUNNING:
                if name in kind.__dict__ or kind is Backend:
                    self._replace(kind, name, self._running)
        self._replace(Walk, "run", self._walk)
        self._replace(Updater, "step", self._step)
        self._replace(Function, "apply", self._apply)

    def _replace(self, owner: type, name: str, measuring: Callable) -> None:
        was = owner.__dict__[name]
        self._undo.append((owner, name, was))
        if isinstance(was, classmethod):
            setattr(owner, name, classmethod(measuring(was.__func__, name)))
        else:
            setattr(owner, name, functools.wraps(was)(measuring(was, name)))

    def _forward(self, was: Callable, name: str) -> Callable:
        ending = "_" if name == "in_place" else ""

        def call(op: Any, *inputs: Any, **named: Any) -> Any:
            if any([isinstance(x, Expr) for x in inputs]):
                return was(op, *inputs, **named)  # a formula is being written, nothing runs
            device = _device_of(inputs)
            return self._measured(op.name + ending, "forward", device, lambda: was(op, *inputs, **named), inputs)

        return call

    def _backward(self, was: Callable, _: str) -> Callable:
        def call(op: Any, node: Any, gradient: Any, walk: Any) -> Any:
            stack = self._stack.events
            if stack and stack[-1].key is node:  # the method of a base class, called by that of the class
                return was(op, node, gradient, walk)
            name = f"{op.name} backward"
            return self._measured(
                name, "backward", node.device, lambda: was(op, node, gradient, walk), (gradient, node.saved), node
            )

        return call

    def _walk(self, was: Callable, _: str) -> Callable:
        def run(walk: Any, *arguments: Any, **named: Any) -> Any:
            return self._measured("backward()", "walk", None, lambda: was(walk, *arguments, **named))

        return run

    def _step(self, was: Callable, _: str) -> Callable:
        def step(updater: Any, groups: Any, *rest: Any) -> Any:
            device = _device_of([p for group in groups for p in group["params"]])
            return self._measured(f"{updater.rule.name} step", "optimizer", device, lambda: was(updater, groups, *rest))

        return step

    def _apply(self, was: Callable, _: str) -> Callable:
        def apply(cls: type, *inputs: Any) -> Any:
            return self._measured(cls.__name__, "forward", _device_of(inputs), lambda: was(cls, *inputs), inputs)

        return apply

    def _running(self, was: Callable, name: str) -> Callable:
        def run(backend: Any, *arguments: Any, **named: Any) -> Any:
            stack = self._stack
            if stack.running or not stack.events:
                return was(backend, *arguments, **named)
            stack.running = True
            try:
                result = was(backend, *arguments, **named)
            finally:
                stack.running = False
            if name != "cast" or not any([result is a for a in arguments]):  # a cast to what it is runs nothing
                event = stack.events[-1]
                event.launches += 1
                distinct = {id(a): a for a in _arrays((arguments, tuple(named.values()), result))}
                event.bytes += sum([a.nbytes for a in distinct.values()])
            return result

        return run


@contextmanager
def record_function(name: str) -> Iterator[None]:
    """Give a stretch of code a name in the profile that is open; without one it costs next to nothing."""
    opened = _open
    if opened is None:
        yield
        return
    event = opened.begin(name, "user", None)
    try:
        yield
    finally:
        opened.end(event)


def _device_of(inputs: Any) -> Device | None:
    for x in inputs:
        if isinstance(x, Tensor):
            return x._device
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor):
            return x[0]._device
        if not isinstance(x, (int, float)) and hasattr(x, "__array_priority__") and hasattr(x, "nbytes"):
            return of_array(x)
    return None


def _arrays(x: Any) -> list[Any]:
    """The bare arrays in a value: Tensors' and those in (nested) lists and tuples."""
    if isinstance(x, Tensor):
        return [x._data]
    if isinstance(x, (list, tuple)):
        return [a for each in x for a in _arrays(each)]
    return [x] if hasattr(x, "__array_priority__") and hasattr(x, "nbytes") and hasattr(x, "base") else []
