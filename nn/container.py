"""Containers: Sequential, and lists and dictionaries of modules and parameters."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gpuad import Tensor

from .activation import GELU, ReLU
from .functional import linear_activation
from .linear import Linear
from .members import MODULE, PARAMETER
from .module import Module, indent, repr_tree
from .parameter import Parameter

if TYPE_CHECKING:
    from typing_extensions import Self


def _position(index: Any, length: int) -> int:
    """`index` as a position from the front; raises IndexError when it is not in the container."""
    index = operator.index(index)
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of range for a container of {length}")
    return index % length


def _renumber(module: Module, values: Iterable[Module]) -> None:
    """Give `module` exactly the children `values`, under the names "0", "1", ..."""
    values = list(values)
    for name in module._modules:
        delattr(module, name)
    for number, value in enumerate(values):
        module.add_module(str(number), value)


def _fusible(module: Module) -> str:
    """The name by which F.linear_activation knows an activation; "" where it does not."""
    if type(module) is ReLU:
        return "relu"
    return "gelu" if type(module) is GELU and module.approximate == "tanh" else ""


def _has_hooks(module: Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Sequential(Module):
    """Modules called one after the other, each on the output of the one before.

    Sequential(module, ...) names them "0", "1", ...; Sequential(OrderedDict(name=module, ...)) keeps the names.
    Indexing with a slice gives a Sequential of the same modules.
    """

    _layers: tuple[Module, ...]
    _steps: tuple[tuple[Module, Module | None, str], ...]

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self._layers = self._steps = ()
        named = args[0].items() if len(args) == 1 and isinstance(args[0], OrderedDict) else enumerate(args)
        for name, module in named:
            self.add_module(str(name), module)

    def _members_changed(self) -> None:
        layers = self.__dict__["_layers"] = tuple(module for _, module in self._members(MODULE))
        # Each layer, with the activation behind a Linear, which a device may be able to compute in the same call.
        steps: list[tuple[Module, Module | None, str]] = []
        for layer in layers:
            name = _fusible(layer)
            if name and steps and type(steps[-1][0]) is Linear and steps[-1][1] is None:
                steps[-1] = (steps[-1][0], layer, name)
            else:
                steps.append((layer, None, ""))
        self.__dict__["_steps"] = tuple(steps)

    def forward(self, input: Any) -> Any:
        """Pass `input` through all the modules."""
        for layer, activation, name in self._steps:
            if activation is not None and not (_has_hooks(layer) or _has_hooks(activation)):
                fused = linear_activation(input, layer.weight, layer.bias, name)
                if fused is not None:
                    input = fused
                    continue
            input = layer(input)
            if activation is not None:
                input = activation(input)
        return input

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(OrderedDict(list(self._modules.items())[index]))
        return self._layers[_position(index, len(self))]

    def __setitem__(self, index: int, module: Module) -> None:
        setattr(self, list(self._modules)[_position(index, len(self))], module)

    def __delitem__(self, index: int | slice) -> None:
        layers = list(self._layers)
        del layers[index if isinstance(index, slice) else _position(index, len(self))]
        _renumber(self, layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._layers)

    def __add__(self, other: Sequential) -> Sequential:
        if not isinstance(other, Sequential):
            return NotImplemented
        return Sequential(*self, *other)

    def __iadd__(self, other: Sequential) -> Self:
        if not isinstance(other, Sequential):
            return NotImplemented
        return self.extend(other)

    def __mul__(self, count: int) -> Sequential:
        if not isinstance(count, int):
            return NotImplemented
        if count <= 0:
            raise ValueError(f"a Sequential can be repeated a positive number of times, got {count}")
        return Sequential(*(list(self) * count))

    __rmul__ = __mul__

    def append(self, module: Module) -> Self:
        """Add a module at the end."""
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add modules at the end."""
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Add a module before the place `index`; the later ones are renumbered."""
        layers = list(self._layers)
        if not -len(layers) <= index <= len(layers):
            raise IndexError(f"index {index} is out of range for a container of {len(layers)}")
        layers.insert(index, module)
        _renumber(self, layers)
        return self

    def pop(self, index: int | slice) -> Any:
        """Remove and return a module, or a Sequential of them."""
        taken = self[index]
        del self[index]
        return taken


class ModuleList(Module):
    """A list whose modules are registered as children "0", "1", ...; it has no forward of its own."""

    def __init__(self, modules: Iterable[Module] | None = None) -> None:
        super().__init__()
        if modules is not None:
            self.extend(modules)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(list(self)[index])
        return self.__dict__[str(_position(index, len(self)))]

    def __setitem__(self, index: int, module: Module) -> None:
        setattr(self, str(_position(index, len(self))), module)

    def __delitem__(self, index: int | slice) -> None:
        modules = list(self)
        del modules[index if isinstance(index, slice) else _position(index, len(self))]
        _renumber(self, modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(list(self._modules.values()))

    def __add__(self, other: Iterable[Module]) -> ModuleList:
        return ModuleList([*self, *other])

    def __iadd__(self, other: Iterable[Module]) -> Self:
        return self.extend(other)

    def append(self, module: Module) -> Self:
        """Add a module at the end."""
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add modules at the end."""
        if not isinstance(modules, Iterable):
            raise TypeError(f"ModuleList.extend should be called with an iterable, but got {type(modules).__name__}")
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> None:
        """Add a module before the place `index`; the later ones are renumbered."""
        modules = list(self)
        modules.insert(index, module)
        _renumber(self, modules)

    def pop(self, index: int | slice) -> Any:
        """Remove and return a module, or a ModuleList of them."""
        taken = self[index]
        del self[index]
        return taken

    def __repr__(self) -> str:
        lines: list[str] = []
        start = 0
        shown = [repr(module) for module in self]
        for end in range(1, len(shown) + 1):  # runs of equal modules take one line
            if end == len(shown) or shown[end] != shown[start]:
                run = f"({start})" if end - start == 1 else f"({start}-{end - 1})"
                count = "" if end - start == 1 else f"{end - start} x "
                lines.append(f"{run}: {count}" + indent(shown[start]))
                start = end
        return repr_tree(type(self).__name__, "", lines)


class ModuleDict(Module):
    """A dictionary whose modules are registered as children under their keys; it has no forward of its own."""

    def __init__(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]] | None = None) -> None:
        super().__init__()
        if modules is not None:
            self.update(modules)

    def __getitem__(self, key: str) -> Module:
        return self._modules[key]

    def __setitem__(self, key: str, module: Module) -> None:
        self.add_module(key, module)

    def __delitem__(self, key: str) -> None:
        del self._modules[key]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, key: object) -> bool:
        return key in self._modules

    def keys(self) -> Iterable[str]:
        """The keys."""
        return self._modules.keys()

    def values(self) -> Iterable[Module]:
        """The modules."""
        return self._modules.values()

    def items(self) -> Iterable[tuple[str, Module]]:
        """The pairs of key and module."""
        return self._modules.items()

    def update(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]]) -> None:
        """Add or replace modules, from a mapping or from pairs, in the order given."""
        pairs = modules.items() if isinstance(modules, (Mapping, ModuleDict)) else modules
        for key, module in pairs:
            self[key] = module

    def pop(self, key: str) -> Module:
        """Remove and return the module of this key."""
        module = self[key]
        del self[key]
        return module

    def clear(self) -> None:
        """Remove all modules."""
        self._modules.clear()


def _as_parameter(value: Tensor) -> Parameter:
    return value if isinstance(value, Parameter) else Parameter(value)


def _show(value: Tensor) -> str:
    size = "x".join(map(str, value.shape))
    place = "" if value.device.type == "cpu" else f" ({value.device})"
    return f"Parameter containing: [{value.dtype} of size {size}{place}]"


class ParameterList(Module):
    """A list whose tensors are registered as parameters "0", "1", ...; a plain Tensor is made a Parameter."""

    def __init__(self, values: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        if values is not None:
            self.extend(values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(list(self)[index])
        return self.__dict__[str(_position(index, len(self)))]

    def __setitem__(self, index: int, value: Tensor) -> None:
        setattr(self, str(_position(index, len(self))), _as_parameter(value))

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(list(self._parameters.values()))

    def __iadd__(self, values: Iterable[Tensor]) -> Self:
        return self.extend(values)

    def append(self, value: Tensor) -> Self:
        """Add a parameter at the end."""
        self.register_parameter(str(len(self)), _as_parameter(value))
        return self

    def extend(self, values: Iterable[Tensor]) -> Self:
        """Add parameters at the end."""
        if not isinstance(values, Iterable) or isinstance(values, Tensor):
            raise TypeError(f"ParameterList.extend should be called with an iterable, but got {type(values).__name__}")
        for value in list(values):
            self.append(value)
        return self

    def __repr__(self) -> str:
        lines = [f"({name}): {_show(value)}" for name, value in self._members(PARAMETER)]
        return repr_tree(type(self).__name__, "", lines)


class ParameterDict(Module):
    """A dictionary whose tensors are registered as parameters under their keys; a Tensor is made a Parameter."""

    def __init__(self, parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None) -> None:
        super().__init__()
        if parameters is not None:
            self.update(parameters)

    def __getitem__(self, key: str) -> Parameter:
        return self._parameters[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.register_parameter(key, _as_parameter(value))

    def __delitem__(self, key: str) -> None:
        del self._parameters[key]

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __contains__(self, key: object) -> bool:
        return key in self._parameters

    def keys(self) -> Iterable[str]:
        """The keys."""
        return self._parameters.keys()

    def values(self) -> Iterable[Parameter]:
        """The parameters."""
        return self._parameters.values()

    def items(self) -> Iterable[tuple[str, Parameter]]:
        """The pairs of key and parameter."""
        return self._parameters.items()

    def get(self, key: str, default: Any = None) -> Any:
        """The parameter of this key, or `default`."""
        return self._parameters.get(key, default)

    def update(self, parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Add or replace parameters, from a mapping or from pairs, in the order given."""
        pairs = parameters.items() if isinstance(parameters, (Mapping, ParameterDict)) else parameters
        for key, value in pairs:
            self[key] = value

    def pop(self, key: str) -> Parameter:
        """Remove and return the parameter of this key."""
        value = self[key]
        del self[key]
        return value

    def clear(self) -> None:
        """Remove all parameters."""
        self._parameters.clear()

    def __repr__(self) -> str:
        lines = [f"({name}): {_show(value)}" for name, value in self._members(PARAMETER)]
        return repr_tree(type(self).__name__, "", lines)
