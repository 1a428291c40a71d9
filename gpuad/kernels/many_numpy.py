"""Many arrays of the host and one dtype together: their norm, and scaling by a number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpuad.array.dtypes import HALF


def norm(arrays: Sequence[np.ndarray], order: float) -> np.ndarray:
    """(Σ |x|ᵖ)^(1/p) over all elements of arrays of one dtype, p = order; 0-d, float32 for 16 bits."""
    real = np.dtype(np.float32) if arrays[0].dtype.char in HALF else arrays[0].dtype
    norms = [np.linalg.norm(array.astype(real, copy=False).reshape(-1), order) for array in arrays]
    return np.asarray(np.linalg.norm(np.array(norms, real), order), real)


def clip(arrays: Sequence[np.ndarray], max_norm: float, total: np.ndarray) -> None:
    """Multiply arrays of one dtype in place by min(1, max_norm / (total + 1e-6)); total: 0-d."""
    factor = min(1.0, max_norm / (float(total) + 1e-6)) if total == total else float(total)
    for array in arrays:
        np.multiply(array, array.dtype.type(factor), out=array)


def unscale(arrays: Sequence[np.ndarray], scale: np.ndarray, found: np.ndarray) -> None:
    """Divide arrays of one dtype by `scale`, in place; `found` becomes 1 where an element is not finite."""
    for array in arrays:
        if not np.isfinite(array).all():
            found[...] = 1
        np.multiply(array, array.dtype.type(1 / float(scale)), out=array)
