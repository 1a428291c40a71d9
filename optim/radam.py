"""RAdam: Adam that waits with its scaling until the average of squares can be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gpuad
from gpuad.update import update

from .optimizer import Optimizer, check_below_one, check_not_negative


class RAdam(Optimizer):
    """p ← p − lr · m̂ · r / (√v̂ + eps) once the average v spans more than 5 steps (ρₜ > 5), before p ← p − lr · m̂.

    r rectifies the variance of 1 / √v̂. weight_decay · p is added to grad, or with decoupled_weight_decay
    lr · weight_decay · p taken off p. foreach and capturable are PyTorch's choices of implementation and change
    nothing.
    Source: Liu, Jiang, He, Chen, Liu, Gao, Han, "On the Variance of the Adaptive Learning Rate and Beyond",
    arXiv:1908.03265.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_below_one(betas=betas)
        super().__init__(
            params,
            {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
             "foreach": foreach, "capturable": capturable, "decoupled_weight_decay": decoupled_weight_decay,
             "differentiable": differentiable},
        )  # fmt: skip

    @update
    def rule(p, grad, exp_avg, exp_avg_sq, *, step, lr, betas, eps, weight_decay=0.0, maximize=False,
             decoupled_weight_decay=False):  # fmt: skip
        beta1, beta2 = betas
        if maximize:
            grad = -grad
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        else:
            grad = grad + weight_decay * p
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (grad * grad)
        decayed = beta2**step
        longest = 2 / (1 - beta2) - 1  # ρ∞
        length = longest - 2 * step * decayed / (1 - decayed)  # ρₜ
        rectified = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)).sqrt()
        scale = gpuad.where(length > 5, rectified * (1 - decayed).sqrt(), 0.0)
        plain = gpuad.where(length > 5, 0.0, 1.0)
        step_size = lr / (1 - beta1**step)
        return p - step_size * exp_avg * (scale / (exp_avg_sq.sqrt() + eps) + plain), exp_avg, exp_avg_sq
