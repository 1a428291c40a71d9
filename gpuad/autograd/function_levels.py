"""A user's Function on tensors with levels: its jvp and vmap, and what stands in where it has none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpuad.autograd.function import Context, Function
from gpuad.autograd.gradients import grad
from gpuad.autograd.levels import (
    Batched,
    Level,
    expose,
    level_of,
    make_batched,
    make_dual,
    open_batches,
    suspended,
    unpack,
)
from gpuad.autograd.modes import enable_grad, no_grad
from gpuad.autograd.op import Interpreters, functions
from gpuad.autograd.variables import moves, variable
from gpuad.errors import AutogradError
from gpuad.tensor import Tensor


class VmapInfo(NamedTuple):
    """What a Function's vmap is told besides the arguments."""

    batch_size: int
    randomness: str


def apply(cls: type[Function], args: tuple) -> Any:
    """The Function on arguments some of which have levels: the highest level is taken apart."""
    level = max(map(level_of, args), default=0)
    if level == 0:
        return NotImplemented
    outer = next(a for a in args if level_of(a) == level)
    if isinstance(outer, Batched):
        randomness = dict(open_batches())[level].randomness
        with suspended(level):
            return _batched(cls, args, level, VmapInfo(outer.value._data.shape[0], randomness))
    pairs = [unpack(a, level) for a in args]
    primals, tangents = tuple(p for p, _ in pairs), [t for _, t in pairs]
    if cls.jvp is Function.jvp:
        return _derived(cls, primals, tangents, level)
    result, ctx = _with_context(cls, primals) if any(map(level_of, primals)) else cls._apply(primals)
    filled = [
        p.new_zeros(p._data.shape) if t is None and isinstance(p, Tensor) and p.is_floating_point() else t
        for p, t in zip(primals, tangents, strict=True)
    ]
    ctx._saved = ctx._to_save_forward
    moved = cls.jvp(ctx, *filled)
    return _duals(result, moved if isinstance(moved, tuple) else (moved,), level)


def _with_context(cls: type[Function], args: tuple) -> tuple[Any, Context]:
    """The result on arguments with levels, and a context with what forward saved of these arguments."""
    result = apply(cls, args)
    ctx = Context()
    ctx.needs_input_grad = tuple(isinstance(a, Tensor) and a._requires_grad for a in args)
    with no_grad():
        raw = cls._forward(ctx, args)
    pairs = zip(raw, result, strict=True) if isinstance(result, tuple) else [(raw, result)]
    given = {id(r): o for r, o in pairs}  # a saved output is the one that was returned, with its place on the tape
    ctx._to_save_forward = tuple(given.get(id(t), t) for t in ctx._to_save_forward)
    return result, ctx


def _duals(result: Any, moved: Sequence[Any], level: int) -> Any:
    several = isinstance(result, tuple)
    outs = result if several else (result,)
    if len(moved) != len(outs):
        raise AutogradError(f"A Function's jvp returned {len(moved)} tangents for {len(outs)} outputs.")
    made = tuple(o if t is None else make_dual(o, t, level) for o, t in zip(outs, moved, strict=True))
    return made if several else made[0]


def _derived(cls: type[Function], primals: tuple, tangents: list[Any], level: int) -> Any:
    """J v without a jvp: u ↦ Jᵀ u is linear, so it is the derivative of that for u, transposed."""
    with enable_grad():
        inputs = [p if t is None else variable(p) for p, t in zip(primals, tangents, strict=True)]
        result = cls.apply(*inputs)
        outs = result if isinstance(result, tuple) else (result,)
        moving = [x for x, t in zip(inputs, tangents, strict=True) if t is not None]
        given = [t for t in tangents if t is not None]
        live = [o for o in outs if isinstance(o, Tensor) and moves(o)]
        found: dict[int, Any] = {}
        if live:
            cotangents = [variable(o.new_zeros(o._data.shape)) for o in live]
            pulled = grad(live, moving, cotangents, True, True, True)
            pairs = [(g, v) for g, v in zip(pulled, given, strict=True) if g is not None and moves(g)]
            if pairs:
                made = grad([g for g, _ in pairs], cotangents, [v for _, v in pairs], True, True, True)
                found = {id(o): t for o, t in zip(live, made, strict=True)}
    return _duals(result, [found.get(id(o)) for o in outs], level)


# vmap -----------------------------------------------------------------------------------------------------------------


def _batched(cls: type[Function], args: tuple, level: int, info: VmapInfo) -> Any:
    has = [isinstance(a, Batched) and a.level == level for a in args]
    physical = [a.value if h else a for a, h in zip(args, has, strict=True)]
    if cls.vmap is not Function.vmap:
        returned = cls.vmap(info, tuple(0 if h else None for h in has), *physical)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise AutogradError(f"{cls.__name__}.vmap must return a pair (outputs, out_dims).")
        result, dims = returned
        several = isinstance(result, tuple)
        outs = result if several else (result,)
        places = dims if isinstance(dims, tuple) else (dims,) * len(outs)
        made = tuple(
            o if d is None else make_batched(o.movedim(d, 0), level) for o, d in zip(outs, places, strict=True)
        )
        return made if several else made[0]
    if cls.generate_vmap_rule:
        result = _of_all(cls, has, info.batch_size).apply(*physical)
    else:
        result = _loop(cls, physical, has, info.batch_size)
    return tuple(make_batched(r, level) for r in result) if isinstance(result, tuple) else make_batched(result, level)


_warned: set[str] = set()


def _loop(cls: type[Function], physical: list[Any], has: list[bool], size: int) -> Any:
    if cls.__qualname__ not in _warned:
        _warned.add(cls.__qualname__)
        warnings.warn(
            f"vmap loops over the {size} examples in {cls.__name__}, which is slow: give it a static method vmap, or "
            "generate_vmap_rule = True where its methods are made of gpuad's operations.",
            stacklevel=2,
        )
    results = [cls.apply(*[p[i] if h else p for p, h in zip(physical, has, strict=True)]) for i in range(size)]
    if isinstance(results[0], tuple):
        return tuple(functions["stack"](each) for each in zip(*results, strict=True))
    return functions["stack"](results)


def _of_all(cls: type[Function], has: list[bool], size: int) -> type[Function]:
    """The Function of all examples: the methods of `cls`, run inside vmap."""

    def hidden(xs: Sequence[Any], which: Sequence[bool], level: int) -> list[Any]:
        return [make_batched(x, level) if h and x is not None else x for x, h in zip(xs, which, strict=True)]

    def exposed(xs: Sequence[Any], level: int) -> list[Any]:
        return [expose(x, level, size) if isinstance(x, Tensor) else x for x in xs]

    def with_saved(ctx: Any, saved: Sequence[Any], level: int) -> Any:
        ctx.inner._saved = tuple(hidden(saved, ctx.saved_batched, level))
        return ctx.inner

    class Batch(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.inner = Context()
            ctx.inner.needs_input_grad = ctx.needs_input_grad
            with Level(size) as level:
                result = cls._forward(ctx.inner, tuple(hidden(args, has, level)))
                several = isinstance(result, tuple)
                outs = exposed(result if several else (result,), level)
                saved, forward = ctx.inner._to_save, ctx.inner._to_save_forward
                ctx.saved_batched = [isinstance(t, Batched) and t.level == level for t in saved]
                ctx.forward_batched = [isinstance(t, Batched) and t.level == level for t in forward]
                ctx.save_for_backward(*[t.value if h else t for t, h in zip(saved, ctx.saved_batched, strict=True)])
                ctx.save_for_forward(*[t.value if h else t for t, h in zip(forward, ctx.forward_batched, strict=True)])
            ctx.mark_non_differentiable(
                *[o for o, r in zip(outs, result if several else (result,), strict=True)
                  if any(r is m for m in ctx.inner._non_differentiable)]
            )  # fmt: skip
            return tuple(outs) if several else outs[0]

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            with Level(size) as level:
                inner = with_saved(ctx, ctx.saved_tensors, level)
                result = cls.backward(inner, *hidden(gradients, [True] * len(gradients), level))
                found = exposed(result if isinstance(result, tuple) else (result,), level)
            return tuple(g if g is None or h else g.sum(0) for g, h in zip(found, has, strict=False))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            with Level(size) as level:
                ctx.inner._saved = tuple(hidden(ctx.saved_tensors, ctx.forward_batched, level))
                result = cls.jvp(ctx.inner, *hidden(tangents, has, level))
                several = isinstance(result, tuple)
                found = exposed(result if several else (result,), level)
            return tuple(found) if several else found[0]

    Batch.__name__ = Batch.__qualname__ = cls.__name__
    if cls.jvp is Function.jvp:
        del Batch.jvp
    return Batch


Interpreters.function = staticmethod(apply)
