"""Helpers around training: data loading, checkpoints."""

from gpuad.utils import checkpoint, data

__all__ = ["checkpoint", "data"]
