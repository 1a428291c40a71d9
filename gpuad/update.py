"""Updates of parameters by rules, as optimisers make them: what changed since the last step, state, one launch.

An optimiser declares its rule with `@update` and lets an `Updater` run it (gpuad.optim.Optimizer does). What a rule is
and becomes is in gpuad/kernels/update.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.array.device import Device, cpu
from gpuad.array.dtypes import FLOATING
from gpuad.autograd.modes import no_grad
from gpuad.errors import DeviceError, DtypeError, ShapeError
from gpuad.kernels.update import Update, UpdateRule
from gpuad.tensor import Tensor, wrap


def update(function: Any) -> UpdateRule:
    """Declare a rule `(p, grad, *state, *, hyperparameters…) -> (new p, *new state)` of one element; a decorator.

    It is traced as formulas are; see gpuad.kernels.update.UpdateRule for what its parameters mean.
    """
    return UpdateRule(function)


class _Batch:
    """The parameters of one update, device and dtype: one launch. sets: those of this step, by their numbers."""

    __slots__ = ("device", "program", "sets", "settings")

    def __init__(self, device: Any, program: Any) -> None:
        self.device, self.program = device, program
        self.sets: list[tuple[tuple[float, ...], list]] = []
        self.settings: list[_Setting] = []  # of each set


class _Setting:
    """The hyperparameters of a group: raw as they stand there, their values, and the numbers made of them, by step.

    first: the setting for the first update of a parameter. moving: whether a value can change in place (a Tensor).
    """

    __slots__ = ("raw", "values", "update", "numbers", "first", "moving")

    first: _Setting

    def __init__(self, rule: UpdateRule, raw: list[Any]) -> None:
        self.raw = raw
        self.values = tuple([_plain(value) for value in raw])
        self.update: Update = rule.update(self.values)
        self.numbers: dict[float | None, tuple[float, ...]] = {}
        self.moving = not all(isinstance(v, (int, float)) for r in raw for v in (r if type(r) is tuple else (r,)))

    def numbers_at(self, step: float | None) -> tuple[float, ...]:
        """The numbers of the formula; one tuple for all parameters that have counted the same step."""
        found = self.numbers.get(step)
        if found is None:
            found = self.numbers[step] = self.update.prelude(self.values, step)
        return found

    def on_device(self, numbers: tuple[float, ...], backend: Any, skipped: Any) -> Any:
        """Those numbers computed on a device, where only that knows how many of the counted steps were skipped."""
        attempts = next(step for step, known in self.numbers.items() if known is numbers)
        made = backend.empty((self.update.numbers,), np.dtype(np.float64))
        outs = [made[k : k + 1].reshape(()) for k in range(self.update.numbers)]
        given = [*self.update.given(self.values), attempts, skipped]
        backend.elementwise(self.update.device_prelude, given, made.dtype, outs)
        return made


def _plain(value: Any) -> Any:
    """A hyperparameter as Python numbers: Tensors and NumPy scalars read."""
    if type(value) in (float, int, bool):
        return value
    if isinstance(value, Tensor):
        return value.item()
    return tuple([_plain(v) for v in value]) if isinstance(value, (tuple, list)) else float(value)


class _Entry:
    """What was prepared for a parameter; valid while its array, its gradient and its state are those it was made for.

    The arrays of the parameter and of its gradient are held weakly: they must go when they are replaced, and zero_grad
    must see whether somebody else looks at a gradient.
    """

    __slots__ = ("update", "data", "grad", "held", "arrays", "count", "batch", "prepared", "is_first")

    update: Update
    data: Any
    grad: Any
    held: list[tuple[str, Tensor, Any]]  # the state in use: name, tensor and array
    arrays: tuple[Any, ...]  # of the state, as the update takes them
    count: np.ndarray | None  # of steps
    batch: _Batch
    prepared: Any
    is_first: bool

    def holds(self, own: dict[str, Any] | None) -> bool:
        """Whether the state of the parameter is still the one this was made for."""
        for name, tensor, array in self.held:
            if own is None or own.get(name) is not tensor or tensor._data is not array:
                return False
        return True


class _Skips:
    """How many steps a device skipped since the step counts were last right: the device counts, the host does not know.

    counts: the step counts, by their id, that took part in all of those steps, so that one number serves them all.
    """

    def __init__(self) -> None:
        self.skipped: dict[Device, Any] = {}
        self.counts: dict[int, tuple[Device, np.ndarray]] = {}

    def begin(self, groups: Sequence[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        """Settle where other parameters take part in this step than in the last."""
        ids = set()
        for group in groups:
            for p in group["params"]:
                if p._grad is not None:
                    count = state[p].get("step") if p in state else None
                    ids.add(id(count._data) if isinstance(count, Tensor) else None)
        if ids != self.counts.keys():
            self.settle()

    def add(self, found: dict[Device, Any], counted: Sequence[tuple[np.ndarray, float, Device]]) -> None:
        """Count a step that was skipped where `found` is not 0."""
        self.counts = {id(count): (device, count) for count, _, device in counted}
        for device, flag in found.items():
            device.backend.add_into(self.of(device), flag)

    def of(self, device: Device) -> Any:
        """The number of skipped steps, on the device."""
        if device not in self.skipped:
            self.skipped[device] = device.backend.full((), 0, np.dtype(np.float64))
        return self.skipped[device]

    def settle(self) -> None:
        """Take the skipped steps off the counts; waits for the devices that skip."""
        known = {device: device.backend.to_host(array).item() for device, array in self.skipped.items()}
        for device, count in self.counts.values():
            count -= known.get(device, 0.0)
        self.skipped.clear()
        self.counts.clear()


class Updater:
    """Runs a rule over parameter groups.

    first: hyperparameters that have another value in the first update of a parameter, the one that makes its state.
    initial: by the name of a state, the hyperparameter whose value it starts from, where that is not 0.
    """

    def __init__(self, rule: UpdateRule, first: dict[str, Any] | None = None, initial: dict[str, str] | None = None):
        self.rule, self._first, self._initial = rule, first or {}, initial or {}
        self._entries: dict[Tensor, _Entry] = {}
        self._settings: dict[int, _Setting] = {}
        self._batches: dict[tuple, _Batch] = {}
        self._made: list[tuple[Tensor, str]] = []  # the state that the current step has added: parameter and name
        self._skips = _Skips()

    def step(
        self,
        groups: Sequence[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        found_inf: dict[Device, Tensor] | None = None,
    ) -> None:
        """Update every parameter that has a gradient; `state` is given the state that the rule needs for it.

        found_inf: for each device of the parameters a number there; where it is not 0 nothing is updated, and the host
        does not wait to know. Raises DeviceError, ShapeError or DtypeError where a gradient or a state does not fit its
        parameter, and gpuad.cuda.OutOfMemoryError; then nothing is updated, and no state is left behind that was not
        there.
        """
        opened: list[_Batch] = []
        counted: list[tuple[np.ndarray, float, Device]] = []
        if found_inf is None:
            self.settle()
        elif self.rule.counts_steps:
            self._skips.begin(groups, state)
        try:
            try:
                for index, group in enumerate(groups):
                    self._collect(group, self._setting(index, group), state, opened, counted)
                runs = [(batch, *self._run(batch, found_inf)) for batch in opened]
                for batch, sets, _ in runs:
                    batch.device.backend.prepare_update(batch.program, sets)
            except BaseException:
                self._unmake(state)
                raise
            for count, step, _ in counted:
                count.fill(step)
            for batch, sets, skip in runs:
                batch.device.backend.update(batch.program, sets, *skip)
        finally:
            self._made.clear()
            for batch in opened:
                batch.sets, batch.settings = [], []
        if found_inf is not None and self.rule.counts_steps:
            self._skips.add({device: flag._data for device, flag in found_inf.items()}, counted)

    def settle(self) -> None:
        """Make step counts right where a device skipped steps; waits for it."""
        if self._skips.skipped:
            self._skips.settle()

    def _run(self, batch: _Batch, found_inf: dict[Device, Tensor] | None) -> tuple[list[tuple[Any, list]], tuple]:
        """The sets of a batch as its backend takes them, and what makes it skip them."""
        if found_inf is None:
            return batch.sets, ()
        sets: list[tuple[Any, list]] = batch.sets
        if self.rule.counts_steps:
            backend, skipped = batch.device.backend, self._skips.of(batch.device)
            sets = [
                (setting.on_device(numbers, backend, skipped), items)
                for setting, (numbers, items) in zip(batch.settings, batch.sets, strict=True)
            ]
        return sets, (found_inf[batch.device]._data,)

    def _unmake(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Take out the state that a failed step has added: the next one then is the first for these parameters."""
        for p, name in self._made:
            own = state.get(p, {})
            own.pop(name, None)
            if not own:
                state.pop(p, None)

    def _setting(self, index: int, group: dict[str, Any]) -> _Setting:
        raw = [group[name] for name in self.rule.hyperparameters]
        found = self._settings.get(index)
        if found is None or found.moving or found.raw != raw:
            found = self._settings[index] = _Setting(self.rule, raw)
            found.first = found
            if any([group[name] != value for name, value in self._first.items()]):
                changed = {**group, **self._first}
                found.first = _Setting(self.rule, [changed[name] for name in self.rule.hyperparameters])
        elif self.rule.counts_steps:
            found.numbers.clear()  # those of the last step
            found.first.numbers.clear()
        return found

    def _collect(
        self,
        group: dict[str, Any],
        setting: _Setting,
        state: dict[Tensor, dict[str, Any]],
        opened: list[_Batch],
        counted: list[tuple[np.ndarray, float, Device]],
    ) -> None:
        """Put the parameters of a group that have gradients into the sets of their batches."""
        entries, update = self._entries, setting.update
        step = numbers = batch = None
        items: list = []
        for p in group["params"]:
            g = p._grad
            if g is None:
                continue
            data, grad = p._data, g._data
            entry = entries.get(p)
            if (
                entry is None
                or entry.data() is not data
                or entry.update is not update
                or (entry.held and not entry.holds(state.get(p)))
            ):
                entry = self._prepare(p, g, group, setting, state)
            elif entry.grad() is not grad:
                _check_gradient(p, g)
                entry.grad = weakref.ref(grad)
                entry.prepared = entry.batch.program.prepare((data, grad, *entry.arrays))
            if entry.count is not None:
                step = entry.count.item() + 1.0
                counted.append((entry.count, step, p._device))
            wanted = setting.first if entry.is_first else setting
            found = wanted.numbers_at(step)
            if found is not numbers or entry.batch is not batch:
                numbers, batch = found, entry.batch
                items = _open(batch, wanted, numbers, opened)
            p._cell[0] += 1
            items.append((entry.prepared, data, grad, *entry.arrays))

    def _prepare(
        self, p: Tensor, g: Tensor, group: dict[str, Any], setting: _Setting, state: dict[Tensor, dict[str, Any]]
    ) -> _Entry:
        data = p._data
        _check_gradient(p, g)
        own = state.get(p)
        if own is None and (self.rule.counts_steps or setting.update.states):
            own = state[p] = {}
        entry = _Entry()
        entry.is_first, entry.held, entry.count = False, [], None
        if own is not None and self.rule.counts_steps:
            if "step" not in own:
                self._made.append((p, "step"))
            counter = own["step"] = _step_count(own.get("step"))
            entry.count = counter._data
            entry.held.append(("step", counter, counter._data))
        arrays = []
        for name in setting.update.states:
            assert own is not None
            tensor = own.get(name)
            if tensor is None:
                entry.is_first = True
                value = _plain(group[self._initial[name]]) if name in self._initial else 0
                self._made.append((p, name))
                tensor = own[name] = wrap(p._device.backend.xp.full_like(data, value), p._device)
            elif tensor._device is not p._device or tensor._data.dtype != data.dtype:
                with no_grad():
                    tensor = own[name] = tensor.detach().to(p._device, data.dtype)
            if tensor._data.shape != data.shape:
                raise ShapeError(
                    f"The state {name!r} of a parameter has shape {tuple(tensor.shape)}, the parameter now has "
                    f"{tuple(p.shape)}; where p.data was replaced by another shape, drop the state with "
                    "`del optimizer.state[p]`."
                )
            arrays.append(tensor._data)
            entry.held.append((name, tensor, tensor._data))
        entry.arrays = tuple(arrays)
        entry.update = (setting.first if entry.is_first else setting).update
        entry.data, entry.grad = weakref.ref(data), weakref.ref(g._data)
        entry.batch = self._batch(entry.update, p)
        entry.prepared = entry.batch.program.prepare((data, g._data, *arrays))
        if entry.is_first:
            self._entries.pop(p, None)
        else:
            self._entries[p] = entry
        return entry

    def _batch(self, update: Update, p: Tensor) -> _Batch:
        key = (update, p._device, p._data.dtype)
        found = self._batches.get(key)
        if found is None:
            program = update.program(p._device.backend.language, p._data.dtype)
            found = self._batches[key] = _Batch(p._device, program)
        return found


def _open(batch: _Batch, setting: _Setting, numbers: tuple[float, ...], opened: list[_Batch]) -> list:
    """The list of a batch for the parameters that are updated with these numbers."""
    for known, items in batch.sets:
        if known is numbers:
            return items
    if not batch.sets:
        opened.append(batch)
    items = []
    batch.sets.append((numbers, items))
    batch.settings.append(setting)
    return items


def _step_count(value: Any) -> Tensor:
    """A step count as it is kept: a 0-d floating tensor on the host, as PyTorch has it."""
    if isinstance(value, Tensor):
        data = value._data
        if type(data) is np.ndarray and data.ndim == 0 and data.dtype.char in FLOATING and data.flags.writeable:
            return value
        value = value.item()
    return wrap(np.array(value or 0, np.float32), cpu)


def _check_gradient(p: Tensor, g: Tensor) -> None:
    if g._device is not p._device:
        raise DeviceError(
            f"The gradient of a parameter is on {g._device}, the parameter on {p._device}; compute the gradient anew "
            f'after moving the parameter, or move it too: p.grad = p.grad.to("{p._device}").'
        )
    if g._data.shape != p._data.shape:
        raise ShapeError(
            f"The gradient of a parameter has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}; compute the "
            "gradient anew after replacing p.data."
        )
    if g._data.dtype != p._data.dtype:
        raise DtypeError(
            f"The gradient of a parameter is {g.dtype}, the parameter {p.dtype}; compute the gradient anew after "
            f"converting the parameter, or convert it too: p.grad = p.grad.to(gpuad.{p.dtype})."
        )
