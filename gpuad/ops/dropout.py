"""Dropout: elements set to zero at random."""

from __future__ import annotations

from gpuad.array import random
from gpuad.autograd.elementwise import elementwise
from gpuad.autograd.op import function, random_tensor
from gpuad.kernels.scalar import where
from gpuad.ops.samples import S
from gpuad.tensor import Tensor

keep = elementwise("keep", lambda input, kept, scale: where(kept, input * scale, 0.0),
                   [(S((3, 4)), S((3, 4), kind="bool"), 2.0)], "input · scale where kept, else 0.",
                   nn=True)  # fmt: skip


@function(nn=True)
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Each element 0 with probability p, else divided by 1 − p; the input itself when not training.

    The same seed drops the same elements on every device. Source: Srivastava et al., "Dropout", JMLR 2014.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout takes a probability between 0 and 1, got p={p}.")
    if not training or p == 0.0:
        return input
    if p == 1.0:
        out = input * 0.0
    else:
        device = input._device
        kept = random_tensor(
            lambda shape: random.bernoulli(None, 1.0 - p, shape, device=device.index), input._data.shape, device
        )
        out = keep(input, kept, 1.0 / (1.0 - p))
    return input.copy_(out) if inplace else out
