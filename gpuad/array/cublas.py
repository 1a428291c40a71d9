"""Matrix products on CUDA: out = alpha a @ b + beta out as one cuBLAS call, in eager and in captured work.

CuPy's own wrappers set the handle's stream in a way that refuses stream capture, upcast batched float16 and
have no beta; this calls cuBLAS by nvmath-python's bindings, on CuPy's handle and current stream.

cuBLAS reads column-major matrices. A row-major matrix is its transpose there, so the product is asked for as
out^T = b^T a^T, and a matrix with one unit stride goes in as it is, row-major (flag N) or transposed (flag T).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gpuad.errors import DeviceError, DtypeError, MissingPackageError, ShapeError

__all__ = ["gemm"]

_DEFAULT_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT


class _Type(NamedTuple):
    """A dtype as cublasGemmEx takes it: cudaDataType, cublasComputeType without and with TF32."""

    code: int
    compute: int
    compute_tf32: int
    itemsize: int


_F16, _BF16, _F32, _F64 = 2, 14, 0, 1
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32, _COMPUTE_64F = 68, 77, 70
_TYPES = {
    "e": _Type(_F16, _COMPUTE_32F, _COMPUTE_32F, 2),
    "E": _Type(_BF16, _COMPUTE_32F, _COMPUTE_32F, 2),
    "f": _Type(_F32, _COMPUTE_32F, _COMPUTE_32F_FAST_TF32, 4),
    "d": _Type(_F64, _COMPUTE_64F, _COMPUTE_64F, 8),
}
_NO_OFFSETS = ((0, 0, 0),)


class _Thread(threading.local):
    """CuPy's handles, one a thread and device, and host memory for alpha and beta, which each call reads at once."""

    def __init__(self) -> None:
        self.handles: dict[int, int] = {}
        self.scalars32 = (ctypes.c_float * 2)()
        self.scalars64 = (ctypes.c_double * 2)()
        self.addresses32 = ctypes.addressof(self.scalars32), ctypes.addressof(self.scalars32) + 4
        self.addresses64 = ctypes.addressof(self.scalars64), ctypes.addressof(self.scalars64) + 8


_thread = _Thread()
cupy: Any = None
cublas: Any = None


def _load() -> None:
    """Import CuPy and nvmath-python, in this order: nvmath then takes the cuBLAS library that CuPy has loaded."""
    global cupy, cublas
    import cupy as cupy_module

    cupy_module.cuda.device.get_cublas_handle()
    try:
        from nvmath.bindings import cublas as bindings
    except ImportError as error:
        raise MissingPackageError(
            "Matrix products on a CUDA device need nvmath-python, which is not installed. "
            'Install it with: pip install "gpuad[cuda13]" (or "gpuad[cuda12]", as your CuPy).'
        ) from error
    cupy, cublas = cupy_module, bindings


def gemm(a: Any, b: Any, out: Any = None, *, alpha: float = 1.0, beta: float = 0.0, tf32: bool = False) -> Any:
    """out = alpha a @ b + beta out, with the shape rules of numpy.matmul for two or more dimensions.

    a: (*batch, m, k), b: (*batch, k, n), CuPy arrays of one device and one of float16 and bfloat16 (accumulated in
    float32), float32 (tf32: products in TF32) or float64. out: (*broadcast batch, m, n) with a unit stride in one of
    its last two dimensions, which must not share memory with a or b; without it beta is 0. beta 0 does not read out.

    One library call and nothing else, on the arrays' device and its current stream, if
    - each matrix has one unit stride and does not overlap itself; of a or b that has not, a contiguous copy is made;
    - the batch has one stride in each array (0 where it is broadcast). An operand whose own batch dimensions do not
      merge is copied likewise; where broadcasting keeps them apart, as in (B, 1, m, k) @ (1, H, k, n), there is a call
      for each index of all batch dimensions but the longest.
    A batch that shares b is one product of m * batch rows. Of the product of empty matrices only beta is applied.
    """
    if cublas is None:
        _load()
    kind = _TYPES.get(a.dtype.char)
    if kind is None or b.dtype != a.dtype or (out is not None and out.dtype != a.dtype):
        raise _dtype_error(a, b, out)
    device = a.data.device_id
    if b.data.device_id != device or (out is not None and out.data.device_id != device):
        raise _device_error(a, b, out)
    if cupy.cuda.runtime.getDevice() != device:
        with cupy.cuda.Device(device):
            return gemm(a, b, out, alpha=alpha, beta=beta, tf32=tf32)
    shape = _product_shape(a.shape, b.shape)
    if out is None:
        out = cupy.ndarray(shape, a.dtype)
        beta = 0.0
    elif out.shape != shape:
        raise ShapeError(f"gemm got out of shape {out.shape} for {a.shape} @ {b.shape}; it must be {shape}.")
    if out.size == 0 or a.shape[-1] == 0:
        return _scale(out, beta)
    _multiply(a, b, out, kind, kind.compute_tf32 if tf32 else kind.compute, alpha, beta)
    return out


def _multiply(a: Any, b: Any, out: Any, kind: _Type, compute: int, alpha: float, beta: float) -> None:
    (m, n), k, itemsize = out.shape[-2:], a.shape[-1], kind.itemsize
    out_layout = _layout(m, n, out.strides, itemsize)
    if out_layout is None:
        raise ShapeError(
            f"gemm got an out of shape {out.shape} with strides {out.strides} bytes; one of its last two dimensions "
            "must have stride 1 and no element may appear twice. Give a contiguous array, or none."
        )
    if out_layout[0]:  # transposed: compute out^T = b^T a^T
        a, b, out = b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2)
        m, n = n, m
    a, (a_flag, a_ld) = _readable(a, m, k, itemsize)
    b, (b_flag, b_ld) = _readable(b, k, n, itemsize)
    out_ld = out_layout[1]

    outer: list[tuple[int, ...]] = []  # batch dimensions beyond one: (length, strides of a, b and out in bytes)
    count, a_step, b_step, out_step = 1, 0, 0, 0
    if out.ndim > 2:
        batch = out.shape[:-2]
        a_steps, b_steps, out_steps = _steps(a, batch), _steps(b, batch), _steps(out, batch)
        if not _merges(batch, a_steps):
            a, (a_flag, a_ld) = _copied(a, m, k, itemsize)
            a_steps = _steps(a, batch)
        if not _merges(batch, b_steps):
            b, (b_flag, b_ld) = _copied(b, k, n, itemsize)
            b_steps = _steps(b, batch)
        outer = _merged(batch, a_steps, b_steps, out_steps)
        if any([dimension[3] <= 0 for dimension in outer]):
            raise ShapeError(f"gemm got out with batch strides {out_steps} bytes; they must be positive.")
        # A batch that shares b and whose rows follow one another in a and out is a product of more rows.
        if outer and outer[-1][2] == 0 and not a_flag:
            length, a_step, _, out_step = outer[-1]
            a_step, out_step = a_step // itemsize, out_step // itemsize
            if (a_step, out_step) == (m * a_ld, m * out_ld) or (m == 1 and a_step >= k and out_step >= n):
                if m == 1:
                    a_ld, out_ld = a_step, out_step
                m *= length
                outer.pop()
            a_step = out_step = 0
        if outer:
            longest = max(outer)
            outer.remove(longest)
            count, a_step, b_step, out_step = longest
            a_step, b_step, out_step = a_step // itemsize, b_step // itemsize, out_step // itemsize

    handle, code = _handle_on_current_stream(), kind.code
    scalars = _thread.scalars32 if kind.itemsize < 8 else _thread.scalars64
    scalars[0], scalars[1] = alpha, beta
    at_alpha, at_beta = _thread.addresses32 if kind.itemsize < 8 else _thread.addresses64
    a_start, b_start, out_start = a.data.ptr, b.data.ptr, out.data.ptr
    for a_at, b_at, out_at in _offsets(outer) if outer else _NO_OFFSETS:
        if count == 1:
            cublas.gemm_ex(
                handle, b_flag, a_flag, n, m, k, at_alpha, b_start + b_at, code, b_ld, a_start + a_at, code, a_ld,
                at_beta, out_start + out_at, code, out_ld, compute, _DEFAULT_ALGORITHM,
            )  # fmt: skip
        else:
            cublas.gemm_strided_batched_ex(
                handle, b_flag, a_flag, n, m, k, at_alpha, b_start + b_at, code, b_ld, b_step, a_start + a_at, code,
                a_ld, a_step, at_beta, out_start + out_at, code, out_ld, out_step, count, compute, _DEFAULT_ALGORITHM,
            )  # fmt: skip


def _handle_on_current_stream() -> int:
    device = cupy.cuda.runtime.getDevice()
    handle = _thread.handles.get(device)
    if handle is None:
        handle = _thread.handles[device] = cupy.cuda.device.get_cublas_handle()
    # cublasSetStream may be called during a capture; PyTorch does so for every product.
    stream = cupy.cuda.get_current_stream().ptr
    if cublas.get_stream(handle) != stream:
        cublas.set_stream(handle, stream)
    return handle


def _layout(rows: int, columns: int, strides: tuple[int, ...], itemsize: int) -> tuple[int, int] | None:
    """(0 for row-major or 1 for transposed, leading dimension) of a matrix, None if it is neither."""
    row, column = strides[-2] // itemsize, strides[-1] // itemsize
    if (column == 1 or columns == 1) and (row >= columns or rows == 1):
        return 0, columns if rows == 1 else row
    if (row == 1 or rows == 1) and (column >= rows or columns == 1):
        return 1, rows if columns == 1 else column
    return None


def _readable(x: Any, rows: int, columns: int, itemsize: int) -> tuple[Any, tuple[int, int]]:
    layout = _layout(rows, columns, x.strides, itemsize)
    return _copied(x, rows, columns, itemsize) if layout is None else (x, layout)


def _copied(x: Any, rows: int, columns: int, itemsize: int) -> tuple[Any, tuple[int, int]]:
    """A contiguous copy with its layout; batch dimensions that are broadcast in memory shrink to length 1."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides[:-2])
    return cupy.ascontiguousarray(x[once]), (0, columns)


def _steps(x: Any, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of x over the broadcast batch, in bytes; 0 where x is broadcast."""
    own = x.shape[:-2]
    strides = x.strides[:-2]
    if own == batch:
        return strides
    moving = [0 if length == 1 else stride for length, stride in zip(own, strides, strict=True)]
    return (*(0,) * (len(batch) - len(own)), *moving)


def _merges(batch: tuple[int, ...], steps: tuple[int, ...]) -> bool:
    """Whether the dimensions along which an operand moves are one, seen for itself, and not backwards."""
    if len(batch) == 1:
        return steps[0] >= 0 or batch[0] == 1
    inner_length, inner_step = 0, 0
    for length, step in zip(reversed(batch), reversed(steps), strict=True):
        if length > 1 and step:
            if step < 0 or (inner_length and step != inner_length * inner_step):
                return False
            inner_length, inner_step = length, step
    return True


def _merged(
    batch: tuple[int, ...], a_steps: tuple[int, ...], b_steps: tuple[int, ...], out_steps: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """The batch as few dimensions as can be: (length, step of a, of b, of out)."""
    dimensions: list[tuple[int, ...]] = []
    for length, a, b, out in zip(batch, a_steps, b_steps, out_steps, strict=True):
        if length == 1:
            continue
        if dimensions and dimensions[-1][1:] == (length * a, length * b, length * out):
            dimensions[-1] = (dimensions[-1][0] * length, a, b, out)
        else:
            dimensions.append((length, a, b, out))
    return dimensions


def _offsets(dimensions: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Byte offsets of the arrays for every index of the dimensions."""
    for index in np.ndindex(*(length for length, *_ in dimensions)):
        yield tuple(sum(i * d[x] for i, d in zip(index, dimensions, strict=True)) for x in (1, 2, 3))


def _product_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise ShapeError(f"gemm got {a} @ {b}; the shapes must be (..., m, k) and (..., k, n), with the same k.")
    batch, other = a[:-2], b[:-2]
    if batch != other:
        try:
            batch = np.broadcast_shapes(batch, other)
        except ValueError:
            raise ShapeError(f"gemm got {a} @ {b}; the batch shapes {batch} and {other} do not broadcast.") from None
    return (*batch, a[-2], b[-1])


def _scale(out: Any, beta: float) -> Any:
    """What is left of the product where nothing is summed."""
    if out.size and beta == 0:
        out.fill(0)
    elif out.size and beta != 1:
        cupy.multiply(out, out.dtype.type(beta), out)
    return out


def _described(a: Any, b: Any, out: Any, what: str) -> str:
    operands = [("a", a), ("b", b)] + ([] if out is None else [("out", out)])
    return f"gemm got operands {what}:\n" + "".join(
        f"  {name:<3}  {x.dtype} {x.shape}  on cuda:{x.data.device_id}\n" for name, x in operands
    )


def _dtype_error(a: Any, b: Any, out: Any) -> DtypeError:
    text = _described(a, b, out, "of other dtypes than it takes")
    return DtypeError(f"{text}All must have the same one of float16, bfloat16, float32 and float64; cast them first.")


def _device_error(a: Any, b: Any, out: Any) -> DeviceError:
    return DeviceError(f"{_described(a, b, out, 'on different devices')}Move them to one device first.")
