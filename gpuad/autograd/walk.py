"""The reverse walk: gradients by falling node number.

Source: reverse accumulation, Griewank & Walther, "Evaluating Derivatives", 2nd ed., section 3.2. Node numbers grow
with time, so taking the highest pending number first visits every node after all of its users: no recursion, and each
node once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from gpuad.array.host_memory import alone
from gpuad.autograd import anomaly
from gpuad.autograd.hooks import NodeHooks, hooked_leaves, run_output_hooks, run_tuple_hooks
from gpuad.autograd.modes import state
from gpuad.autograd.node import WRITTEN, Node, OutputNode
from gpuad.tensor import Tensor, wrap


class Walk:
    """One reverse pass over the tape.

    recorded: gradients are Tensors and their computation is recorded (create_graph); else they are bare arrays.
    accumulate: leaves take their gradients into .grad; else `gradients` holds those of `targets`.
    anomaly: gradients are checked, see gpuad/autograd/anomaly.py. at_end: called when the pass is over.
    """

    def __init__(self, recorded: bool, retain: bool, accumulate: bool) -> None:
        self.recorded, self.retain, self.accumulate = recorded, retain, accumulate
        self.grad_mode = recorded  # whether what the rules compute is recorded; gradients may be Tensors without
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
        state.enabled, state.walk, state.autocast = self.grad_mode, self, None
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
            backend_of(to).add_into(before, gradient)
        else:
            gradients[to] = backend_of(to).add(before, gradient)
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
        before = slots[node.index]
        if before is not None:  # an output that was saved stands on the tape a second time, see saved_tensor
            gradient = before + gradient if self.recorded else node.device.backend.add(before, gradient)
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
                    only = not self.recorded and sole(last)[parent]
                    _hand(*self._finished(parent, last[parent], only))
                elif self.direct.pop(parent, None) is None:
                    continue
                for hook in list(parent._post_hooks.values()):
                    hook(parent)

    def finish_leaves(self) -> None:
        """Hand each leaf its gradient: to all of them, or after an error to none."""
        if self.gradients:
            alone_at = {} if self.recorded else sole(self.gradients)
            finished = [self._finished(leaf, g, alone_at.get(leaf, False)) for leaf, g in self.gradients.items()]
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


def sole(gradients: dict[Any, Any]) -> dict[Any, bool]:
    """Which gradients nobody else holds: they may be kept and written later without a copy."""
    return {
        place: count == _SOLE and alone(gradients[place]) and gradients[place].flags.c_contiguous
        for place, count in _holders(gradients).items()
    }


def _fits(buffer: Tensor, leaf: Tensor) -> bool:
    """Whether a gradient buffer left by zero_grad still suits its leaf, which may have moved or changed dtype."""
    a, b = buffer._data, leaf._data
    return a.dtype == b.dtype and a.shape == b.shape and buffer._device is leaf._device


def backend_of(at: Any) -> Any:
    """The backend of a leaf or node."""
    return (at._device if isinstance(at, Tensor) else at.device).backend
