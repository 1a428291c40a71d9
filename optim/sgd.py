"""SGD: gradient descent, with momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gpuad
from gpuad.update import update

from .optimizer import Optimizer, check_not_negative


class SGD(Optimizer):
    """p ← p − lr · v, with v ← momentum · v + (1 − dampening) · (grad + weight_decay · p).

    The first v is the gradient itself; without momentum there is no v and no dampening. nesterov steps along
    grad + momentum · v; maximize climbs instead.
    foreach and fused are PyTorch's choices of implementation and change nothing: a step is always one launch.
    Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning",
    ICML 2013, with PyTorch's placing of lr.
    """

    first = {"dampening": 0.0}

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"nesterov=True needs a momentum above 0 and no dampening, got {momentum} and {dampening}."
            )
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
             "nesterov": nesterov, "maximize": maximize, "foreach": foreach, "differentiable": differentiable,
             "fused": fused},
        )  # fmt: skip

    @update
    def rule(p, grad, momentum_buffer, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
             maximize=False):  # fmt: skip
        grad = (-grad if maximize else grad) + weight_decay * p
        damped = gpuad.where(momentum > 0, 1 - dampening, 1.0)
        momentum_buffer = momentum * momentum_buffer + damped * grad
        direction = grad + momentum * momentum_buffer if nesterov else momentum_buffer
        return p - lr * direction, momentum_buffer
