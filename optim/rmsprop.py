"""RMSprop: steps scaled by a running average of the squared gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpuad.update import update

from .optimizer import Optimizer, check_not_negative


class RMSprop(Optimizer):
    """p ← p − lr · b, with b ← momentum · b + grad / (√s + eps) and s ← alpha · s + (1 − alpha) · grad².

    weight_decay · p is added to grad first. centered divides by the running standard deviation, √(s − (mean grad)²).
    foreach and capturable are PyTorch's choices of implementation and change nothing.
    Source: Tieleman, Hinton, "Lecture 6.5 – rmsprop", COURSERA 2012; centered: Graves, arXiv:1308.0850.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_not_negative(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "alpha": alpha, "eps": eps, "centered": centered,
             "weight_decay": weight_decay, "capturable": capturable, "foreach": foreach, "maximize": maximize,
             "differentiable": differentiable},
        )  # fmt: skip

    @update
    def rule(p, grad, square_avg, momentum_buffer, grad_avg, *, step, lr, alpha, eps, weight_decay=0.0, momentum=0.0,
             centered=False, maximize=False):  # fmt: skip
        grad = (-grad if maximize else grad) + weight_decay * p
        square_avg = alpha * square_avg + (1 - alpha) * (grad * grad)
        grad_avg = grad_avg + (1 - alpha) * (grad - grad_avg)
        variance = square_avg - grad_avg * grad_avg if centered else square_avg
        momentum_buffer = momentum * momentum_buffer + grad / (variance.sqrt() + eps)
        return p - lr * momentum_buffer, square_avg, momentum_buffer, grad_avg
