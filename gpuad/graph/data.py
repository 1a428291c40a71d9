"""The computational graph as data: nodes, the edges between them, and the graph itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpuad.graph import draw, formulas, page, walking
from gpuad.graph.source import Place
from gpuad.tensor import Tensor


@dataclass(eq=False)
class Edge:
    """One operand of an operation.

    source: the number of the node it comes from. operand: what the operation calls it, at place `index` of its
    operands. derivative: ∂output/∂operand as text, where the operation is a formula of elements; rule: how the
    gradient g is passed on, as text, where it is not. local: the numbers of that derivative, where it has the shape of
    the operand (elementwise operations, and outputs of one element). sent: the gradient that went back along the edge.
    """

    source: int
    operand: str
    index: int
    derivative: str = ""
    rule: str = ""
    local: Tensor | None = None
    sent: Tensor | None = None


@dataclass(eq=False)
class GraphNode:
    """A value of the graph: an input, a parameter, a constant, or what an operation computed.

    kind: "input" (of the function, or another variable that requires grad), "parameter" (of a module), "constant" or
    "op". number: its place in `Graph.nodes`. name: that of the variable or
    parameter, else v1, v2 … in order of computation. formula: the operation in the names of its operands. saved_bytes:
    what is kept for the gradient. module, module_type: dotted name and class of the innermost nn.Module at work, the
    owner's for parameters. shape, dtype: None where they are not known (graph.of, before backward()). value, tangent,
    gradient: Tensors or None.
    """

    number: int
    kind: str
    op: str
    name: str
    inputs: list[Edge] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    dtype: np.dtype | None = None
    device: str = ""
    saved_bytes: int = 0
    formula: str = ""
    place: Place = Place()
    module: str = ""
    module_type: str = ""
    requires_grad: bool = False
    value: Tensor | None = None
    tangent: Tensor | None = None
    gradient: Tensor | None = None
    operation: Any = None
    operands: list[Any] = field(default_factory=list)  # names of nodes, numbers, None
    tape: Any = None  # the tape's node, or the leaf

    @property
    def source(self) -> str:
        """The user's line, as file:line; "" where it is not known."""
        return f"{self.place.file}:{self.place.line}" if self.place.file else ""

    def programs(self) -> dict[str, str]:
        """The sources of what runs for this operation, by title: generated NumPy and CUDA, or Python."""
        node = walking.owner(self.tape)  # with tangents, it is of another operation: value and tangent at once
        wanted = tuple(i for i, p in enumerate(getattr(node, "parents", ())) if p is not None)
        dtype = np.dtype(np.float32) if self.dtype is None else self.dtype
        return formulas.programs(getattr(node, "op", self.operation), wanted, dtype)


class Graph:
    """A computational graph: its nodes, operands before their users. Made by gpuad.graph.trace and gpuad.graph.of.

    nodes: list of GraphNode. outputs: numbers of the result's nodes. title: what it is the graph of. Printed it is a
    tree; in Jupyter a picture. backward_order: the numbers of the nodes in the order in which the reverse walk, where
    there was one, passed their gradients on.
    """

    def __init__(self, title: str, nodes: list[GraphNode], outputs: list[int], roots: list[Tensor]) -> None:
        self.title, self.nodes, self.outputs = title, nodes, outputs
        self.backward_order: list[int] = []
        self._roots = roots

    def __getitem__(self, name: str) -> GraphNode:
        """The node of this name; KeyError that lists the names where there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"The graph has no node {name!r}; it has {', '.join(n.name for n in self.nodes[:40])}.")

    @property
    def saved_bytes(self) -> int:
        """Bytes of the arrays that are kept for the gradient; one that several operations keep counts once."""
        return walking.saved_bytes(node.tape for node in self.nodes)

    def backward(self, *cotangents: Tensor) -> Graph:
        """Walk back from the outputs, and note each node's gradient and what went along each edge. Returns the graph.

        cotangents: the gradient of each output, ones unless given. The tape is left as it is and so is every .grad.
        Raises AutogradError where nothing requires grad, or where the tape was freed by an earlier backward.
        """
        walking.walk_back(self, self._roots, cotangents)
        return self

    def __str__(self) -> str:
        return draw.tree(self)

    __repr__ = __str__

    def to_dot(self) -> str:
        """The graph in Graphviz's DOT language."""
        return draw.dot(self)

    def to_svg(self) -> str:
        """The graph as an SVG picture, drawn by Graphviz.

        Raises MissingPackageError where the package graphviz or the program `dot` is not installed.
        """
        return draw.svg(self)

    def to_mermaid(self) -> str:
        """The graph as a Mermaid flowchart, to be put in Markdown between ```mermaid and ```."""
        return draw.mermaid(self)

    def to_html(self, path: Any = None) -> str:
        """One HTML page on which the graph is walked, forwards and backwards; written to `path` if given.

        It is self-contained: it needs no network and no server. Values up to 64 elements are in it whole, of others
        a summary.
        """
        written = page.html(self)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(written)
        return written

    def _repr_svg_(self) -> str | None:
        return draw.svg_or_none(self)

    def _repr_html_(self) -> str:
        return draw.html_tree(self)
