"""Lion: steps of one size, in the direction of the sign of an average."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gpuad
from gpuad.update import update

from .optimizer import Optimizer, check_below_one, check_not_negative


class Lion(Optimizer):
    """p ← (1 − lr · weight_decay) · p − lr · sign(β₁ m + (1 − β₁) grad), then m ← β₂ m + (1 − β₂) grad.

    Source: Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu, Le, "Symbolic Discovery of Optimization
    Algorithms", arXiv:2302.06675, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        check_not_negative(lr=lr, weight_decay=weight_decay)
        check_below_one(betas=betas)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "maximize": maximize})

    @update
    def rule(p, grad, exp_avg, *, lr, betas, weight_decay=0.0, maximize=False):
        beta1, beta2 = betas
        if maximize:
            grad = -grad
        direction = gpuad.sign(beta1 * exp_avg + (1 - beta1) * grad)
        return p * (1 - lr * weight_decay) - lr * direction, beta2 * exp_avg + (1 - beta2) * grad
