"""Schedules given by one formula of the epoch.

Most are a factor by which the initial rate is multiplied at epoch t. They apply the ratio of two consecutive factors
to whatever rate is there, so that several schedulers on one optimiser multiply.
"""

from __future__ import annotations

import math
import types
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

from .lr_base import LRScheduler, for_each_group


class _FactorLR(LRScheduler):
    """Rate at epoch t = floor + (initial − floor) · factor(t), reached from the rate at t − 1."""

    def _factor(self, epoch: int) -> float:
        raise NotImplementedError

    def _floor(self) -> float:
        return 0.0

    def get_lr(self) -> list[float]:
        epoch, floor = self.last_epoch, self._floor()
        before, now = (1.0 if epoch == 0 else self._factor(epoch - 1)), self._factor(epoch)
        if before == now or (self._is_initial and epoch > 0):
            return self._current()
        if before == 0.0:  # nothing left to multiply
            return [lr + (base - floor) * now for base, lr in zip(self.base_lrs, self._current())]
        return [floor + (lr - floor) * (now / before) for lr in self._current()]

    def _restart(self) -> None:
        self.last_epoch = 0
        floor = self._floor()
        self._set([floor + (base - floor) * self._factor(0) for base in self.base_lrs])


class StepLR(_FactorLR):
    """factor = gamma^⌊t / step_size⌋."""

    def __init__(self, optimizer: Any, step_size: int, gamma: float = 0.1, last_epoch: int = -1) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        return self.gamma ** (epoch // self.step_size)


class MultiStepLR(_FactorLR):
    """factor = gamma to the power of the number of milestones reached."""

    def __init__(self, optimizer: Any, milestones: Iterable[int], gamma: float = 0.1, last_epoch: int = -1) -> None:
        self.milestones = sorted(milestones)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        return self.gamma ** bisect_right(self.milestones, epoch)


class ConstantLR(_FactorLR):
    """`factor` until epoch total_iters, then 1."""

    def __init__(self, optimizer: Any, factor: float = 1.0 / 3, total_iters: int = 5, last_epoch: int = -1) -> None:
        if not 0 <= factor <= 1:
            raise ValueError(f"Constant multiplicative factor expected to be between 0 and 1, got {factor}")
        self.factor = factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        return self.factor if epoch < self.total_iters else 1.0


class LinearLR(_FactorLR):
    """factor from start_factor at epoch 0 straight to end_factor at total_iters, where it stays."""

    def __init__(
        self,
        optimizer: Any,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        if not 0 < start_factor <= 1:
            raise ValueError(
                "Starting multiplicative factor expected to be greater than 0 and less or equal to 1, "
                f"got {start_factor}"
            )
        if not 0 <= end_factor <= 1:
            raise ValueError(f"Ending multiplicative factor expected to be between 0 and 1, got {end_factor}")
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        share = min(self.total_iters, epoch) / max(self.total_iters, 1)
        return self.start_factor + (self.end_factor - self.start_factor) * share


class ExponentialLR(_FactorLR):
    """factor = gamma^t."""

    def __init__(self, optimizer: Any, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        return self.gamma**epoch


class PolynomialLR(_FactorLR):
    """factor = (1 − t / total_iters)^power, and 0 after total_iters."""

    def __init__(self, optimizer: Any, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1) -> None:
        self.total_iters = total_iters
        self.power = power
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        return (1.0 - min(self.total_iters, epoch) / max(self.total_iters, 1)) ** self.power


class CosineAnnealingLR(_FactorLR):
    """From the initial rate down to eta_min at T_max, and up again: factor = (1 + cos(π t / T_max)) / 2.

    Source: Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv:1608.03983.
    """

    def __init__(self, optimizer: Any, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        return (1.0 + math.cos(math.pi * epoch / self.T_max)) / 2.0

    def _floor(self) -> float:
        return self.eta_min


class _FunctionLR(LRScheduler):
    """What LambdaLR and MultiplicativeLR share: a function for each group, which is not part of the state."""

    def __init__(self, optimizer: Any, lr_lambda: Any, last_epoch: int = -1) -> None:
        self.lr_lambdas: list[Callable[[int], float]] = for_each_group("lr_lambda", optimizer, lr_lambda)
        for function in self.lr_lambdas:
            if not callable(function):
                raise TypeError(f"lr_lambda should be a function, but got {type(function).__name__}")
        super().__init__(optimizer, last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """As in LRScheduler; of callable objects, not of functions, the attributes are kept."""
        state = super().state_dict()
        state["lr_lambdas"] = [
            None if isinstance(function, types.FunctionType) else dict(vars(function)) for function in self.lr_lambdas
        ]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in LRScheduler; the functions stay, callable objects get their attributes back."""
        for function, attributes in zip(self.lr_lambdas, state_dict["lr_lambdas"]):
            if attributes is not None:
                vars(function).update(attributes)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "lr_lambdas"})


class LambdaLR(_FunctionLR):
    """Rate = initial · lr_lambda(t); lr_lambda is a function, or a list of them, one for each group."""

    def get_lr(self) -> list[float]:
        return [base * function(self.last_epoch) for function, base in zip(self.lr_lambdas, self.base_lrs)]


class MultiplicativeLR(_FunctionLR):
    """Rate = rate before · lr_lambda(t); lr_lambda is a function, or a list of them, one for each group."""

    def get_lr(self) -> list[float]:
        if self._is_initial:
            return self._current()
        return [lr * function(self.last_epoch) for function, lr in zip(self.lr_lambdas, self._current())]
