"""Matrix products on CUDA with what stands around them done in the same call: cuBLASLt's epilogues.

    linear            x @ weight.T + bias, with relu or gelu after it
    weight_gradient   g.T @ x, and the sum of the rows of g
    input_gradient    g @ weight times the derivative of the relu or gelu before it, and the sum of its rows

Each is one library call, or None where cuBLASLt has no algorithm for it (a layout or dtype that it does not take): the
caller then does the same with plain products and kernels. As in cublas.py, a row-major product out = a @ b is asked
for as out^T = b^T a^T.
Source: cuBLAS documentation, section "cublasLtEpilogue_t".
"""

from __future__ import annotations

import ctypes
import threading
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from gpuad.array import cublas as plain

__all__ = ["Saved", "input_gradient", "linear", "weight_gradient"]

# As much workspace as lets small products be cut along k; PyTorch takes 1 MiB before Hopper and 32 MiB there.
WORKSPACE = 4 << 20

# cublasLtEpilogue_t: of the activation, with what its derivative needs kept, with a bias too; its derivative.
_BIAS, _BGRADB = 4, 512
_ACTIVATIONS = {"relu": (2, 130, 136), "gelu": (32, 160, 192)}
_WITH_BIAS, _WITH_BIAS_GRADIENT = 4, 16

# cublasLtMatmulDescAttributes_t
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER, _AUX_POINTER, _AUX_LD = 3, 4, 7, 8, 11, 12
# cublasLtMatmulPreferenceAttributes_t: workspace bytes, least alignment of a, b, c, d
_MAX_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)

_BIAS_ALIGNMENT = 16  # bytes; what PyTorch too sees to before it calls cublasLtMatmul
_NOT_TAKEN = (7, 15)  # CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED

lt: Any = None
cupy: Any = None
_looked = False


class Saved(NamedTuple):
    """What the forward epilogue kept for its derivative: relu's bits, or what went into gelu."""

    activation: str
    values: Any
    leading: int  # its leading dimension: bits for relu, elements for gelu


class _Plan(NamedTuple):
    """The descriptors of one kind of product and the algorithm for it."""

    description: int
    a: int
    b: int
    out: int
    algorithm: np.ndarray


class _Thread(threading.local):
    """Descriptors are written to before each call, so every thread has its own."""

    def __init__(self) -> None:
        self.plans: dict[tuple, _Plan | None] = {}
        self.handles: dict[int, int] = {}
        self.workspaces: dict[tuple[int, int], Any] = {}
        self.pointer = ctypes.c_uint64()
        self.scalars32 = (ctypes.c_float * 2)()
        self.scalars64 = (ctypes.c_double * 2)()


_thread = _Thread()


def available() -> bool:
    """Whether nvmath-python has cuBLASLt; imports it on the first call, after the cuBLAS that CuPy has loaded."""
    global lt, cupy, _looked
    if lt is None and not _looked:
        _looked = True
        if find_spec("nvmath") is None:
            return False
        import cupy as cupy_module

        cupy_module.cuda.device.get_cublas_handle()
        from nvmath.bindings import cublasLt as bindings

        try:
            bindings.get_version()
        except RuntimeError:  # nvmath's error for a library, or a function in it, that is not there
            return False
        lt, cupy = bindings, cupy_module
    return lt is not None


def linear(x: Any, weight: Any, bias: Any, activation: str | None, keep: bool, tf32: bool) -> tuple[Any, Any] | None:
    """(activation(x @ weight.T + bias), what its derivative needs: a Saved with `keep`, else None).

    x: (m, k). weight: (n, k). bias: (n,) or None, contiguous. Returns (m, n), of the dtype of x.
    """
    if bias is not None and not (bias.flags.c_contiguous and bias.data.ptr % _BIAS_ALIGNMENT == 0):
        return None
    epilogue, saved = 1, None
    out = cupy.ndarray((x.shape[0], weight.shape[0]), x.dtype)
    if activation is not None:
        without, with_aux, _ = _ACTIVATIONS[activation]
        epilogue = with_aux if keep else without
        if keep:
            saved = _room_for(activation, out)
    if bias is not None:
        epilogue = _BIAS if activation is None else epilogue | _WITH_BIAS
    done = _matmul(epilogue, x, weight.T, out, 0.0, bias, saved, tf32)
    return (out, saved) if done else None


def weight_gradient(g: Any, x: Any, out: Any, beta: float, total: Any, tf32: bool) -> Any:
    """The sum of the rows of g, (n,), in `total` where given; out = g.T @ x + beta · out besides.

    g: (m, n). x: (m, k). out: (n, k), C-contiguous.
    """
    total = cupy.ndarray((g.shape[1],), g.dtype) if total is None else total
    return total if _matmul(_BGRADB, g.T, x, out, beta, total, None, tf32) else None


def input_gradient(g: Any, weight: Any, saved: Saved, summed: bool, total: Any, tf32: bool) -> tuple[Any, Any] | None:
    """(g @ weight · activation', with `summed` the sum of its rows, in `total` where given, else None).

    g: (m, n). weight: (n, k). Returns (m, k) and (k,).
    """
    out = cupy.ndarray((g.shape[0], weight.shape[1]), g.dtype)
    epilogue = _ACTIVATIONS[saved.activation][2]
    if summed:
        epilogue |= _WITH_BIAS_GRADIENT
        total = cupy.ndarray((weight.shape[1],), g.dtype) if total is None else total
    return (out, total) if _matmul(epilogue, g, weight, out, 0.0, total if summed else None, saved, tf32) else None


def _room_for(activation: str, out: Any) -> Saved:
    """Memory for what the epilogue keeps: a bit an element in columns of a multiple of 128, or the elements."""
    m, n = out.shape
    if activation == "relu":
        leading = -(-n // 128) * 128
        return Saved(activation, cupy.ndarray((m * leading // 8,), np.uint8), leading)
    leading = -(-n // 8) * 8
    return Saved(activation, cupy.ndarray((m, leading), out.dtype), leading)


def _matmul(epilogue: int, a: Any, b: Any, out: Any, beta: float, bias: Any, saved: Saved | None, tf32: bool) -> bool:
    """out = epilogue(a @ b + beta out) on the current device and stream; False where there is no algorithm."""
    (m, k), n = a.shape, b.shape[1]
    if not m or not n or not k:
        return False
    itemsize = a.dtype.itemsize
    a_layout = plain._layout(m, k, a.strides, itemsize)
    b_layout = plain._layout(k, n, b.strides, itemsize)
    if a_layout is None or b_layout is None or not out.flags.c_contiguous:
        return False
    device, stream = cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr
    pointers = [a.data.ptr, b.data.ptr, out.data.ptr]
    bits = pointers[0] | pointers[1] | pointers[2] | 256
    bias_bits = 256 if bias is None else bias.data.ptr | 256  # a part of a larger array may lie anywhere
    leading = saved.leading if saved is not None else 0
    alignments = bits & -bits, bias_bits & -bias_bits
    key = (device, a.dtype.char, tf32, epilogue, m, n, k, a_layout, b_layout, leading, *alignments)
    plans = _thread.plans
    if key in plans:
        plan = plans[key]
    else:
        plan = plans[key] = _plan(*key[1:])
    if plan is None:
        return False
    workspace = _thread.workspaces.get((device, stream))
    if workspace is None:
        workspace = _thread.workspaces[device, stream] = cupy.cuda.alloc(WORKSPACE)
    if bias is not None:
        _set_pointer(plan.description, _BIAS_POINTER, bias.data.ptr)
    if saved is not None:
        _set_pointer(plan.description, _AUX_POINTER, saved.values.data.ptr)
    scalars: Any = _thread.scalars64 if itemsize == 8 else _thread.scalars32
    scalars[0], scalars[1] = 1.0, beta
    alpha_at = ctypes.addressof(scalars)
    try:
        lt.matmul(
            _handle(device), plan.description, alpha_at, pointers[1], plan.a, pointers[0], plan.b,
            alpha_at + ctypes.sizeof(scalars) // 2, pointers[2], plan.out, pointers[2], plan.out,
            plan.algorithm.ctypes.data, workspace.ptr, WORKSPACE, stream,
        )  # fmt: skip
    except lt.cuBLASLtError as error:  # found by the heuristic, and not taken after all: nothing was started
        if error.status not in _NOT_TAKEN:
            raise
        plans[key] = None
        return False
    return True


def _handle(device: int) -> int:
    found = _thread.handles.get(device)
    if found is None:
        found = _thread.handles[device] = lt.create()
    return found


def _set_pointer(description: int, attribute: int, value: int) -> None:
    _thread.pointer.value = value
    lt.matmul_desc_set_attribute(description, attribute, ctypes.addressof(_thread.pointer), 8)


def _plan(
    char: str, tf32: bool, epilogue: int, m: int, n: int, k: int, a_layout: tuple[int, int],
    b_layout: tuple[int, int], leading: int, alignment: int,
    bias_alignment: int,
) -> _Plan | None:  # fmt: skip
    kind = plain._TYPES.get(char)
    if kind is None:
        return None
    description = lt.matmul_desc_create(
        kind.compute_tf32 if tf32 else kind.compute, plain._F64 if char == "d" else plain._F32
    )
    for attribute, value in ((_TRANSA, b_layout[0]), (_TRANSB, a_layout[0]), (_EPILOGUE, epilogue)):
        _set(lt.matmul_desc_set_attribute, description, attribute, ctypes.c_int32(value))
    if leading:
        _set(lt.matmul_desc_set_attribute, description, _AUX_LD, ctypes.c_int64(leading))
    # Any address as well aligned: the heuristic looks at whether there is one; each call sets its own.
    for attribute, address in ((_BIAS_POINTER, bias_alignment), (_AUX_POINTER, 1 << 20)):
        _set(lt.matmul_desc_set_attribute, description, attribute, ctypes.c_uint64(address))
    a = lt.matrix_layout_create(kind.code, *((k, n) if b_layout[0] else (n, k)), b_layout[1])
    b = lt.matrix_layout_create(kind.code, *((m, k) if a_layout[0] else (k, m)), a_layout[1])
    out = lt.matrix_layout_create(kind.code, n, m, n)
    preference = lt.matmul_preference_create()
    _set(lt.matmul_preference_set_attribute, preference, _MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE))
    for attribute in _ALIGNMENTS:
        _set(lt.matmul_preference_set_attribute, preference, attribute, ctypes.c_uint32(alignment))
    found = np.zeros(1, lt.matmul_heuristic_result_dtype)
    count = np.zeros(1, np.int32)
    try:
        lt.matmul_algo_get_heuristic(
            _handle(cupy.cuda.runtime.getDevice()), description, a, b, out, out, preference, 1, found.ctypes.data,
            count.ctypes.data,
        )  # fmt: skip
    except lt.cuBLASLtError:  # not supported
        return None
    finally:
        lt.matmul_preference_destroy(preference)
    return _Plan(description, a, b, out, found["algo"]) if count[0] else None


def _set(setter: Any, of: int, attribute: int, value: Any) -> None:
    setter(of, attribute, ctypes.addressof(value), ctypes.sizeof(value))
