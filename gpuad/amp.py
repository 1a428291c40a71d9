"""Automatic mixed precision, by PyTorch's names: autocast, and the GradScaler that keeps small gradients alive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from gpuad.array import dtypes
from gpuad.array.device import Device
from gpuad.autograd.autocast import autocast, custom_bwd, custom_fwd
from gpuad.autograd.modes import no_grad
from gpuad.errors import DtypeError
from gpuad.ops import many
from gpuad.ops.arithmetic import where
from gpuad.ops.fuse import fuse
from gpuad.tensor import Tensor, wrap

__all__ = ["GradScaler", "autocast", "custom_bwd", "custom_fwd"]


@fuse(name="amp_update")
def _updated(scale, tracker, found, growth, backoff, interval):
    """The scale and the count of steps without infinities, after a step."""
    full = tracker + 1 >= interval
    grown = scale * growth
    fits = grown <= float(np.finfo(np.float32).max)
    calm = where(full, where(fits, grown, scale), scale)
    return where(found > 0, scale * backoff, calm), where(found > 0, 0.0, where(full, 0.0, tracker + 1))


class _PerOptimizer:
    """Where an optimiser stands between two updates: by device what its gradients were found to hold; or stepped."""

    def __init__(self) -> None:
        self.found: dict[Device, Tensor] = {}
        self.stepped = False


class GradScaler:
    """Scales the loss so that float16 gradients do not vanish, and skips steps whose gradients overflowed.

        scaler = gpuad.amp.GradScaler()
        with gpuad.autocast("cuda"):
            loss = loss_function(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # divides the gradients first, unless scaler.unscale_(optimizer) did
        scaler.update()

    The scale starts at init_scale, is multiplied by backoff_factor after a step whose gradients held inf or NaN, and by
    growth_factor after growth_interval steps without one. enabled=False makes every method a no-op.

    On a CUDA device nothing waits: whether a step is skipped is decided by the kernel that makes it, and step counts in
    optimizer.state become right when they are next needed on the host (state_dict(), or a step without the scaler).
    Parameters on several CUDA devices skip together; beside parameters on the host, and with an optimiser that has a
    step of its own instead of a rule, the host waits for the device to know.

    Source: PyTorch documentation, torch.amp.GradScaler; Micikevicius et al., "Mixed Precision Training",
    arXiv:1710.03740, section 3.2.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if enabled and not growth_factor > 1.0:
            raise ValueError(f"growth_factor must be above 1, got {growth_factor}.")
        if enabled and not 0.0 < backoff_factor < 1.0:
            raise ValueError(f"backoff_factor must be between 0 and 1, got {backoff_factor}.")
        self.device = device
        self._enabled = bool(enabled)
        self._init_scale = float(init_scale)
        self._growth_factor, self._backoff_factor = float(growth_factor), float(backoff_factor)
        self._growth_interval = int(growth_interval)
        self._init_tracker = 0
        self._scale: Tensor | None = None  # made on the device of the first loss
        self._tracker: Tensor | None = None
        self._optimizers: dict[int, _PerOptimizer] = {}

    # The scale --------------------------------------------------------------------------------------------------------

    def scale(self, outputs: Any) -> Any:
        """The loss, or an iterable of losses, times the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            return outputs * self._scale_on(outputs._device)
        if isinstance(outputs, Iterable):
            scaled = [self.scale(each) for each in outputs]
            return type(outputs)(scaled) if isinstance(outputs, (list, tuple)) else scaled
        raise TypeError(f"scale takes a Tensor or an iterable of Tensors, got {type(outputs).__name__}.")

    def _scale_on(self, device: Device) -> Tensor:
        if self._scale is None:
            self._scale = _number(self._init_scale, device)
            self._tracker = _number(self._init_tracker, device)
        return self._scale.to(device)

    def get_scale(self) -> float:
        """The scale as a Python number; waits for the device."""
        if not self._enabled:
            return 1.0
        return self._init_scale if self._scale is None else self._scale.item()

    # Steps ------------------------------------------------------------------------------------------------------------

    def unscale_(self, optimizer: Any) -> None:
        """Divide the gradients of an optimiser's parameters by the scale, in place, e.g. to clip them before step()."""
        if not self._enabled:
            return
        own = self._optimizers.setdefault(id(optimizer), _PerOptimizer())
        if own.stepped:
            raise RuntimeError("unscale_() is being called after step(); call it before, and update() after step().")
        if own.found:
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
        own.found = self._unscale(optimizer)

    def _unscale(self, optimizer: Any) -> dict[Device, Tensor]:
        if self._scale is None:
            raise RuntimeError("The scaler has scaled no loss yet; call scaler.scale(loss).backward() first.")
        gradients: dict[Device, dict[Any, list[Tensor]]] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p._grad is None:
                    continue
                if p._grad._data.dtype == dtypes.float16:
                    raise DtypeError(
                        "The gradients of float16 parameters cannot be unscaled: they are too coarse to train on. Keep "
                        "the parameters in float32 (no model.half()) and compute under gpuad.autocast."
                    )
                gradients.setdefault(p._grad._device, {}).setdefault(p._grad._data.dtype, []).append(p._grad)
        found = {}
        for device, by_dtype in gradients.items():
            scale, flag = self._scale_on(device), _number(0, device)
            for same in by_dtype.values():
                many.unscale_(same, scale, flag)
            found[device] = flag
        return found

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Unscale the gradients unless that was done, and let the optimiser step where all of them are finite.

        Returns what optimizer.step returned, None where the step is known to be skipped.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if args or kwargs.get("closure") is not None:
            raise RuntimeError("A closure cannot be given to GradScaler.step(): gradients would be computed unscaled.")
        own = self._optimizers.setdefault(id(optimizer), _PerOptimizer())
        if own.stepped:
            raise RuntimeError("step() has already been called since the last update().")
        if not own.found:
            own.found = self._unscale(optimizer)
        if not own.found:
            raise RuntimeError("No gradients were found for this optimizer; call scaler.scale(loss).backward() first.")
        own.stepped = True
        skip = _together(own.found)
        known = [device.backend.peek(flag._data) for device, flag in skip.items()]
        if optimizer.rule is None or any(flag is not None for flag in known):
            return None if any(flag.item() for flag in skip.values()) else optimizer.step(**kwargs)
        optimizer.found_inf = skip
        try:
            return optimizer.step(**kwargs)
        finally:
            optimizer.found_inf = None

    def update(self, new_scale: Any = None) -> None:
        """Adapt the scale to what the steps since the last update found, or set it; call it once an iteration."""
        if not self._enabled:
            return
        if self._scale is None or self._tracker is None:
            raise RuntimeError("update() needs a scale; call scaler.scale(loss) first.")
        device = self._scale._device
        if new_scale is not None:
            number = new_scale.item() if isinstance(new_scale, Tensor) else float(new_scale)
            self._scale = _number(number, device)
        else:
            flags = [flag.to(device) for own in self._optimizers.values() for flag in own.found.values()]
            if not flags:
                raise RuntimeError("update() found no gradients that were unscaled; call step() (or unscale_()) first.")
            found = sum(flags[1:], flags[0])
            with no_grad():
                self._scale, self._tracker = _updated(
                    self._scale, self._tracker, found, self._growth_factor, self._backoff_factor, self._growth_interval
                )
        self._optimizers.clear()

    # Settings and state -----------------------------------------------------------------------------------------------

    def is_enabled(self) -> bool:
        """Whether it scales."""
        return self._enabled

    def get_growth_factor(self) -> float:
        """What the scale is multiplied by after growth_interval steps without an overflow."""
        return self._growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Set the growth factor."""
        self._growth_factor = float(new_factor)

    def get_backoff_factor(self) -> float:
        """What the scale is multiplied by after an overflow."""
        return self._backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set the backoff factor."""
        self._backoff_factor = float(new_factor)

    def get_growth_interval(self) -> int:
        """How many steps without an overflow let the scale grow."""
        return self._growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        """Set the growth interval."""
        self._growth_interval = int(new_interval)

    def state_dict(self) -> dict[str, Any]:
        """The scale, its settings and its count, as numbers; {} where it is not enabled. Waits for the device."""
        if not self._enabled:
            return {}
        return {
            "scale": self.get_scale(),
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._init_tracker if self._tracker is None else int(self._tracker.item()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state_dict, which PyTorch's layout is too."""
        if not self._enabled:
            return
        if not state_dict:
            raise RuntimeError("The state_dict is empty: it comes from a GradScaler that was not enabled.")
        self._init_scale = float(state_dict["scale"])
        self._init_tracker = int(state_dict["_growth_tracker"])
        self._growth_factor = state_dict["growth_factor"]
        self._backoff_factor = state_dict["backoff_factor"]
        self._growth_interval = state_dict["growth_interval"]
        self._scale = self._tracker = None


def _number(value: float, device: Device) -> Tensor:
    return wrap(device.backend.full((), value, dtypes.float32), device)


def _together(found: dict[Device, Tensor]) -> dict[Device, Tensor]:
    """For each device whether any of them found something."""
    if len(found) == 1:
        return found
    return {
        device: sum((flag.to(device) for other, flag in found.items() if other is not device), own)
        for device, own in found.items()
    }
