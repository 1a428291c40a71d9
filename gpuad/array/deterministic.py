"""Whether results must be the same, bit for bit, in every run; PyTorch's switch.

On the host they always are, and so are products, sums and row operations on CUDA. What is not: additions at indices
that may repeat (the gradients of indexing, gather and embedding), which CUDA does by atomic additions in any order.
"""

from __future__ import annotations

from typing import Any

_mode = False


def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
    """Let additions at repeated indices on CUDA be done in a fixed order: they are sorted first, which takes longer.

    warn_only is PyTorch's; every operation here has a deterministic form, so there is nothing to warn of.
    """
    global _mode
    _mode = bool(mode)


def are_deterministic_algorithms_enabled() -> bool:
    """Whether use_deterministic_algorithms is on."""
    return _mode


def add_at(cupy: Any, out: Any, key: Any, values: Any) -> None:
    """out[key] += values on CUDA in a fixed order: the places are sorted, and each sums what is added to it in turn."""
    places = cupy.arange(out.size, dtype="int64").reshape(out.shape)[key]
    terms = cupy.ascontiguousarray(cupy.broadcast_to(values, places.shape), out.dtype).reshape(-1)
    places = places.reshape(-1)
    order = cupy.argsort(places, kind="stable")
    flat = out if out.flags.c_contiguous else cupy.ascontiguousarray(out)
    if places.size:
        _kernel(cupy)(places[order], order, terms, places.size, flat.reshape(-1))
    if flat is not out:
        out[...] = flat


_made: Any = None


def _kernel(cupy: Any) -> Any:
    global _made
    if _made is None:
        _made = cupy.ElementwiseKernel(
            "raw int64 places, raw int64 order, raw T terms, int64 count",
            "T out",
            """
            long long low = 0;
            for (long long high = count; low < high;) {
              const long long middle = (low + high) / 2;
              if (places[middle] < i) low = middle + 1; else high = middle;
            }
            for (; low < count && places[low] == i; ++low) out += terms[order[low]];
            """,
            "gpuad_add_at_in_order",
        )
    return _made
