"""Adamax: Adam with the largest gradient so far in place of the root mean square."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gpuad
from gpuad.update import update

from .optimizer import Optimizer, check_below_one, check_not_negative


class Adamax(Optimizer):
    """p ← p − lr / (1 − β₁ᵗ) · m / u, with m the running average of grad and u ← max(β₂ u, |grad| + eps).

    weight_decay · p is added to grad first. foreach and capturable are PyTorch's choices of implementation and change
    nothing.
    Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, section 7.1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_below_one(betas=betas)
        super().__init__(
            params,
            {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "foreach": foreach,
             "maximize": maximize, "differentiable": differentiable, "capturable": capturable},
        )  # fmt: skip

    @update
    def rule(p, grad, exp_avg, exp_inf, *, step, lr, betas, eps, weight_decay=0.0, maximize=False):
        beta1, beta2 = betas
        grad = (-grad if maximize else grad) + weight_decay * p
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_inf = gpuad.maximum(beta2 * exp_inf, abs(grad) + eps)
        return p - lr / (1 - beta1**step) * (exp_avg / exp_inf), exp_avg, exp_inf
