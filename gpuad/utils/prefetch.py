"""Batches copied to a device ahead of their use, beside the computation on those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gpuad import Tensor
from gpuad.array.device import as_device
from gpuad.tensor import wrap
from gpuad.utils.collate import like
from gpuad.utils.samplers import check_positive


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """A batch with its tensors replaced; mappings, namedtuples, lists and tuples are entered."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return like(batch, {key: map_tensors(function, value) for key, value in batch.items()})
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        mapped = [map_tensors(function, value) for value in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*mapped)
        return tuple(mapped) if isinstance(batch, tuple) else mapped
    return batch


class Prefetch:
    """What prefetch() returns: an iterable over the batches of a loader, on a device."""

    def __init__(self, loader: Any, device: Any, depth: int) -> None:
        check_positive("depth", depth)
        self.loader, self.device, self.depth = loader, as_device(device), depth

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        uploader = self.device.backend.uploader(self.depth)
        batches = iter(self.loader)
        ahead: deque[tuple[Any, list[Any], Any]] = deque()
        failure: Exception | None = None
        try:
            more = True
            while more or ahead:
                while more and len(ahead) < self.depth:
                    try:
                        ahead.append(self._send(next(batches), uploader))
                    except StopIteration:
                        more = False
                    except Exception as error:  # raised where the loader would have: after the batches before it
                        failure, more = error, False
                if ahead:
                    yield self._received(*ahead.popleft(), uploader)
            if failure is not None:
                raise failure
        finally:
            ahead.clear()
            if uploader is not None:
                uploader.close()
            if hasattr(batches, "close"):
                batches.close()

    def _send(self, batch: Any, uploader: Any) -> tuple[Any, list[Any], Any]:
        """The batch, those of its tensors that are being copied (as arrays there), and what to wait for."""
        if uploader is None:
            return map_tensors(lambda t: t.to(self.device), batch), [], None
        hosts: list[Tensor] = []
        map_tensors(lambda t: hosts.append(t) if uploader.takes(t._data) and not t._requires_grad else None, batch)
        arrays, event = uploader.send([t._data for t in hosts])
        there = {id(t): wrap(array, self.device) for t, array in zip(hosts, arrays, strict=True)}
        return map_tensors(lambda t: there[id(t)] if id(t) in there else t.to(self.device), batch), arrays, event

    def _received(self, batch: Any, arrays: list[Any], event: Any, uploader: Any) -> Any:
        if uploader is not None:
            uploader.receive(arrays, event)
        return batch


def prefetch(loader: Any, device: Any, depth: int = 2) -> Prefetch:
    """The batches of a loader on a device, up to `depth` of them copied before they are asked for.

        for x, y in prefetch(DataLoader(data, batch_size=64, shuffle=True, pin_memory=True), "cuda"):
            ...

    loader: any iterable of batches (tensors in lists, tuples and dicts); its order and its random numbers stay as they
    are. On a CUDA device the copies run on a stream of their own, from pinned memory: with the loader's pin_memory=True
    the batch lies there already, else it is put there. The current stream waits for a batch when it is handed out; the
    host does not. To use a batch on another stream, let that wait for the current one, and call tensor.record_stream.

    An exception of the loader is raised after the batches before it. Leaving the loop early waits for the copies that
    are under way and closes the loader's iterator. Raises ValueError for a depth below 1.
    """
    return Prefetch(loader, device, depth)
