"""The reverse walk, one node at a time: what arrives at each node and what it sends to its operands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop
from typing import TYPE_CHECKING, Any

from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.node import WRITTEN, Node, OutputNode
from gpuad.autograd.walk import Walk, _place, _seed
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor, wrap

if TYPE_CHECKING:
    from gpuad.graph.data import Graph, GraphNode


class _Steps(Walk):
    """A walk that can be watched: the tape's own rules and sums, nothing freed, no .grad written."""

    def __init__(self) -> None:
        super().__init__(recorded=False, retain=True, accumulate=False)

    def step(self) -> tuple[Node, Any, list[Any]]:
        """Take the pending node with the highest number: the node, its gradient, what it sent to its parents."""
        node = heappop(self.heap)[1]
        gradient = self.gradients.pop(node)
        if node.hooks is not None:
            gradient = self._run_hooks(node.hooks, gradient, node)
        if type(node) is OutputNode:
            self._gather(node, gradient)
            return node, gradient, []
        results = self.apply_rule(node, gradient)
        for parent, result in zip(node.parents, results, strict=True):
            if parent is not None and result is not None:
                self.contribute(parent, result)
        return node, gradient, results

    def apply_rule(self, node: Node, gradient: Any) -> list[Any]:
        """The gradients of a node's parents from that of its output."""
        results = node.device.backend.inside(node.op.backward, node, gradient, self)
        return [None if r is WRITTEN else r for r in results]


def walk_back(graph: Graph, roots: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    """Fill in the gradients of a graph's nodes and edges by the tape's rules."""
    if cotangents and len(cotangents) != len(roots):
        raise AutogradError(f"The graph has {len(roots)} outputs, got {len(cotangents)} cotangents; give one for each.")
    weights = cotangents or [None if r.numel() == 1 else r.new_ones(r.shape) for r in roots]
    at: dict[Any, list[GraphNode]] = {}
    for node in graph.nodes:
        node.gradient = None
        for edge in node.inputs:
            edge.local = edge.sent = None
        at.setdefault(node.tape, []).append(node)
    inner: dict[Node, list[GraphNode]] = {}  # an op with several outputs: the nodes of its outputs
    for node in graph.nodes:
        if type(node.tape) is OutputNode:
            inner.setdefault(node.tape.parents[0], []).append(node)  # type: ignore[arg-type]
    graph.backward_order = order = []
    walk = _Steps()
    for root, weight in zip(roots, weights, strict=True):
        if root._requires_grad or len(roots) == 1:
            walk.contribute(_place(root), _seed(root, weight, False))
    while walk.heap:
        place, gradient, sent = walk.step()
        for node in at.get(place, ()):
            _arrived(node, gradient, place.device)
        if type(place) is OutputNode:
            continue
        for node in [*at.get(place, ()), *inner.get(place, ())]:
            if node.gradient is None or node.kind != "op":
                continue
            order.append(node.number)
            local = _local(walk, place, gradient)
            for edge in node.inputs:
                edge.sent = _as_tensor(sent[edge.index], place.device) if edge.index < len(sent) else None
                if edge.sent is not None and local is not None and local[edge.index].shape == edge.sent._data.shape:
                    edge.local = _as_tensor(local[edge.index], place.device)
    for leaf, gradient in walk.gradients.items():
        for node in at.get(leaf, ()):
            _arrived(node, gradient, leaf._device)


def _arrived(node: GraphNode, gradient: Any, device: Any) -> None:
    if not isinstance(gradient, list):  # the gradients of several outputs are each at its own node
        node.gradient = wrap(gradient, device)
        node.shape, node.dtype = tuple(gradient.shape), gradient.dtype


def _as_tensor(array: Any, device: Any) -> Tensor | None:
    return None if array is None else wrap(array, device)


def _local(walk: _Steps, node: Node, gradient: Any) -> list[Any] | None:
    """The local derivatives of a node for its parents: the rule applied to a gradient of ones, where that is them.

    For an output of one element the rule's Jᵀ·1 is the derivative itself; for an elementwise operation, whose J is
    diagonal, it is the diagonal, unless an operand was broadcast.
    """
    if isinstance(gradient, list):
        return None
    op = node.op
    elementwise = isinstance(op, Elementwise) and not op.formula.is_row
    if gradient.size != 1 and not elementwise:
        return None
    results = walk.apply_rule(node, node.device.backend.full(gradient.shape, 1, gradient.dtype))
    alike = [r is None or gradient.size == 1 or r.shape == gradient.shape for r in results]
    return results if all(alike) else None


def owner(place: Any) -> Any:
    """The tape's node that keeps parents and saved values: of an output of several, the operation's."""
    return place.parents[0] if type(place) is OutputNode else place


def saved_bytes(places: Iterable[Any]) -> int:
    """Bytes of the distinct arrays that nodes of the tape keep; inputs of the tape (leaves) keep none."""
    found = {}
    for place in places:
        for array in (owner(place).saved or ()) if isinstance(place, Node) else ():
            if hasattr(array, "nbytes"):
                found[id(array)] = int(array.nbytes)
    return sum(found.values())
