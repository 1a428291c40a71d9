"""Datasets: what has samples, by index or one after the other."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gpuad
from gpuad import Tensor


class Dataset:
    """Base of datasets whose samples have an index: a subclass defines `__getitem__` and `__len__`."""

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __getitem__")

    def __add__(self, other: Dataset) -> ConcatDataset:
        return ConcatDataset([self, other])


class IterableDataset(Dataset):
    """Base of datasets that can only be gone through: a subclass defines `__iter__`."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError(f"{type(self).__name__} must define __iter__")


class TensorDataset(Dataset):
    """Sample i is the tuple of the rows i of the tensors, which are of equal length."""

    tensors: tuple[Tensor, ...]

    def __init__(self, *tensors: Tensor) -> None:
        sizes = [len(tensor) for tensor in tensors]
        if not tensors or any(size != sizes[0] for size in sizes):
            raise ValueError(f"TensorDataset takes one or more tensors of the same length, got lengths {sizes}")
        self.tensors = tensors

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def device(self) -> Any:
        """The device that indices for `gather` are best on."""
        return self.tensors[0].device

    def gather(self, indices: Tensor) -> list[Tensor]:
        """The samples of a vector of indices as a batch: one gather a tensor."""
        return [tensor[indices.to(tensor.device)] for tensor in self.tensors]


class Subset(Dataset):
    """The samples of a dataset at the given indices."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices
        self._on_device: Tensor | None = None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return self.dataset[[self.indices[i] for i in index]]
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def device(self) -> Any:
        """The device that indices for `gather` are best on."""
        return self.dataset.device

    def gather(self, indices: Tensor) -> list[Tensor]:
        """The samples of a vector of indices as a batch, when the dataset has `gather`."""
        if self._on_device is None or self._on_device.device != indices.device:
            self._on_device = gpuad.tensor(list(self.indices), dtype=gpuad.int64, device=indices.device)
        return self.dataset.gather(self._on_device[indices])


def can_gather(dataset: Any) -> bool:
    """Whether batches of a dataset can be gathered: a TensorDataset, or a Subset of one, reading as those do."""
    if isinstance(dataset, Subset):
        return type(dataset).__getitem__ is Subset.__getitem__ and can_gather(dataset.dataset)
    return isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__


class ConcatDataset(Dataset):
    """The samples of several datasets, one dataset after the other."""

    def __init__(self, datasets: Iterable[Any]) -> None:
        self.datasets = list(datasets)
        if not self.datasets:
            raise ValueError("datasets should not be an empty iterable")
        if any(isinstance(dataset, IterableDataset) for dataset in self.datasets):
            raise TypeError("ConcatDataset does not support IterableDataset, which has no indices")
        self.cumulative_sizes = list(itertools.accumulate(len(dataset) for dataset in self.datasets))

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a dataset of {len(self)} samples")
        index %= len(self)
        which = bisect.bisect_right(self.cumulative_sizes, index)
        before = self.cumulative_sizes[which - 1] if which else 0
        return self.datasets[which][index - before]

    def __len__(self) -> int:
        return self.cumulative_sizes[-1]


def random_split(dataset: Any, lengths: Sequence[int | float], generator: Any = None) -> list[Subset]:
    """Split a dataset at random into subsets of these lengths, or of these fractions where they add up to 1.

    Fractions are rounded down, and the samples left over go to the subsets in turn.
    """
    size = len(dataset)
    if math.isclose(sum(lengths), 1) and sum(lengths) <= 1 + 1e-9:
        for number, fraction in enumerate(lengths):
            if not 0 <= fraction <= 1:
                raise ValueError(f"Fraction at index {number} is not between 0 and 1: {fraction}")
        counts = [math.floor(size * fraction) for fraction in lengths]
        for number in range(size - sum(counts)):
            counts[number % len(counts)] += 1
    else:
        counts = [int(length) for length in lengths]
        if counts != list(lengths) or min(counts, default=0) < 0 or sum(counts) != size:
            raise ValueError(
                f"Sum of input lengths does not equal the length of the input dataset: {list(lengths)} for {size} "
                "samples; give whole numbers that add up to it, or fractions that add up to 1"
            )
    order = gpuad.randperm(size, generator=generator, device="cpu").tolist()
    ends = itertools.accumulate(counts)
    return [Subset(dataset, order[end - count : end]) for end, count in zip(ends, counts)]
