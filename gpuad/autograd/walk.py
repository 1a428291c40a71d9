"""The reverse walk: gradients by falling node number, and what backward() and grad() do with them.

Source: reverse accumulation, Griewank & Walther, "Evaluating Derivatives", 2nd ed., section 3.2. Node numbers grow
with time, so taking the highest pending number first visits every node after all of its users: no recursion, and each
node once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

from gpuad.array.host_memory import alone
from gpuad.autograd import anomaly
from gpuad.autograd.hooks import NodeHooks, hooked_leaves, run_output_hooks, run_tuple_hooks
from gpuad.autograd.modes import state
from gpuad.autograd.node import WRITTEN, Node, OutputNode
from gpuad.autograd.op import Interpreters
from gpuad.errors import AutogradError, DeviceError, ShapeError
from gpuad.tensor import Tensor, wrap


class Walk:
    """One reverse pass over the tape.

    recorded: gradients are Tensors and their computation is recorded (create_graph); else they are bare arrays.
    accumulate: leaves take their gradients into .grad; else `gradients` holds those of `targets`.
    anomaly: gradients are checked, see gpuad/autograd/anomaly.py. at_end: called when the pass is over.
    """

    def __init__(self, recorded: bool, retain: bool, accumulate: bool) -> None:
        self.recorded, self.retain, self.accumulate = recorded, retain, accumulate
        self.gradients: dict[Any, Any] = {}
        self.owned: set[Any] = set()  # whose gradient is a buffer made by this walk's own addition
        self.direct: dict[Tensor, Any] = {}  # leaves whose gradient is written straight into their buffer
        self.heap: list[tuple[int, Node]] = []
        self.sums: dict[Node, tuple[Any, Any]] = {}  # of pending gradients: (gradient, the sum of its rows)
        self.passed: dict[Node, Node] = {}  # by the node that got its gradient: the node that was passed by
        self.rooms: dict[Tensor, Any] = {}  # leaves whose empty buffer holds a sum that is not theirs yet
        self.needed: set[Any] | None = None
        self.targets: dict[Any, None] = {}
        self.anomaly = anomaly.settings.enabled
        self.at_end: list[Callable[[], None]] = []
        self.uses: dict[Tensor, int] = {}  # of leaves with post-accumulate hooks: operations that are yet to be walked
        self.at: Node | None = None  # the node whose rule runs, while anomalies are looked for

    def drive(self, seeds: list[tuple[Any, Any]], targets: Any = None, needed: Any = None) -> None:
        """The whole pass from the seeds, (place, gradient) each, which it empties."""
        enabled, outer, autocast = state.enabled, state.walk, state.autocast
        state.enabled, state.walk, state.autocast = self.recorded, self, None
        try:
            if self.accumulate and hooked_leaves:
                self._count_uses([place for place, _ in seeds], needed)
            while seeds:  # taken out one by one: what the walk adds to, nobody else may hold
                self.contribute(*seeds.pop(0))
            self.run(targets, needed)
            if self.accumulate:
                self.finish_leaves()
            else:
                for place, gradient in self.gradients.items():
                    if isinstance(place, Tensor) and place._hooks:
                        self.gradients[place] = self._run_leaf_hooks(place, gradient)
        except BaseException:
            self.undo()
            raise
        finally:
            state.enabled, state.walk, state.autocast = enabled, outer, autocast
            for end in self.at_end:
                end()

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
        direct, watched, uses = self.direct, self.anomaly, self.uses
        self.needed, self.targets = needed, targets or {}
        keep: dict[Any, Any] = {}
        while heap:
            node = heappop(heap)[1]
            gradient = gradients.pop(node)
            hooks = node.hooks
            if hooks is not None:
                gradient = self._run_output_hooks(hooks, gradient, node)
            if targets is not None and node in targets:
                keep[node] = gradient
                if node not in needed:  # type: ignore[operator]
                    continue
            if type(node) is OutputNode:
                self._gather(node, gradient)
                continue
            rule = node.op.backward_recorded if recorded else node.op.backward
            if watched or (hooks is not None and hooks.watching):
                rule = self._watched(rule)
            backend = node.device.backend
            try:
                if backend.current:
                    results = rule(node, gradient, self)
                else:
                    results = backend.inside(rule, node, gradient, self)
            except (MemoryError, RuntimeError) as error:
                backend.explain(error)
                raise
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
            if uses:
                results = []  # what a leaf takes over, nobody else may hold
                result = None
                self._finish_used_up(node.parents)
        if not self.accumulate:  # else retain_grad() has kept them
            gradients.update(keep)

    def passes(self, node: Node) -> bool:
        """Whether nobody looks at the gradient of this node's output: an op may hand on what comes after it."""
        unseen = node.hooks is None and not self.anomaly and node not in self.targets
        return unseen and not self.recorded and (self.needed is None or node in self.needed)

    def pass_by(self, node: Node, gradient: Any, total: Any) -> None:
        """Hand `gradient`, which is already that of this node's parent, to the parent; total: the sum of its rows."""
        parent: Any = node.parents[0]
        if total is not None and parent not in self.gradients:
            self.sums[parent] = gradient, total
        self.contribute(parent, gradient)
        self.passed[parent] = node

    def sum_of(self, node: Node, gradient: Any) -> Any:
        """The sum of the rows of a gradient that pass_by handed to the node; None where it is not known."""
        handed, total = self.sums.pop(node, (None, None))
        return total if handed is gradient else None

    def free_passed(self, parent: Node) -> None:
        """When `parent` is walked, all that led to the node before it has been: free what that saved."""
        node = self.passed.pop(parent, None)
        if node is not None and not self.retain:
            node.free()

    def room(self, leaf: Any) -> Any:
        """The empty buffer of a leaf to compute its gradient in, before it is known whether that is all of it."""
        if not isinstance(leaf, Tensor) or leaf in self.rooms or not self._has_empty_buffer(leaf):
            return None
        buffer = self.rooms[leaf] = leaf._grad_buffer._data  # type: ignore[union-attr]
        return buffer

    def in_room(self, leaf: Any, total: Any) -> bool:
        """Whether `total` lies in the buffer of the leaf, where nobody has written since; takes it as the gradient."""
        return total is self.rooms.get(leaf) and self._has_empty_buffer(leaf) and self.into(leaf) is not None

    def _gather(self, node: OutputNode, gradient: Any) -> None:
        """Put the gradient of one output in its place among those of its operation."""
        parent: Any = node.parents[0]
        slots = self.gradients.get(parent)
        if slots is None:
            slots = self.gradients[parent] = [None] * len(parent.info[2])
            heappush(self.heap, (-parent.number, parent))
        slots[node.index] = gradient

    def into(self, leaf: Tensor) -> tuple[Any, float] | None:
        """(buffer, beta) where an op may write a leaf's gradient as beta · buffer + gradient, else None."""
        if leaf in self.direct:
            return self.direct[leaf], 1.0
        if not self._has_empty_buffer(leaf):
            return None
        empty: Any = leaf._grad_buffer
        self.direct[leaf] = empty._data
        leaf._grad = empty
        leaf._grad_buffer = None
        empty._cell[0] += 1
        return empty._data, 0.0

    def _has_empty_buffer(self, leaf: Tensor) -> bool:
        if not self.accumulate or self.recorded or self.anomaly or leaf._hooks or leaf in self.gradients:
            return False
        empty = leaf._grad_buffer
        return empty is not None and leaf._grad is None and leaf not in self.direct and _fits(empty, leaf)

    def _tensor(self, gradient: Any, at: Any) -> Any:
        """A gradient as hooks see it."""
        if self.recorded or gradient is None:
            return gradient
        return wrap(gradient, at.device if isinstance(at, Node) else at._device)

    def _bare(self, gradient: Any) -> Any:
        """What a hook leaves, as the walk carries it."""
        return gradient if self.recorded or gradient is None else gradient._data

    def _run_leaf_hooks(self, leaf: Tensor, gradient: Any) -> Any:
        return self._bare(run_output_hooks([*leaf._hooks.values()], self._tensor(gradient, leaf)))

    def _run_output_hooks(self, hooks: NodeHooks, gradient: Any, node: Node) -> Any:
        """The hooks of an output tensor, then what retain_grad() keeps."""
        if hooks.output:
            gradient = self._bare(run_output_hooks([*hooks.output.values()], self._tensor(gradient, node)))
        tensor = None if hooks.retained is None else hooks.retained()
        if tensor is not None and tensor._node is node:
            value = self._tensor(gradient, node)
            tensor._grad = value if tensor._grad is None else tensor._grad + value
        return gradient

    def _watched(self, rule: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """A rule with the node's hooks, and anomaly detection, around it."""

        def run(node: Node, gradient: Any, walk: Walk) -> list[Any]:
            before = [] if node.hooks is None else [*node.hooks.before.values()]
            after = [] if node.hooks is None else [*node.hooks.after.values()]
            several = isinstance(gradient, list)
            outputs = tuple([self._tensor(g, node) for g in (gradient if several else [gradient])])
            if before:
                outputs = run_tuple_hooks(before, outputs)
                bare = [self._bare(g) for g in outputs]
                gradient = bare if several else bare[0]
                if gradient is None or (several and not any(g is not None for g in bare)):
                    return [None] * len(node.parents)
            if self.anomaly:
                results = anomaly.checked(rule, node, gradient, self)
            else:
                results = rule(node, gradient, _Unbuffered(self) if after else self)
            if after:
                places = [p if p is not None else node for p in node.parents]
                inputs = tuple([self._tensor(r, p) for r, p in zip(results, places, strict=True)])
                results = [self._bare(r) for r in run_tuple_hooks(after, inputs, outputs)]
            return results

        return run

    def _count_uses(self, roots: list[Any], needed: set[Any] | None) -> None:
        """Count the operations on the way that used each leaf with post-accumulate hooks."""
        nodes = [n for n in roots if isinstance(n, Node)]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            if needed is not None and node not in needed:
                continue
            for parent in node.parents:
                if isinstance(parent, Tensor):
                    if parent._post_hooks:
                        self.uses[parent] = self.uses.get(parent, 0) + 1
                elif parent is not None and parent not in seen:
                    seen.add(parent)
                    nodes.append(parent)

    def _finish_used_up(self, parents: tuple) -> None:
        """Hand those leaves their gradients whose last use was just walked, and call their hooks."""
        for parent in parents:
            left = self.uses.get(parent)
            if left is None:
                continue
            self.uses[parent] = left - 1
            if left == 1:
                if parent in self.gradients:
                    last = {parent: self.gradients.pop(parent)}
                    sole = not self.recorded and _sole(last)[parent]
                    _hand(*self._finished(parent, last[parent], sole))
                elif self.direct.pop(parent, None) is None:
                    continue
                for hook in list(parent._post_hooks.values()):
                    hook(parent)

    def finish_leaves(self) -> None:
        """Hand each leaf its gradient: to all of them, or after an error to none."""
        if self.gradients:
            sole = {} if self.recorded else _sole(self.gradients)
            finished = [self._finished(leaf, g, sole.get(leaf, False)) for leaf, g in self.gradients.items()]
            for leaf, made, added in finished:
                _hand(leaf, made, added)
        leaves = [*self.direct, *self.gradients]
        self.direct.clear()
        self.gradients.clear()
        for leaf in leaves:
            if leaf._post_hooks:
                for hook in list(leaf._post_hooks.values()):
                    hook(leaf)

    def undo(self) -> None:
        """After an error: the leaves whose gradient was being written have none, only the buffer for the next one."""
        for leaf in self.direct:
            leaf._grad, leaf._grad_buffer = None, leaf._grad
        self.direct.clear()

    def _finished(self, leaf: Tensor, gradient: Any, sole: bool) -> tuple[Any, Tensor | None, Any]:
        """(leaf, its new .grad, None) or, where the buffer of the one it has serves, (leaf, None, what is added)."""
        if leaf._hooks:
            gradient = self._run_leaf_hooks(leaf, gradient)
            sole = False
        before = leaf._grad
        backend = leaf._device.backend
        if self.recorded:
            return leaf, gradient if before is None else before + gradient, None
        if before is None:
            return leaf, wrap(gradient if sole else backend.copy(gradient), leaf._device), None
        if before._requires_grad:
            return leaf, wrap(backend.add(before._data, gradient), leaf._device), None
        return leaf, None, gradient


def _hand(leaf: Tensor, made: Tensor | None, added: Any) -> None:
    """Give a leaf what Walk._finished made for it."""
    if made is not None:
        leaf._grad, leaf._grad_buffer = made, None
        return
    grad: Any = leaf._grad
    leaf._device.backend.add_into(grad._data, added)
    grad._cell[0] += 1


class _Unbuffered:
    """Stands for the walk where gradients must be seen before they reach a leaf."""

    def __init__(self, walk: Walk) -> None:
        self.free_passed = walk.free_passed

    def into(self, leaf: Tensor) -> None:
        return None

    def passes(self, node: Node) -> bool:
        return False

    def room(self, leaf: Any) -> None:
        return None

    def sum_of(self, node: Node, gradient: Any) -> None:
        return None


def _holders(gradients: dict[Any, Any]) -> dict[Any, int]:
    return {place: sys.getrefcount(gradient) for place, gradient in gradients.items()}


# The count of an object that only the dictionary holds: measured, since interpreters count temporaries differently.
_SOLE = _holders({None: object()})[None]


def _sole(gradients: dict[Any, Any]) -> dict[Any, bool]:
    """Which gradients nobody else holds: they may be kept and written later without a copy."""
    return {
        place: count == _SOLE and alone(gradients[place]) and gradients[place].flags.c_contiguous
        for place, count in _holders(gradients).items()
    }


def _fits(buffer: Tensor, leaf: Tensor) -> bool:
    """Whether a gradient buffer left by zero_grad still suits its leaf, which may have moved or changed dtype."""
    a, b = buffer._data, leaf._data
    return a.dtype == b.dtype and a.shape == b.shape and buffer._device is leaf._device


def _backend(at: Any) -> Any:
    return (at._device if isinstance(at, Tensor) else at.device).backend


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
        if data.size != 1:
            raise AutogradError(
                f"backward() needs the gradient of a tensor with {data.size} elements (shape {tuple(data.shape)}); a "
                "gradient of 1 is assumed for scalars only. Reduce it first, e.g. loss.sum().backward(), or pass "
                "gradient=."
            )
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
    if is_grads_batched:
        raise NotImplementedError("grad(is_grads_batched=True) is not there yet; loop over the gradients.")
    if materialize_grads and allow_unused is False:
        raise ValueError("grad() got materialize_grads=True, which gives zeros for unused inputs, and "
                         "allow_unused=False, which refuses them; leave allow_unused out.")  # fmt: skip
    roots, targets = _as_list(outputs), _as_list(inputs)
    weights = [None] * len(roots) if grad_outputs is None else _as_list(grad_outputs)
    if len(weights) != len(roots):
        raise AutogradError(f"grad() got {len(roots)} outputs and {len(weights)} grad_outputs; give one for each.")
    if not targets:
        raise AutogradError("grad() got no inputs to differentiate for; name at least one.")
    if Interpreters.active:
        result = Interpreters.grad(roots, targets, weights, create_graph)
        if result is not NotImplemented:
            return result
    _check_targets("grad", targets)
    places: dict[Any, None] = dict.fromkeys(_place(t) for t in targets)
    walk = Walk(create_graph, create_graph if retain_graph is None else retain_graph, False)
    seeds = [(_place(root), _seed(root, weight, create_graph)) for root, weight in zip(roots, weights, strict=True)]
    needed = _leading_to([place for place, _ in seeds], places)
    walk.drive([seed for seed in seeds if seed[0] in needed or seed[0] in places], places, needed)
    results: list[Tensor | None] = []
    sole = {} if create_graph else _sole(walk.gradients)
    handed: set[Any] = set()  # a target may be asked for twice
    for i, target in enumerate(targets):
        place = _place(target)
        gradient = walk.gradients.get(place)
        if gradient is None:
            if materialize_grads and isinstance(target, Tensor):
                results.append(wrap(_backend(target).full(target._data.shape, 0, target._data.dtype), target._device))
                continue
            if not allow_unused:
                raise AutogradError(
                    f"The outputs do not depend on input {i}, so it has no gradient; leave it out, or pass "
                    "allow_unused=True (None) or materialize_grads=True (zeros)."
                )
            results.append(None)
            continue
        if not create_graph:
            shared = not sole[place] or place in handed
            handed.add(place)
            device = place._device if isinstance(place, Tensor) else place.device
            gradient = wrap(device.backend.copy(gradient) if shared else gradient, device)
        results.append(gradient)
    return tuple(results)


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
