"""Module: what every layer and model is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import gpuad
from gpuad import Tensor
from gpuad.autograd.zero_grad import zero_grad

from .hooks import BackwardHooks, RemovableHandle
from .members import BUFFER, MODULE, PARAMETER, Members
from .parameter import Parameter
from .state import IncompatibleKeys, load_state_dict, state_dict

if TYPE_CHECKING:
    from typing_extensions import Self


class Module:
    """Base of all layers and models: subclasses make their parts in `__init__` and compute in `forward`.

    A Parameter or Module assigned to an attribute is registered under that name, and a tensor by `register_buffer`.
    The values themselves are ordinary instance attributes, so that reading one costs no more than any other;
    `_kinds` says which attributes are registered, and as what.
    """

    training: bool

    def __init__(self) -> None:
        state = self.__dict__
        state["training"] = True
        state["_kinds"] = {}
        state["_non_persistent"] = set()
        state["_forward_pre_hooks"] = {}
        state["_forward_hooks"] = {}
        state["_backward_pre_hooks"] = {}
        state["_backward_hooks"] = {}

    # ------------------------------------------------------------------ calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; every subclass defines it."""
        raise NotImplementedError(f'Module [{type(self).__name__}] is missing the required "forward" function')

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks:
            return self._call_with_hooks(args, kwargs)
        return self.forward(*args, **kwargs)

    def _call_with_hooks(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        for hook, with_kwargs in list(self._forward_pre_hooks.values()):
            changed = hook(self, args, kwargs) if with_kwargs else hook(self, args)
            if changed is None:
                continue
            if not with_kwargs:
                args = changed if isinstance(changed, tuple) else (changed,)
            elif isinstance(changed, tuple) and len(changed) == 2:
                args, kwargs = changed
            else:
                raise RuntimeError(
                    "a forward pre-hook with kwargs must return None or a tuple (new args, new kwargs), "
                    f"got {changed!r}"
                )
        boundary = None
        if gpuad.is_grad_enabled() and (self._backward_hooks or self._backward_pre_hooks):
            boundary = BackwardHooks(self, [*self._backward_pre_hooks.values()], [*self._backward_hooks.values()])
            args = boundary.enter(args)
        result = self.forward(*args, **kwargs)
        for hook, with_kwargs in list(self._forward_hooks.values()):
            changed = hook(self, args, kwargs, result) if with_kwargs else hook(self, args, result)
            if changed is not None:
                result = changed
        return result if boundary is None else boundary.leave(result)

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, args)` before every forward; what it returns, if not None, replaces the arguments."""
        return RemovableHandle(self._forward_pre_hooks, (hook, with_kwargs), prepend)

    def register_forward_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, args, output)` after every forward; what it returns, if not None, replaces the output."""
        return RemovableHandle(self._forward_hooks, (hook, with_kwargs), prepend)

    def register_full_backward_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call `hook(module, grad_output)` in backward, before the gradient goes through the module.

        grad_output is a tuple, one entry for each output, None where it takes no gradient; a tuple (or, of one, a
        Tensor) that the hook returns takes its place. Outputs must not be changed in place.
        """
        return RemovableHandle(self._backward_pre_hooks, hook, prepend)

    def register_full_backward_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Call `hook(module, grad_input, grad_output)` in backward, when the gradients of the inputs are there.

        grad_input is a tuple, one entry for each positional argument, None for those that take no gradient; a tuple
        that the hook returns takes its place. Where no argument requires grad, the hook is called when grad_output is
        there. Arguments and outputs must not be changed in place.
        """
        return RemovableHandle(self._backward_hooks, hook, prepend)

    # ------------------------------------------------------------------ registration

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter, or the place of one (None), reachable as the attribute `name`."""
        self._register(PARAMETER, name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a tensor that moves with the module but is no parameter; a persistent one is in the state_dict."""
        self._register(BUFFER, name, tensor)
        if persistent:
            self._non_persistent.discard(name)
        else:
            self._non_persistent.add(name)

    def add_module(self, name: str, module: Module | None) -> None:
        """Add a child, reachable as the attribute `name`."""
        self._register(MODULE, name, module)

    register_module = add_module

    def _register(self, kind: str, name: str, value: Any) -> None:
        kinds = self.__dict__.get("_kinds")
        if kinds is None:
            raise AttributeError(
                f"cannot assign {kind}s before Module.__init__() call: "
                f"call super().__init__() first in {type(self).__name__}.__init__"
            )
        if not isinstance(name, str):
            raise TypeError(f"{kind} name should be a string, got {type(name).__name__}")
        if "." in name:
            raise KeyError(f'{kind} name can\'t contain ".", got "{name}"')
        if not name:
            raise KeyError(f'{kind} name can\'t be the empty string ""')
        if kinds.get(name) != kind and hasattr(self, name):
            raise KeyError(f"attribute '{name}' already exists")
        expected = _TYPES[kind]
        if value is not None and not isinstance(value, expected):
            raise TypeError(
                f"cannot assign '{type(value).__name__}' object to {kind} '{name}' "
                f"({expected.__name__} or None expected)"
            )
        self.__dict__[name] = value
        kinds[name] = kind
        self._members_changed()

    def _members_changed(self) -> None:
        """Called after a registered attribute was set or deleted."""

    def __setattr__(self, name: str, value: Any) -> None:
        kind = PARAMETER if isinstance(value, Parameter) else MODULE if isinstance(value, Module) else None
        kinds = self.__dict__.get("_kinds")
        current = None if kinds is None else kinds.get(name)
        if kind is None:
            if current is None:
                super().__setattr__(name, value)
            else:
                self._register(current, name, value)
        else:
            if kind != current:  # it takes the place of whatever else had the name
                if current is not None:
                    delattr(self, name)
                self.__dict__.pop(name, None)
            self._register(kind, name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in self.__dict__.get("_kinds", ()):
            del self._kinds[name]
            self._non_persistent.discard(name)
            self._members_changed()

    def __getattr__(self, name: str) -> Any:  # only reached when the attribute is not there
        hint = "" if "_kinds" in self.__dict__ else " (was super().__init__() called?)"
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'{hint}")

    @property
    def _parameters(self) -> Members:
        return Members(self, PARAMETER)

    @property
    def _buffers(self) -> Members:
        return Members(self, BUFFER)

    @property
    def _modules(self) -> Members:
        return Members(self, MODULE)

    # ------------------------------------------------------------------ walking the tree

    def named_modules(
        self, memo: set[Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """This module and all below it, depth first, with dotted names; a shared one comes once."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, child in self._members(MODULE):
            yield from child.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def modules(self) -> Iterator[Module]:
        """This module and all below it; a shared one comes once."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly below this one, with their names; a shared one comes once."""
        seen = set()
        for name, child in self._members(MODULE):
            if child not in seen:
                seen.add(child)
                yield name, child

    def children(self) -> Iterator[Module]:
        """The modules directly below this one; a shared one comes once."""
        return (child for _, child in self.named_children())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """The parameters with their dotted names; a shared one comes once."""
        return self._named_members(PARAMETER, prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """The parameters, as an optimiser takes them; a shared one comes once."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The buffers with their dotted names; a shared one comes once."""
        return self._named_members(BUFFER, prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """The buffers; a shared one comes once."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def _members(self, kind: str) -> list[tuple[str, Any]]:
        """Name and value of the registered attributes of one kind that are not None."""
        values = self.__dict__
        return [(n, values[n]) for n, k in self._kinds.items() if k == kind and values[n] is not None]

    def _named_members(
        self, kind: str, prefix: str, recurse: bool, remove_duplicate: bool
    ) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        owners = self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate) if recurse else [(prefix, self)]
        for path, module in owners:
            for name, value in module._members(kind):
                if id(value) in seen:
                    continue
                if remove_duplicate:
                    seen.add(id(value))
                yield (f"{path}.{name}" if path else name), value

    def get_submodule(self, target: str) -> Module:
        """The module of this dotted name; this module itself for ""."""
        module = self
        for name in target.split(".") if target else ():
            if module._kinds.get(name) != MODULE:
                raise AttributeError(f"{type(module).__name__} has no module `{name}` (looking for '{target}')")
            module = module.__dict__[name]
        return module

    def get_parameter(self, target: str) -> Parameter:
        """The parameter of this dotted name."""
        return self._get_member(PARAMETER, target)

    def get_buffer(self, target: str) -> Tensor:
        """The buffer of this dotted name."""
        return self._get_member(BUFFER, target)

    def _get_member(self, kind: str, target: str) -> Any:
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        if module._kinds.get(name) != kind:
            raise AttributeError(f"{type(module).__name__} has no {kind} `{name}` (looking for '{target}')")
        return module.__dict__[name]

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn` on every module below this one, then on this one."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    # ------------------------------------------------------------------ modes

    def train(self, mode: bool = True) -> Self:
        """Set training mode here and below; it matters to Dropout and BatchNorm."""
        if not isinstance(mode, bool):
            raise ValueError(f"training mode is expected to be boolean, got {mode!r}")
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Set evaluation mode: train(False)."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether the parameters need gradients; False freezes the module."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or zero them in place; their buffers serve the next backward."""
        zero_grad(self.parameters(), set_to_none)

    # ------------------------------------------------------------------ device and dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, convert floating parameters and buffers to a dtype, or both.

        to(device=None, dtype=None, non_blocking=False), to(dtype), or to(tensor) for a tensor's device and dtype.
        Parameters stay the same objects, so an optimiser made before keeps working; buffers are replaced.
        """
        device, dtype = _parse_to(*args, **kwargs)

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return self._apply(convert)

    def cpu(self) -> Self:
        """Move to the host."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Self:
        """Move to a CUDA device, the current one unless given."""
        return self.to("cuda" if device is None else device)

    def float(self) -> Self:
        """Convert floating parameters and buffers to float32."""
        return self.to(dtype=gpuad.float32)

    def double(self) -> Self:
        """Convert floating parameters and buffers to float64."""
        return self.to(dtype=gpuad.float64)

    def half(self) -> Self:
        """Convert floating parameters and buffers to float16."""
        return self.to(dtype=gpuad.float16)

    def bfloat16(self) -> Self:
        """Convert floating parameters and buffers to bfloat16."""
        return self.to(dtype="bfloat16")

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Self:
        converted: dict[int, tuple[Tensor, Tensor]] = {}  # by id; with the original, so that its id stays taken
        with gpuad.no_grad():
            for parameter in self.parameters():
                grad = parameter.grad
                parameter.data = fn(parameter.data)
                if grad is not None:
                    parameter.grad = fn(grad)
            for module in self.modules():
                for name, buffer in module._members(BUFFER):
                    if id(buffer) not in converted:
                        converted[id(buffer)] = (buffer, fn(buffer))
                    module.__dict__[name] = converted[id(buffer)][1]
        return self

    # ------------------------------------------------------------------ state

    def state_dict(
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The parameters and persistent buffers by dotted name, detached (sharing memory) unless keep_vars."""
        return state_dict(self, {} if destination is None else destination, prefix, keep_vars)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> IncompatibleKeys:
        """Copy a state_dict into this module, on the devices and in the dtypes that it has.

        strict: every key must be present and none be left over; otherwise they are only reported in the result.
        assign: take the given tensors themselves in place of copying into the present ones.
        Raises RuntimeError naming every key that does not fit, and then changes nothing.
        """
        return load_state_dict(self, state_dict, strict, assign)

    # ------------------------------------------------------------------ showing

    def extra_repr(self) -> str:
        """What stands between the parentheses of the repr, beside the children."""
        return ""

    def __repr__(self) -> str:
        children = [f"({name}): " + indent(repr(self.__dict__[name])) for name in self._modules]
        return repr_tree(type(self).__name__, self.extra_repr(), children)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not name.isdigit()]


_TYPES: dict[str, type] = {PARAMETER: Parameter, BUFFER: Tensor, MODULE: Module}


def _parse_to(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    kwargs.pop("non_blocking", None)
    if kwargs:
        raise TypeError(f"Module.to() got an unexpected keyword argument '{next(iter(kwargs))}'")
    for arg in args:
        if isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, (np.dtype, type)):
            dtype = arg
        elif arg is not None and not isinstance(arg, bool):  # a bool is non_blocking
            device = arg
    if dtype is not None and gpuad.can_cast(dtype, gpuad.int64):
        raise TypeError(f"nn.Module.to only accepts floating point dtypes, but got desired dtype={np.dtype(dtype)}")
    return device, dtype


def indent(text: str) -> str:
    """`text` with the lines after the first moved in, for a child in a repr."""
    return text.replace("\n", "\n  ")


def repr_tree(name: str, extra: str, children: list[str]) -> str:
    """PyTorch's repr of a module: one line when there are no children, else a line for each."""
    lines = (extra.split("\n") if extra else []) + children
    if not children and len(lines) < 2:
        return f"{name}({extra})"
    return f"{name}(\n  " + "\n  ".join(lines) + "\n)"
