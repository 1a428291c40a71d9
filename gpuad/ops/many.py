"""Operations on many tensors together, in one launch for each device and dtype; not recorded. For gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpuad.array.device import Device
from gpuad.kernels import many_cuda, many_numpy
from gpuad.tensor import Tensor, wrap

_KERNELS: dict[str, Any] = {"numpy": many_numpy, "cuda": many_cuda}


def _run(name: str, device: Device, *arguments: Any) -> Any:
    backend = device.backend
    return backend.run(getattr(_KERNELS[backend.language], name), *arguments)


def _groups(tensors: Iterable[Tensor]) -> list[tuple[Device, list[Any]]]:
    """The arrays of the tensors by device and dtype."""
    found: dict[tuple[Device, Any], list[Any]] = {}
    for tensor in tensors:
        found.setdefault((tensor._device, tensor._data.dtype), []).append(tensor._data)
    return [(device, arrays) for (device, _), arrays in found.items()]


def total_norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    """(Σ |x|ᵖ)^(1/p) over all elements of floating tensors, p = order, inf for the largest |x|; 0-d.

    On the device of the first tensor, in the widest of their dtypes, float32 at least. There must be one.
    Raises ValueError for an order that is not positive.
    """
    if not order > 0:
        raise ValueError(f"A total norm has a positive order, or inf; got {order}.")
    groups = _groups(tensors)
    norms = [wrap(_run("norm", device, arrays, order), device) for device, arrays in groups]
    first = norms[0]
    if len(norms) == 1:
        return first
    widest = max((n.dtype for n in norms), key=lambda dtype: dtype.itemsize)
    moved = [n.detach().to(first.device, widest)._data.reshape(1) for n in norms]
    return wrap(_run("norm", first._device, moved, order), first._device)


def clip_to_norm_(tensors: Sequence[Tensor], max_norm: float, total: Tensor) -> None:
    """Multiply the tensors in place by min(1, max_norm / (total + 1e-6)); total: 0-d, on any device."""
    for device, arrays in _groups(tensors):
        _run("clip", device, arrays, float(max_norm), total.detach().to(device)._data)
    for tensor in tensors:
        tensor._cell[0] += 1


def unscale_(tensors: Sequence[Tensor], scale: Tensor, found: Tensor) -> None:
    """Divide tensors of one device and dtype by `scale`, in place; `found` becomes 1 where an element is not finite.

    scale, found: 0-d, float32, on that device.
    """
    _run("unscale", tensors[0]._device, [t._data for t in tensors], scale._data, found._data)
    for tensor in tensors:
        tensor._cell[0] += 1
