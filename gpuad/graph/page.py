"""The graph as one self-contained HTML page: its data as JSON, put into the template beside this file."""

from __future__ import annotations

import html as markup
import json
import math
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.graph import draw, formulas

if TYPE_CHECKING:
    from gpuad.graph.data import Edge, Graph, GraphNode
    from gpuad.tensor import Tensor

_WHOLE = 64  # elements up to which an array is in the page whole


def html(graph: Graph) -> str:
    """The page of a graph."""
    files = resources.files("gpuad.graph")
    page, style, layout, inspector, program = (
        files.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "layout.js", "inspector.js", "page.js")
    )
    data = json.dumps(content(graph), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for mark, text in (
        ("{{title}}", markup.escape(graph.title)),
        ("{{style}}", style),
        ("{{layout}}", layout),
        ("{{inspector}}", inspector),
        ("{{program}}", program),
        # What a name or a source line holds cannot end the script element.
        ("{{data}}", data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")),
    ):
        page = page.replace(mark, text, 1)
    return page


def content(graph: Graph) -> dict[str, Any]:
    """What the page shows, as JSON has it."""
    programs: list[dict[str, str]] = []
    return {
        "title": graph.title,
        "outputs": graph.outputs,
        "backward": graph.backward_order,
        "saved": graph.saved_bytes,
        "nodes": [_node(graph, node, programs) for node in graph.nodes],
        "programs": programs,
    }


def _node(graph: Graph, node: GraphNode, programs: list[dict[str, str]]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "kind": node.kind,
        "op": node.op,
        "name": node.name,
        "formula": node.formula,
        "numbers": _in_numbers(graph, node),
        "type": draw.type_text(node),
        "saved": node.saved_bytes,
        "module": node.module,
        "moduleType": node.module_type,
        "inputs": [_edge(edge) for edge in node.inputs],
    }
    for title in ("value", "tangent", "gradient"):
        made[title] = array(getattr(node, title))
    if node.place.file:
        made["place"] = {"at": node.source, "text": node.place.text, "expression": node.place.expression}
    if node.kind == "op":
        found = node.programs()
        if found:
            if found not in programs:  # many nodes share one
                programs.append(found)
            made["program"] = programs.index(found)
    return made


def _edge(edge: Edge) -> dict[str, Any]:
    return {
        "from": edge.source,
        "operand": edge.operand,
        "derivative": edge.derivative,
        "rule": edge.rule,
        "local": array(edge.local),
        "sent": array(edge.sent),
    }


def _in_numbers(graph: Graph, node: GraphNode) -> str:
    """The formula with its operands' values in place of their names, where all are single numbers."""
    operands: list[Any] = [graph.nodes[edge.source].value for edge in node.inputs]
    if not node.inputs or any(o is None or o.numel() != 1 for o in operands):
        return ""
    written = [draw.number(draw.host(o).item()) for o in operands]
    # In place of the operand's name stands its number, whatever else the formula holds.
    shown = formulas.formula(node.operation, _filled(graph, node, written), {})
    return "" if shown == node.formula else shown


def _filled(graph: Graph, node: GraphNode, written: list[str]) -> list[Any]:
    operands = list(node.operands)
    for edge, number in zip(node.inputs, written, strict=True):
        operands[edge.index] = f"({number})" if number.startswith("-") else number
    return operands


def array(tensor: Tensor | None) -> dict[str, Any] | None:
    """An array for the page: its elements where they are few, else a summary."""
    if tensor is None:
        return None
    values = draw.host(tensor)
    made: dict[str, Any] = {"shape": list(values.shape)}
    if values.size <= _WHOLE:
        made["data"] = [_number(x) for x in values.ravel().tolist()]
        return made
    floats = values.astype(np.float64)
    made["summary"] = {
        "min": _number(floats.min().item()),
        "mean": _number(floats.mean().item()),
        "max": _number(floats.max().item()),
        "norm": _number(math.sqrt(np.square(floats).sum().item())),
    }
    return made


def _number(x: Any) -> Any:
    """A number that JSON can hold: seven digits, and what is not finite as text."""
    if isinstance(x, float):
        return float(f"{x:.7g}") if math.isfinite(x) else str(x)
    return int(x)
