"""The reverse walk, watched: the gradient that arrives at each node, and what each node sends to its operands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.gradients import _place, _seed
from gpuad.autograd.node import Node, OutputNode
from gpuad.autograd.walk import Walk
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor, wrap

if TYPE_CHECKING:
    from gpuad.graph.data import Graph, GraphNode


def walk_back(graph: Graph, roots: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    """Fill in the gradients of a graph's nodes and edges: by one walk over the tape, and the rule of each node.

    Nothing is freed and no .grad is written. Hooks run, as in every walk.
    """
    if cotangents and len(cotangents) != len(roots):
        raise AutogradError(f"The graph has {len(roots)} outputs, got {len(cotangents)} cotangents; give one for each.")
    weights: Sequence[Tensor | None] = cotangents or [None if r.numel() == 1 else r.new_ones(r.shape) for r in roots]
    walk = Walk(recorded=False, retain=True, accumulate=False)
    for root, weight in zip(roots, weights, strict=True):
        if root._requires_grad or len(roots) == 1:
            walk.contribute(_place(root), _seed(root, weight, False))
    # With every place as a target, the walk hands over the gradient of every place.
    places = _everything(map(_place, roots))
    walk.run(dict.fromkeys(places), {p for p in places if isinstance(p, Node)})
    arrived = walk.gradients
    for node in graph.nodes:
        node.gradient = None
        for edge in node.inputs:
            edge.local = edge.sent = None
        gradient = arrived.get(node.tape)
        if gradient is not None:
            device = node.tape._device if isinstance(node.tape, Tensor) else node.tape.device
            node.gradient = wrap(gradient, device)
            node.shape, node.dtype = tuple(gradient.shape), gradient.dtype
            if isinstance(node.tape, Node):
                _send(walk, node, arrived[owner(node.tape)])
    passed = [node for node in graph.nodes if node.kind == "op" and node.gradient is not None]
    graph.backward_order = [n.number for n in sorted(passed, key=lambda n: n.tape.number, reverse=True)]


def _everything(roots: Iterable[Any]) -> dict[Any, None]:
    """The roots, and every node and leaf that they were computed from."""
    found: dict[Any, None] = {}
    pending = list(roots)
    while pending:
        place = pending.pop()
        if place is not None and place not in found:
            found[place] = None
            pending.extend(getattr(place, "parents", ()))
    return found


def _send(walk: Walk, node: GraphNode, gradient: Any) -> None:
    """What a node sends along each of its edges, and the local derivatives there."""
    at = owner(node.tape)
    rule = at.op.backward
    sent = at.device.backend.inside(rule, at, gradient, walk)
    local = None
    if _is_local(at, gradient):
        local = at.device.backend.inside(rule, at, at.device.backend.full(gradient.shape, 1, gradient.dtype), walk)
    for edge in node.inputs:
        result = sent[edge.index]
        if result is not None:
            edge.sent = wrap(result, at.device)
            if local is not None and (gradient.size == 1 or result.shape == gradient.shape):
                edge.local = wrap(local[edge.index], at.device)


def _is_local(node: Node, gradient: Any) -> bool:
    """Whether a node's rule applied to a gradient of ones gives its local derivatives.

    For an output of one element the rule's Jᵀ·1 is the derivative itself; for an elementwise operation, whose J is
    diagonal, it is the diagonal for the operands that were not broadcast.
    """
    if isinstance(gradient, list):  # of several outputs
        return False
    return gradient.size == 1 or (isinstance(node.op, Elementwise) and not node.op.formula.is_row)


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
