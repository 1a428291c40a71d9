"""Between dtypes, devices, hosts and people: to(), numpy(), item(), repr, DLPack, NumPy's protocols."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuad.array import dtypes, streams
from gpuad.array.device import Device, as_device, of_array
from gpuad.autograd.batching import shift
from gpuad.autograd.op import function
from gpuad.autograd.primitive import Primitive, linear, primitive
from gpuad.errors import AutogradError
from gpuad.ops.samples import HERE, S
from gpuad.tensor import Tensor, wrap

cast = primitive(
    "cast",
    lambda backend, input, *, dtype: backend.copy(input) if input.dtype == dtype else backend.cast(input, dtype),
    vjp={"input": lambda g, input_dtype: _back(g, input_dtype)},
    jvp=linear,
    samples=[(S((3, 4)), {"dtype": dtypes.float64}), (S(()), {"dtype": dtypes.float64})],
    doc="The elements in another dtype.",
    batch=shift,
)


def _back(g: Any, dtype: np.dtype) -> Any:
    return g.to(dtype) if isinstance(g, Tensor) else of_array(g).backend.cast(g, dtype)


# A copy to another device; the gradient is copied back to where the input came from.
move: Primitive = primitive(
    "move",
    lambda backend, input, *, device, source: device.backend.receive(input),
    vjp={"input": lambda g, source, device: move(g, device=source, source=device)},
    jvp=linear,
    samples=[(S((3, 4)), {"source": HERE, "device": as_device("cpu")})],
    doc="A copy on another device.",
    batch=shift,
    moves=True,
)


@function
def to(input: Tensor, *args: Any, dtype: Any = None, device: Any = None, non_blocking: bool = False,
       copy: bool = False) -> Tensor:  # fmt: skip
    """The tensor in another dtype and/or on another device; itself where nothing changes and copy is False.

    to(dtype, non_blocking=False, copy=False), to(device=None, dtype=None, non_blocking=False, copy=False),
    to(other, non_blocking=False, copy=False). Differentiable: the gradient goes back to where and what it came from.
    non_blocking: copies between devices and to a device never wait, those to the host always do, whatever it says.
    Errors: TypeError for other arguments.
    """
    if args:
        device, dtype, copy = _positional(args, device, dtype, copy)
    if isinstance(device, int):
        device = f"cuda:{device}"
    wanted = input._data.dtype if dtype is None else dtypes.as_dtype(dtype)
    place = input._device if device is None else as_device(device)
    out = input
    if wanted != input._data.dtype:
        out = cast(out, dtype=wanted)
    if place is not input._device:
        out = move(out, device=place, source=input._device)
    return out.clone() if copy and out is input else out


def _positional(args: tuple, device: Any, dtype: Any, copy: bool) -> tuple[Any, Any, bool]:
    """(device, dtype, copy) of the positional arguments of to(); the first says which of its forms it is."""
    first, rest = args[0], args[1:]
    if isinstance(first, Tensor):
        found: dict[str, Any] = {"device": first._device, "dtype": first._data.dtype}
    elif first is None or _names_device(first):
        found = {"device": first}
        if rest:
            found["dtype"], rest = rest[0], rest[1:]
    else:
        found = {"dtype": first}
    given = {"device": device, "dtype": dtype}
    twice = [name for name in found if found[name] is not None and given[name] is not None]
    wrong = found.get("dtype")
    if (
        twice or len(rest) > 2 or not all(isinstance(flag, bool) for flag in rest)
        or isinstance(wrong, bool) or (wrong is not None and _names_device(wrong))
    ):  # fmt: skip
        raise TypeError(
            f"to() got {', '.join(repr(a) if not isinstance(a, Tensor) else 'a Tensor' for a in args)}"
            + (f" and {twice[0]}= besides" if twice else "")
            + "; it takes to(dtype, non_blocking, copy), to(device, dtype, non_blocking, copy) or "
            "to(other, non_blocking, copy), the last two True or False."
        )
    return found.get("device", device), found.get("dtype", dtype), rest[1] if len(rest) == 2 else copy


def _names_device(x: Any) -> bool:
    if isinstance(x, str):
        return x.partition(":")[0] in ("cpu", "cuda")
    return isinstance(x, Device) or (isinstance(x, int) and not isinstance(x, bool))


@function
def cpu(input: Tensor) -> Tensor:
    """The tensor on cpu."""
    return to(input, "cpu")


def cuda(input: Tensor, device: Any = None) -> Tensor:
    """The tensor on a CUDA device, the current one unless given."""
    return to(input, "cuda" if device is None else as_device(device))


@function
def type_as(input: Tensor, other: Tensor) -> Tensor:
    """The tensor in the dtype of another."""
    return to(input, other.dtype)


def _caster(name: str, dtype: Any) -> Any:
    def method(input: Tensor) -> Tensor:
        return to(input, dtype)

    method.__name__, method.__doc__ = name, f"The tensor as {dtype}."
    return method


for _name in ("half", "double", "short", "long"):
    setattr(Tensor, _name, _caster(_name, dtypes.BY_NAME[_name]))
Tensor.float, Tensor.int, Tensor.bool = (  # type: ignore[attr-defined]
    _caster("float", dtypes.float32), _caster("int", dtypes.int32), _caster("bool", dtypes.bool_),
)  # fmt: skip
Tensor.bfloat16 = _caster("bfloat16", "bfloat16")  # type: ignore[attr-defined]


# To the host ----------------------------------------------------------------------------------------------------------


def item(self: Tensor) -> Any:
    """The number in a tensor of one element; waits for the device."""
    if self._data.size != 1:
        raise ValueError(f"item() takes a tensor of one element, this one has shape {tuple(self.shape)}; see tolist().")
    return self._device.backend.to_host(self._data).item()


def tolist(self: Tensor) -> Any:
    """The elements as nested lists of Python numbers; waits for the device."""
    return self._device.backend.to_host(self._data).tolist()


def numpy(self: Tensor, *, force: bool = False) -> np.ndarray:
    """The elements as a numpy.ndarray that shares the memory of a cpu tensor.

    Refused for tensors that require grad (detach() first) and on CUDA (cpu() first), unless force=True does both.
    """
    if not force:
        if self._requires_grad:
            raise AutogradError("numpy() of a tensor that requires grad would lose the graph; use x.detach().numpy().")
        if self._device.type != "cpu":
            raise TypeError(f"numpy() of a tensor on {self._device}; copy it to the host first: x.cpu().numpy().")
    return self._device.backend.to_host(self._data)


def _no_graph_lost(self: Tensor, what: str) -> None:
    if self._requires_grad:
        raise AutogradError(
            f"{what} of a tensor that requires grad would lose the graph silently; use x.detach() if that is meant."
        )


def array_protocol(self: Tensor, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """numpy.asarray(tensor): for cpu tensors that require no grad."""
    _no_graph_lost(self, "A NumPy array")
    if self._device.type != "cpu":
        raise TypeError(f"A NumPy array of a tensor on {self._device}; copy it to the host first: x.cpu().")
    array = self._data
    if dtype is not None and np.dtype(dtype) != array.dtype:
        return array.astype(dtype)
    return array.copy() if copy else array


def cuda_array_interface(self: Tensor) -> Any:
    """CuPy's and Numba's view of a CUDA tensor that requires no grad."""
    if self._device.type != "cuda":
        raise AttributeError("__cuda_array_interface__ is for tensors on CUDA devices.")
    if self._requires_grad:
        raise AttributeError(
            "__cuda_array_interface__ of a tensor that requires grad would lose the graph silently; use x.detach()."
        )
    return self._data.__cuda_array_interface__


def cupy(self: Tensor) -> Any:
    """The elements as a cupy.ndarray that shares the memory of a tensor on a CUDA device.

    It is what a cupy.RawKernel takes. Refused for tensors that require grad (detach() first) and on cpu.
    """
    if self._requires_grad:
        raise AutogradError(
            "A CuPy array of a tensor that requires grad would lose the graph silently. Use x.detach(), or put the "
            "CuPy code with its gradient into a gpuad.autograd.Function."
        )
    if self._device.type != "cuda":
        raise TypeError(f"A CuPy array of a tensor on {self._device}; move it first: x.to('cuda').")
    return self._data


def dlpack(
    self: Tensor, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
) -> Any:
    """The tensor's memory as a DLPack capsule, without a copy unless `copy` is True or dl_device is another device.

    stream: the consumer's, which will wait for the work that is under way. max_version, dl_device, copy: as the array
    API standard has them. Raises AutogradError where the tensor requires grad, BufferError where a copy is needed and
    copy is False.
    """
    _no_graph_lost(self, "A DLPack capsule")
    backend, data = self._device.backend, self._data
    own = tuple(map(int, data.__dlpack_device__()))
    if dl_device is not None and tuple(map(int, dl_device)) != own:
        if copy is False or int(dl_device[0]) != 1:
            raise BufferError(
                f"__dlpack__ of a tensor on {self._device} cannot give memory of device {tuple(dl_device)} "
                f"{'without a copy' if copy is False else ''}; move the tensor first, x.to(…)."
            )
        data, stream = backend.to_host(data), None
    elif copy:
        data = backend.copy(data)
    named = {} if max_version is None else {"max_version": max_version}
    return backend.inside(data.__dlpack__, stream=stream, **named)


def dlpack_device(self: Tensor) -> Any:
    """(kind, index) of the device, as DLPack numbers them."""
    return self._data.__dlpack_device__()


def record_stream(self: Tensor, stream: Any) -> None:
    """Say that `stream` uses the tensor's memory: it is not reused before the work which that stream has when the
    tensor goes is done. Needed where a tensor is used on another stream than it was made on; see gpuad.cuda.

    stream: a gpuad.cuda.Stream or CuPy's. On cpu it does nothing.
    """
    self._device.backend.record_stream(self._data, getattr(stream, "cupy", stream))


def is_pinned(self: Tensor) -> bool:
    """Whether a cpu tensor lies in page-locked memory."""
    return isinstance(self._data, np.ndarray) and streams.is_pinned(self._data)


def pin_memory(self: Tensor) -> Tensor:
    """A cpu tensor in page-locked memory, from which copies to a CUDA device run beside all else; itself if it is.

    Raises TypeError for a tensor on a CUDA device, AutogradError where it requires grad, and DeviceError where there is
    no CUDA device.
    """
    if not isinstance(self._data, np.ndarray):
        raise TypeError(f"pin_memory() is for tensors on cpu, this one is on {self._device}; use x.cpu().pin_memory().")
    if is_pinned(self):
        return self
    _no_graph_lost(self, "A pinned copy")
    made = streams.pinned_empty(self._data.shape, self._data.dtype)
    np.copyto(made, self._data)
    return wrap(made, self._device)


def _number(kind: type) -> Any:
    def convert(self: Tensor) -> Any:
        return kind(item(self))

    convert.__doc__ = f"{kind.__name__}(item())."
    return convert


def to_bool(self: Tensor) -> bool:
    """Whether the one element is not zero; waits for the device."""
    if self._data.size != 1:
        raise ValueError(f"The truth value of a tensor of shape {tuple(self.shape)} is ambiguous; use any() or all().")
    return bool(item(self))


def to_index(self: Tensor) -> int:
    """The number of an integer tensor of one element, as an index."""
    if self._data.dtype.kind not in "iu" or self._data.size != 1:
        raise TypeError("Only integer tensors of one element can be used as an index.")
    return item(self)


def representation(self: Tensor) -> str:
    """tensor(values, device=…, dtype=…, grad_fn=…) as PyTorch prints it."""
    host = self._device.backend.to_host(self._data)
    shown = host.astype(np.float32) if host.dtype.char == dtypes.BFLOAT16 else host  # whose digits NumPy does not count
    body = np.array2string(shown, separator=", ", precision=4, threshold=1000, edgeitems=3, prefix="tensor(")
    extra = [body]
    if self._device.type != "cpu":
        extra.append(f"device='{self._device}'")
    default = (dtypes.bool_, dtypes.int64, dtypes.get_default_dtype())[dtypes.category(host.dtype)]
    if host.dtype != default or not host.size:
        extra.append(f"dtype=gpuad.{host.dtype}")
    if self._node is not None:
        extra.append(f"grad_fn=<{self._node.op.name}>")
    elif self._requires_grad:
        extra.append("requires_grad=True")
    return f"tensor({', '.join(extra)})"


def text_format(self: Tensor, spec: str) -> str:
    """format() of the number of a 0-d tensor, else of the repr."""
    return format(item(self), spec) if not self._data.ndim else format(str(self), spec)


def deep_copy(self: Tensor, memo: dict) -> Tensor:
    """A leaf with its own memory (copy.deepcopy); non-leaves cannot be copied."""
    if self._node is not None:
        raise AutogradError("Only leaf tensors can be deep-copied; use x.detach().clone() or x.clone().")
    if id(self) in memo:
        return memo[id(self)]
    made = wrap(self._device.backend.copy(self._data), self._device, type(self))
    made._requires_grad = self._requires_grad
    memo[id(self)] = made
    if self._grad is not None:
        made._grad = deep_copy(self._grad, memo)
    return made


def _rebuild(cls: type, array: np.ndarray, device: str, requires_grad: bool) -> Tensor:
    made = wrap(as_device(device).backend.asarray(array), as_device(device), cls)
    made._requires_grad = requires_grad
    return made


def reduce(self: Tensor, protocol: Any) -> Any:
    """Pickling (for sending to another process): the elements, the device's name, requires_grad."""
    if self._node is not None:
        raise AutogradError("Only leaf tensors can be pickled; detach() first.")
    host = self._device.backend.to_host(self._data)
    return _rebuild, (type(self), host, str(self._device), self._requires_grad)


def copy_(self: Tensor, src: Any, non_blocking: bool = False) -> Tensor:
    """Write the elements of src (broadcast, converted, from any device) into this tensor; recorded."""
    if isinstance(src, Tensor):
        src = to(src, self._device, self._data.dtype)
    self[...] = src
    return self


_METHODS = {
    "cuda": cuda, "item": item, "tolist": tolist, "numpy": numpy, "__array__": array_protocol, "__dlpack__": dlpack,
    "record_stream": record_stream, "is_pinned": is_pinned, "pin_memory": pin_memory,
    "__dlpack_device__": dlpack_device, "cupy": cupy,
    "__cupy_get_ndarray__": cupy, "__float__": _number(float), "__int__": _number(int),
    "__complex__": _number(complex), "__bool__": to_bool, "__index__": to_index, "__repr__": representation,
    "__format__": text_format, "__deepcopy__": deep_copy, "__reduce_ex__": reduce, "copy_": copy_,
}  # fmt: skip
for _name, _function in _METHODS.items():
    setattr(Tensor, _name, _function)
Tensor.__cuda_array_interface__ = property(cuda_array_interface)  # type: ignore[attr-defined]
