"""Every operation, one family a file, each declared in one place."""

from gpuad.ops import (
    activations,
    arithmetic,
    convert,
    creation,
    indexing,
    linalg,
    maths,
    reduction,
    shape,
)
from gpuad.ops.attach import attach

attach()

__all__ = ["activations", "arithmetic", "convert", "creation", "indexing", "linalg", "maths", "reduction", "shape"]
