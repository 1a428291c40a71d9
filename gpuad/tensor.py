"""Tensor: an array, its device, its place on the tape.

What can be done with a Tensor is declared in gpuad/ops and attached to the class from there; this file holds only what
a Tensor is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpuad.array.device import Device, of_array
from gpuad.array.dtypes import FLOATING
from gpuad.errors import AutogradError, DtypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuad.autograd.node import Node


class Tensor:
    """An n-dimensional array on a device, recorded on the tape when it requires grad.

    Made by gpuad.tensor, gpuad.zeros, gpuad.from_numpy … and by operations; `Tensor(values)` is `gpuad.tensor(values)`
    in the default dtype. Subclasses (nn.Parameter) share its layout.
    """

    __slots__ = ("_data", "_device", "_requires_grad", "_node", "_grad", "_cell", "_view", "__dict__", "__weakref__")

    _data: Any  # the bare array
    _device: Device
    _requires_grad: bool
    _node: Node | None  # what computed it; None for leaves
    _grad: Tensor | None
    _cell: list[Any]  # [version, weak references to views…], one list for a tensor and all its views
    _view: Any  # (view operation, tensor that it is a view of, parameters), None where it is no view

    # Rare attributes live in the instance __dict__, made on first use.
    _hooks: Any = None
    _retains_grad = False
    _post_hooks: Any = None
    _grad_buffer: Tensor | None = None  # where zero_grad left the buffer for the next backward
    name: str | None = None

    # NumPy must ask us first in `array + tensor`.
    __array_priority__ = 1000

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __floordiv__(self, other: Any) -> Tensor: ...
        def __mod__(self, other: Any) -> Tensor: ...
        def __pow__(self, other: Any) -> Tensor: ...
        def __rpow__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pos__(self) -> Tensor: ...
        def __abs__(self) -> Tensor: ...
        def __invert__(self) -> Tensor: ...
        def __lt__(self, other: Any) -> Tensor: ...
        def __le__(self, other: Any) -> Tensor: ...
        def __gt__(self, other: Any) -> Tensor: ...
        def __ge__(self, other: Any) -> Tensor: ...
        def __and__(self, other: Any) -> Tensor: ...
        def __or__(self, other: Any) -> Tensor: ...
        def __getitem__(self, key: Any) -> Tensor: ...
        def __setitem__(self, key: Any, value: Any) -> None: ...
        def backward(
            self, gradient: Tensor | None = None, retain_graph: bool | None = None, create_graph: bool = False,
            inputs: Any = None,
        ) -> None: ...  # fmt: skip

    def __new__(cls, values: Any = (), *args: Any, **kwargs: Any) -> Tensor:
        make = Tensor._from_values
        return wrap(make(values), cls=cls)

    # Filled by gpuad/ops/creation.py: nested values -> array on the default device.
    _from_values: Callable[[Any], Any] = staticmethod(lambda values: np.asarray(values))

    @classmethod
    def _make_subclass(cls, tensor: Tensor, requires_grad: bool = False) -> Tensor:
        """A leaf of class `cls` that shares the memory (and version) of `tensor`."""
        made = wrap(tensor._data, cls=cls)
        made._cell = tensor._cell
        if requires_grad:
            made.requires_grad = True
        return made

    # What it is -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> Size:
        """The lengths of the dimensions, a tuple with numel()."""
        return Size(self._data.shape)

    @property
    def dtype(self) -> np.dtype:
        """The element type, a numpy.dtype."""
        return self._data.dtype

    @property
    def device(self) -> Device:
        """The device that holds the elements."""
        return self._device

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self._data.ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape, or the length of dimension `dim`."""
        return self.shape if dim is None else self._data.shape[dim]

    def dim(self) -> int:
        """The number of dimensions."""
        return self._data.ndim

    def numel(self) -> int:
        """The number of elements."""
        return int(self._data.size)

    nelement = numel

    def element_size(self) -> int:
        """Bytes an element takes."""
        return self._data.dtype.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes an element takes."""
        return self._data.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return self._data.nbytes

    def stride(self, dim: int | None = None) -> Any:
        """Steps in elements from one entry to the next, in all dimensions or in `dim`."""
        strides = tuple(s // self._data.dtype.itemsize for s in self._data.strides)
        return strides if dim is None else strides[dim]

    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        return bool(self._data.flags.c_contiguous)

    def is_floating_point(self) -> bool:
        """Whether the dtype is floating."""
        return self._data.dtype.char in FLOATING

    def data_ptr(self) -> int:
        """The address of the first element."""
        data = self._data
        return data.ctypes.data if isinstance(data, np.ndarray) else data.data.ptr

    @property
    def is_cuda(self) -> bool:
        """Whether it lies on a CUDA device."""
        return self._device.type == "cuda"

    # Its place on the tape --------------------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        """Whether operations on it are recorded."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if self._node is not None:
            if not value:
                raise AutogradError(
                    f"requires_grad of a tensor that {self._node.op.name} computed cannot be switched off; "
                    "use x = x.detach() for a tensor outside the graph."
                )
            return
        if value and self._data.dtype.char not in FLOATING:
            raise DtypeError(
                f"Only floating tensors can require grad, this one is {self._data.dtype}; convert it first, "
                "e.g. x.float()."
            )
        self._requires_grad = bool(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set requires_grad in place and return the tensor."""
        self.requires_grad = requires_grad
        return self

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded operation computed it."""
        return self._node is None

    @property
    def grad_fn(self) -> Node | None:
        """The node that computed it, None for leaves."""
        return self._node

    @property
    def grad(self) -> Tensor | None:
        """The gradient that backward accumulated, None before."""
        return self._grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:
            self._grad = None
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"grad takes a Tensor or None, got {type(value).__name__}.")
        if value._data.shape != self._data.shape or value._device is not self._device:
            raise AutogradError(
                f"grad must have the shape and device of its tensor, {tuple(self.shape)} on {self._device}; "
                f"got {tuple(value.shape)} on {value._device}."
            )
        if value._data.dtype != self._data.dtype:
            raise DtypeError(f"grad must have the dtype of its tensor, {self.dtype}; got {value.dtype}.")
        self._grad = value

    def retain_grad(self) -> None:
        """Keep the gradient of this non-leaf in `.grad` at the next backward."""
        if not self._requires_grad:
            raise AutogradError(
                "retain_grad() needs a tensor that requires grad; call requires_grad_() on a leaf of it."
            )
        if self._node is not None and not self._retains_grad:
            self._retains_grad = True
            self._node.retain(self)

    @property
    def retains_grad(self) -> bool:
        """Whether backward keeps the gradient of this non-leaf."""
        return self._retains_grad

    @property
    def data(self) -> Tensor:
        """The same memory outside the graph; assigning replaces the array."""
        made = wrap(self._data, device=self._device)
        made._cell = self._cell
        return made

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"data takes a Tensor, got {type(value).__name__}.")
        self._data, self._device, self._cell = value._data, value._device, value._cell

    def detach(self) -> Tensor:
        """The same memory as a leaf that requires no grad; versions are shared, so writes are noticed."""
        return self.data

    def detach_(self) -> Tensor:
        """Take this tensor out of the graph, in place; a view cannot be: it would still share what is on the tape."""
        if self._view is not None and self._requires_grad:
            raise AutogradError("A view cannot be detached in place; use x = x.detach(), or detach its base.")
        self._node, self._requires_grad = None, False
        return self

    @property
    def _version(self) -> int:
        return self._cell[0]

    def __len__(self) -> int:
        if not self._data.ndim:
            raise TypeError("len() of a 0-d tensor: it has no dimensions.")
        return self._data.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        if not self._data.ndim:
            raise TypeError("A 0-d tensor cannot be iterated over; use .item() for its number.")
        return (self[i] for i in range(self._data.shape[0]))

    __hash__ = object.__hash__


class Size(tuple):
    """A shape: a tuple with numel()."""

    __slots__ = ()

    def numel(self) -> int:
        """The product of the lengths."""
        product = 1
        for n in self:
            product *= n
        return product

    def __repr__(self) -> str:
        return f"gpuad.Size({list(self)})"


_new = object.__new__


def wrap(array: Any, device: Device | None = None, cls: type[Tensor] = Tensor) -> Tensor:
    """A leaf Tensor around a bare array; nothing is copied."""
    made = _new(cls)
    made._data = array
    made._device = of_array(array) if device is None else device
    made._requires_grad = False
    made._node = made._grad = made._view = None
    made._cell = [0]
    return made
