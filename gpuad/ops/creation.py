"""Making tensors: from values, filled, ranges, random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuad.array import dtypes, random
from gpuad.array.device import as_device, of_array
from gpuad.array.dtypes import FLOATING
from gpuad.array.host_memory import memory
from gpuad.array.random import Generator
from gpuad.autograd.levels import batches_of, make_batched, open_batches
from gpuad.autograd.op import Interpreters, function, random_tensor
from gpuad.errors import DeviceError, DtypeError, ShapeError
from gpuad.tensor import Tensor, wrap


def _shape(size: Sequence[Any]) -> tuple[int, ...]:
    """(2, 3), ((2, 3),) or ([2, 3],) as (2, 3)."""
    if len(size) == 1 and not isinstance(size[0], (int, np.integer)):
        size = tuple(size[0])
    shape = tuple(int(n) for n in size)
    if any(n < 0 for n in shape):
        raise ShapeError(f"A shape has no negative lengths; got {shape}.")
    return shape


def _finish(array: Any, device: Any, requires_grad: bool) -> Tensor:
    made = wrap(array, device)
    if requires_grad:
        made.requires_grad = True
    return made


def _has_tensors(values: Any) -> bool:
    if isinstance(values, Tensor):
        return True
    return isinstance(values, (list, tuple)) and any(_has_tensors(v) for v in values)


def _unwrap(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.item() if not values._data.ndim else values.tolist()
    return [_unwrap(v) for v in values] if isinstance(values, (list, tuple)) else values


def _host_array(values: Any, dtype: np.dtype | None) -> np.ndarray:
    """Nested Python values or a host array as a new numpy array of a dtype of gpuad."""
    if isinstance(values, np.ndarray):
        return _copy(values, dtypes.as_dtype(values.dtype) if dtype is None else dtype)
    if _has_tensors(values):
        values = _unwrap(values)
    try:
        array = np.array(values, order="C")
    except ValueError as error:
        raise ShapeError(
            f"The nested values are ragged: lists of one level must have equal lengths ({error})."
        ) from error
    if array.dtype.kind not in "biu" and array.dtype.char not in FLOATING:
        raise DtypeError(f"gpuad.tensor takes numbers and bools; these values make a {array.dtype} array.")
    if dtype is None and not isinstance(values, np.generic):
        if array.dtype.char in FLOATING or array.size == 0:
            dtype = dtypes.get_default_dtype()
        elif array.dtype.kind in "iu":
            dtype = dtypes.int64
    return _copy(array, dtypes.as_dtype(array.dtype) if dtype is None else dtype)


def _copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    made = memory.aligned(array.shape, dtype)
    np.copyto(made, array, casting="unsafe")
    return made


@function(method=False)
def tensor(data: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """A new leaf with a copy of `data`: nested lists, numbers, a NumPy or CuPy array, or a Tensor.

    dtype: that of the data unless given (Python floats give the default dtype, ints int64). device: the default device
    unless given; for a CuPy array or Tensor its own.
    """
    wanted = None if dtype is None else dtypes.as_dtype(dtype)
    if isinstance(data, Tensor):
        place = data._device if device is None else as_device(device)
        array = data._data if place is data._device else place.backend.receive(data._data)
        if wanted is None or wanted == array.dtype:
            array = place.backend.copy(array)
        else:
            array = place.backend.cast(array, wanted)
        return _finish(array, place, requires_grad)
    if hasattr(data, "__cuda_array_interface__"):
        source = of_array(data)
        place = source if device is None else as_device(device)
        array = source.backend.copy(data) if place is source else place.backend.receive(data)
        return _finish(array if wanted is None else place.backend.cast(array, wanted), place, requires_grad)
    place = as_device(device)
    return _finish(place.backend.asarray(_host_array(data, wanted)), place, requires_grad)


@function(method=False)
def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    """`data` as a Tensor; shares memory with it where dtype and device allow."""
    if isinstance(data, Tensor):
        return data.to(device=device, dtype=dtype) if dtype is not None or device is not None else data
    if isinstance(data, np.ndarray) or hasattr(data, "__cuda_array_interface__"):
        place = of_array(data)
        if dtypes.as_dtype(data.dtype) == data.dtype and (device is None or as_device(device) is place):
            made = wrap(data, place)
            return made if dtype is None else made.to(dtype=dtype)
    return tensor(data, dtype, device)


@function(method=False)
def asarray(obj: Any, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> Tensor:
    """`obj` as a Tensor: shared where possible unless copy=True."""
    return tensor(obj, dtype, device) if copy else as_tensor(obj, dtype, device)


@function(method=False)
def from_numpy(array: np.ndarray) -> Tensor:
    """A Tensor on cpu that shares the memory of a NumPy array."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"from_numpy takes a numpy.ndarray, got {type(array).__name__}; use gpuad.tensor(…).")
    dtypes.as_dtype(array.dtype)
    return wrap(array)


@function(method=False)
def from_dlpack(ext_tensor: Any, *, device: Any = None, copy: bool | None = None) -> Tensor:
    """A Tensor that shares the memory of any array with __dlpack__ (NumPy, CuPy, PyTorch, JAX).

    device: where it is to be, which copies where that is another one; copy: whether to copy (True), to refuse
    where there must be one (False), or either. Work of the owner's stream comes first. Memory that the owner says is
    read-only can be read but not written. Raises TypeError, DeviceError or DtypeError for what gpuad has not.
    """
    if not hasattr(ext_tensor, "__dlpack__"):
        raise TypeError(
            f"from_dlpack takes an array with __dlpack__, got {type(ext_tensor).__name__}; use gpuad.tensor(…)."
        )
    kind, index = ext_tensor.__dlpack_device__()
    name = _DLPACK_DEVICES.get(int(kind))
    if name is None:
        raise DeviceError(
            f"from_dlpack got an array on a device of DLPack's kind {int(kind)}; gpuad has cpu and CUDA devices. Move "
            "it to one of them first."
        )
    place = as_device(name.format(index))
    array = place.backend.xp.from_dlpack(ext_tensor)
    dtypes.as_dtype(array.dtype)
    made = wrap(array, place)
    there = place if device is None else as_device(device)
    if there is not place and copy is False:
        raise ValueError(f"from_dlpack(copy=False) cannot bring an array from {place} to {there}; leave copy out.")
    return made.to(there, copy=bool(copy))


# DLPack's kinds of devices (dlpack.h, DLDeviceType): the host, CUDA, host memory pinned for CUDA, managed memory.
_DLPACK_DEVICES = {1: "cpu", 2: "cuda:{}", 3: "cpu", 13: "cuda:{}"}


def _filled(value: Any) -> Any:
    def make(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        place = as_device(device)
        wanted = dtypes.get_default_dtype() if dtype is None else dtypes.as_dtype(dtype)
        return _finish(place.backend.full(_shape(size), value, wanted), place, requires_grad)

    return make


zeros, ones = _filled(0), _filled(1)
zeros.__name__, zeros.__doc__ = "zeros", "A tensor of zeros of shape `size`."
ones.__name__, ones.__doc__ = "ones", "A tensor of ones of shape `size`."
function(zeros, method=False)
function(ones, method=False)


@function(method=False)
def empty(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """A tensor of shape `size` whose elements are whatever was in memory."""
    place = as_device(device)
    wanted = dtypes.get_default_dtype() if dtype is None else dtypes.as_dtype(dtype)
    return _finish(place.backend.empty(_shape(size), wanted), place, requires_grad)


@function(method=False)
def full(
    size: Sequence[int], fill_value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """A tensor of shape `size` with `fill_value` everywhere; dtype that of the number."""
    place = as_device(device)
    if isinstance(fill_value, Tensor):
        fill_value = fill_value.item()
    wanted = dtypes.result_type((), (), (fill_value,)) if dtype is None else dtypes.as_dtype(dtype)
    shape = (size,) if isinstance(size, int) else tuple(size)
    return _finish(place.backend.full(_shape(shape), fill_value, wanted), place, requires_grad)


def _like(input: Tensor, dtype: Any, device: Any) -> tuple[Any, np.dtype]:
    place = input._device if device is None else as_device(device)
    return place, input._data.dtype if dtype is None else dtypes.as_dtype(dtype)


@function(method=False)
def zeros_like(input: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Zeros with the shape, dtype and device of `input`."""
    return full_like(input, 0, dtype=dtype, device=device, requires_grad=requires_grad)


@function(method=False)
def ones_like(input: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Ones with the shape, dtype and device of `input`."""
    return full_like(input, 1, dtype=dtype, device=device, requires_grad=requires_grad)


@function(method=False)
def full_like(
    input: Tensor, fill_value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """`fill_value` everywhere, with the shape, dtype and device of `input`."""
    place, wanted = _like(input, dtype, device)
    made = _finish(place.backend.full(input._data.shape, fill_value, wanted), place, requires_grad)
    return _of_each_example(made, input)


@function(method=False)
def empty_like(input: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Any elements, with the shape, dtype and device of `input`."""
    place, wanted = _like(input, dtype, device)
    return _of_each_example(_finish(place.backend.empty(input._data.shape, wanted), place, requires_grad), input)


def _of_each_example(made: Tensor, input: Tensor) -> Tensor:
    """Inside vmap: one for each example that `input` has, so that it can be changed in place."""
    mine = batches_of([input])
    for number, level in open_batches() if mine else ():
        if number in mine:
            made = make_batched(made.expand((level.size, *made._data.shape)), number)
    return made


def new_zeros(self: Tensor, *size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Zeros of shape `size` with the dtype and device of this tensor."""
    return self.new_full(_shape(size), 0, dtype=dtype, device=device, requires_grad=requires_grad)


def new_ones(self: Tensor, *size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Ones of shape `size` with the dtype and device of this tensor."""
    return self.new_full(_shape(size), 1, dtype=dtype, device=device, requires_grad=requires_grad)


def new_full(
    self: Tensor, size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """`fill_value` in shape `size` with the dtype and device of this tensor."""
    place, wanted = _like(self, dtype, device)
    return _finish(place.backend.full(_shape((size,)), fill_value, wanted), place, requires_grad)


def new_empty(self: Tensor, *size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Any elements of shape `size` with the dtype and device of this tensor."""
    place, wanted = _like(self, dtype, device)
    return _finish(place.backend.empty(_shape(size), wanted), place, requires_grad)


def new_tensor(
    self: Tensor, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """A copy of `data` with the dtype and device of this tensor."""
    place, wanted = _like(self, dtype, device)
    return tensor(data, wanted, place, requires_grad)


for _method in (new_zeros, new_ones, new_full, new_empty, new_tensor):
    setattr(Tensor, _method.__name__, _method)
Tensor._from_values = staticmethod(
    lambda values: tensor(values, None if isinstance(values, Tensor) else dtypes.get_default_dtype())._data
)


@function(method=False)
def arange(
    start: Any, end: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """start, start + step, … below end; `arange(end)` starts at 0. int64 for ints, else the default dtype."""
    if end is None:
        start, end = 0, start
    if step == 0:
        raise ValueError("arange() cannot take steps of 0.")
    place = as_device(device)
    wanted = dtypes.result_type((), (), (start, end, step)) if dtype is None else dtypes.as_dtype(dtype)
    length = max(0, math.ceil((end - start) / step))
    xp = place.backend.xp
    array = xp.arange(length, dtype=np.int64 if wanted.kind in "biu" else np.float64)
    array = array if step == 1 else xp.multiply(array, step)
    array = array if start == 0 else xp.add(array, start)
    return _finish(place.backend.cast(array, wanted), place, requires_grad)


@function(method=False)
def linspace(
    start: float, end: float, steps: int, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """`steps` numbers from start to end, both included, evenly spaced."""
    place = as_device(device)
    wanted = dtypes.get_default_dtype() if dtype is None else dtypes.as_dtype(dtype)
    return _finish(place.backend.cast(place.backend.xp.linspace(start, end, steps), wanted), place, requires_grad)


@function(method=False)
def logspace(
    start: float, end: float, steps: int, base: float = 10.0, *, dtype: Any = None, device: Any = None,
    requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """`steps` numbers from base**start to base**end, evenly spaced in the exponent."""
    place = as_device(device)
    wanted = dtypes.get_default_dtype() if dtype is None else dtypes.as_dtype(dtype)
    xp = place.backend.xp
    return _finish(place.backend.cast(xp.power(base, xp.linspace(start, end, steps)), wanted), place, requires_grad)


@function(method=False)
def eye(n: int, m: int | None = None, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """The n × m matrix (square unless m is given) with ones on its diagonal."""
    place = as_device(device)
    wanted = dtypes.get_default_dtype() if dtype is None else dtypes.as_dtype(dtype)
    return _finish(place.backend.xp.eye(n, m, dtype=wanted), place, requires_grad)


# Random numbers -------------------------------------------------------------------------------------------------------


def _random(draw: Any, size: Sequence[Any], generator: Generator | None, dtype: Any, device: Any, grad: bool) -> Tensor:
    place = as_device(device)
    wanted = dtypes.get_default_dtype() if dtype is None else dtypes.as_dtype(dtype)
    made = random_tensor(lambda shape: draw(generator, shape, wanted, device=place.index), _shape(size), place)
    return made.requires_grad_() if grad else made


@function(method=False)
def rand(
    *size: Any, generator: Generator | None = None, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Uniform numbers in [0, 1); the same for one seed on every device."""
    return _random(random.uniform, size, generator, dtype, device, requires_grad)


@function(method=False)
def randn(
    *size: Any, generator: Generator | None = None, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """Numbers of the standard normal distribution; the same for one seed on every device (to a few ulps)."""
    return _random(random.normal, size, generator, dtype, device, requires_grad)


@function(method=False)
def randint(
    low: int, high: Any = None, size: Any = None, *, generator: Generator | None = None, dtype: Any = None,
    device: Any = None, requires_grad: bool = False,
) -> Tensor:  # fmt: skip
    """Integers in [low, high) of shape `size`; `randint(high, size)` starts at 0."""
    if size is None:
        low, high, size = 0, low, high
    place = as_device(device)
    wanted = dtypes.int64 if dtype is None else dtypes.as_dtype(dtype)

    def draw(shape: tuple[int, ...]) -> Any:
        drawn = random.integers(generator, shape, low, high, np.dtype(np.int64), place.index)
        return place.backend.cast(drawn, wanted)

    made = random_tensor(draw, _shape((size,)), place)
    return made.requires_grad_() if requires_grad else made


@function(method=False)
def randperm(n: int, *, generator: Generator | None = None, dtype: Any = None, device: Any = None) -> Tensor:
    """A random order of 0 … n − 1, int64."""
    place = as_device(device)
    wanted = dtypes.int64 if dtype is None else dtypes.as_dtype(dtype)

    def draw(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return place.backend.cast(random.permutation(generator, n, place.index), wanted)
        orders = [draw((n,)) for _ in range(math.prod(shape[:-1]))]  # one for each example of vmap
        return place.backend.xp.stack(orders).reshape(shape)

    return random_tensor(draw, (n,), place)


@function(method=False)
def rand_like(input: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Uniform numbers in [0, 1) with the shape, dtype and device of `input`."""
    place, wanted = _like(input, dtype, device)
    return rand(input._data.shape, dtype=wanted, device=place, requires_grad=requires_grad)


@function(method=False)
def randn_like(input: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Standard normal numbers with the shape, dtype and device of `input`."""
    place, wanted = _like(input, dtype, device)
    return randn(input._data.shape, dtype=wanted, device=place, requires_grad=requires_grad)


@function(method=False)
def normal(
    mean: float = 0.0, std: float = 1.0, size: Any = (), *, generator: Generator | None = None, dtype: Any = None,
    device: Any = None,
) -> Tensor:  # fmt: skip
    """Normal numbers of the given mean and standard deviation, of shape `size`."""
    place = as_device(device)
    wanted = dtypes.get_default_dtype() if dtype is None else dtypes.as_dtype(dtype)
    return random_tensor(
        lambda shape: random.normal(generator, shape, wanted, mean, std, place.index), _shape((size,)), place
    )


@function(method=False)
def bernoulli(input: Tensor, *, generator: Generator | None = None) -> Tensor:
    """1 with the probability that `input` gives, else 0; shape, dtype and device of `input`."""
    if open_batches():
        return (rand(input.shape, generator=generator, dtype=input.dtype, device=input.device) < input).to(input.dtype)
    data = input._data
    return wrap(random.bernoulli(generator, data, data.shape, data.dtype, input._device.index), input._device)


def _fill_method(draw: Any) -> Any:
    def method(self: Tensor, a: float, b: float, *, generator: Generator | None = None) -> Tensor:
        from gpuad.autograd.modes import state
        from gpuad.autograd.op import check_in_place

        recording = state.enabled and self._requires_grad
        check_in_place(draw.__name__, self, self._data.dtype, self._data.shape, recording)
        if Interpreters.active:
            return self.copy_(random_tensor(
                lambda shape: draw(generator, shape, self._data.dtype, a, b, self._device.index),
                self._data.shape, self._device,
            ))  # fmt: skip
        if recording:  # what was there before no longer counts
            drawn = draw(generator, self._data.shape, self._data.dtype, a, b, self._device.index)
            self[...] = wrap(drawn, self._device)
            return self
        draw(generator, self._data.shape, self._data.dtype, a, b, self._device.index, out=self._data)
        self._cell[0] += 1
        return self

    return method


_uniform, _normal = _fill_method(random.uniform), _fill_method(random.normal)


def uniform_(self: Tensor, from_: float = 0.0, to: float = 1.0, *, generator: Generator | None = None) -> Tensor:
    """Fill with uniform numbers in [from_, to), in place."""
    return _uniform(self, from_, to, generator=generator)


def normal_(self: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Generator | None = None) -> Tensor:
    """Fill with normal numbers, in place."""
    return _normal(self, mean, std, generator=generator)


Tensor.uniform_, Tensor.normal_ = uniform_, normal_  # type: ignore[attr-defined]


@function(method=False)
def manual_seed(seed: int) -> Generator:
    """Restart the default generator, of every device, at `seed`."""
    return random.manual_seed(seed)
