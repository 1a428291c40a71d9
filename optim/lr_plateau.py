"""ReduceLROnPlateau: the schedule that looks at a metric."""

from __future__ import annotations

import math
from typing import Any

from .lr_base import LRScheduler, for_each_group


class ReduceLROnPlateau(LRScheduler):
    """Multiply the rate by `factor` when the metric has not improved for more than `patience` epochs.

    mode: 'min' or 'max', what is better. threshold: how much counts as an improvement, relative ('rel') or absolute
    ('abs'). cooldown: epochs after a reduction that don't count. min_lr: the lowest rate. eps: the least reduction.
    """

    def __init__(
        self,
        optimizer: Any,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | list[float] = 0,
        eps: float = 1e-8,
    ) -> None:
        if factor >= 1.0:
            raise ValueError(f"Factor should be < 1.0, got {factor}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode {mode} is unknown; it is 'min' or 'max'")
        if threshold_mode not in ("rel", "abs"):
            raise ValueError(f"threshold mode {threshold_mode} is unknown; it is 'rel' or 'abs'")
        self.optimizer = optimizer
        self.min_lr = min_lr
        self.min_lrs = for_each_group("min_lr", optimizer, min_lr)
        self.mode = mode
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.eps = eps
        self.last_epoch = 0
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad_epochs = 0
        self.cooldown_counter = 0
        self._last_lr = self._current()

    @property
    def in_cooldown(self) -> bool:
        """Whether the epochs after a reduction are not over yet."""
        return self.cooldown_counter > 0

    def step(self, metrics: Any) -> None:  # type: ignore[override]
        """Go on to the next epoch, whose metric (a number, or a tensor of one element) this is."""
        current = float(metrics)
        self.last_epoch += 1
        if self._is_better(current):
            self.best = current
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
        self._last_lr = self._current()

    def _is_better(self, current: float) -> bool:
        if self.mode == "min":
            best = self.best * (1 - self.threshold) if self.threshold_mode == "rel" else self.best - self.threshold
            return current < best
        best = self.best * (1 + self.threshold) if self.threshold_mode == "rel" else self.best + self.threshold
        return current > best

    def _reduce(self) -> None:
        if len(self.min_lrs) != len(self.optimizer.param_groups):  # a group was added since
            self.min_lrs = for_each_group("min_lr", self.optimizer, self.min_lr)
        for group, least in zip(self.optimizer.param_groups, self.min_lrs):
            reduced = max(group["lr"] * self.factor, least)
            if group["lr"] - reduced > self.eps:
                group["lr"] = reduced
