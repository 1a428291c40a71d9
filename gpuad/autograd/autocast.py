"""autocast: mixed precision. An operation's own declaration says in which precision it is computed (Op.autocast)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpuad.array import dtypes
from gpuad.autograd.levels import counted
from gpuad.autograd.modes import F, state
from gpuad.autograd.op import Interpreters, Op
from gpuad.errors import DtypeError
from gpuad.tensor import Tensor

DEVICE_TYPES = ("cpu", "cuda")


class _Region:
    """What autocast does in a thread: the lower dtype by device type, and the casts of weights made so far."""

    __slots__ = ("lower", "cache")

    def __init__(self, lower: dict[str, np.dtype], cache: dict[tuple, tuple] | None) -> None:
        self.lower, self.cache = lower, cache

    def cast(self, x: Any, category: str) -> Any:
        """An operand in the precision of a category; numbers, float64, integers and other devices' as they are."""
        if not isinstance(x, Tensor):
            return x
        lower = self.lower.get(x._device.type)
        dtype = x._data.dtype
        if lower is None or (dtype != dtypes.float32 and dtype != lower):
            return x
        wanted = lower if category == "lower" else dtypes.float32
        if dtype == wanted:
            return x
        if self.cache is None or not (x._requires_grad and x._node is None) or wanted is dtypes.float32:
            return x.to(wanted)
        # One cast a weight and region, made anew where the weight was written to or replaced since.
        key = (id(x), state.enabled, wanted)
        found = self.cache.get(key)
        if found is None or found[0] is not x or found[1] is not x._data or found[2] != x._cell[0]:
            found = self.cache[key] = (x, x._data, x._cell[0], x.to(wanted))
        return found[3]


def apply(op: Op, inputs: Sequence[Any], params: dict) -> Any:
    """The op on operands in the precision it declares, then what forward mode makes of it."""
    region = state.autocast
    if region is not None and op.autocast is not None:
        cast = [region.cast(x, op.autocast) for x in inputs]
        if any([a is not b for a, b in zip(cast, inputs, strict=True)]):
            return op(*cast, **params)
    return Interpreters.dual(op, inputs, params)


Interpreters.apply = staticmethod(apply)


@contextmanager
def resumed(region: Any) -> Iterator[None]:
    """Be, inside, under the autocast that `state.autocast` named elsewhere: for what is computed again later."""
    before, state.autocast = state.autocast, region
    counted(1)
    try:
        yield
    finally:
        counted(-1)
        state.autocast = before


def widened(x: Tensor) -> Tensor:
    """x in float32 where autocast is on; for functions that are made of several operations (norm, var)."""
    region = state.autocast
    return x if region is None else region.cast(x, "float32")


class autocast:  # noqa: N801  (PyTorch's name)
    """Mixed precision: matrix products in `dtype`, losses, softmax, norms and the like in float32; a decorator too.

        with gpuad.autocast("cuda"):
            loss = loss_function(model(x), y)
        scaler.scale(loss).backward()  # outside, with a gpuad.amp.GradScaler

    device_type: "cuda" or "cpu"; only tensors of that kind of device are cast. dtype: float16 unless given, or
    bfloat16, whose range needs no GradScaler. enabled=False switches it off inside. cache_enabled: whether a weight
    used several times in the outermost region is cast once.

    In `dtype`: matmul, mm, bmm, mv, dot, addmm, linear, bilinear, prelu. In float32: exp, expm1, log and its kin, pow,
    reciprocal, rsqrt, softplus, tan, asin, acos, sinh, cosh, erfinv, sum, prod, cumsum, norm, var, std, softmax,
    log_softmax, layer_norm, rms_norm, batch_norm, and every loss. All others take the widest dtype of their operands.
    float64 and integers are left alone, and so are operations in place. The same list holds for both kinds of device.
    A gradient has the dtype of its tensor; backward runs with autocast off.

    Raises DtypeError for another dtype.
    Source: PyTorch documentation, "Automatic Mixed Precision package", Autocast Op Reference; Micikevicius et al.,
    "Mixed Precision Training", arXiv:1710.03740.
    """

    def __init__(
        self, device_type: str = "cuda", dtype: Any = None, enabled: bool = True, cache_enabled: bool | None = None
    ) -> None:
        self.device_type = _device_type(device_type)
        self.dtype = dtypes.float16 if dtype is None else dtypes.as_dtype(dtype)
        if self.dtype.char not in dtypes.HALF:
            raise DtypeError(f"autocast takes dtype=gpuad.float16 or gpuad.bfloat16, got {self.dtype}.")
        self.enabled = bool(enabled)
        self.cache_enabled = True if cache_enabled is None else bool(cache_enabled)
        self._before: list[_Region | None] = []

    def __enter__(self) -> autocast:
        outside = state.autocast
        self._before.append(outside)
        lower = dict(outside.lower) if outside is not None else {}
        lower.pop(self.device_type, None)
        if self.enabled:
            lower[self.device_type] = self.dtype
        cache: Any = None
        if self.cache_enabled:
            cache = {} if outside is None or outside.cache is None else outside.cache
        state.autocast = _Region(lower, cache)
        counted(1)
        return self

    def __exit__(self, *exc: object) -> None:
        counted(-1)
        state.autocast = self._before.pop()

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with autocast(self.device_type, self.dtype, self.enabled, self.cache_enabled):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]


def _device_type(given: str) -> str:
    if given not in DEVICE_TYPES:
        raise ValueError(f"autocast takes a device_type, 'cuda' or 'cpu', got {given!r}; it has no index.")
    return given


def is_autocast_enabled(device_type: str = "cuda") -> bool:
    """Whether this thread is inside autocast for a kind of device."""
    return state.autocast is not None and _device_type(device_type) in state.autocast.lower


def get_autocast_dtype(device_type: str = "cuda") -> np.dtype:
    """The dtype that autocast computes products in for a kind of device."""
    region = state.autocast
    return dtypes.float16 if region is None else region.lower.get(_device_type(device_type), dtypes.float16)


# Custom functions -----------------------------------------------------------------------------------------------------


def custom_fwd(forward: Callable | None = None, *, device_type: str, cast_inputs: Any = None) -> Any:
    """Decorate the forward of an autograd.Function for use under autocast; its backward takes custom_bwd.

    cast_inputs: floating tensors of the device are cast to this dtype and forward runs with autocast off; without it
    forward runs as it is called. Outside autocast it changes nothing.
    """
    if forward is None:
        return functools.partial(custom_fwd, device_type=device_type, cast_inputs=cast_inputs)
    wanted = None if cast_inputs is None else dtypes.as_dtype(cast_inputs)
    inner: Callable = forward

    @functools.wraps(inner)
    def run(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        on = is_autocast_enabled(device_type)
        ctx._autocast = on and wanted is None
        if not on or wanted is None:
            return inner(ctx, *args, **kwargs)
        with autocast(device_type, enabled=False):
            return inner(ctx, *[_to(a, wanted, device_type) for a in args], **kwargs)

    return run


def custom_bwd(backward: Callable | None = None, *, device_type: str) -> Any:
    """Decorate the backward of an autograd.Function: it runs with autocast as its custom_fwd did."""
    if backward is None:
        return functools.partial(custom_bwd, device_type=device_type)
    inner: Callable = backward

    @functools.wraps(inner)
    def run(ctx: Any, *gradients: Any) -> Any:
        with autocast(device_type, enabled=ctx._autocast):
            return inner(ctx, *gradients)

    return run


def _to(x: Any, dtype: np.dtype, device_type: str) -> Any:
    castable = isinstance(x, Tensor) and x._device.type in (device_type,) and x.is_floating_point()
    return x.to(dtype) if castable and x._data.dtype != dtypes.float64 else x
