"""Devices: a name ("cpu", "cuda:1"), the backend behind it, and which device is the current one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from gpuad.errors import DeviceError

if TYPE_CHECKING:
    from gpuad.array.backend import Backend

_instances: dict[tuple[str, int], Device] = {}
_making = threading.Lock()
_local = threading.local()
_process_default: Device | None = None


class Device:
    """One device, as a value and as a context manager that makes it the default of new tensors.

    `gpuad.device("cuda:1")`, `gpuad.device("cuda", 1)` and `gpuad.device(1)` are the same object: devices are
    interned, so `a.device is b.device` compares them. Raises DeviceError when the device is not there.
    """

    __slots__ = ("type", "index", "backend", "_name")

    type: str
    index: int | None
    backend: Backend
    _name: str

    def __new__(cls, spec: Any = None, index: int | None = None) -> Device:
        if isinstance(spec, Device):
            return spec
        kind, number = _parse(spec, index)
        found = _instances.get((kind, number))
        return found if found is not None else _make(kind, number)

    def __repr__(self) -> str:
        return f"device(type='{self.type}')" if self.index is None else f"device(type='cuda', index={self.index})"

    def __str__(self) -> str:
        return self._name

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return self._name == other or (other == "cuda" and self.index == 0)
        return self is other

    def __hash__(self) -> int:
        return hash(self._name)

    def __reduce__(self) -> tuple:
        return (Device, (self._name,))

    def __enter__(self) -> Device:
        stack = _stack()
        stack.append(self)
        self.backend.enter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.backend.leave()
        _stack().pop()


def _stack() -> list[Device]:
    try:
        return _local.stack
    except AttributeError:
        _local.stack = []
        return _local.stack


def _parse(spec: Any, index: int | None) -> tuple[str, int]:
    if isinstance(spec, int) and not isinstance(spec, bool):
        kind, number = "cuda", spec
    elif isinstance(spec, str):
        kind, colon, digits = spec.partition(":")
        if colon and not digits.isdigit():
            raise DeviceError(f"{spec!r} is not a device; devices are 'cpu', 'cuda' and 'cuda:<index>'.")
        number = int(digits) if colon else -1
        if index is not None:
            if colon:
                raise DeviceError(f"device({spec!r}, {index}) names an index twice; give device('{kind}', {index}).")
            number = index
    else:
        raise DeviceError(f"{spec!r} is not a device; devices are 'cpu', 'cuda' and 'cuda:<index>'.")
    if kind == "cpu":
        if number > 0:
            raise DeviceError(f"'cpu:{number}' does not exist: the host is one device; give 'cpu'.")
        return kind, -1
    if kind != "cuda":
        raise DeviceError(f"{spec!r} is not a device; devices are 'cpu', 'cuda' and 'cuda:<index>'.")
    if number < 0:
        from gpuad.array.cupy_backend import current_cuda_index

        number = current_cuda_index()
    return kind, number


def _make(kind: str, number: int) -> Device:
    with _making:
        found = _instances.get((kind, number))
        if found is not None:
            return found
        made = object.__new__(Device)
        made.type = kind
        made.index = None if kind == "cpu" else number
        made._name = kind if kind == "cpu" else f"cuda:{number}"
        if kind == "cpu":
            from gpuad.array.numpy_backend import NumpyBackend

            made.backend = NumpyBackend(made)
        else:
            from gpuad.array.cupy_backend import CupyBackend

            made.backend = CupyBackend(made, number)
        _instances[kind, number] = made
        return made


cpu = Device("cpu")


def as_device(spec: Any) -> Device:
    """`spec` (a Device, a name, an index or None for the default) as a Device."""
    return default_device() if spec is None else Device(spec)


def default_device() -> Device:
    """The device of new tensors: that of the innermost `with device:`, else what set_default_device said, else cpu."""
    stack = getattr(_local, "stack", None)
    if stack:
        return stack[-1]
    return cpu if _process_default is None else _process_default


def set_default_device(spec: Any) -> None:
    """Make `spec` the device of new tensors in this process; None goes back to cpu."""
    global _process_default
    _process_default = None if spec is None else Device(spec)


def of_array(array: Any) -> Device:
    """The device that holds a NumPy or CuPy array."""
    if isinstance(array, np.ndarray):
        return cpu
    if type(array) is ndarray:
        return cpu
    place = getattr(array, "device", "cpu")
    return cpu if isinstance(place, str) else Device("cuda", place.id)
