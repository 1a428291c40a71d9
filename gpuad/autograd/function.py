"""Function: an operation with a gradient of the user's own, in PyTorch's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuad.array.dtypes import FLOATING
from gpuad.autograd.modes import no_grad, state
from gpuad.autograd.node import Node, OutputNode
from gpuad.autograd.op import Interpreters
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor, wrap


class Context:
    """What forward leaves for backward: save_for_backward(…), and any attributes."""

    needs_input_grad: tuple[bool, ...] = ()
    _to_save: tuple[Any, ...] = ()
    _saved: tuple[Any, ...] = ()
    _non_differentiable: tuple[Tensor, ...] = ()
    _materialize = True
    _to_save_forward: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for backward, where they are in `saved_tensors`; in-place changes in between are noticed."""
        self._to_save = tensors

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for jvp, where they are in `saved_tensors`; what save_for_backward kept unless called."""
        self._to_save_forward = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Whether backward gets zeros for outputs that have no gradient (it does unless told), or None."""
        self._materialize = bool(value)

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Outputs that take no part in differentiation."""
        self._non_differentiable = tensors

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What save_for_backward kept."""
        return self._saved


class Function:
    """An operation whose forward and backward are static methods; call it by `Name.apply(…)`.

        class Cube(gpuad.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x ** 3

            @staticmethod
            def backward(ctx, g):
                (x,) = ctx.saved_tensors
                return 3 * x ** 2 * g

    forward runs unrecorded. backward gets a gradient for each output (zeros where there was none) and returns one for
    each argument of forward, None where there is none; written in gpuad's operations it can be differentiated again.

    As in PyTorch, forward may leave ctx out and a static method setup_context(ctx, inputs, output) save instead.
    Forward mode goes by a static method jvp(ctx, *tangents), one for each argument (None for what is no Tensor), which
    returns the tangent(s) of the output(s); without one it is derived from backward. vmap goes by a static method
    vmap(info, in_dims, *args), which returns (outputs, out_dims); by the others run for all examples at once where
    `generate_vmap_rule = True`; else by a loop, with a warning. (info: batch_size and randomness.)
    """

    name: str
    generate_vmap_rule = False

    @staticmethod
    def forward(*args: Any) -> Any:
        """Compute the output(s) from the arguments."""
        raise NotImplementedError("A Function needs a static method forward(ctx, *args).")

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple, output: Any) -> None:
        """Save what backward and jvp need; where this is defined, forward takes no ctx."""
        raise NotImplementedError

    @staticmethod
    def jvp(ctx: Context, *tangents: Any) -> Any:
        """Compute the tangent(s) of the output(s) from those of the arguments."""
        raise NotImplementedError

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        """Compute (outputs, out_dims) for many examples, which lie along in_dims of the arguments."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Context, *gradients: Any) -> Any:
        """Compute the gradients of forward's arguments from those of its outputs."""
        raise NotImplementedError("A Function needs a static method backward(ctx, *gradients).")

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run forward, and record it where an argument requires grad."""
        if Interpreters.active:
            result = Interpreters.function(cls, args)
            if result is not NotImplemented:
                return result
        return cls._apply(args)[0]

    @classmethod
    def _apply(cls, args: tuple) -> tuple[Any, Context]:
        """The output(s), recorded, and the context."""
        ctx = Context()
        wanted = [isinstance(a, Tensor) and a._requires_grad for a in args]
        ctx.needs_input_grad = tuple(wanted)
        with no_grad():
            result = cls._forward(ctx, args)
        several = isinstance(result, tuple)
        outs = [_fresh(r, args) for r in (result if several else (result,))]
        if state.enabled and any(wanted):
            cls._record(ctx, args, wanted, outs, result if several else (result,))
        given = {id(r): o for r, o in zip(result if several else (result,), outs, strict=True)}
        ctx._to_save_forward = tuple(given.get(id(t), t) for t in ctx._to_save_forward)
        return (tuple(outs) if several else outs[0]), ctx

    @classmethod
    def _forward(cls, ctx: Context, args: tuple) -> Any:
        """What forward returns, with what it saves in the context."""
        if cls.setup_context is Function.setup_context:
            result = cls.forward(ctx, *args)
        else:
            result = cls.forward(*args)
            cls.setup_context(ctx, args, result)
        if not ctx._to_save_forward:
            ctx._to_save_forward = ctx._to_save if Interpreters.active else ()
        return result

    @classmethod
    def _record(cls, ctx: Context, args: Any, wanted: list[bool], outs: list[Any], raw: tuple) -> None:
        parents = tuple(
            None if not want else (a if a._node is None else a._node) for a, want in zip(args, wanted, strict=True)
        )
        device = next(o for o in outs if isinstance(o, Tensor))._device
        # Each saved tensor by its origin: an argument, an output, or made inside forward.
        origins = [_origin(t, args, raw) for t in ctx._to_save]
        cells = tuple(outs[i]._cell if kind == "out" else t._cell
                      for t, (kind, i) in zip(ctx._to_save, origins, strict=True) if isinstance(t, Tensor))  # fmt: skip
        shapes = [(o._data.shape, o._data.dtype) if isinstance(o, Tensor) else None for o in outs]
        info = (ctx, origins, shapes)
        saved = tuple(t._data if isinstance(t, Tensor) else t for t in ctx._to_save)
        version = sum(c[0] for c in cells)
        node = Node(_Applied(cls, len(outs)), parents, saved, cells, version, info, device)  # type: ignore[arg-type]
        ctx._to_save = ()
        for i, (out, r) in enumerate(zip(outs, raw, strict=True)):
            if (
                isinstance(out, Tensor)
                and out._data.dtype.char in FLOATING
                and not any(r is m for m in ctx._non_differentiable)
            ):
                out._node = OutputNode(node, i) if len(outs) > 1 else node
                out._requires_grad = True


def _origin(t: Any, args: Any, raw: tuple) -> tuple[str, int]:
    """Whether a saved tensor is an argument ("in"), an output ("out") or was made inside forward (""), and which."""
    for kind, candidates in (("in", args), ("out", raw)):
        for i, candidate in enumerate(candidates):
            if candidate is t:
                return kind, i
    return "", 0


def _fresh(result: Any, args: Any) -> Any:
    """An output as a tensor of its own; an argument returned as it is becomes a view of itself."""
    if not isinstance(result, Tensor):
        return result
    made = wrap(result._data, result._device)
    if any(result is a for a in args):
        made._cell = result._cell
        made._view = (None, result, "function")
    return made


class _Applied:
    """The op of one application: runs the user's backward on Tensors, recorded or not."""

    def __init__(self, function: type[Function], outputs: int) -> None:
        self.function, self.outputs = function, outputs
        self.name = function.__name__

    def _run(self, node: Node, gradients: Any, recorded: bool) -> list[Any]:
        ctx, origins, shapes = node.info
        saved = []
        for value, (kind, i) in zip(node.check(), origins, strict=True):
            if recorded and kind == "in":
                saved.append(node.saved_tensor(value, node.parents[i]))
            elif recorded and kind == "out":
                t = wrap(value, node.device)
                t._node, t._requires_grad = (OutputNode(node, i) if self.outputs > 1 else node), True
                saved.append(t)
            else:
                saved.append(wrap(value, node.device) if isinstance(value, node.device.backend.array_type) else value)
        ctx._saved = tuple(saved)
        try:
            result = self.function.backward(ctx, *gradients)
        finally:
            ctx._saved = ()
        results = list(result) if isinstance(result, tuple) else [result]
        if len(results) > len(node.parents) and all(r is None for r in results[len(node.parents) :]):
            results = results[: len(node.parents)]
        if len(results) != len(node.parents):
            raise AutogradError(
                f"{self.name}.backward returned {len(results)} gradients, but forward took {len(node.parents)} "
                "arguments; return one for each, None where there is none."
            )
        return [None if p is None else r for p, r in zip(node.parents, results, strict=True)]

    def _gradients(self, node: Node, gradient: Any, wrapped: Callable) -> list[Any]:
        if self.outputs == 1:
            return [wrapped(gradient)]
        backend = node.device.backend
        filled: list[Any] = []
        for g, shape in zip(gradient, node.info[2], strict=True):
            if g is None and shape is not None and node.info[0]._materialize:
                filled.append(wrap(backend.full(shape[0], 0, shape[1]), node.device))
            else:
                filled.append(None if g is None else wrapped(g))
        return filled

    def backward(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        """On bare arrays: wrapped for the user's rule, unwrapped after."""
        gradients = self._gradients(node, gradient, lambda g: wrap(g, node.device))
        return [None if r is None else r._data for r in self._run(node, gradients, False)]

    def backward_recorded(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        """On Tensors, recorded."""
        return self._run(node, self._gradients(node, gradient, lambda g: g), True)
