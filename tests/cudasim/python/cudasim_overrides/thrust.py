"""cupy.cuda.thrust on the simulator: sorting with NumPy.

Device memory is host memory there, so that an array on the device is a NumPy
array at its address.
"""

import ctypes

import cudasim
import numpy

available = True

_callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_submit = cudasim._core.cudasim_host_operation
_submit.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _callback, ctypes.c_void_p]
_submit.restype = ctypes.c_int

_keep = []  # callbacks, which a captured graph may call again at any time


def get_build_version():
    return 300200


def _array(address, dtype, shape):
    dtype = numpy.dtype(dtype)
    size = int(numpy.prod(shape))
    buffer = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    return numpy.frombuffer(buffer, dtype).reshape(shape)


def _check(dtype):
    if numpy.dtype(dtype).char not in "?bBhHiIlLqQefdFD":
        raise NotImplementedError(f"Sorting arrays with dtype '{dtype}' is not supported")


def _run(name, function):
    import cupy

    stream = cupy.cuda.get_current_stream().ptr
    errors = []

    def call(_):
        try:
            function()
        except BaseException as e:
            errors.append(e)

    callback = _callback(call)
    _keep.append(callback)
    cupy.cuda.runtime.check_status(_submit(stream, name.encode(), callback, None))
    if errors:
        raise errors[0]


def sort(dtype, data_start, keys_start, shape):
    _check(dtype)
    data = _array(data_start, dtype, shape)
    _run("thrust::sort", lambda: data.sort(axis=-1, kind="stable"))


def argsort(dtype, idx_start, data_start, keys_start, shape):
    _check(dtype)
    data = _array(data_start, dtype, shape)
    indices = _array(idx_start, numpy.intp, shape)

    def go():
        indices[...] = numpy.argsort(data, axis=-1, kind="stable")

    _run("thrust::argsort", go)


def lexsort(dtype, idx_start, keys_start, k, n):
    if numpy.dtype(dtype).char not in "?bBhHiIlLqQefdFD":
        raise TypeError(f"Sorting keys with dtype '{dtype}' is not supported")
    keys = _array(keys_start, dtype, (k, n))
    indices = _array(idx_start, numpy.intp, (n,))

    def go():
        indices[...] = numpy.lexsort(keys)

    _run("thrust::lexsort", go)
