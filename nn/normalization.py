"""Layers that normalise: over the last dimensions of each sample, or over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gpuad
from gpuad import Tensor

from . import functional as F
from . import init
from .module import Module
from .parameter import Parameter


class _OverLastDimensions(Module):
    """What LayerNorm and RMSNorm share: a normalized_shape, eps, and weights of that shape."""

    weight: Parameter | None

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None, affine: bool, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.normalized_shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(int(size) for size in normalized_shape)
        )
        self.eps = eps
        self.elementwise_affine = affine
        self.register_parameter("weight", self._new_weight(device, dtype) if affine else None)

    def _new_weight(self, device: Any, dtype: Any) -> Parameter:
        return Parameter(gpuad.empty(self.normalized_shape, device=device, dtype=dtype))


class LayerNorm(_OverLastDimensions):
    """y = (x − mean) / sqrt(var + eps) · weight + bias, over the last dimensions; the variance biased.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    eps: float
    bias: Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.register_parameter("bias", self._new_weight(device, dtype) if elementwise_affine and bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, of shape (*, *normalized_shape)."""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}"
        )


class RMSNorm(_OverLastDimensions):
    """y = x / sqrt(mean(x²) + eps) · weight, over the last dimensions; eps is the dtype's epsilon unless given.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight to 1."""
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, of shape (*, *normalized_shape)."""
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class BatchNorm1d(Module):
    """y = (x − mean) / sqrt(var + eps) · weight + bias, for each feature over the batch.

    x: (batch, features) or (batch, features, length). In training the statistics are the batch's (the variance
    biased), and running_mean and running_var move towards them (the variance unbiased) by the share `momentum`, or
    to their plain average over all batches when it is None; in evaluation the running statistics are used.
    Source: Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167.
    """

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            parameter = Parameter(gpuad.empty(num_features, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, parameter)
        for name in ("running_mean", "running_var"):
            statistic = gpuad.empty(num_features, device=device, dtype=dtype) if track_running_stats else None
            self.register_buffer(name, statistic)
        count = gpuad.zeros((), device=device, dtype=gpuad.int64) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the count of batches to 0."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and the running statistics as reset_running_stats does."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` by the batch's statistics in training, else by the running ones where they are kept."""
        if input.ndim not in (2, 3):
            raise ValueError(f"expected 2D or 3D input (got {input.ndim}D input)")
        mean, var = self.running_mean, self.running_var
        if not self.training:
            return F.batch_norm(input, mean, var, self.weight, self.bias, mean is None, 0.0, self.eps)
        if not self.track_running_stats or mean is None or var is None:
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        count = self.num_batches_tracked
        share: Any = self.momentum or 0.0
        if self.momentum is None and count is not None:
            share = (count + 1).to(gpuad.float64).reciprocal()  # 1/n, and n stays on the device
        output = F.batch_norm(input, mean, var, self.weight, self.bias, True, share, self.eps)
        if count is not None:
            count.add_(1)  # last: a forward that fails has changed nothing
        return output

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )
