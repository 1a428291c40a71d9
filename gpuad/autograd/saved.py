"""Saved-tensor hooks: what nodes keep for their rules goes through `pack` when saved and `unpack` when read.

While a thread is inside saved_tensors_hooks, every new node is looked at (node.watch) and becomes a packed one: its
saved arrays are what `pack` returned. Outside nothing is different and nothing is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from gpuad.array.device import of_array
from gpuad.autograd.modes import state
from gpuad.autograd.node import Node, unwatch, watch
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor, wrap


class _Stack(threading.local):
    """The hooks that are open in a thread; the last ones apply."""

    def __init__(self) -> None:
        self.hooks: list[tuple[Callable, Callable]] = []
        self.disabled: list[str] = []


_stack = _Stack()


class Packed:
    """What pack made of a saved array, and the function that turns it back."""

    __slots__ = ("value", "unpack")

    def __init__(self, value: Any, unpack: Callable) -> None:
        self.value, self.unpack = value, unpack

    def array(self) -> Any:
        """The bare array again."""
        result = self.unpack(self.value)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"The unpack hook of saved tensors returned a {type(result).__name__}; it must return the Tensor that "
                "was packed (or one like it)."
            )
        return result._data


@cache
def _packed(kind: type[Node]) -> type[Node]:
    """The class of nodes of a kind whose saved arrays are packed.

    Changes in place are noticed where pack returned the tensors themselves.
    """

    def check(self: Node) -> tuple[Any, ...]:
        return tuple([s.array() if type(s) is Packed else s for s in kind.check(self)])

    return type(f"Packed{kind.__name__}", (kind,), {"__slots__": (), "check": check})


def _pack(node: Node) -> None:
    """Send what a new node saved through the hooks of this thread."""
    if not _stack.hooks or not node.saved:
        return
    pack, unpack = _stack.hooks[-1]
    kind = node.device.backend.array_type
    saved = list(node.saved)
    enabled, same = state.enabled, True
    state.enabled = False
    try:
        for i, value in enumerate(saved):
            if isinstance(value, kind):
                given = wrap(value, of_array(value))
                packed = pack(given)
                same = same and packed is given
                saved[i] = Packed(packed, unpack)
                if given._cell[0]:
                    raise AutogradError(
                        f"The pack hook changed a tensor that {node.op.name} saves in place; let it work on a copy."
                    )
    finally:
        state.enabled = enabled
    node.saved = tuple(saved)
    if not same:
        node.cells, node.version = (), 0
    node.__class__ = _packed(type(node))  # type: ignore[arg-type]


class saved_tensors_hooks:  # noqa: N801  (PyTorch's name)
    """Inside, `pack_hook(tensor)` decides what is kept of a tensor saved for backward, `unpack_hook` gives it back.

        with gpuad.autograd.graph.saved_tensors_hooks(lambda x: x.half(), lambda x: x.float()):
            loss = model(x)

    pack_hook gets each saved tensor, outside the graph, and may return anything; when a gradient needs it,
    unpack_hook gets that and must return a Tensor of the same shape, dtype and device. The hooks entered last apply,
    in this thread. Errors: AutogradError where hooks are disabled, or when pack_hook writes to the tensor; TypeError
    when unpack_hook returns no Tensor.
    """

    def __init__(self, pack_hook: Callable[[Tensor], Any], unpack_hook: Callable[[Any], Tensor]) -> None:
        self.pack_hook, self.unpack_hook = pack_hook, unpack_hook

    def __enter__(self) -> None:
        if _stack.disabled:
            raise AutogradError(_stack.disabled[-1])
        _stack.hooks.append((self.pack_hook, self.unpack_hook))
        watch(_pack)

    def __exit__(self, *exc: object) -> None:
        unwatch(_pack)
        _stack.hooks.pop()


class save_on_cpu(saved_tensors_hooks):  # noqa: N801
    """Inside, what is saved for backward waits on the host and returns to its device when it is needed.

    Trades device memory for copies. pin_memory: keep it in pinned memory, where copies run at full speed.
    """

    def __init__(self, pin_memory: bool = False) -> None:
        def pack(tensor: Tensor) -> Any:
            array = tensor._device.backend.offload(tensor._data, pin_memory)
            return tensor if array is tensor._data else (tensor._device, array)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, array = packed
            return wrap(device.backend.restore(array), device)

        super().__init__(pack, unpack)


class disable_saved_tensors_hooks:  # noqa: N801
    """Inside, entering saved_tensors_hooks raises AutogradError with `error_message`."""

    def __init__(self, error_message: str) -> None:
        self.error_message = error_message

    def __enter__(self) -> None:
        if _stack.hooks:
            raise AutogradError(self.error_message)
        _stack.disabled.append(self.error_message)

    def __exit__(self, *exc: object) -> None:
        _stack.disabled.pop()
