"""Optimizer: parameter groups, state, and a step that runs one rule over them.

An optimiser of one's own is a rule and its hyperparameters:

    class Momentum(Optimizer):
        def __init__(self, params, lr=1e-2, momentum=0.9):
            super().__init__(params, {"lr": lr, "momentum": momentum})

        @update
        def rule(p, grad, velocity, *, lr, momentum):
            velocity = momentum * velocity + grad
            return p - lr * velocity, velocity
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import gpuad
from gpuad import Tensor
from gpuad.autograd.graph import RemovableHandle
from gpuad.autograd.zero_grad import zero_grad
from gpuad.kernels.update import UpdateRule
from gpuad.update import Updater


class Optimizer:
    """Base of the optimisers.

    params: an iterable of tensors, of (name, tensor) pairs, or of dicts, each a group with "params" and values that
    take the place of the defaults. defaults: the hyperparameters, by name.

    A subclass declares its `rule`, or overrides `step`. Parameters without a gradient are skipped: nothing decays, no
    state is made. State follows its parameter to another device or dtype at the next step.
    """

    rule: UpdateRule | None = None
    # Hyperparameters with another value in a parameter's first update; states that start from a hyperparameter, not 0.
    first: dict[str, Any] = {}
    initial: dict[str, str] = {}
    # By device, a number there that is not 0 where a step must change nothing; GradScaler puts it here for a step.
    found_inf: dict[Any, Tensor] | None = None

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if isinstance(params, Tensor):
            raise TypeError(
                "params takes an iterable of tensors or of dicts, got a Tensor; put it in a list: [tensor]."
            )
        if defaults.get("differentiable"):
            raise ValueError(
                "differentiable=True is not there: a step changes parameters in place, off the tape. Write the update "
                "out with tensor operations to differentiate through it."
            )
        self.defaults = defaults
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []
        self._start()
        groups = list(params)
        if not groups:
            raise ValueError("The optimiser got an empty parameter list; give it e.g. model.parameters().")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    def _start(self) -> None:
        self._before_step: dict[int, Callable] = {}
        self._after_step: dict[int, Callable] = {}
        self._updater = None if self.rule is None else Updater(self.rule, self.first, self.initial)

    def __getstate__(self) -> dict[str, Any]:
        if self._updater is not None:
            self._updater.settle()
        return {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for number, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {number}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"]
        return "\n".join([*lines, ")"])

    # Groups -----------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: {"params": tensors, …}; hyperparameters that it does not name are the defaults.

        Raises ValueError for a tensor that is there already or that an operation computed.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"A parameter group must be a dict, got {type(param_group).__name__}.")
        group = dict(param_group)
        params = group["params"]
        if isinstance(params, set):
            raise TypeError(
                "The parameters are a set, whose order changes from run to run, and with it which state belongs to "
                "which; give a list."
            )
        params = [params] if isinstance(params, Tensor) else list(params)
        named = [p for p in params if isinstance(p, tuple)]
        if named and len(named) != len(params):
            raise ValueError("Give either all parameters with their names, as (name, tensor), or none.")
        if named:
            group["param_names"] = [name for name, _ in params]
            params = [p for _, p in params]
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(f"The optimiser optimises Tensors, one of the params is {type(p).__name__}.")
            if not p.is_leaf:
                raise ValueError(
                    "The optimiser cannot optimise a tensor that an operation computed: the operation would not know. "
                    "Give it leaves, e.g. x.detach().requires_grad_()."
                )
        if len(set(params)) != len(params):
            raise ValueError("A tensor is twice in one parameter group; give each once (a shared one counts once).")
        present = {p for known in self.param_groups for p in known["params"]}
        if present.intersection(params):
            raise ValueError("Some parameters appear in more than one parameter group; each can be in one only.")
        if self.param_groups and ("param_names" in group) != ("param_names" in self.param_groups[0]):
            raise ValueError("Give either all groups with names of their parameters, or none.")
        group["params"] = params
        self.param_groups.append({**self.defaults, **group})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters (their buffers serve the next backward), or zero them in place."""
        for group in self.param_groups:
            zero_grad(group["params"], set_to_none)

    # Steps ------------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what the closure returns.

        closure: computes the loss and its gradients anew; called first, with recording on.
        """
        if self._updater is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a rule nor a step of its own.")
        loss = None
        if closure is not None:
            with gpuad.enable_grad():
                loss = closure()
        if self._before_step:
            self._call(self._before_step)
        self._updater.step(self.param_groups, self.state, self.found_inf)
        if self._after_step:
            self._call(self._after_step)
        return loss

    def _call(self, hooks: dict[int, Callable]) -> None:
        for hook in list(hooks.values()):
            hook(self, (), {})

    def register_step_pre_hook(self, hook: Callable) -> Any:
        """Call hook(optimizer, args, kwargs) before each step; returns a handle with remove()."""
        return RemovableHandle(self._before_step, hook)

    def register_step_post_hook(self, hook: Callable) -> Any:
        """Call hook(optimizer, args, kwargs) after each step; returns a handle with remove()."""
        return RemovableHandle(self._after_step, hook)

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """{"state": {number of the parameter: its state}, "param_groups": [...]}; tensors are shared, not copied."""
        if self._updater is not None:
            self._updater.settle()
        numbers: dict[Tensor, int] = {}
        groups = []
        for group in self.param_groups:
            for p in group["params"]:
                numbers.setdefault(p, len(numbers))
            groups.append({**group, "params": [numbers[p] for p in group["params"]]})
        state = {numbers.get(p, p): dict(own) for p, own in self.state.items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`, which PyTorch's layout is too; tensors are copied to their parameters' devices.

        Raises ValueError, and changes nothing, where groups or shapes do not fit the parameters.
        """
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(
                f"The loaded state has {len(saved)} parameter groups, the optimiser {len(self.param_groups)}; they "
                "must be equal."
            )
        for number, (group, own) in enumerate(zip(saved, self.param_groups)):
            if len(group["params"]) != len(own["params"]):
                raise ValueError(
                    f"Parameter group {number} has {len(group['params'])} parameters in the loaded state and "
                    f"{len(own['params'])} in the optimiser; they must be equal."
                )
        numbers = [key for group in saved for key in group["params"]]
        parameters = dict(zip(numbers, (p for group in self.param_groups for p in group["params"])))
        if self._updater is not None:
            self._updater.settle()
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for key, own in state_dict["state"].items():
            if key in parameters:
                p = parameters[key]
                state[p] = {name: self._fitting(value, name, key, p) for name, value in own.items()}
            else:
                state[key] = copy.copy(own)
        groups = []
        for group, own in zip(saved, self.param_groups):
            loaded = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            groups.append({**own, **loaded, "params": own["params"]})
        self.state, self.param_groups = state, groups

    def _fitting(self, value: Any, name: str, key: Any, p: Tensor) -> Any:
        """A copy of a loaded value for parameter p: on its device and in its dtype; step counts stay on the host."""
        if name == "step":
            count = value.item() if isinstance(value, Tensor) else float(value)
            return gpuad.tensor(count, dtype=gpuad.float32, device="cpu")
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        if self.rule is not None and name in self.rule.states and value.shape != p.shape:
            raise ValueError(
                f"The loaded {name!r} of parameter {key} has shape {tuple(value.shape)}, the parameter "
                f"{tuple(p.shape)}; they must be equal."
            )
        with gpuad.no_grad():
            dtype = p.dtype if value.is_floating_point() and p.is_floating_point() else value.dtype
            return value.detach().to(p.device, dtype, copy=True)


def check_not_negative(**values: Any) -> None:
    """Raise ValueError for a value below 0, or NaN."""
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {value}.")


def check_below_one(**values: Any) -> None:
    """Raise ValueError for a value outside 0 ≤ value < 1, in tuples too."""
    for name, value in values.items():
        for i, each in enumerate(value if isinstance(value, (tuple, list)) else [value]):
            if not 0.0 <= each < 1.0:
                place = f"{name}[{i}]" if isinstance(value, (tuple, list)) else name
                raise ValueError(f"{place} must be at least 0 and below 1, got {each}.")
