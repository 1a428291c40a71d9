"""What a profile has found: single calls, sums by name, the table and the lines of a trace."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from gpuad.array.device import Device


class Event:
    """One call: what it was, when it began and ended on the host (ns), and what it did on its device.

    kind: "forward", "backward", "optimizer", "walk" (of the tape) or "user" (record_function). start, end: host time.
    device_start, device_time: on a CUDA device, else 0. inside, device_inside: the share of calls within this one.
    launches, bytes: without those of calls within.
    """

    __slots__ = ("name", "kind", "device", "parent", "key", "start", "end", "device_start", "device_time", "inside",
                 "device_inside", "launches", "bytes", "shapes", "thread", "marks", "has_children")  # fmt: skip

    marks: Any

    def __init__(self, name: str, kind: str, device: Device | None, parent: Event | None, key: Any) -> None:
        self.name, self.kind, self.device, self.parent, self.key = name, kind, device, parent, key
        self.start = self.end = self.device_start = self.device_time = self.inside = self.device_inside = 0
        self.launches = self.bytes = 0
        self.shapes: tuple[Any, ...] = ()
        self.thread = threading.get_ident()
        self.marks = None
        self.has_children = False
        if parent is not None:
            parent.has_children = True

    def __repr__(self) -> str:
        return f"<Event {self.name}: {(self.end - self.start) / 1e3:.1f} µs>"

    def trace(self) -> Iterator[dict[str, Any]]:
        """The event as complete events ("ph": "X") of Chrome's trace format, on the host and on its device."""
        arguments = {"launches": self.launches, "bytes": self.bytes}
        if self.shapes:
            arguments["shapes"] = str(self.shapes)  # type: ignore[assignment]
        line = {"name": self.name, "cat": self.kind, "ph": "X", "pid": os.getpid(), "args": arguments}
        yield {**line, "tid": self.thread, "ts": self.start / 1e3, "dur": (self.end - self.start) / 1e3}
        if self.device_start:
            yield {**line, "tid": str(self.device), "ts": self.device_start / 1e3, "dur": self.device_time / 1e3}


class Average:
    """The calls of one name; times in µs, by PyTorch's names."""

    def __init__(self, key: str, input_shapes: Any, events: Sequence[Event]) -> None:
        self.key, self.input_shapes, self.count = key, input_shapes, len(events)
        self.cpu_time_total = sum(e.end - e.start for e in events) / 1e3
        self.self_cpu_time_total = sum(e.end - e.start - e.inside for e in events) / 1e3
        self.device_time_total = sum(e.device_time for e in events) / 1e3
        self.self_device_time_total = sum(e.device_time - e.device_inside for e in events) / 1e3
        self.launches = sum(e.launches for e in events)
        self.bytes = sum(e.bytes for e in events)

    @property
    def cpu_time(self) -> float:
        """The mean host time of a call."""
        return self.cpu_time_total / self.count

    @property
    def device_time(self) -> float:
        """The mean device time of a call."""
        return self.device_time_total / self.count

    def __repr__(self) -> str:
        return f"<Average {self.key}: {self.count} calls, {self.cpu_time_total:.1f} µs>"


# Column: heading, how it is written. Those of the device are left out where nothing ran on one.
_COLUMNS = {
    "count": ("calls", "{:,}"),
    "self_cpu_time_total": ("self host µs", "{:,.1f}"),
    "cpu_time_total": ("host µs", "{:,.1f}"),
    "cpu_time": ("host µs a call", "{:,.1f}"),
    "self_device_time_total": ("self device µs", "{:,.1f}"),
    "device_time_total": ("device µs", "{:,.1f}"),
    "launches": ("launches", "{:,}"),
    "bytes": ("bytes", "{:,}"),
}


class EventList(list[Average]):
    """The sums of a profile by name, in the order in which the names first came."""

    def __init__(self, events: Sequence[Event], by_shape: bool = False) -> None:
        groups: dict[Any, list[Event]] = {}
        for event in sorted(events, key=lambda event: event.start):
            groups.setdefault((event.name, event.shapes if by_shape else ()), []).append(event)
        super().__init__([Average(name, shapes, found) for (name, shapes), found in groups.items()])
        self.on_device = any(event.device_start for event in events)
        self.by_shape = by_shape

    def total_average(self) -> dict[str, float]:
        """The sums over all names: of calls, of host and device time without calls within, of launches and bytes."""
        keys = ("count", "self_cpu_time_total", "self_device_time_total", "launches", "bytes")
        return {key: sum(getattr(row, key) for row in self) for key in keys}

    def table(self, sort_by: str | None = None, row_limit: int = 100) -> str:
        """Plain text: a row for each name, the one with the most `sort_by` first (in order of time without it).

        sort_by: "count", "cpu_time", "cpu_time_total", "self_cpu_time_total", "device_time_total",
        "self_device_time_total" (or cuda_… for device_…), "launches" or "bytes".
        """
        key = None if sort_by is None else sort_by.replace("cuda", "device")
        if key is not None and key not in _COLUMNS:
            raise ValueError(f"table() got sort_by={sort_by!r}; give one of {', '.join(_COLUMNS)}.")
        rows = list(self) if key is None else sorted(self, key=lambda row: getattr(row, key), reverse=True)
        columns = {k: v for k, v in _COLUMNS.items() if self.on_device or "device" not in k}
        lines = [["name", *(heading for heading, _ in columns.values())]]
        for row in rows[:row_limit]:
            name = f"{row.key} {', '.join(map(str, row.input_shapes))}" if self.by_shape else row.key
            lines.append([name, *(form.format(getattr(row, k)) for k, (_, form) in columns.items())])
        total = self.total_average()
        lines.append(["in all", *(form.format(total[k]) if k in total else "" for k, (_, form) in columns.items())])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        rule = "-" * len(text[0])
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])
