"""Dropout: elements set to zero at random."""

from __future__ import annotations

from typing import Any

from gpuad.array import random
from gpuad.autograd.batching import Batch
from gpuad.autograd.levels import open_batches
from gpuad.autograd.op import function, random_tensor
from gpuad.autograd.primitive import Primitive, linear, primitive
from gpuad.ops.arithmetic import where
from gpuad.ops.samples import S
from gpuad.tensor import Tensor


def _drop_of_all(batch: Batch, op: Any, inputs: Any, params: dict) -> Any:
    """The same elements of each example."""
    values = inputs[0].value
    return values * op(values.new_ones(values.shape[1:]), **params)


# Which elements are dropped is never stored: `taken`, blocks of random numbers, tells it again in the backward pass.
drop: Primitive = primitive(
    "dropout",
    lambda backend, input, *, p, taken: random.dropout(backend.contiguous(input), p, taken),
    vjp={"input": lambda g, p, taken: drop(g, p=p, taken=taken)},
    jvp=linear,
    samples=[
        (S(shape), {"p": p, "taken": random.Taken(0, 7, 3)})
        for shape, p in (((3, 4), 0.5), ((5, 7), 0.9), ((), 0.5), ((0, 3), 0.5))
    ],
    doc="input / p where a random number is below p, else 0.",
    batch=_drop_of_all,
)


@function(nn=True)
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Each element 0 with probability p, else divided by 1 − p; the input itself when not training.

    The same seed drops the same elements on every device. Source: Srivastava et al., "Dropout", JMLR 2014.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout takes a probability between 0 and 1, got p={p}.")
    if not training or p == 0.0:
        return input
    device = input._device
    if p == 1.0:
        out = input * 0.0
    elif open_batches():  # inside vmap, each example may have its own
        kept = random_tensor(
            lambda shape: random.bernoulli(None, 1.0 - p, shape, device=device.index), input._data.shape, device
        )
        out = where(kept, input * (1.0 / (1.0 - p)), 0.0)
    else:
        taken = random.take_dropout(None, input._data.size, device.index)
        out = drop(input, p=1.0 - p, taken=taken)
    return input.copy_(out) if inplace else out
