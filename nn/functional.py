"""gpuad.nn.functional: the functions behind the layers, with PyTorch's names and signatures."""

from __future__ import annotations

from typing import Any

import gpuad
from gpuad.ops.activations import (
    celu,
    elu,
    gelu,
    hardshrink,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    logsigmoid,
    mish,
    relu6,
    selu,
    silu,
    softplus,
    softshrink,
    softsign,
    tanhshrink,
    threshold,
)
from gpuad.ops.activations import relu as _relu
from gpuad.ops.dropout import dropout
from gpuad.ops.indexing import embedding, one_hot
from gpuad.ops.linalg import bilinear
from gpuad.ops.linear import linear, linear_activation
from gpuad.ops.losses import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
)
from gpuad.ops.rows import attention_weights, batch_norm, layer_norm, log_softmax, rms_norm, softmax, softmin

sigmoid = gpuad.sigmoid
tanh = gpuad.tanh

__all__ = [
    "batch_norm", "bilinear", "binary_cross_entropy", "binary_cross_entropy_with_logits", "celu", "cosine_similarity",
    "cross_entropy", "dropout", "elu", "embedding", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "huber_loss", "kl_div", "l1_loss", "layer_norm", "leaky_relu", "linear", "linear_activation",
    "log_softmax", "logsigmoid", "mish", "mse_loss", "nll_loss", "normalize", "one_hot", "pairwise_distance", "prelu",
    "relu", "relu6", "rms_norm", "scaled_dot_product_attention", "selu", "sigmoid", "silu", "smooth_l1_loss",
    "softmax", "softmin", "softplus", "softshrink", "softsign", "tanh", "tanhshrink", "threshold",
]  # fmt: skip


def relu(input: gpuad.Tensor, inplace: bool = False) -> gpuad.Tensor:
    """max(input, 0); in place when asked."""
    return input.relu_() if inplace else _relu(input)


def prelu(input: gpuad.Tensor, weight: gpuad.Tensor) -> gpuad.Tensor:
    """leaky_relu with learned slopes: one, or one for each channel (dimension 1)."""
    if weight.numel() > 1 and input.ndim > 1:
        weight = weight.reshape(1, -1, *(1 for _ in range(input.ndim - 2)))
    return gpuad.prelu(input, weight)


def glu(input: gpuad.Tensor, dim: int = -1) -> gpuad.Tensor:
    """a · sigmoid(b), a and b the halves of input along `dim`."""
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def normalize(input: gpuad.Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> gpuad.Tensor:
    """input divided by its p-norm over `dim` (at least eps)."""
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps)


def cosine_similarity(x1: gpuad.Tensor, x2: gpuad.Tensor, dim: int = 1, eps: float = 1e-8) -> gpuad.Tensor:
    """x1 · x2 / (max(|x1|, eps) max(|x2|, eps)) over `dim`."""
    lengths = x1.norm(2, dim).clamp_min(eps) * x2.norm(2, dim).clamp_min(eps)
    return (x1 * x2).sum(dim) / lengths


def pairwise_distance(
    x1: gpuad.Tensor, x2: gpuad.Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> gpuad.Tensor:
    """The p-norm of x1 − x2 + eps over the last dimension."""
    return (x1 - x2 + eps).norm(p, -1, keepdim)


def scaled_dot_product_attention(
    query: gpuad.Tensor, key: gpuad.Tensor, value: gpuad.Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None,
) -> gpuad.Tensor:  # fmt: skip
    """softmax(query keyᵀ · scale + mask) value; scale is 1 / sqrt(d) unless given.

    query: (*, L, d). key: (*, S, d). value: (*, S, e). attn_mask: bool (True takes part) or added, broadcast to
    (*, L, S). Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, equation 1.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = attention_weights(query @ key.mT, scale, attn_mask, is_causal)
    return dropout(weights, dropout_p) @ value
