"""backward() and grad(): where a reverse walk starts, what it goes to, and what becomes of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gpuad.autograd.levels import Level, Logical, expose, level_of, make_batched
from gpuad.autograd.node import Node
from gpuad.autograd.op import Interpreters
from gpuad.autograd.walk import Walk, sole
from gpuad.errors import AutogradError, DeviceError, ShapeError
from gpuad.tensor import Tensor, wrap


def require_scalar(root: Tensor) -> None:
    """That a gradient of 1 can be assumed for a root."""
    data = root._data
    if data.size != 1:
        raise AutogradError(
            f"backward() needs the gradient of a tensor with {data.size} elements (shape {tuple(data.shape)}); a "
            "gradient of 1 is assumed for scalars only. Reduce it first, e.g. loss.sum().backward(), or pass "
            "gradient=."
        )


def _seed(root: Tensor | GradientEdge, gradient: Any, recorded: bool) -> Any:
    """The incoming gradient of a root: given, or 1 for a scalar."""
    if isinstance(root, GradientEdge):
        if not isinstance(gradient, Tensor):
            raise AutogradError(
                "A walk from a gradient edge needs the gradient that arrives there; pass grad_tensors=."
            )
        return gradient if recorded else gradient._data
    data = root._data
    if not root._requires_grad:
        raise AutogradError(
            "backward() was called on a tensor that does not require grad: nothing it was computed from does. Call "
            "x.requires_grad_() on an input first, and compute outside no_grad()."
        )
    if gradient is None:
        require_scalar(root)
        one = root._device.backend.ones_scalar(data.dtype)
        seed = one if data.shape == () else one.reshape(data.shape)
        return wrap(seed, root._device) if recorded else seed
    if not isinstance(gradient, Tensor):
        raise TypeError(f"gradient must be a Tensor or None, got {type(gradient).__name__}.")
    if gradient._data.shape != data.shape:
        raise ShapeError(
            f"gradient has shape {tuple(gradient._data.shape)}, but the tensor it belongs to has {tuple(data.shape)}; "
            "they must be equal."
        )
    if gradient._device is not root._device:
        raise DeviceError(
            f"gradient is on {gradient._device}, but the tensor it belongs to on {root._device}; move it with "
            f'gradient.to("{root._device}").'
        )
    if gradient._data.dtype != data.dtype:
        gradient = gradient.to(data.dtype)
    return gradient if recorded else gradient._data


class GradientEdge(NamedTuple):
    """Where a tensor's gradient arrives, without the tensor: its node (or the leaf), and which output of the node."""

    node: Any
    output_nr: int


def _as_list(x: Any) -> list[Any]:
    return [x] if isinstance(x, (Tensor, GradientEdge)) else list(x)


def _place(target: Tensor | GradientEdge) -> Any:
    """Where a gradient gathers: the node, or the leaf itself."""
    if isinstance(target, GradientEdge):
        return target.node
    return target if target._node is None else target._node


def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Accumulate the gradients of the tensors' (weighted) sum into the .grad of the leaves they depend on.

    grad_tensors: the weights, shaped like the tensors; None means 1 for scalars. inputs: only these take a gradient;
    one that is no leaf gets it too, as after retain_grad(). tensors and inputs may be edges (graph.get_gradient_edge).
    Errors: AutogradError when nothing requires grad, when the graph was freed, or a saved tensor changed in place.
    """
    roots = _as_list(tensors)
    weights = [None] * len(roots) if grad_tensors is None else _as_list(grad_tensors)
    if len(weights) != len(roots):
        raise AutogradError(f"backward() got {len(roots)} tensors and {len(weights)} gradients; give one for each.")
    if Interpreters.active and any(isinstance(x, Tensor) and isinstance(x._data, Logical) for x in roots):
        raise AutogradError(
            "backward() inside vmap would add the gradients of all examples to one .grad. Use gpuad.func.grad inside "
            "vmap, which gives a gradient for each example, or call backward() outside."
        )
    places = needed = None
    if inputs is not None:
        chosen = _as_list(inputs)
        if not chosen:
            raise AutogradError("backward() got no inputs; leave inputs out for all leaves, or name at least one.")
        _check_targets("backward", chosen)
        for target in chosen:
            if isinstance(target, Tensor) and target._node is not None:
                target.retain_grad()
        places = dict.fromkeys(_place(t) for t in chosen)
    walk = Walk(create_graph, create_graph if retain_graph is None else retain_graph, True)
    seeds = [(_place(root), _seed(root, weight, create_graph)) for root, weight in zip(roots, weights)]
    if places is not None:
        needed = _leading_to([place for place, _ in seeds], places)
        seeds = [seed for seed in seeds if seed[0] in needed or seed[0] in places]
    walk.drive(seeds, places, needed)


def _check_targets(name: str, targets: Sequence[Any]) -> None:
    for i, target in enumerate(targets):
        if isinstance(target, Tensor) and not target._requires_grad:
            raise AutogradError(
                f"{name}() cannot go to input {i}: it does not require grad. Call requires_grad_() on it."
            )


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of the outputs' (weighted) sum for the inputs, as a tuple; .grad is left alone.

    create_graph records their computation, so that they can be differentiated again. An input that the outputs do not
    depend on is an error, unless allow_unused (gives None) or materialize_grads (gives zeros). outputs and inputs may
    be edges (graph.get_gradient_edge).
    """
    if materialize_grads and allow_unused is False:
        raise ValueError("grad() got materialize_grads=True, which gives zeros for unused inputs, and "
                         "allow_unused=False, which refuses them; leave allow_unused out.")  # fmt: skip
    roots, targets = _as_list(outputs), _as_list(inputs)
    weights = [None] * len(roots) if grad_outputs is None else _as_list(grad_outputs)
    if len(weights) != len(roots):
        raise AutogradError(f"grad() got {len(roots)} outputs and {len(weights)} grad_outputs; give one for each.")
    if not targets:
        raise AutogradError("grad() got no inputs to differentiate for; name at least one.")
    if is_grads_batched:
        return _batched_grads(roots, targets, weights, (create_graph, allow_unused, materialize_grads))
    if Interpreters.active:
        found = Interpreters.grad(roots, targets, weights, create_graph)
        if found is not NotImplemented:
            return tuple([
                _unused(i, target, allow_unused, materialize_grads) if gradient is None else gradient
                for i, (target, gradient) in enumerate(zip(targets, found, strict=True))
            ])  # fmt: skip
    _check_targets("grad", targets)
    places: dict[Any, None] = dict.fromkeys(_place(t) for t in targets)
    # Gradients of many examples (vmap), or with a tangent, are Tensors on their way too, recorded or not.
    recorded = create_graph or any(w is not None and level_of(w) for w in weights)
    walk = Walk(recorded, create_graph if retain_graph is None else retain_graph, False)
    walk.grad_mode = create_graph
    seeds = [(_place(root), _seed(root, weight, recorded)) for root, weight in zip(roots, weights, strict=True)]
    needed = _leading_to([place for place, _ in seeds], places)
    walk.drive([seed for seed in seeds if seed[0] in needed or seed[0] in places], places, needed)
    results: list[Tensor | None] = []
    alone = {} if recorded else sole(walk.gradients)
    handed: set[Any] = set()  # a target may be asked for twice
    for i, target in enumerate(targets):
        place = _place(target)
        gradient = walk.gradients.get(place)
        if gradient is None:
            results.append(_unused(i, target, allow_unused, materialize_grads))
            continue
        if not recorded:
            shared = not alone[place] or place in handed
            handed.add(place)
            device = place._device if isinstance(place, Tensor) else place.device
            gradient = wrap(device.backend.copy(gradient) if shared else gradient, device)
        results.append(gradient)
    return tuple(results)


def _unused(i: int, target: Any, allow_unused: bool | None, materialize_grads: bool) -> Tensor | None:
    """What stands for the gradient of an input that the outputs do not depend on."""
    if materialize_grads and isinstance(target, Tensor):
        return target.new_zeros(target._data.shape)
    if not allow_unused:
        raise AutogradError(
            f"The outputs do not depend on input {i}, so it has no gradient; leave it out, or pass "
            "allow_unused=True (None) or materialize_grads=True (zeros)."
        )
    return None


def _batched_grads(
    roots: list[Tensor], targets: list[Tensor], weights: list[Any], options: tuple[bool, bool | None, bool]
) -> tuple[Tensor | None, ...]:
    """grad() for many grad_outputs at once: along a first dimension that the results have too."""
    create_graph, allow_unused, materialize_grads = options
    sizes = {w._data.shape[0] for w in weights if isinstance(w, Tensor) and w._data.ndim}
    if len(sizes) != 1 or any(not isinstance(w, Tensor) for w in weights):
        raise AutogradError(
            "grad(is_grads_batched=True) takes grad_outputs for each output, all with a first dimension of one length: "
            f"how many there are. Got lengths {sorted(sizes)} for {len(weights)} outputs."
        )
    size = sizes.pop()
    with Level(size) as level:
        batched = [make_batched(w, level) for w in weights]
        found = grad(roots, targets, batched, True, create_graph, allow_unused, False, materialize_grads)
        return tuple([None if g is None else expose(g, level, size) for g in found])


def _leading_to(roots: Sequence[Any], targets: dict[Any, None]) -> set[Any]:
    """The nodes reachable from the roots through which a target is reached."""
    nodes: dict[Any, None] = {}
    stack = [r for r in roots if isinstance(r, Node)]
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes[node] = None
        stack.extend(p for p in node.parents if isinstance(p, Node) and p not in nodes)
    needed: set[Any] = set()
    for node in sorted(nodes, key=lambda n: n.number):
        if any(p in targets or p in needed for p in node.parents if p is not None):
            needed.add(node)
    return needed


def tensor_backward(
    self: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Accumulate the gradients of this tensor into the .grad of the leaves it depends on; see autograd.backward."""
    backward((self,), (gradient,), retain_graph, create_graph, inputs)


Tensor.backward = tensor_backward  # type: ignore[method-assign]
