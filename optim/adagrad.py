"""Adagrad: steps scaled by the sum of all squared gradients so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpuad.update import update

from .optimizer import Optimizer, check_not_negative


class Adagrad(Optimizer):
    """p ← p − lrₜ · grad / (√s + eps), with s ← s + grad² and lrₜ = lr / (1 + (t − 1) · lr_decay).

    s starts from initial_accumulator_value; weight_decay · p is added to grad first.
    foreach and fused are PyTorch's choices of implementation and change nothing.
    Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR
    12 (2011).
    """

    initial = {"sum": "initial_accumulator_value"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_not_negative(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps)
        check_not_negative(initial_accumulator_value=initial_accumulator_value)
        super().__init__(
            params,
            {"lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
             "initial_accumulator_value": initial_accumulator_value, "foreach": foreach, "maximize": maximize,
             "differentiable": differentiable, "fused": fused},
        )  # fmt: skip

    @update
    def rule(p, grad, sum, *, step, lr, lr_decay, eps, weight_decay=0.0, maximize=False):
        grad = (-grad if maximize else grad) + weight_decay * p
        sum = sum + grad * grad
        return p - lr / (1 + (step - 1) * lr_decay) * (grad / (sum.sqrt() + eps)), sum
