"""Every operation, one family a file, each declared in one place."""

from gpuad.ops import (
    activations,
    arithmetic,
    convert,
    creation,
    dropout,
    fuse,
    indexing,
    linalg,
    linear,
    losses,
    many,
    maths,
    pieces,
    reduction,
    rows,
    shape,
)
from gpuad.ops.attach import attach

attach()

__all__ = [
    "activations",
    "arithmetic",
    "convert",
    "creation",
    "dropout",
    "fuse",
    "indexing",
    "linalg",
    "linear",
    "losses",
    "many",
    "maths",
    "pieces",
    "reduction",
    "rows",
    "shape",
]
