"""Modules as functions of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gpuad.autograd.op import functions
from gpuad.tensor import Tensor


@contextmanager
def _swapped(module: Any, given: dict[str, Tensor]) -> Iterator[None]:
    """The module with other tensors in the place of parameters and buffers, inside the block."""
    before: list[tuple[dict, str, Any]] = []
    names = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    shared: dict[int, list[str]] = {}
    for name, tensor in names.items():
        shared.setdefault(id(tensor), []).append(name)
    for name, tensor in given.items():
        if name not in names:
            raise KeyError(
                f"functional_call was given {name!r}, but the module has no such parameter or buffer; it has "
                f"{', '.join(names)}."
            )
        for each in shared[id(names[name])]:  # tied parameters change together
            if each != name and each in given:
                continue
            owner, _, attribute = each.rpartition(".")
            members = module.get_submodule(owner).__dict__
            before.append((members, attribute, members[attribute]))
            members[attribute] = tensor
    try:
        yield
    finally:
        for members, attribute, tensor in reversed(before):
            members[attribute] = tensor


def functional_call(
    module: Any, parameter_and_buffer_dicts: Any, args: Any = None, kwargs: dict[str, Any] | None = None
) -> Any:
    """module(*args, **kwargs) with the tensors given by name in the place of its parameters and buffers.

    parameter_and_buffer_dicts: {name: tensor} as of named_parameters() and named_buffers(), or several such; what is
    not named stays as it is. args: a tuple, or the one argument. The module is unchanged after.
    """
    if isinstance(parameter_and_buffer_dicts, dict):
        given = parameter_and_buffer_dicts
    else:
        given = {name: tensor for each in parameter_and_buffer_dicts for name, tensor in each.items()}
    arguments = () if args is None else args if isinstance(args, tuple) else (args,)
    with _swapped(module, given):
        return module(*arguments, **(kwargs or {}))


def stack_module_state(models: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parameters, buffers) of modules of one class, each stacked along a new first dimension: an ensemble for vmap."""
    models = list(models)
    if not models or any(type(m) is not type(models[0]) for m in models):
        raise ValueError("stack_module_state takes one or more modules, all of the same class.")

    def stacked(kind: str) -> dict[str, Tensor]:
        states = [dict(getattr(m, kind)()) for m in models]
        return {name: functions["stack"]([s[name].detach() for s in states]) for name in states[0]}

    parameters = stacked("named_parameters")
    for tensor in parameters.values():
        tensor.requires_grad_()
    return parameters, stacked("named_buffers")
