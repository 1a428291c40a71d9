"""LRScheduler: what sets the learning rate of an optimiser's parameter groups from epoch to epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LRScheduler:
    """Base of the schedulers: a subclass gives the rates of the groups at epoch `last_epoch` in `get_lr`.

    last_epoch: -1 to start; else the epoch to go on from, with optimiser groups that hold their `initial_lr`.
    """

    last_epoch: int
    base_lrs: list[float]
    _last_lr: list[float]

    def __init__(self, optimizer: Any, last_epoch: int = -1) -> None:
        self.optimizer = checked(optimizer)
        for number, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", group["lr"])
            elif "initial_lr" not in group:
                raise KeyError(
                    f"param 'initial_lr' is not specified in param_groups[{number}] when resuming scheduler with "
                    f"last_epoch={last_epoch}; load the optimizer's state first, or start with last_epoch=-1"
                )
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        self._initial_step()

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        self.step()
        self._is_initial = False

    def get_lr(self) -> list[float]:
        """The rates at epoch `last_epoch`, computed from those at the epoch before; `step` calls it."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """The rates that were set last, one for each group."""
        return self._last_lr

    def step(self) -> None:
        """Go on to the next epoch and set its rates; call it after `optimizer.step()`."""
        self._step_count += 1
        self.last_epoch += 1
        self._set(self.get_lr())

    def _restart(self) -> None:
        """Be at epoch 0, as SequentialLR wants it when this scheduler's turn has come."""
        self.last_epoch = 0
        self._set(self.get_lr())

    def _set(self, rates: Sequence[float]) -> None:
        groups = len(self.optimizer.param_groups)
        if len(rates) != groups:
            raise ValueError(
                f"{type(self).__name__} was made for {len(rates)} parameter groups, the optimizer now has {groups}; "
                "make the scheduler after the last add_param_group"
            )
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        self._last_lr = self._current()

    def _current(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimiser, as plain values."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`; load the optimiser's own too, it holds the rates."""
        self.__dict__.update(state_dict)


def checked(optimizer: Any) -> Any:
    """The optimiser itself, if it is one: it has `param_groups`."""
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
    return optimizer


def for_each_group(name: str, optimizer: Any, value: Any) -> list[Any]:
    """`value` for each group: a list or tuple as it is, anything else repeated; `name` is for the error."""
    groups = len(checked(optimizer).param_groups)
    if not isinstance(value, (list, tuple)):
        return [value] * groups
    if len(value) != groups:
        raise ValueError(
            f"{name} must have the same length as optimizer.param_groups: "
            f"{name} has {len(value)} values, param_groups has {groups}"
        )
    return list(value)
