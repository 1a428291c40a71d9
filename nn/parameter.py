"""Parameter: a tensor that a Module counts as its own and an optimiser changes."""

from __future__ import annotations

from typing import Any

import gpuad
from gpuad import Tensor


class Parameter(Tensor):
    """A leaf tensor that becomes a module's parameter when it is assigned to one of its attributes.

    data: a Tensor, whose storage is shared (not copied); an empty one when None.
    Raises TypeError when data is something else, e.g. a NumPy array: say gpuad.tensor(data).
    """

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> Parameter:
        if data is None:
            data = gpuad.empty(0)
        elif not isinstance(data, Tensor):
            raise TypeError(
                f"Parameter takes a Tensor, got {type(data).__name__}; give Parameter(gpuad.tensor(...)), "
                "or gpuad.as_tensor(...) to share the array's memory."
            )
        made: Any = cls._make_subclass(data, requires_grad)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        if id(self) not in memo:
            memo[id(self)] = type(self)(self.data.clone(), self.requires_grad)
        return memo[id(self)]

    def __repr__(self) -> str:
        return "Parameter containing:\n" + super().__repr__()
