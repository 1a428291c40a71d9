"""Adam and AdamW: steps scaled by running averages of the gradient and of its square."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gpuad
from gpuad.update import update

from .optimizer import Optimizer, check_below_one, check_not_negative


class Adam(Optimizer):
    """p ← p − lr · m̂ / (√v̂ + eps), with averages m of grad and v of grad², corrected for their start from 0.

    m ← β₁ m + (1 − β₁) grad, m̂ = m / (1 − β₁ᵗ), and so v with grad² and β₂. weight_decay · p is added to grad, or
    with decoupled_weight_decay lr · weight_decay · p taken off p. amsgrad divides by the largest v̂ so far.
    foreach, fused and capturable are PyTorch's choices of implementation and change nothing.
    Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980; amsgrad: Reddi, Kale, Kumar,
    "On the Convergence of Adam and Beyond", arXiv:1904.09237.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_below_one(betas=betas)
        super().__init__(
            params,
            {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
             "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
             "fused": fused, "decoupled_weight_decay": decoupled_weight_decay},
        )  # fmt: skip

    @update
    def rule(p, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, *, step, lr, betas, eps, weight_decay=0.0, amsgrad=False,
             maximize=False, decoupled_weight_decay=False):  # fmt: skip
        beta1, beta2 = betas
        if maximize:
            grad = -grad
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        else:
            grad = grad + weight_decay * p
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (grad * grad)
        max_exp_avg_sq = gpuad.maximum(max_exp_avg_sq, exp_avg_sq)
        square = max_exp_avg_sq if amsgrad else exp_avg_sq
        # m̂ / (√v̂ + eps) with the corrections, which all elements share, drawn together.
        correction = (1 - beta2**step).sqrt()
        change = lr * correction / (1 - beta1**step) * (exp_avg / (square.sqrt() + eps * correction))
        return p - change, exp_avg, exp_avg_sq, max_exp_avg_sq


class AdamW(Adam):
    """Adam whose weight decay is decoupled: p ← (1 − lr · weight_decay) · p before the step.

    Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=True,
        )  # fmt: skip
