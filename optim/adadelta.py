"""Adadelta: steps in the units of the parameter, from the sizes of earlier steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpuad.update import update

from .optimizer import Optimizer, check_not_negative


class Adadelta(Optimizer):
    """p ← p − lr · d, with d = √(u + eps) / √(s + eps) · grad, s and u running averages of grad² and of d².

    weight_decay · p is added to grad first. foreach and capturable are PyTorch's choices of implementation and change
    nothing.
    Source: Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_not_negative(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)
        if rho > 1.0:
            raise ValueError(f"rho must be between 0 and 1, got {rho}.")
        super().__init__(
            params,
            {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
             "capturable": capturable, "foreach": foreach, "differentiable": differentiable},
        )  # fmt: skip

    @update
    def rule(p, grad, square_avg, acc_delta, *, step, lr, rho, eps, weight_decay=0.0, maximize=False):
        grad = (-grad if maximize else grad) + weight_decay * p
        square_avg = rho * square_avg + (1 - rho) * (grad * grad)
        delta = (acc_delta + eps).sqrt() / (square_avg + eps).sqrt() * grad
        return p - lr * delta, square_avg, rho * acc_delta + (1 - rho) * (delta * delta)
