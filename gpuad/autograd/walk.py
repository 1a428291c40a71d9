"""The reverse walk: gradients by falling node number, and what backward() and grad() do with them.

Source: reverse accumulation, Griewank & Walther, "Evaluating Derivatives", 2nd ed., section 3.2. Node numbers grow
with time, so taking the highest pending number first visits every node after all of its users: no recursion, and each
node once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

from gpuad.autograd.levels import Level, Logical, expose, level_of, make_batched
from gpuad.autograd.modes import state
from gpuad.autograd.node import WRITTEN, Node, OutputNode
from gpuad.autograd.op import Interpreters
from gpuad.errors import AutogradError, DeviceError, ShapeError
from gpuad.tensor import Tensor, wrap


class Walk:
    """One reverse pass over the tape.

    recorded: gradients are Tensors and their computation is recorded (create_graph); else they are bare arrays.
    accumulate: leaves take their gradients into .grad; else `gradients` holds those of `targets`.
    """

    def __init__(self, recorded: bool, retain: bool, accumulate: bool) -> None:
        self.recorded, self.retain, self.accumulate = recorded, retain, accumulate
        self.gradients: dict[Any, Any] = {}
        self.owned: set[Any] = set()  # whose gradient is a buffer made by this walk's own addition
        self.direct: dict[Tensor, Any] = {}  # leaves whose gradient is written straight into their buffer
        self.heap: list[tuple[int, Node]] = []

    def contribute(self, to: Any, gradient: Any) -> None:
        """Add to the gradient of a node or leaf: kept as it is, then added out of place, then in place."""
        gradients = self.gradients
        before = gradients.get(to)
        if before is None:
            if to in self.direct:
                buffer = self.direct[to]
                to._device.backend.add_into(buffer, gradient)
                return
            gradients[to] = gradient
            if not isinstance(to, Tensor):
                heappush(self.heap, (-to.number, to))
        elif self.recorded:
            gradients[to] = before + gradient
        elif to in self.owned:
            _backend(to).add_into(before, gradient)
        else:
            gradients[to] = _backend(to).add(before, gradient)
            self.owned.add(to)

    def run(self, targets: dict[Any, None] | None = None, needed: set[Any] | None = None) -> None:
        """Walk until no node is pending; with `needed`, only nodes that lead to a target."""
        heap, gradients, recorded, retain = self.heap, self.gradients, self.recorded, self.retain
        direct = self.direct
        keep: dict[Any, Any] = {}
        while heap:
            node = heappop(heap)[1]
            gradient = gradients.pop(node)
            if node.hooks is not None:
                gradient = self._run_hooks(node.hooks, gradient, node)
            if node.retained is not None:
                self._retain(node, gradient)
            if targets is not None and node in targets:
                keep[node] = gradient
                if node not in needed:  # type: ignore[operator]
                    continue
            if type(node) is OutputNode:
                self._gather(node, gradient)
                continue
            rule = node.op.backward_recorded if recorded else node.op.backward
            backend = node.device.backend
            if backend.current:
                results = rule(node, gradient, self)
            else:
                results = backend.inside(rule, node, gradient, self)
            if node.saved and not retain:
                node.saved, node.cells = None, ()
            for parent, result in zip(node.parents, results):  # noqa: B905  (one each, by construction)
                if parent is None or result is None or result is WRITTEN:
                    continue
                if needed is not None and parent not in needed and parent not in targets:  # type: ignore[operator]
                    continue
                if parent in gradients or parent in direct:
                    self.contribute(parent, result)
                    continue
                gradients[parent] = result
                if isinstance(parent, Node):
                    heappush(heap, (-parent.number, parent))
        gradients.update(keep)

    def _gather(self, node: OutputNode, gradient: Any) -> None:
        """Put the gradient of one output in its place among those of its operation."""
        parent: Any = node.parents[0]
        slots = self.gradients.get(parent)
        if slots is None:
            slots = self.gradients[parent] = [None] * len(parent.info[2])
            heappush(self.heap, (-parent.number, parent))
        before = slots[node.index]
        if before is not None:  # an output that was saved stands on the tape a second time, see saved_tensor
            gradient = before + gradient if self.recorded else node.device.backend.add(before, gradient)
        slots[node.index] = gradient

    def into(self, leaf: Tensor) -> tuple[Any, float] | None:
        """(buffer, beta) where an op may write a leaf's gradient as beta · buffer + gradient, else None."""
        if not self.accumulate or self.recorded or leaf._hooks is not None or leaf in self.gradients:
            return None
        if leaf in self.direct:
            return self.direct[leaf], 1.0
        empty = leaf._grad_buffer
        if empty is None or leaf._grad is not None or not _fits(empty, leaf):
            return None
        self.direct[leaf] = empty._data
        leaf._grad = empty
        leaf._grad_buffer = None
        empty._cell[0] += 1
        return empty._data, 0.0

    def _run_hooks(self, hooks: Sequence[Any], gradient: Any, at: Any) -> Any:
        for hook in list(hooks):
            given = gradient if self.recorded else wrap(gradient, at.device if isinstance(at, Node) else at._device)
            result = hook(given)
            if result is not None:
                gradient = result if self.recorded else result._data
        return gradient

    def _retain(self, node: Node, gradient: Any) -> None:
        tensor = node.retained()  # type: ignore[misc]
        if tensor is not None and tensor._node is node:
            value = gradient if self.recorded else wrap(gradient, node.device)
            tensor._grad = value if tensor._grad is None else tensor._grad + value

    def finish_leaves(self) -> None:
        """Hand each leaf its gradient."""
        if self.gradients:
            sole = {} if self.recorded else _sole(self.gradients)
            for leaf, gradient in self.gradients.items():
                self._finish_leaf(leaf, gradient, sole.get(leaf, False))
        leaves = [*self.direct, *self.gradients]
        self.gradients.clear()
        for leaf in leaves:
            if leaf._post_hooks is not None:
                for hook in list(leaf._post_hooks.values()):
                    hook(leaf)

    def _finish_leaf(self, leaf: Tensor, gradient: Any, sole: bool) -> None:
        if leaf._hooks is not None:
            gradient = self._run_hooks(leaf._hooks.values(), gradient, leaf)
            sole = False
        before = leaf._grad
        backend = leaf._device.backend
        if self.recorded:
            leaf._grad = gradient if before is None else before + gradient
        elif before is None:
            leaf._grad_buffer = None
            leaf._grad = wrap(gradient if sole else backend.copy(gradient), leaf._device)
        elif before._requires_grad:
            leaf._grad = wrap(backend.add(before._data, gradient), leaf._device)
        else:
            backend.add_into(before._data, gradient)
            before._cell[0] += 1


def _holders(gradients: dict[Any, Any]) -> dict[Any, int]:
    return {place: sys.getrefcount(gradient) for place, gradient in gradients.items()}


# The count of an object that only the dictionary holds: measured, since interpreters count temporaries differently.
_SOLE = _holders({None: object()})[None]


def _sole(gradients: dict[Any, Any]) -> dict[Any, bool]:
    """Which gradients nobody else holds: they may be kept and written later without a copy."""
    return {
        place: count == _SOLE and gradients[place].base is None and gradients[place].flags.c_contiguous
        for place, count in _holders(gradients).items()
    }


def _fits(buffer: Tensor, leaf: Tensor) -> bool:
    """Whether a gradient buffer left by zero_grad still suits its leaf, which may have moved or changed dtype."""
    a, b = buffer._data, leaf._data
    return a.dtype == b.dtype and a.shape == b.shape and buffer._device is leaf._device


def _backend(at: Any) -> Any:
    return (at._device if isinstance(at, Tensor) else at.device).backend


def require_scalar(root: Tensor) -> None:
    """That a gradient of 1 can be assumed for a root."""
    data = root._data
    if data.size != 1:
        raise AutogradError(
            f"backward() needs the gradient of a tensor with {data.size} elements (shape {tuple(data.shape)}); a "
            "gradient of 1 is assumed for scalars only. Reduce it first, e.g. loss.sum().backward(), or pass "
            "gradient=."
        )


def _seed(root: Tensor, gradient: Any, recorded: bool) -> Any:
    """The incoming gradient of a root: given, or 1 for a scalar."""
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


def _as_list(x: Any) -> list[Any]:
    return [x] if isinstance(x, Tensor) else list(x)


def _place(tensor: Tensor) -> Any:
    """Where a tensor's gradient gathers: its node, or the leaf itself."""
    return tensor if tensor._node is None else tensor._node


def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Accumulate the gradients of the tensors' (weighted) sum into the .grad of the leaves they depend on.

    grad_tensors: the weights, shaped like the tensors; None means 1 for scalars. inputs: only these take a gradient.
    Errors: AutogradError when nothing requires grad, when the graph was freed, or a saved tensor changed in place.
    """
    roots = _as_list(tensors)
    weights = [None] * len(roots) if grad_tensors is None else _as_list(grad_tensors)
    if len(weights) != len(roots):
        raise AutogradError(f"backward() got {len(roots)} tensors and {len(weights)} gradients; give one for each.")
    if inputs is not None:
        chosen = _as_list(inputs)
        found = grad(roots, chosen, weights, retain_graph, create_graph, allow_unused=True)
        for leaf, gradient in zip(chosen, found, strict=True):
            if gradient is not None:
                leaf._grad = gradient if leaf._grad is None else leaf._grad + gradient
        return
    if Interpreters.active and any(isinstance(x._data, Logical) for x in roots):
        raise AutogradError(
            "backward() inside vmap would add the gradients of all examples to one .grad. Use gpuad.func.grad inside "
            "vmap, which gives a gradient for each example, or call backward() outside."
        )
    walk = Walk(create_graph, create_graph if retain_graph is None else retain_graph, True)
    seeds = [(_place(root), _seed(root, weight, create_graph)) for root, weight in zip(roots, weights)]
    enabled = state.enabled
    state.enabled = create_graph
    try:
        while seeds:  # taken out one by one: what the walk adds to, nobody else may hold
            walk.contribute(*seeds.pop(0))
        walk.run()
        walk.finish_leaves()
    finally:
        state.enabled = enabled


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
    depend on is an error, unless allow_unused (gives None) or materialize_grads (gives zeros).
    """
    roots, targets = _as_list(outputs), _as_list(inputs)
    weights = [None] * len(roots) if grad_outputs is None else _as_list(grad_outputs)
    if len(weights) != len(roots):
        raise AutogradError(f"grad() got {len(roots)} outputs and {len(weights)} grad_outputs; give one for each.")
    if is_grads_batched:
        return _batched_grads(roots, targets, weights, (create_graph, allow_unused, materialize_grads))
    if Interpreters.active:
        found = Interpreters.grad(roots, targets, weights, create_graph)
        if found is not NotImplemented:
            return tuple([
                _unused(i, target, allow_unused, materialize_grads) if gradient is None else gradient
                for i, (target, gradient) in enumerate(zip(targets, found, strict=True))
            ])  # fmt: skip
    for i, target in enumerate(targets):
        if not target._requires_grad:
            raise AutogradError(
                f"grad() cannot go to input {i}: it does not require grad. Call requires_grad_() on it."
            )
    places: dict[Any, None] = dict.fromkeys(_place(t) for t in targets)
    # Gradients of many examples (vmap), or with a tangent, are Tensors on their way too, recorded or not.
    recorded = create_graph or any(w is not None and level_of(w) for w in weights)
    walk = Walk(recorded, create_graph if retain_graph is None else retain_graph, False)
    seeds = [_seed(root, weight, recorded) for root, weight in zip(roots, weights, strict=True)]
    needed = _leading_to([_place(r) for r in roots], places)
    enabled = state.enabled
    state.enabled = create_graph
    try:
        for root, seed in zip(roots, seeds, strict=True):
            if _place(root) in needed or _place(root) in places:
                walk.contribute(_place(root), seed)
        walk.run(places, needed)
    finally:
        state.enabled = enabled
    results: list[Tensor | None] = []
    sole = {} if recorded else _sole(walk.gradients)
    handed: set[Any] = set()  # a target may be asked for twice
    for i, target in enumerate(targets):
        gradient = walk.gradients.get(_place(target))
        if gradient is None:
            results.append(_unused(i, target, allow_unused, materialize_grads))
            continue
        if target._node is None and target._hooks is not None:
            gradient = walk._run_hooks(target._hooks.values(), gradient, target)
        if not recorded:
            place = _place(target)
            shared = not sole[place] or place in handed
            handed.add(place)
            gradient = wrap(_backend(target).copy(gradient) if shared else gradient, target._device)
        results.append(gradient)
    return tuple(results)


def _unused(i: int, target: Tensor, allow_unused: bool | None, materialize_grads: bool) -> Tensor | None:
    """What stands for the gradient of an input that the outputs do not depend on."""
    if materialize_grads:
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


class RemovableHandle:
    """What a registration returns: remove() takes the hook out again; also a context manager."""

    def __init__(self, hooks: Any, key: Any) -> None:
        self._hooks, self._key = hooks, key

    def remove(self) -> None:
        """Take the hook out; harmless when it is out already."""
        if isinstance(self._hooks, dict):
            self._hooks.pop(self._key, None)
        elif self._key in self._hooks:
            self._hooks.remove(self._key)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def register_hook(self: Tensor, hook: Any) -> RemovableHandle:
    """Call `hook(gradient)` when the gradient of this tensor is computed; a Tensor it returns takes its place."""
    if not self._requires_grad:
        raise AutogradError("register_hook() needs a tensor that requires grad; call requires_grad_() first.")
    if self._node is not None:
        self._node.add_hook(hook)
        return RemovableHandle(self._node.hooks, hook)
    if self._hooks is None:
        self._hooks = {}
    key = object()
    self._hooks[key] = hook
    return RemovableHandle(self._hooks, key)


def register_post_accumulate_grad_hook(self: Tensor, hook: Any) -> RemovableHandle:
    """Call `hook(tensor)` after backward has accumulated this leaf's gradient."""
    if self._node is not None or not self._requires_grad:
        raise AutogradError("register_post_accumulate_grad_hook() needs a leaf that requires grad.")
    if self._post_hooks is None:
        self._post_hooks = {}
    key = object()
    self._post_hooks[key] = hook
    return RemovableHandle(self._post_hooks, key)


Tensor.register_hook = register_hook  # type: ignore[attr-defined]
Tensor.register_post_accumulate_grad_hook = register_post_accumulate_grad_hook  # type: ignore[attr-defined]
