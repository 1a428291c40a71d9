"""Nodes of the tape: what was computed from what, and what its derivative needs."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpuad.autograd.hooks import NodeHooks, RemovableHandle, hooks_of
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor, wrap

if TYPE_CHECKING:
    from gpuad.array.device import Device
    from gpuad.autograd.op import Op

_numbers = itertools.count()


class Node:
    """One recorded operation.

    op: the operation. parents: for each input the node that computed it, the leaf itself, or None where no gradient is
    wanted. saved: bare arrays and numbers that the vjp needs; None once the walk has freed them. info: what else the op
    keeps (shapes, parameters). number: grows with every node, so that falling numbers are a reverse topological order.
    A node never points at its output tensors: no cycles, memory returns by reference counting alone.
    """

    __slots__ = ("op", "parents", "saved", "cells", "version", "info", "device", "number", "hooks", "_metadata",
                 "__weakref__")  # fmt: skip

    op: Op
    parents: tuple[Node | Tensor | None, ...]
    saved: tuple[Any, ...] | None
    cells: tuple[list[int], ...]
    version: int
    info: Any
    device: Device
    number: int
    hooks: NodeHooks | None

    def __init__(
        self,
        op: Op,
        parents: tuple,
        saved: tuple,
        cells: tuple[list[int], ...],
        version: int,
        info: Any,
        device: Device,
    ) -> None:
        self.op = op
        self.parents = parents
        self.saved = saved
        self.cells = cells
        self.version = version  # of all cells together: versions only grow, so an unchanged sum means no change
        self.info = info
        self.device = device
        self.number = next(_numbers)
        self.hooks = None

    def __repr__(self) -> str:
        return f"<{self.op.name} node {self.number}>"

    def name(self) -> str:
        """The name of the operation."""
        return self.op.name

    @property
    def next_functions(self) -> tuple:
        """(parent, number of its output) for each input, as in PyTorch; leaves stand for themselves."""
        parents = self.parents[0].parents if isinstance(self, OutputNode) else self.parents  # type: ignore[union-attr]
        return tuple((p.parents[0], p.index) if isinstance(p, OutputNode) else (p, 0) for p in parents)

    @property
    def metadata(self) -> dict:
        """A dictionary for notes about this node; anomaly detection leaves "traceback" and "parent" here."""
        try:
            return self._metadata
        except AttributeError:
            self._metadata: dict = {}
            return self._metadata

    def register_hook(self, fn: Callable) -> RemovableHandle:
        """Call `fn(grad_inputs, grad_outputs)` after this node's rule has run; returns a handle with remove().

        Both are tuples, one entry for each input and each output, None where there is no gradient. A tuple that fn
        returns takes the place of grad_inputs.
        """
        return RemovableHandle(hooks_of(self).after, fn)

    def register_prehook(self, fn: Callable) -> RemovableHandle:
        """Call `fn(grad_outputs)` before this node's rule runs; a tuple that it returns takes their place."""
        return RemovableHandle(hooks_of(self).before, fn)

    def retain(self, tensor: Tensor) -> None:
        """Leave the gradient of this node's output in tensor.grad at every backward."""
        hooks_of(self).retained = weakref.ref(tensor)

    def free(self) -> None:
        """Let go of what was saved."""
        self.saved, self.cells = None, ()

    def check(self) -> tuple[Any, ...]:
        """The saved values; raises when they were freed or changed in place since they were saved."""
        saved = self.saved
        if saved is None:
            raise AutogradError(
                f"The graph was walked before: the buffers that {self.op.name} saved are freed. Call "
                "backward(retain_graph=True) (or grad(..., retain_graph=True)) the first time to walk it again."
            )
        version = 0
        for cell in self.cells:
            version += cell[0]
        if version != self.version:
            raise AutogradError(
                f"A tensor that {self.op.name} saved for its gradient was changed in place since (by an operation like "
                "x.add_(), x[i] = … or an optimiser step). Write to a copy (x.clone()) or out of place, or call "
                "backward before the change."
            )
        return saved

    def saved_tensor(self, array: Any, parent: Node | Tensor | None) -> Any:
        """A saved array as a Tensor at its place in the graph, for derivatives that are differentiated again."""
        if not isinstance(array, self.device.backend.array_type):
            return array
        if parent is None:
            return wrap(array, self.device)
        if isinstance(parent, Tensor):
            if parent._data is array:
                return parent
            parent = Node(ALIAS, (parent,), (), (), 0, None, self.device)  # type: ignore[arg-type]
        made = wrap(array, self.device)
        made._node, made._requires_grad = parent, True
        return made


_made = Node.__init__
_watching = threading.Lock()
_watchers: list[Callable[[Node], None]] = []


def _made_and_seen(self: Node, *args: Any) -> None:
    _made(self, *args)
    for watcher in _watchers:
        watcher(self)


def watch(watcher: Callable[[Node], None]) -> None:
    """Call `watcher(node)` for every node that any thread makes, until unwatch(); free while nobody watches."""
    global _watchers
    with _watching:
        _watchers = [*_watchers, watcher]
        Node.__init__ = _made_and_seen  # type: ignore[method-assign, assignment]


def watched() -> bool:
    """Whether anybody watches: what is saved, and by whom, is then as if every operation ran by itself."""
    return bool(_watchers)


def unwatch(watcher: Callable[[Node], None]) -> None:
    """End one watch()."""
    global _watchers
    with _watching:
        _watchers = list(_watchers)
        _watchers.remove(watcher)
        if not _watchers:
            Node.__init__ = _made  # type: ignore[method-assign]


# What an op returns for a gradient that it wrote into the leaf's buffer.
WRITTEN = object()


class OutputNode(Node):
    """One output of an operation with several: hands its gradient to its place in the operation's node."""

    __slots__ = ("index",)
    index: int

    def __init__(self, of: Node, index: int) -> None:
        super().__init__(of.op, (of,), (), (), 0, None, of.device)
        self.index = index

    @property
    def metadata(self) -> dict:
        """That of the operation."""
        return self.parents[0].metadata  # type: ignore[union-attr]

    def register_hook(self, fn: Callable) -> RemovableHandle:
        """On the operation: grad_outputs has an entry for each of its outputs."""
        return self.parents[0].register_hook(fn)  # type: ignore[union-attr]

    def register_prehook(self, fn: Callable) -> RemovableHandle:
        """On the operation: grad_outputs has an entry for each of its outputs."""
        return self.parents[0].register_prehook(fn)  # type: ignore[union-attr]


class _Alias:
    """The identity that stands between a leaf and an array it held when it was saved."""

    name = "alias"

    def backward(self, node: Node, gradient: Any, walk: Any) -> list:
        return [gradient]

    backward_recorded = backward


ALIAS = _Alias()
