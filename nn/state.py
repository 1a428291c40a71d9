"""state_dict: a module's parameters and persistent buffers by name; checked as a whole before any is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import gpuad
from gpuad import Tensor

from .members import BUFFER, MODULE, PARAMETER
from .parameter import Parameter

if TYPE_CHECKING:
    from .module import Module


class IncompatibleKeys(NamedTuple):
    """The keys that a loaded state_dict lacked, and those that the module has no place for."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return f"IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


def _entries(module: Module, prefix: str = "") -> Iterator[tuple[str, Module, str, Tensor]]:
    """Key, owner, attribute and value of everything in the state_dict; what is shared comes under all its keys."""
    for kind in (PARAMETER, BUFFER):
        for name, value in module._members(kind):
            if name not in module._non_persistent:
                yield prefix + name, module, name, value
    for name, child in module._members(MODULE):
        yield from _entries(child, f"{prefix}{name}.")


def state_dict(module: Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> dict[str, Any]:
    """Put the state of `module` into `destination`."""
    for key, _, _, value in _entries(module, prefix):
        destination[key] = value if keep_vars else value.detach()
    return destination


def load_state_dict(module: Module, state: Mapping[str, Any], strict: bool, assign: bool) -> IncompatibleKeys:
    """Check every entry of `state` against the module, then copy all of them, or raise and copy none."""
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state).__name__}.")
    places = list(_entries(module))
    present = {key for key, *_ in places}
    missing = [key for key, *_ in places if key not in state]
    unexpected = [key for key in state if key not in present]

    problems = []
    if strict and missing:
        problems.append("Missing key(s) in state_dict: " + ", ".join(f'"{key}"' for key in missing) + ".")
    if strict and unexpected:
        problems.append("Unexpected key(s) in state_dict: " + ", ".join(f'"{key}"' for key in unexpected) + ".")
    given: dict[str, Tensor] = {}
    for key, _, _, value in places:
        if key not in state:
            continue
        if not hasattr(state[key], "shape"):
            problems.append(f"{key}: expected a tensor or an array, got {type(state[key]).__name__}.")
            continue
        given[key] = gpuad.as_tensor(state[key])
        if tuple(given[key].shape) != tuple(value.shape):
            problems.append(
                f"size mismatch for {key}: copying a param with shape {tuple(given[key].shape)} from checkpoint, "
                f"the shape in current model is {tuple(value.shape)}."
            )
    if problems:
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__} (nothing was loaded):\n\t"
            + "\n\t".join(problems)
        )

    with gpuad.no_grad():
        for key, owner, name, value in places:
            if key not in given:
                continue
            if not assign:
                value.copy_(given[key])
            elif isinstance(value, Parameter):
                setattr(owner, name, Parameter(given[key].detach(), value.requires_grad))
            else:
                setattr(owner, name, given[key])
    return IncompatibleKeys(missing, unexpected)
