"""Operations: what every op is, how a call is dispatched, and the table of all of them.

An op is called with Tensors, Python numbers, bare arrays or symbolic scalars (inside a formula). With Tensors it
computes and records; with bare arrays it only computes, which is how derivative rules run in a plain backward pass:
the same rule, the same ops, no tape. With dual numbers it goes through forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuad.array import dtypes
from gpuad.array.device import Device, default_device, of_array
from gpuad.array.dtypes import FLOATING
from gpuad.autograd.node import Node
from gpuad.errors import AutogradError, DeviceError, DtypeError, ShapeError
from gpuad.kernels.expr import Expr
from gpuad.tensor import Tensor, wrap

NUMBERS = (int, float, bool)

# Every declared op by name; documentation and generic tests go over it.
table: dict[str, Op] = {}


# Every public function by name, and the names of those that are Tensor methods (gpuad/ops/attach.py makes them so) and
# of those that are for gpuad.nn.functional alone.
functions: dict[str, Callable] = {}
methods: set[str] = set()
for_nn: set[str] = set()


def function(
    target: Any = None, *, name: str | None = None, method: bool = True, nn: bool = False, aliases: Sequence[str] = ()
) -> Any:
    """Publish a function as gpuad.<name> and, with `method`, as Tensor.<name>; with `nn` in nn.functional only."""

    def publish(f: Any) -> Any:
        for each in (name or f.__name__, *aliases):
            functions[each] = f
            if nn:
                for_nn.add(each)
            elif method:
                methods.add(each)
        return f

    return publish if target is None else publish(target)


class Interpreters:
    """How many levels (forward mode, vmap) and autocast regions are open; while none is, operands are as they are."""

    active = 0
    # autocast.py puts its rule here: (op, inputs, params) -> result. It goes on to `dual`, of the same form, where
    # interpret.py puts its own, with (name, target, result) -> target, (roots, targets, weights, create_graph) ->
    # gradients, and (make, shape, device) -> random numbers; and function_levels.py: (Function, arguments) -> result.
    # An operation in place keeps the dtype of its target, and asks `dual` at once.
    apply: Callable[..., Any]
    dual: Callable[..., Any]
    write: Callable[..., Any]
    grad: Callable[..., Any]
    draw: Callable[..., Any]
    function: Callable[..., Any]


class Op:
    """What elementwise and other operations have in common.

    name, doc: for errors and documentation. samples: functions (or tuples) of inputs for the generic tests.
    autocast: what gpuad.autocast computes it in: "lower", its dtype; "float32"; None, what promotion says.
    """

    name: str
    doc: str
    samples: Sequence[Any]
    autocast: str | None

    def __init__(
        self,
        name: str,
        doc: str = "",
        samples: Sequence[Any] = (),
        register: bool = True,
        autocast: str | None = None,
    ) -> None:
        self.name = name
        self.autocast = autocast
        self.doc = self.__doc__ = doc
        self.samples = samples
        self.__name__ = self.__qualname__ = name
        if register:
            if name in table:
                raise ValueError(f"An op called {name} is declared already.")
            table[name] = self

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __str__(self) -> str:
        return self.name

    def __call__(self, *inputs: Any, **params: Any) -> Any:
        raise NotImplementedError

    def backward(self, node: Node, gradient: Any, walk: Any) -> list[Any]:
        """Gradients of the parents from that of the output, on bare arrays.

        walk.into(leaf) is (buffer, beta) where the gradient of a leaf may be written as beta · buffer + gradient (the
        list then has WRITTEN in its place), else None.
        """
        raise NotImplementedError

    def backward_recorded(self, node: Node, gradient: Tensor, walk: Any) -> list[Any]:
        """The same on Tensors, recorded, so that gradients can be differentiated."""
        raise NotImplementedError

    def tangent(self, inputs: Sequence[Any], tangents: Sequence[Tensor | None], params: dict) -> tuple[Any, Any]:
        """Forward mode: the value and its tangent."""
        raise NotImplementedError(f"{self.name} has no forward-mode rule yet.")

    def batch(self, batch: Any, inputs: Sequence[Any], params: dict) -> Any:
        """vmap: the output(s) of all examples, along the first dimension; see batching.py."""
        raise NotImplementedError(f"{self.name} has no batching rule.")


def describe(x: Any) -> str:
    """dtype, shape and device of an operand, for error texts."""
    if isinstance(x, Tensor):
        return f"{x._data.dtype!s:<8} {tuple(x._data.shape)!s:<14} on {x._device}"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype!s:<8} {tuple(x.shape)!s:<14} on {of_array(x)} (a bare {type(x).__name__})"
    return repr(x)


def operand_names(count: int, names: Sequence[str] | None) -> list[str]:
    """Names for operands in error texts: the op's own, else a, b, c …"""
    if names is not None and len(names) >= count:
        return list(names[:count])
    return [chr(ord("a") + i) if i < 26 else f"a{i}" for i in range(count)]


def check_devices(name: str, inputs: Sequence[Any], names: Sequence[str] | None = None) -> Device:
    """The one device of all Tensor operands; DeviceError naming each when there are several."""
    device: Device | None = None
    for x in inputs:
        if isinstance(x, Tensor):
            if device is None:
                device = x._device
            elif x._device is not device:
                labels = operand_names(len(inputs), names)
                width = max(len(label) for label in labels)
                lines = [
                    f"  {label:<{width}}  {describe(each)}"
                    for label, each in zip(labels, inputs, strict=True)
                    if isinstance(each, Tensor)
                ]
                first = next(label for label, each in zip(labels, inputs, strict=True) if each is x)
                raise DeviceError(
                    f"{name} got operands on different devices:\n"
                    + "\n".join(lines)
                    + f'\nMove one of them first, e.g. {first}.to("{device}").'
                )
    return default_device() if device is None else device


def as_operand(name: str, x: Any) -> Any:
    """A Tensor or Python number from what a user passed: NumPy scalars are unwrapped, other arrays refused."""
    if isinstance(x, np.generic):  # first: numpy.float64 is a float too, but would promote
        return x.item()
    if isinstance(x, (Tensor, Expr, *NUMBERS)):
        return x
    if isinstance(x, (list, tuple)):
        raise TypeError(
            f"{name} takes Tensors and numbers, got a {type(x).__name__}; make it one with gpuad.tensor(…)."
        )
    if isinstance(x, np.ndarray) or hasattr(x, "__cuda_array_interface__"):
        raise TypeError(
            f"{name} got a bare {type(x).__module__}.{type(x).__name__} beside a Tensor; nothing is copied or moved "
            "silently. Wrap it: gpuad.from_numpy(a), gpuad.from_dlpack(a) share its memory, gpuad.tensor(a) copies."
        )
    raise TypeError(f"{name} takes Tensors and numbers, got {type(x).__name__}.")


def broadcast_error(name: str, inputs: Sequence[Any], names: Sequence[str] | None = None) -> ShapeError:
    """The error of operands whose shapes do not broadcast."""
    labels = operand_names(len(inputs), names)
    lines = [f"  {label}  {describe(x)}" for label, x in zip(labels, inputs, strict=True) if not isinstance(x, NUMBERS)]
    return ShapeError(
        f"{name} got operands whose shapes do not broadcast:\n" + "\n".join(lines) + "\n"
        "Aligned at the last dimension, lengths must be equal or 1; add dimensions of length 1 with "
        "x.unsqueeze(dim), or swap them with x.transpose(a, b)."
    )


def promoted_dtype(inputs: Sequence[Any], needs_float: bool) -> np.dtype:
    """The dtype that numbers are computed in, by PyTorch's promotion rules."""
    found: np.dtype | None = None
    for x in inputs:  # nearly always one floating dtype, and numbers, which go with any
        if not isinstance(x, NUMBERS):
            dtype = x._data.dtype if isinstance(x, Tensor) else x.dtype
            if dtype.char not in FLOATING or (found is not None and dtype != found):
                break
            found = dtype
    else:
        if found is not None:
            return found
    dimensioned: list[np.dtype] = []
    zero_d: list[np.dtype] = []
    scalars: list[Any] = []
    for x in inputs:
        if isinstance(x, NUMBERS):
            scalars.append(x)
        else:
            array = x._data if isinstance(x, Tensor) else x
            (dimensioned if array.ndim else zero_d).append(array.dtype)
    dtype = dtypes.result_type(dimensioned, zero_d, scalars)
    return dtypes.get_default_dtype() if needs_float and dtype.char not in FLOATING else dtype


def floating_dtype(name: str, inputs: Sequence[Any]) -> np.dtype:
    """The dtype that numbers are computed in by an operation that takes floating ones only."""
    dtype = promoted_dtype(inputs, False)
    if dtype.char not in FLOATING:
        raise DtypeError(f"{name} takes floating tensors, got {dtype}; convert first, e.g. x.float().")
    return dtype


def check_in_place(name: str, target: Tensor, dtype: np.dtype, shape: tuple[int, ...], recording: bool) -> None:
    """Whether `target` can take a result of this dtype and shape in place."""
    if recording and target._requires_grad and target._node is None:
        raise AutogradError(
            f"{name}_ would change a leaf that requires grad in place, and its gradient would be that of another "
            f"value. Do it inside `with gpuad.no_grad():`, or out of place."
        )
    if recording and target._view is not None:
        _check_view(name, target)
    if not dtypes.can_cast(dtype, target._data.dtype):
        raise DtypeError(
            f"{name}_ computes {dtype}, which cannot be stored in a {target.dtype} tensor without loss of kind; "
            f"use the operation out of place or convert first, e.g. x.to(gpuad.{dtype})."
        )
    if shape != target._data.shape:
        raise ShapeError(
            f"{name}_ computes shape {tuple(shape)}, which does not fit the tensor of shape {tuple(target.shape)} "
            "it is to be stored in; in place, only the other operands broadcast."
        )


def _check_view(name: str, target: Tensor) -> None:
    """Whether a view can be changed in place and the tensor it is a view of follow on the tape."""
    base = target
    while base._view is not None and base._view[1]._cell is target._cell:
        op, base, how = base._view
        if op is None and how == "no_grad":
            raise AutogradError(
                f"{name}_ would change a view that was made inside no_grad() in place, while recording: its gradient "
                "could not reach the tensor it is a view of. Make the view outside no_grad(), write inside it, or "
                "clone() the view first."
            )
        if op is None:
            raise AutogradError(
                f"{name}_ would change what a Function returned in place, and it is one of the Function's arguments. "
                "Return a clone() from forward, or use the operation out of place."
            )
        if op.name == "expand":
            raise ShapeError(
                f"{name}_ would change a view of an expanded tensor in place, whose elements share memory; clone() "
                "it first."
            )
    if base is not target and base._requires_grad and base._node is None:
        raise AutogradError(
            f"{name}_ would change a view of a leaf that requires grad in place, and the leaf's gradient would be that "
            "of another value. Do it inside `with gpuad.no_grad():`, or use the operation out of place."
        )


def writable(name: str, target: Tensor) -> Any:
    """The array of a tensor that is about to be written; error where elements share memory."""
    array = target._data
    if array.size and any(s == 0 and n > 1 for s, n in zip(array.strides, array.shape, strict=True)):
        raise ShapeError(f"{name}_ would write to an expanded tensor, whose elements share memory; clone() it first.")
    if not getattr(array.flags, "writeable", True):
        raise ShapeError(f"{name}_ would write to memory that is read-only; clone() the tensor first.")
    return array


def new_tensor(array: Any, device: Device) -> Tensor:
    """A fresh Tensor around a result."""
    return wrap(array, device)


def random_tensor(make: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...], device: Device) -> Tensor:
    """make(shape) as a Tensor; inside vmap, of each example its own where `randomness` says so."""
    return Interpreters.draw(make, shape, device) if Interpreters.active else wrap(make(shape), device)
