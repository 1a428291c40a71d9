"""Building a graph: nodes from what the tape keeps and from what was seen, then names and formulas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.node import Node, OutputNode
from gpuad.autograd.variables import plain
from gpuad.graph import formulas, walking
from gpuad.graph.data import Edge, Graph, GraphNode
from gpuad.graph.source import Names, Place
from gpuad.tensor import Tensor, wrap


def place_on_tape(tensor: Tensor) -> Any:
    """The tape's node that computed a tensor, else the leaf itself; below tangents and examples of vmap."""
    tensor = plain(tensor)
    return tensor if tensor._node is None else tensor._node


class Builder:
    """Collects nodes. Operands are nodes, numbers, None, or text where the tape does not keep them."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.nodes: list[GraphNode] = []
        self.operands: dict[GraphNode, list[Any]] = {}
        self.params: dict[GraphNode, dict[str, Any]] = {}
        self.calls: dict[GraphNode, Any] = {}  # the call in the user's program that led to it
        self._at: dict[Any, GraphNode] = {}
        self._known: dict[int, tuple[GraphNode, Tensor]] = {}

    def add(self, node: GraphNode, operands: Sequence[Any], tensor: Tensor | None = None) -> GraphNode:
        """Take a node in; `tensor` is its value."""
        self.nodes.append(node)
        self.operands[node] = list(operands)
        self._at[node.tape] = node
        if tensor is not None:
            self._known[id(tensor)] = node, tensor
            tensor = plain(tensor)  # inside vmap: with all examples
            node.shape, node.dtype, node.device = tuple(tensor.shape), tensor.dtype, str(tensor.device)
            node.requires_grad = tensor._requires_grad
            # What is shown is the value as it was: the tensor's memory may be written to later.
            node.value = wrap(tensor._device.backend.copy(tensor._data), tensor._device)
        return node

    def node_of(self, tensor: Tensor, stack: Iterable[FrameType]) -> GraphNode:
        """The node of a tensor, made where it is not known yet: a leaf, or what the tape knows of it."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known[0]
        place = place_on_tape(tensor)
        found = self._at.get(place)
        if found is not None:
            return found
        if isinstance(place, Tensor):
            return self.leaf(place, stack)
        return self.from_tape(place, stack, tensor)

    def rename(self, tensor: Tensor, node: GraphNode) -> None:
        """From now on `tensor` is the value of `node`."""
        self._known[id(tensor)] = node, tensor

    def changed(self, base: Tensor, node: GraphNode) -> None:
        """`node` was written to a view of `base`: what that is now is on the tape (view_put)."""
        self._known.pop(id(base), None)
        self._at[base._node.parents[1]] = node  # type: ignore[union-attr]

    def leaf(self, tensor: Tensor, stack: Iterable[FrameType] = ()) -> GraphNode:
        """The node of a tensor that nothing computed."""
        name, kind = self.names.of_leaf(tensor, stack)
        node = GraphNode(0, kind, kind, name, tape=tensor)
        if kind == "parameter" or "." in name:
            node.module, _, _ = name.rpartition(".")
        return self.add(node, (), tensor)

    def from_tape(self, place: Node, stack: Iterable[FrameType], tensor: Tensor | None = None) -> GraphNode:
        """The node of a place on the tape, and before it those of all it was computed from that are not known."""
        stack = list(stack)
        pending: list[Any] = [place]
        while pending:
            at = pending[-1]
            if at in self._at:
                pending.pop()
                continue
            if isinstance(at, Tensor):
                self.leaf(at, stack)
                continue
            parents = walking.owner(at).parents
            missing = [p for p in parents if p is not None and p not in self._at]
            if missing:
                pending.extend(reversed(missing))
                continue
            name = at.op.name + (f"[{at.index}]" if isinstance(at, OutputNode) else "")
            made = GraphNode(0, "op", name, "", device=str(at.device), operation=at.op, tape=at, requires_grad=True)
            operands = [self._at[p] if p is not None else _kept(walking.owner(at), i) for i, p in enumerate(parents)]
            self.add(made, operands, tensor if at is place else None)
        return self._at[place]

    def finish(self, title: str, roots: Sequence[Tensor], root_name: str = "") -> Graph:
        """The graph of all that the roots were computed from, with names and formulas."""
        outputs = [self.node_of(root, ()) for root in roots]
        wanted = set(outputs)
        for node in reversed(self.nodes):
            if node in wanted:
                wanted.update(o for o in self.operands[node] if isinstance(o, GraphNode))
        nodes = [node for node in self.nodes if node in wanted]
        self._name_last_only(nodes)
        if len(outputs) == 1 and outputs[0].kind == "op" and not outputs[0].name:
            outputs[0].name = root_name
        _give_names(nodes)
        for number, node in enumerate(nodes):
            node.number = number
        for node in nodes:
            self._describe(node)
        return Graph(title, nodes, [node.number for node in outputs], list(roots))

    def _name_last_only(self, nodes: Sequence[GraphNode]) -> None:
        """Of several operations behind one call the last is what the variable stands for."""
        last: dict[Any, GraphNode] = {}
        for node in nodes:
            call = self.calls.get(node)
            if call is None:
                continue
            if call in last:
                last[call].name = ""
            last[call] = node
        self.calls.clear()

    def _describe(self, node: GraphNode) -> None:
        operands = self.operands[node]
        shown = [o.name if isinstance(o, GraphNode) else o for o in operands]
        node.saved_bytes = walking.saved_bytes([node.tape])
        if node.kind != "op":
            return
        op = node.operation
        node.operands = shown
        node.formula = formulas.formula(op, shown, self.params.get(node, {}))
        for i, (operand, name) in enumerate(zip(operands, formulas.operand_names(op, len(operands)), strict=True)):
            if isinstance(operand, GraphNode):
                derivative = formulas.local_derivative(op, i, shown)
                rule = "" if derivative or not operand.requires_grad else formulas.rule(op, i)
                node.inputs.append(Edge(operand.number, name, i, derivative, rule))


def _kept(node: Node, i: int) -> Any:
    """An operand that needs no gradient: the number that was saved, else what the op calls it."""
    if isinstance(node.op, Elementwise) and node.saved:
        for where, value in zip(node.info[0].inputs, node.saved, strict=False):
            if where == i and isinstance(value, (int, float)):
                return value
    return formulas.operand_names(node.op, len(node.parents))[i]


def _give_names(nodes: Sequence[GraphNode]) -> None:
    """A name for each node that has none, and different ones for all."""
    taken: dict[str, int] = {}
    for node in nodes:
        if node.name:
            count = taken[node.name] = taken.get(node.name, 0) + 1
            if count > 1:
                node.name = f"{node.name}_{count}"
    count = 0
    for node in nodes:
        if not node.name:
            count += 1
            while f"v{count}" in taken:
                count += 1
            node.name = f"v{count}"


def seen(op: Any, tensor: Tensor, index: int | None, place: Place, module: tuple[str, str]) -> GraphNode:
    """The node of an operation's output (number `index` of several) as it was seen when it ran."""
    name = op.name if index is None else f"{op.name}[{index}]"
    return GraphNode(
        0, "op", name, place.assigned, place=place, module=module[0], module_type=module[1], operation=op,
        tape=place_on_tape(tensor),
    )  # fmt: skip
