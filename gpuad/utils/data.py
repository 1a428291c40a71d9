"""Datasets and the DataLoader that makes batches of them.

A TensorDataset with the default collate function is read a whole batch at a time, one gather a tensor, on the
tensors' own device; everything else sample by sample.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import gpuad
from gpuad.utils.collate import default_collate, default_convert
from gpuad.utils.datasets import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    can_gather,
    random_split,
)
from gpuad.utils.prefetch import map_tensors, prefetch
from gpuad.utils.samplers import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    check_positive,
    epoch_order,
)

__all__ = [
    "BatchSampler",
    "ConcatDataset",
    "DataLoader",
    "Dataset",
    "IterableDataset",
    "RandomSampler",
    "Sampler",
    "SequentialSampler",
    "Subset",
    "SubsetRandomSampler",
    "TensorDataset",
    "WeightedRandomSampler",
    "default_collate",
    "default_convert",
    "prefetch",
    "random_split",
]


class DataLoader:
    """The batches of a dataset: `for x, y in DataLoader(dataset, batch_size=64, shuffle=True): ...`.

    shuffle: a new order in each epoch, which depends on `generator` (the default one unless given) alone.
    sampler: an iterable of indices in place of shuffle; batch_sampler: an iterable of lists of indices.
    batch_size=None: no batches, the samples themselves. drop_last: leave out a last batch that is not full.
    collate_fn: makes a batch of a list of samples; default_collate unless given.
    num_workers: threads that prepare batches ahead, `prefetch_factor` (2) each, in order; what they raise is raised
    here. The samples of an IterableDataset are read by one thread. pin_memory: put batches that are on cpu into
    page-locked memory, for `prefetch`; it changes nothing where there is no CUDA device. persistent_workers is
    PyTorch's and changes nothing: threads share all memory.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[Sequence[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        *,
        generator: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers should be non-negative, got {num_workers}; 0 loads in the caller's thread")
        if prefetch_factor is not None and prefetch_factor <= 0:
            raise ValueError(f"prefetch_factor should be positive, got {prefetch_factor}")
        if sampler is not None and shuffle:
            raise ValueError("sampler option is mutually exclusive with shuffle")
        if batch_sampler is not None:
            if batch_size != 1 or shuffle or sampler is not None or drop_last:
                raise ValueError(
                    "batch_sampler option is mutually exclusive with batch_size, shuffle, sampler, and drop_last"
                )
            batch_size = None
        elif batch_size is None and drop_last:
            raise ValueError("batch_size=None makes no batches, so drop_last can't be given")
        self._iterable = isinstance(dataset, IterableDataset)
        if self._iterable and (shuffle or sampler is not None or batch_sampler is not None):
            raise ValueError(
                "an IterableDataset has no indices: DataLoader takes neither shuffle, sampler nor batch_sampler for it"
            )
        if sampler is None and not self._iterable:
            sampler = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
        if batch_sampler is None and batch_size is not None and not self._iterable:
            assert sampler is not None
            batch_sampler = BatchSampler(sampler, batch_size, drop_last)
        elif batch_size is not None:
            check_positive("batch_size", batch_size)
        self.dataset = dataset
        self.batch_size = batch_size
        self.sampler = sampler
        self.batch_sampler = batch_sampler
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.generator = generator
        self.prefetch_factor = 2 if prefetch_factor is None else prefetch_factor
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        batching = batch_sampler is not None or batch_size is not None
        self.collate_fn = collate_fn or (default_collate if batching else default_convert)

    def __len__(self) -> int:
        if not self._iterable:
            return len(self.sampler if self.batch_sampler is None else self.batch_sampler)  # type: ignore[arg-type]
        samples = len(self.dataset)
        if self.batch_size is None:
            return samples
        return samples // self.batch_size if self.drop_last else math.ceil(samples / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        batches = self._batches()
        return map(_pinned, batches) if self.pin_memory and gpuad.cuda.is_available() else batches

    def _batches(self) -> Iterator[Any]:
        if self._iterable:
            return self._from_iterable()
        if self.batch_sampler is None:
            return self._in_order(self._one, self.sampler)  # type: ignore[arg-type]
        if self.collate_fn is default_collate and can_gather(self.dataset):
            return self._gathered()
        return self._in_order(self._batch, self.batch_sampler)

    def _gathered(self) -> Iterator[list[Any]]:
        """Batches by one gather a tensor; an epoch's order stays a tensor on the data's device where it can."""
        batches, gather, device = self.batch_sampler, self.dataset.gather, self.dataset.device
        order = epoch_order(batches.sampler, device) if type(batches) is BatchSampler else None
        if order is None:
            for indices in batches:  # type: ignore[union-attr]
                yield gather(gpuad.tensor(list(indices), dtype=gpuad.int64, device=device))
        else:
            size = batches.batch_size  # type: ignore[union-attr]
            for start in range(0, len(batches) * size, size):  # type: ignore[arg-type]
                yield gather(order[start : start + size])

    def _one(self, index: Any) -> Any:
        return self.collate_fn(self.dataset[index])

    def _batch(self, indices: Sequence[Any]) -> Any:
        getitems = getattr(self.dataset, "__getitems__", None)
        return self.collate_fn(getitems(indices) if getitems else [self.dataset[index] for index in indices])

    def _in_order(self, fetch: Callable[[Any], Any], keys: Iterable[Any]) -> Iterator[Any]:
        """fetch(key) for each key, by the worker threads where there are any."""
        if self.num_workers == 0:
            return map(fetch, keys)
        return _in_threads(fetch, keys, self.num_workers, self.num_workers * self.prefetch_factor)

    def _from_iterable(self) -> Iterator[Any]:
        samples = iter(self.dataset)

        def batches() -> Iterator[Any]:
            if self.batch_size is None:
                yield from map(self.collate_fn, samples)
                return
            while batch := list(itertools.islice(samples, self.batch_size)):
                if len(batch) == self.batch_size or not self.drop_last:
                    yield self.collate_fn(batch)

        if self.num_workers == 0:
            return batches()
        source = batches()
        ahead = _in_threads(lambda _: next(source, _END), itertools.count(), 1, self.num_workers * self.prefetch_factor)
        return itertools.takewhile(lambda batch: batch is not _END, ahead)


_END = object()


def _pinned(batch: Any) -> Any:
    """A batch whose tensors on cpu lie in page-locked memory."""
    return map_tensors(lambda t: t if t.is_cuda or t.requires_grad else t.pin_memory(), batch)


def _in_threads(fetch: Callable[[Any], Any], keys: Iterable[Any], workers: int, ahead: int) -> Iterator[Any]:
    """fetch(key) for each key in order, up to `ahead` of them begun before they are asked for."""
    device = gpuad.get_default_device()  # threads begin without the caller's

    def fetch_there(key: Any) -> Any:
        with device:
            return fetch(key)

    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="gpuad-loader") as threads:
        try:
            for key in keys:
                pending.append(threads.submit(fetch_there, key))
                if len(pending) == ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
