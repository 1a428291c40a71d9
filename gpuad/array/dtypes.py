"""Dtypes and PyTorch's promotion rules, on numpy.dtype objects.

Source of the rules: PyTorch documentation, "Tensor Attributes", section torch.dtype: operands fall into the
categories bool < integer < floating; an operand of a higher category decides, and within it tensors with
dimensions come before 0-d tensors, and those before Python scalars.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from gpuad.errors import DtypeError, MissingPackageError

float16 = half = np.dtype(np.float16)
float32 = float_ = np.dtype(np.float32)
float64 = double = np.dtype(np.float64)
int8 = np.dtype(np.int8)
int16 = short = np.dtype(np.int16)
int32 = int_ = np.dtype(np.int32)
int64 = long = np.dtype(np.int64)
uint8 = np.dtype(np.uint8)
bool_ = np.dtype(np.bool_)

# The characters of the floating dtypes: NumPy's of kind "f", and bfloat16's, whose kind is "V". Those of 16 bits are
# computed in float32.
BFLOAT16: str = "E"
FLOATING = "efd" + BFLOAT16
HALF = "e" + BFLOAT16

BY_NAME: dict[str, np.dtype] = {
    "float16": float16, "half": float16, "float32": float32, "float": float32, "float64": float64, "double": float64,
    "int8": int8, "int16": int16, "short": int16, "int32": int32, "int": int32, "int64": int64, "long": int64,
    "uint8": uint8, "bool": bool_,
}  # fmt: skip
SUPPORTED = frozenset(BY_NAME.values())
PYTHON_TYPES: dict[type, np.dtype] = {bool: bool_, int: int64, float: float32}

_process_default = float32


@cache
def bfloat16() -> np.dtype:
    """The dtype of 16 bits with the range of float32, which NumPy has by the package ml_dtypes."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingPackageError(
            "bfloat16 needs the package ml_dtypes, which is not installed. "
            'Install it with: pip install "gpuad[bfloat16]".'
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def get_default_dtype() -> np.dtype:
    """The floating dtype of new tensors made from Python numbers; float32 unless set."""
    return _process_default


def set_default_dtype(dtype: Any) -> None:
    """Make `dtype` (floating) the dtype of new floating tensors."""
    global _process_default
    found = as_dtype(dtype)
    if found.char not in FLOATING:
        raise DtypeError(f"set_default_dtype takes a floating dtype, got {found}; give float32 or float64.")
    _process_default = found


def as_dtype(dtype: Any) -> np.dtype:
    """`dtype` (a numpy dtype or scalar type, a Python type or a name) as one of the supported numpy dtypes."""
    if isinstance(dtype, np.dtype) and dtype in SUPPORTED:
        return dtype.newbyteorder("=")
    if isinstance(dtype, str) and dtype == "bfloat16":
        return bfloat16()
    if dtype is float:
        return _process_default
    if isinstance(dtype, type) and dtype in PYTHON_TYPES:
        return PYTHON_TYPES[dtype]
    if isinstance(dtype, str) and dtype in BY_NAME:
        return BY_NAME[dtype]
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is not None and found.newbyteorder("=") in SUPPORTED:
        return found.newbyteorder("=")
    if found is not None and found.name == "bfloat16":
        return bfloat16()
    known = ", ".join(sorted([*map(str, SUPPORTED), "bfloat16"]))
    raise DtypeError(f"{dtype!r} is not a dtype of gpuad; the dtypes are {known}.")


def category(dtype: np.dtype) -> int:
    """0 for bool, 1 for integers, 2 for floating dtypes."""
    kind = dtype.kind
    return 0 if kind == "b" else 1 if kind in "iu" else 2


def scalar_category(value: Any) -> int:
    """The category of a Python number."""
    return 0 if isinstance(value, bool) else 1 if isinstance(value, int) else 2


_SCALAR_DEFAULT = {0: bool_, 1: int64}


def promote_types(a: Any, b: Any) -> np.dtype:
    """The smallest dtype that both convert to, as in PyTorch (int64 with float16 is float16)."""
    a, b = as_dtype(a), as_dtype(b)
    if category(a) != category(b):
        return a if category(a) > category(b) else b
    return float32 if a != b and a.char in HALF and b.char in HALF else np.promote_types(a, b)


def finfo(dtype: np.dtype) -> Any:
    """The limits of a floating dtype: numpy.finfo, or that of ml_dtypes."""
    if dtype.char == BFLOAT16:
        import ml_dtypes

        return ml_dtypes.finfo(dtype)
    return np.finfo(dtype)


def result_type(dimensioned: Iterable[np.dtype], zero_d: Iterable[np.dtype], scalars: Iterable[Any]) -> np.dtype:
    """PyTorch's result dtype of an operation on tensors with dimensions, 0-d tensors and Python numbers."""
    result: np.dtype | None = None
    for group in (dimensioned, zero_d):
        of_group: np.dtype | None = None
        for dtype in group:
            of_group = dtype if of_group is None else promote_types(of_group, dtype)
        if of_group is not None and (result is None or category(of_group) > category(result)):
            result = of_group
    highest = max((scalar_category(s) for s in scalars), default=-1)
    if result is None or highest > category(result):
        result = _SCALAR_DEFAULT.get(highest, _process_default)
    return result


def can_cast(source: Any, target: Any) -> bool:
    """Whether PyTorch converts implicitly, as in-place operations must: not to a lower category."""
    return category(as_dtype(source)) <= category(as_dtype(target))
