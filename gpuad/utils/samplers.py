"""Samplers: in which order a DataLoader reads a dataset.

Those that know the order of a whole epoch have `order(device)`, which gives it as a tensor; iterating gives the same
indices as Python numbers. A seed gives the same order on every device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

import gpuad
from gpuad import Tensor


class Sampler:
    """Base of the samplers: an iterable of indices, or of lists of indices."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError(f"{type(self).__name__} must define __iter__")


class _OrderSampler(Sampler):
    """A sampler given by the tensor of an epoch's indices."""

    def order(self, device: Any = "cpu") -> Tensor:
        """The indices of the next epoch, a vector of int64 on `device`."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())


def epoch_order(sampler: Any, device: Any) -> Tensor | None:
    """The next epoch's indices as a tensor on `device`, or None when the sampler can only be iterated over."""
    known = type(sampler).__iter__ in (_OrderSampler.__iter__, SequentialSampler.__iter__)
    return sampler.order(device) if known else None


class SequentialSampler(_OrderSampler):
    """0, 1, 2, ..."""

    def __init__(self, data_source: Any) -> None:
        self.data_source = data_source

    def order(self, device: Any = "cpu") -> Tensor:
        """The indices of the next epoch, a vector of int64 on `device`."""
        return gpuad.arange(len(self), device=device)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self.data_source)


class RandomSampler(_OrderSampler):
    """A random order of all indices; or, with replacement, indices drawn independently.

    num_samples: how many, as many as there are unless given; without replacement, further orders follow the first.
    """

    def __init__(
        self, data_source: Any, replacement: bool = False, num_samples: int | None = None, generator: Any = None
    ) -> None:
        if not isinstance(replacement, bool):
            raise TypeError(f"replacement should be a boolean value, but got replacement={replacement}")
        if num_samples is not None:
            check_positive("num_samples", num_samples)
        self.data_source = data_source
        self.replacement = replacement
        self._num_samples = num_samples
        self.generator = generator

    @property
    def num_samples(self) -> int:
        """How many indices an epoch has."""
        return len(self.data_source) if self._num_samples is None else self._num_samples

    def order(self, device: Any = "cpu") -> Tensor:
        """The indices of the next epoch, a vector of int64 on `device`."""
        size, wanted = len(self.data_source), self.num_samples
        if size == 0:
            return gpuad.arange(0, device=device)
        if self.replacement:
            return gpuad.randint(0, size, (wanted,), generator=self.generator, device=device)
        whole, rest = divmod(wanted, size)
        orders = [self._permutation(device) for _ in range(whole + (rest > 0))]
        return (orders[0] if len(orders) == 1 else gpuad.cat(orders))[:wanted]

    def _permutation(self, device: Any) -> Tensor:
        return gpuad.randperm(len(self.data_source), generator=self.generator, device=device)

    def __len__(self) -> int:
        return self.num_samples


class SubsetRandomSampler(_OrderSampler):
    """The given indices in a random order."""

    def __init__(self, indices: Sequence[int], generator: Any = None) -> None:
        self.indices = indices
        self.generator = generator

    def order(self, device: Any = "cpu") -> Tensor:
        """The indices of the next epoch, a vector of int64 on `device`."""
        indices = gpuad.tensor(list(self.indices), dtype=gpuad.int64, device=device)
        return indices[gpuad.randperm(len(indices), generator=self.generator, device=device)]

    def __len__(self) -> int:
        return len(self.indices)


class WeightedRandomSampler(_OrderSampler):
    """num_samples indices of [0, len(weights)), each drawn with a probability proportional to its weight."""

    def __init__(
        self, weights: Sequence[float] | Tensor, num_samples: int, replacement: bool = True, generator: Any = None
    ) -> None:
        check_positive("num_samples", num_samples)
        if not isinstance(replacement, bool):
            raise ValueError(f"replacement should be a boolean value, but got replacement={replacement}")
        self.weights = gpuad.as_tensor(weights, dtype=gpuad.float64, device="cpu")
        values = self.weights.numpy()
        if values.ndim != 1:
            raise ValueError(f"weights should be a 1d sequence but given weights have shape {values.shape}")
        if not ((values >= 0) & (values < float("inf"))).all() or not values.sum() > 0:
            raise ValueError("weights should be finite, not negative, and not all 0")
        if not replacement and (values > 0).sum() < num_samples:
            raise ValueError(
                f"{num_samples} indices can't be drawn without replacement from {(values > 0).sum()} positive weights"
            )
        self.num_samples = num_samples
        self.replacement = replacement
        self.generator = generator

    def order(self, device: Any = "cpu") -> Tensor:
        """The indices of the next epoch, a vector of int64 on `device`; drawn on the host."""
        weights = self.weights.numpy()
        count = self.num_samples if self.replacement else len(weights)
        draws = gpuad.rand(count, dtype=gpuad.float64, generator=self.generator, device="cpu").numpy()
        if self.replacement:
            cumulative = weights.cumsum()
            last = weights.nonzero()[0][-1]  # the product below may be rounded up to the sum
            chosen = np.minimum(cumulative.searchsorted(draws * cumulative[-1], side="right"), last)
        else:
            chosen = _without_replacement(weights, draws)[: self.num_samples]
        return gpuad.tensor(chosen, dtype=gpuad.int64, device=device)

    def __len__(self) -> int:
        return self.num_samples


def _without_replacement(weights: Any, draws: Any) -> Any:
    """Indices by rising time of arrival, −log(1 − u) / weight.

    Source: Efraimidis, Spirakis, "Weighted random sampling with a reservoir", 2006.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(weights > 0, -np.log1p(-draws) / weights, np.inf)
    return np.argsort(times, kind="stable")


class BatchSampler(Sampler):
    """Lists of batch_size indices of a sampler, the last one shorter, or left out with drop_last."""

    def __init__(self, sampler: Iterable[Any], batch_size: int, drop_last: bool) -> None:
        check_positive("batch_size", batch_size)
        if not isinstance(drop_last, bool):
            raise ValueError(f"drop_last should be a boolean value, but got drop_last={drop_last}")
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[list[Any]]:
        indices = iter(self.sampler)
        while batch := list(itertools.islice(indices, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch

    def __len__(self) -> int:
        samples = len(self.sampler)  # type: ignore[arg-type]
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a positive int."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} should be a positive integer value, but got {name}={value}")
