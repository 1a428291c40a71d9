"""The graph as a tree in the terminal, in Graphviz's DOT, as SVG, and as a Mermaid flowchart."""

from __future__ import annotations

import html as markup
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.errors import MissingPackageError

if TYPE_CHECKING:
    from gpuad.graph.data import Graph, GraphNode
    from gpuad.tensor import Tensor

_DEEPEST = 24  # levels of a tree that fit on a screen


def number(x: Any) -> str:
    """A number as a person writes it, to five digits."""
    return f"{x:.5g}" if isinstance(x, float) else str(x)


def host(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor on the host."""
    return tensor._device.backend.to_host(tensor._data)


def summary(tensor: Tensor | None) -> str:
    """One number, a few numbers, or their range; "" where there is no tensor."""
    if tensor is None:
        return ""
    array = host(tensor)
    if array.size == 1:
        return number(array.item())
    if not array.size:
        return "empty"
    if array.size <= 4:
        return "[" + ", ".join(number(x) for x in array.ravel().tolist()) + "]"
    return f"{number(array.min().item())} … {number(array.max().item())}"


def type_text(node: GraphNode) -> str:
    """dtype, shape and device, as far as they are known."""
    kind = "" if node.dtype is None else str(node.dtype)
    shape = "" if node.shape is None else str(tuple(node.shape))
    return " ".join(t for t in (kind, shape, f"on {node.device}" if node.device else "") if t)


def _line(node: GraphNode) -> str:
    parts = [f"{node.name} = {node.formula}" if node.formula else node.name]
    parts.append(f"{type_text(node)}" + ("" if node.kind in ("op", "input") else f", {node.kind}"))
    for title in ("value", "tangent", "gradient"):
        text = summary(getattr(node, title))
        if text:
            parts.append(f"{title} {text}")
    if node.saved_bytes:
        parts.append(f"saves {node.saved_bytes} B")
    if node.place.file:
        parts.append(f"{node.place.file.replace(chr(92), '/').rpartition('/')[2]}:{node.place.line}")
    return "   ".join(parts)


def tree(graph: Graph) -> str:
    """The graph as a tree from the results down to the leaves; what was drawn before is named only.

    A graph that is deeper than a screen is wide is listed in the order of computation.
    """
    if _depth(graph) > _DEEPEST:
        return "\n".join([f"{graph.title}, in order of computation", *(f"  {_line(node)}" for node in graph.nodes)])
    lines: list[str] = []
    drawn: set[int] = set()
    stack = [(number, "", "") for number in reversed(graph.outputs)]
    while stack:
        at, indent, branch = stack.pop()
        node = graph.nodes[at]
        if at in drawn and node.inputs:
            lines.append(f"{indent}{branch}{node.name}   (above)")
            continue
        if at in drawn:
            lines.append(f"{indent}{branch}{node.name}")
            continue
        drawn.add(at)
        lines.append(f"{indent}{branch}{_line(node)}")
        below = indent + {"": "", "├── ": "│   ", "└── ": "    "}[branch]
        for i, edge in reversed(list(enumerate(node.inputs))):
            stack.append((edge.source, below, "└── " if i == len(node.inputs) - 1 else "├── "))
    return "\n".join(lines)


def _depth(graph: Graph) -> int:
    depth: list[int] = []
    for node in graph.nodes:
        depth.append(1 + max((depth[edge.source] for edge in node.inputs), default=0))
    return max(depth, default=0)


def html_tree(graph: Graph) -> str:
    """The tree as preformatted HTML."""
    return f"<pre>{markup.escape(tree(graph))}</pre>"


def _labels(node: GraphNode) -> list[str]:
    lines = [f"{node.name} = {node.formula}" if node.formula else node.name, type_text(node)]
    return lines + [f"{t} {summary(getattr(node, t))}" for t in ("value", "tangent", "gradient") if getattr(node, t)
                    is not None]  # fmt: skip


_COLOURS = {"input": "#dbeafe", "parameter": "#fde9c9", "constant": "#ececec", "op": "#ffffff"}


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def dot(graph: Graph) -> str:
    """The graph in DOT: operands above what was computed from them, local derivatives at the edges."""
    lines = [f"digraph {_quote(graph.title)} {{", '  node [shape=box, style="rounded,filled", fontname="sans-serif"];',
             '  edge [fontname="sans-serif", fontsize=10];']  # fmt: skip
    for node in graph.nodes:
        colour = _COLOURS[node.kind]
        weight = ", penwidth=2" if node.number in graph.outputs else ""
        tip = f", tooltip={_quote(node.source)}" if node.source else ""
        label = _quote("\n".join(_labels(node)))
        lines.append(f'  n{node.number} [label={label}, fillcolor="{colour}"{weight}{tip}];')
    for node in graph.nodes:
        for edge in node.inputs:
            label = (
                f" [label={_quote('  ' + edge.derivative)}]" if edge.derivative and len(edge.derivative) < 24 else ""
            )
            lines.append(f"  n{edge.source} -> n{node.number}{label};")
    return "\n".join([*lines, "}"])


def mermaid(graph: Graph) -> str:
    """The graph as a Mermaid flowchart."""

    def quote(lines: list[str]) -> str:
        text = "<br/>".join(markup.escape(line) for line in lines)
        return '"' + text.replace("&#x27;", "'").replace("&quot;", "#quot;") + '"'

    lines = ["flowchart TD"]
    for node in graph.nodes:
        text = quote(_labels(node))
        lines.append(f"  n{node.number}({text})" if node.kind == "op" else f"  n{node.number}[{text}]")
    for node in graph.nodes:
        for edge in node.inputs:
            arrow = f"-->|{quote([edge.derivative])}|" if edge.derivative and len(edge.derivative) < 24 else "-->"
            lines.append(f"  n{edge.source} {arrow} n{node.number}")
    return "\n".join(lines)


def _missing() -> str:
    try:
        import graphviz  # noqa: F401
    except ImportError:
        return 'the Python package graphviz is not installed; install it with: pip install "gpuad[graph]"'
    if shutil.which("dot") is None:
        return "the program `dot` of Graphviz is not installed; install it with: apt-get install graphviz (or, with " \
               "conda, conda install graphviz)"  # fmt: skip
    return ""


def svg(graph: Graph) -> str:
    """The graph as SVG, drawn by Graphviz."""
    missing = _missing()
    if missing:
        raise MissingPackageError(
            f"A graph is drawn as SVG by Graphviz, but {missing}. to_html(), to_mermaid() and str() need neither."
        )
    import graphviz

    return graphviz.Source(dot(graph)).pipe(format="svg", encoding="utf-8")


def svg_or_none(graph: Graph) -> str | None:
    """The SVG where Graphviz is there, else None."""
    return None if _missing() else svg(graph)
