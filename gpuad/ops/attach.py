"""Puts the declared operations in place: Tensor methods, operators, in-place forms, NumPy's protocols."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuad.array.dtypes import FLOATING
from gpuad.autograd.elementwise import Elementwise
from gpuad.autograd.op import NUMBERS, functions, methods, table
from gpuad.kernels.expr import Expr
from gpuad.tensor import Tensor

_OPERANDS = (Tensor, Expr, *NUMBERS, np.generic)


def _method(f: Any) -> Any:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return f(self, *args, **kwargs)

    method.__name__, method.__doc__ = getattr(f, "__name__", "method"), f.__doc__
    return method


def _binary(f: Any, reflected: bool = False) -> Any:
    """An operator's method: other kinds of operand get NotImplemented, so that Python can ask them."""

    def forward(self: Tensor, other: Any) -> Any:
        return f(self, other) if isinstance(other, _OPERANDS) or _is_array(other) else NotImplemented

    def backward(self: Tensor, other: Any) -> Any:
        return f(other, self) if isinstance(other, _OPERANDS) or _is_array(other) else NotImplemented

    return backward if reflected else forward


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or hasattr(x, "__cuda_array_interface__")


def _in_place(op: Elementwise, public: Any) -> Any:
    def method(self: Tensor, *others: Any, **named: Any) -> Tensor:
        alpha = named.pop("alpha", 1)
        if alpha != 1:
            others = (others[0] * alpha, *others[1:])
        return op.in_place(self, *others, **named)

    method.__name__, method.__doc__ = f"{op.name}_", f"{op.doc} In place."
    return method


def attach() -> None:
    """Attach everything that is declared; called once, by gpuad/ops/__init__.py."""
    for name in sorted(methods):
        if name not in Tensor.__dict__:
            setattr(Tensor, name, _method(functions[name]))
    for op in table.values():
        if not isinstance(op, Elementwise) or not op.has_in_place:
            continue
        setattr(Tensor, f"{op.name}_", _in_place(op, op))
        if op.operator:
            setattr(Tensor, f"__{op.operator}__", _binary(op))
            setattr(Tensor, f"__r{op.operator}__", _binary(op, reflected=True))
            setattr(Tensor, f"__i{op.operator}__", _in_place(op, op))
    get = functions
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Tensor, f"__{name}__", _binary(get[name]))
    for name, symbol in (("and", "logical_and"), ("or", "logical_or"), ("xor", "logical_xor")):
        setattr(Tensor, f"__{name}__", _binary(_bitwise(name, get[symbol])))
        setattr(Tensor, f"__r{name}__", _binary(_bitwise(name, get[symbol]), reflected=True))
    Tensor.__pow__ = _binary(get["pow"])  # type: ignore[method-assign]
    Tensor.__rpow__ = _binary(get["pow"], reflected=True)  # type: ignore[method-assign]
    Tensor.__matmul__ = _method(get["matmul"])  # type: ignore[method-assign]
    Tensor.__rmatmul__ = lambda self, other: get["matmul"](other, self)  # type: ignore[method-assign]
    Tensor.__neg__ = _method(get["neg"])  # type: ignore[method-assign]
    Tensor.__abs__ = _method(get["abs"])  # type: ignore[method-assign]
    Tensor.__pos__ = lambda self: self  # type: ignore[method-assign]
    Tensor.__invert__ = _invert  # type: ignore[method-assign]
    for name, method in _IN_PLACE.items():
        setattr(Tensor, name, method)


def _invert(self: Tensor) -> Tensor:
    """The logical complement of bools, the bitwise one of integers."""
    if self._data.dtype.kind == "b":
        return table["logical_not"](self)
    if self._data.dtype.char in FLOATING:
        raise TypeError(f"~ takes bool or integer tensors, got {self.dtype}.")
    return -self - 1


def _bitwise(name: str, logical: Any) -> Any:
    def call(a: Any, b: Any) -> Any:
        dtypes_ = {x._data.dtype.kind if isinstance(x, Tensor) else "b" if isinstance(x, (bool, Expr)) else "i"
                   for x in (a, b)}  # fmt: skip
        if dtypes_ == {"b"}:
            return logical(a, b)
        if "f" in dtypes_:
            raise TypeError(f"bitwise {name} takes bool or integer tensors, not floating ones; compare first.")
        tensor = a if isinstance(a, Tensor) else b
        xp = tensor._device.backend.xp
        from gpuad.tensor import wrap

        bare = [x._data if isinstance(x, Tensor) else x for x in (a, b)]
        return wrap(xp.asarray(getattr(xp, f"bitwise_{name}")(*bare)), tensor._device)

    return call


def _fill_(self: Tensor, value: Any) -> Tensor:
    """Write one value everywhere, in place."""
    self[...] = value
    return self


def _zero_(self: Tensor) -> Tensor:
    """Write zeros, in place."""
    self[...] = 0
    return self


def _clamp_(self: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """clamp(), in place."""
    if min is not None:
        table["clamp_min"].in_place(self, min)  # type: ignore[attr-defined]
    if max is not None:
        table["clamp_max"].in_place(self, max)  # type: ignore[attr-defined]
    return self


def _pow_(self: Tensor, exponent: Any) -> Tensor:
    """pow(), in place."""
    return table["pow"].in_place(self, exponent)  # type: ignore[attr-defined]


def _masked_fill_(self: Tensor, mask: Tensor, value: Any) -> Tensor:
    """masked_fill(), in place."""
    self[...] = self.masked_fill(mask, value)
    return self


def _t_(name: str) -> Any:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.copy_(getattr(self, name)(*args, **kwargs))

    method.__name__, method.__doc__ = name + "_", f"{name}(), in place."
    return method


_IN_PLACE = {
    "fill_": _fill_, "zero_": _zero_, "clamp_": _clamp_, "pow_": _pow_, "__ipow__": _pow_,
    "masked_fill_": _masked_fill_, "tril_": _t_("tril"), "triu_": _t_("triu"), "scatter_": _t_("scatter"),
    "scatter_add_": _t_("scatter_add"),
}  # fmt: skip


# NumPy's protocols ----------------------------------------------------------------------------------------------------

# NumPy's names of functions whose names differ here.
_NUMPY_NAMES = {
    "subtract": "sub", "divide": "div", "true_divide": "div", "power": "pow", "negative": "neg", "absolute": "abs",
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arctan2": "atan2", "arcsinh": "asinh", "arccosh": "acosh",
    "arctanh": "atanh", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "equal": "eq",
    "not_equal": "ne", "multiply": "mul", "rint": "round", "concatenate": "cat", "mod": "remainder",
}  # fmt: skip


def array_ufunc(self: Tensor, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
    """np.exp(tensor) and the like run the differentiable op on the tensor's device."""
    name = _NUMPY_NAMES.get(ufunc.__name__, ufunc.__name__)
    if method == "reduce" and ufunc in (np.add, np.multiply, np.maximum, np.minimum):
        axis = kwargs.pop("axis", 0)
        reduction = {"add": "sum", "multiply": "prod", "maximum": "amax", "minimum": "amin"}[ufunc.__name__]
        return functions[reduction](inputs[0], axis, keepdim=bool(kwargs.get("keepdims", False)))
    if method != "__call__" or kwargs or name not in functions:
        raise TypeError(
            f"np.{ufunc.__name__} has no differentiable counterpart for gpuad Tensors in this form; use gpuad's "
            "functions, or x.detach().numpy() for an array."
        )
    if any(isinstance(x, np.ndarray) and x.ndim for x in inputs):
        raise TypeError(
            f"np.{ufunc.__name__} got a numpy.ndarray beside a Tensor; nothing is moved silently. Wrap it: "
            "gpuad.from_numpy(a)."
        )
    return functions[name](*[x.item() if isinstance(x, (np.ndarray, np.generic)) else x for x in inputs])


def array_function(self: Tensor, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """np.sum(tensor), np.concatenate([tensors]) and the like run the differentiable function."""
    name = _NUMPY_NAMES.get(func.__name__, func.__name__)
    if name not in functions:
        raise TypeError(
            f"np.{func.__name__} has no differentiable counterpart in gpuad; use gpuad's functions, or "
            "x.detach().numpy() for an array."
        )
    return functions[name](*args, **kwargs)


Tensor.__array_ufunc__ = array_ufunc  # type: ignore[attr-defined]
Tensor.__array_function__ = array_function  # type: ignore[attr-defined]
