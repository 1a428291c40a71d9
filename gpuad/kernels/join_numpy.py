"""Arrays joined along a dimension, one after the other, with zeros where one is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def join(pieces: Sequence[Any], lengths: Sequence[int], dim: int, out: Any) -> None:
    """Write the pieces, None for zeros, one after the other along `dim` of `out`."""
    start = 0
    for piece, length in zip(pieces, lengths, strict=True):
        out[(*[slice(None)] * dim, slice(start, start + length))] = 0 if piece is None else piece
        start += length
