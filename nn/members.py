"""Members: a module's parameters, buffers or children seen as a dictionary."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .module import Module

PARAMETER, BUFFER, MODULE = "parameter", "buffer", "module"


class Members(MutableMapping[str, Any]):
    """A module's registered attributes of one kind as a dictionary; what is changed in it changes the module."""

    def __init__(self, module: Module, kind: str) -> None:
        self._module, self._kind = module, kind

    def __getitem__(self, name: str) -> Any:
        if self._module._kinds.get(name) != self._kind:
            raise KeyError(name)
        return self._module.__dict__[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._module._register(self._kind, name, value)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        delattr(self._module, name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, kind in self._module._kinds.items() if kind == self._kind])

    def __len__(self) -> int:
        return sum(kind == self._kind for kind in self._module._kinds.values())

    def __repr__(self) -> str:
        return repr(dict(self))
