"""Sums over all blocks of a kernel in the same launch: the last block to finish adds up what all have left.

Each block stores its partial result, and counts itself; the one that counts last sees all of them and sums them in the
order of the blocks, so that the result does not depend on which block was last. Counters return to 0 by themselves.
Source: CUDA programming guide, "Memory Fence Functions", and NVIDIA's threadFenceReduction sample.
"""

from __future__ import annotations

from typing import Any

# Counters of a stream: as many tiles may be summed by several blocks at once.
COUNTERS = 1024
# Blocks that keep a large device busy: four for each of an H100's 132 multiprocessors.
BLOCKS = 528

SOURCE = r"""
// Whether the calling block is the last of `blocks` to get here; for all its threads.
__device__ inline bool gpuad_is_last_block(unsigned int* counter, unsigned int blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    last = atomicAdd(counter, 1u) == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}
"""

_counters: dict[tuple[int, int], Any] = {}


def counters() -> Any:
    """The counters of the current device and stream, all 0 between launches: streams may run at the same time."""
    import cupy

    key = cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr
    found = _counters.get(key)
    if found is None:
        found = _counters[key] = cupy.zeros(COUNTERS, "uint32")
    return found
