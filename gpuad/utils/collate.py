"""Making a batch of samples, for a DataLoader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import gpuad


def default_collate(batch: Sequence[Any]) -> Any:
    """Samples of one structure as the same structure of batches.

    Tensors and NumPy arrays are stacked; numbers become a tensor (floats a float64 one); strings a list. Mappings,
    namedtuples and sequences are entered; a sequence, a tuple too, comes out as a list.
    Raises TypeError for other types, and RuntimeError for sequences that differ in length.
    """
    first = batch[0]
    if isinstance(first, gpuad.Tensor):
        return gpuad.stack(list(batch))
    if isinstance(first, (np.ndarray, np.generic)):
        if not _is_numeric(first.dtype):
            raise TypeError(f"default_collate can't make a tensor of NumPy arrays of dtype {first.dtype}")
        return gpuad.as_tensor(np.stack(batch))
    if isinstance(first, float):
        return gpuad.tensor(batch, dtype=gpuad.float64)
    if isinstance(first, int):
        return gpuad.tensor(batch)
    if isinstance(first, (str, bytes)):
        return list(batch)
    if isinstance(first, Mapping):
        return like(first, {key: default_collate([sample[key] for sample in batch]) for key in first})
    if isinstance(first, Sequence):
        if any(len(sample) != len(first) for sample in batch):
            raise RuntimeError("each element in list of batch should be of equal size")
        collated = [default_collate(parts) for parts in zip(*batch)]
        return type(first)(*collated) if hasattr(first, "_fields") else collated
    raise TypeError(
        "default_collate: batch must contain tensors, numpy arrays, numbers, strings, dicts or lists; "
        f"found {type(first).__name__}. Give DataLoader a collate_fn for it."
    )


def _is_numeric(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" or dtype.name == "bfloat16"


def default_convert(data: Any) -> Any:
    """One sample with its NumPy arrays as tensors; what DataLoader applies when it makes no batches."""
    if isinstance(data, (np.ndarray, np.generic)) and _is_numeric(data.dtype):
        return gpuad.as_tensor(data)
    if isinstance(data, Mapping):
        return like(data, {key: default_convert(value) for key, value in data.items()})
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        converted = [default_convert(value) for value in data]
        return type(data)(*converted) if hasattr(data, "_fields") else converted
    return data


def like(mapping: Mapping, values: dict) -> Any:
    """`values` as the type of `mapping`, where that can be made of a dictionary."""
    try:
        return type(mapping)(values)  # type: ignore[call-arg]
    except TypeError:
        return values
