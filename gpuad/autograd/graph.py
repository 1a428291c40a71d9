"""The graph from outside, under PyTorch's names: nodes, edges, saved-tensor hooks, handles."""

from __future__ import annotations

from gpuad.autograd.gradients import GradientEdge
from gpuad.autograd.hooks import RemovableHandle
from gpuad.autograd.node import Node, OutputNode
from gpuad.autograd.saved import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor

__all__ = [
    "GradientEdge", "Node", "RemovableHandle", "disable_saved_tensors_hooks", "get_gradient_edge", "save_on_cpu",
    "saved_tensors_hooks",
]  # fmt: skip


def get_gradient_edge(tensor: Tensor) -> GradientEdge:
    """The edge at which the gradient of `tensor` arrives; backward() and grad() take it in the tensor's place.

    Keeping the edge instead of the tensor lets the tensor's memory go. A leaf stands for itself.
    Errors: AutogradError when the tensor requires no grad.
    """
    if not tensor.requires_grad:
        raise AutogradError("get_gradient_edge() needs a tensor that requires grad; call requires_grad_() first.")
    node = tensor._node
    if node is None:
        return GradientEdge(tensor, 0)
    return GradientEdge(node, node.index if isinstance(node, OutputNode) else 0)
