"""gpuad.graph.trace: run a function for real and write down every operation that it calls.

Every operation asks Interpreters first while one is active; the tracer is one. So nothing is in the way of programs
that are not traced.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

from gpuad.autograd.levels import Dual, Level, counted, level_of, make_dual, unpack
from gpuad.autograd.modes import enable_grad, no_grad
from gpuad.autograd.op import Interpreters, Op
from gpuad.autograd.views import owner
from gpuad.errors import AutogradError, ShapeError
from gpuad.graph.building import Builder, seen
from gpuad.graph.data import Graph, GraphNode
from gpuad.graph.source import Names, frames, parameter_names, place_of
from gpuad.tensor import Tensor

_tracing = threading.Lock()
_REPLACED = ("apply", "dual", "write", "function")


class _Tracer:
    """What stands in for forward mode's rules while a function is traced: lets them run, and notes what ran."""

    def __init__(self, builder: Builder, stop: FrameType) -> None:
        self.builder, self.stop = builder, stop
        self.tangents: dict[GraphNode, Tensor] = {}
        self._inside = False  # an operation that runs because of another one is part of it
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        _tracing.acquire()
        self._rules = {name: getattr(Interpreters, name) for name in _REPLACED}
        for name in _REPLACED:
            setattr(Interpreters, name, getattr(self, name))
        counted(1)

    def __exit__(self, *exc: object) -> None:
        counted(-1)
        for name, rule in self._rules.items():
            setattr(Interpreters, name, staticmethod(rule))
        _tracing.release()

    def apply(self, op: Op, inputs: Sequence[Any], params: dict) -> Any:
        """The operation as it would have run, noted."""
        return self._noted(self._rules["apply"], op, inputs, params)

    def dual(self, op: Op, inputs: Sequence[Any], params: dict) -> Any:
        """The same for an operation in place, which asks here at once."""
        return self._noted(self._rules["dual"], op, inputs, params)

    def _noted(self, apply: Callable, op: Op, inputs: Sequence[Any], params: dict) -> Any:
        if self._inside or threading.get_ident() != self._thread:
            return apply(op, inputs, params)
        self._inside = True
        try:
            stack = list(frames(sys._getframe(1), self.stop))
            self.builder.names.module_of(stack)  # first, so that its parameters have their names
            operands = [self.node_of(x, stack) if isinstance(x, Tensor) else x for x in inputs]
            tangents = self._tangents_of(op, inputs, operands, params)
            result = apply(op, inputs, params)
            if result is NotImplemented:
                result = op(*inputs, **params)
        finally:
            self._inside = False
        self._last = op, inputs, params, operands, tangents, len(self.builder.nodes)
        self._note(op, result, params, operands, tangents, stack)
        return result

    def node_of(self, tensor: Tensor, stack: Sequence[FrameType]) -> GraphNode:
        """The node of a tensor; what ran unseen, such as the change of what a view is of, is found on the tape."""
        known = len(self.builder.nodes)
        node = self.builder.node_of(tensor, stack)
        for unseen in self.builder.nodes[known:]:
            if any(o in self.tangents for o in self.builder.operands[unseen]):
                raise AutogradError(
                    f"graph.trace(tangents=…) cannot carry tangents through {unseen.op} here (a view changed in place, "
                    "or a gradient taken inside). Trace it without tangents."
                )
        return node

    def function(self, cls: Any, args: tuple) -> Any:
        """A custom Function as it would have run, with the tangents of its outputs noted."""
        function = self._rules["function"]
        moving = [self.tangents.get(self.node_of(a, ())) if isinstance(a, Tensor) else None for a in args]
        if self._inside or threading.get_ident() != self._thread or all(t is None for t in moving):
            return function(cls, args)
        self._inside = True
        try:
            result = function(cls, args)
            result = cls.apply(*args) if result is NotImplemented else result
            with no_grad(), Level() as level:
                duals = [a if t is None else make_dual(a.detach(), t, level) for a, t in zip(args, moving, strict=True)]
                moved = cls.apply(*duals)
        finally:
            self._inside = False
        several = isinstance(result, tuple)
        for out, dual in zip(result if several else (result,), moved if several else (moved,), strict=True):
            tangent = unpack(dual, level)[1]
            if tangent is not None:
                node = self.builder.node_of(out, ())
                node.tangent = self.tangents[node] = tangent
        return result

    def write(self, name: str, target: Tensor, result: Tensor) -> Tensor:
        """An operation in place: the one out of place that was just noted is taken back, and the real one runs."""
        write = self._rules["write"]
        if self._inside or threading.get_ident() != self._thread:
            return write(name, target, result)
        if level_of(result):
            self.builder.rename(target, self.builder.node_of(result, ()))
            return write(name, target, result)
        op, inputs, params, operands, tangents, before = self._last
        del self.builder.nodes[before:]
        self._inside = True
        try:
            if "key" in params:
                target[params["key"]] = inputs[1]
            else:
                op.in_place(*inputs)  # type: ignore[attr-defined]
        finally:
            self._inside = False
        self._note(op, target, params, operands, tangents, list(frames(sys._getframe(1), self.stop)))
        base, chain = owner(target)
        if chain and base._node is not None:
            self.builder.changed(base, self.builder.node_of(target, ()))
        return target

    def _note(
        self, op: Op, result: Any, params: dict, operands: list, tangents: Iterable[Any], stack: list[FrameType]
    ) -> None:
        place, call = place_of(stack)
        module = self.builder.names.module_of(stack)
        several = isinstance(result, tuple)
        for i, (out, tangent) in enumerate(zip(result if several else (result,), tangents, strict=False)):
            node = self.builder.add(seen(op, out, i if several else None, place, module), operands, out)
            self.builder.params[node], self.builder.calls[node] = params, call
            if tangent is not None:
                node.tangent = self.tangents[node] = tangent

    def _tangents_of(self, op: Op, inputs: Sequence[Any], operands: Sequence[Any], params: dict) -> Iterable[Any]:
        """The tangents of the outputs by the op's forward-mode rule."""
        moving = [self.tangents.get(o) if isinstance(o, GraphNode) else None for o in operands]
        if all(t is None for t in moving):
            return itertools.repeat(None)
        if any(isinstance(x, Dual) for x in inputs):
            raise AutogradError(
                f"graph.trace(tangents=…) met a dual number in {op.name}: the function uses forward mode itself. Trace "
                "it without tangents."
            )
        with no_grad():
            primals = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
            tangent = op.tangent(primals, moving, params)[1]
        return tangent if isinstance(tangent, (list, tuple)) else [tangent]


def trace(f: Callable, *inputs: Any, tangents: Sequence[Any] | None = None, cotangents: Any = None) -> Graph:
    """Run f(*inputs) and return its computational graph, with every value, and every gradient of a walk back.

    inputs: Tensors, or anything else that f takes; floating Tensors become new variables, so nothing is accumulated in
    their .grad. f: a function of them, or a module; returns a Tensor or a tuple or list of them. tangents: one for each
    input, None where it does not move; then each node has its tangent too (forward mode). cotangents: the gradient of
    the result with which the walk back begins (a tuple for several results); ones unless given.

    Each node knows the line that called it, the module at work, and its formula; see GraphNode. A copy of every value
    is kept, so trace with small inputs.

    Raises TypeError where f does not return Tensors, ShapeError where there is not one tangent for each input.
    """
    names = Names(f)
    builder = Builder(names)
    tracer = _Tracer(builder, sys._getframe())
    if tangents is not None and len(tangents) != len(inputs):
        raise ShapeError(f"graph.trace takes one tangent for each input, got {len(inputs)} inputs, {len(tangents)}.")
    given = []
    for i, (x, name) in enumerate(zip(inputs, parameter_names(f, len(inputs)), strict=True)):
        if not isinstance(x, Tensor):
            given.append(x)
            continue
        made = x.detach()
        if made.is_floating_point():
            made.requires_grad_()
        given.append(made)
        names.add_tensor(made, name, "input")
        node = builder.leaf(made)
        tangent = None if tangents is None else tangents[i]
        if tangent is not None:
            if tuple(tangent.shape) != tuple(x.shape):
                raise ShapeError(
                    f"The tangent of {name} has the shape of its primal, {tuple(x.shape)}; got {tuple(tangent.shape)}."
                )
            node.tangent = tracer.tangents[node] = tangent.detach()
    with tracer, enable_grad():
        result = f(*given)
    roots = list(result) if isinstance(result, (tuple, list)) else [result]
    if not roots or not all(isinstance(root, Tensor) for root in roots):
        raise TypeError(f"graph.trace needs a function that returns Tensors, got {type(result).__name__}.")
    title = getattr(f, "__name__", type(f).__name__)
    named = title.isidentifier() and hasattr(f, "__name__")
    for root in roots:
        tracer.node_of(root, ())
    graph = builder.finish(title if title.isidentifier() else "f", roots, title if named else "f")
    if any(root._requires_grad for root in roots):
        weights = () if cotangents is None else cotangents if isinstance(cotangents, (tuple, list)) else (cotangents,)
        graph.backward(*weights)
    return graph
