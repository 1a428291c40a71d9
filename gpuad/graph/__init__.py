"""Seeing the computational graph: as data, as text, as pictures, and as a page on which it is walked both ways.

    graph = gpuad.graph.trace(f, x, y)
    print(graph)
    graph.to_html("graph.html")

Imported on the first use of `gpuad.graph`.
"""

from gpuad.graph.data import Edge, Graph, GraphNode
from gpuad.graph.source import Place
from gpuad.graph.tape import of
from gpuad.graph.tracing import trace

__all__ = ["Edge", "Graph", "GraphNode", "Place", "of", "trace"]
