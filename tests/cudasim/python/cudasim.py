"""Counters of the simulated CUDA devices.

    import cudasim
    cudasim.reset()
    ...
    cudasim.stats()['kernels']          # {name: launches}

    with cudasim.record() as r:
        ...
    r.kernel_launches, r.stats['syncs'], r.trace

The module exists only under the simulator.
"""

import contextlib
import ctypes
import json
import os

_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_core = None


def _load_libraries():
    """Loads the stand-ins for the CUDA libraries, so that those who ask for
    them by name (CuPy's modules, cuda-pathfinder) get these."""
    global _core
    if _core is not None:
        return
    lib = os.path.join(_root, "lib")
    core = ctypes.CDLL(os.path.join(lib, "libcudasim.so"), mode=ctypes.RTLD_GLOBAL)
    for name in sorted(os.listdir(lib)):
        ctypes.CDLL(os.path.join(lib, name), mode=ctypes.RTLD_GLOBAL)
    core.cudasim_stats.restype = ctypes.c_char_p
    core.cudasim_trace.restype = ctypes.c_char_p
    core.cudasim_trace.argtypes = [ctypes.c_int]
    core.cudasim_reset.restype = None
    _core = core


_load_libraries()


def stats():
    """All counters since the start or the last reset, as a dict:

    kernels         {name: number of launches}, outside graphs
    library         {name: number of calls}, cuBLAS, cuRAND and sorting
    copies          {'h2d' | 'd2h' | 'd2d' | 'p2p' | 'h2h': {count, bytes}}
    memsets, host_functions
    mallocs, malloc_bytes, frees    device memory asked of the driver
    syncs           {name: number of calls} that block the host
    graph_launches, and what ran inside graphs: graph_kernels (kernels and
                    library calls), graph_copies, graph_memsets
    memory          bytes in use, per device
    """
    return json.loads(_core.cudasim_stats())


def reset():
    """Zeroes the counters, and clears the error that a faulty kernel left."""
    _core.cudasim_reset()


def _difference(after, before):
    if isinstance(after, dict):
        result = {}
        for key, value in after.items():
            d = _difference(value, before.get(key, {} if isinstance(value, dict) else 0))
            if not isinstance(value, dict) and isinstance(key, str) or d:
                result[key] = d
        return result
    if isinstance(after, list):
        return after
    return after - before


def _counts(d):
    return {k: v for k, v in d.items() if v}


class Recording:
    """What happened in a `with cudasim.record()` block; filled at its end.

    stats   as cudasim.stats(), of the block alone
    trace   with record(trace=True): the events in order, as tuples
            (type, name, bytes, device, stream number, in a graph)
    """

    def __init__(self):
        self.stats = None
        self.trace = None

    @property
    def kernel_launches(self):
        """Kernels launched one by one (not from graphs)."""
        return sum(self.stats["kernels"].values())

    @property
    def graph_kernels(self):
        return sum(self.stats["graph_kernels"].values())

    @property
    def library_calls(self):
        return sum(self.stats["library"].values())

    @property
    def syncs(self):
        return sum(self.stats["syncs"].values())

    def copies(self, kind):
        """(count, bytes) of the copies of a kind, such as 'd2h'."""
        c = self.stats["copies"].get(kind, {"count": 0, "bytes": 0})
        return c["count"], c["bytes"]


@contextlib.contextmanager
def record(trace=False):
    recording = Recording()
    before = stats()
    if trace:
        _core.cudasim_trace(1)
    try:
        yield recording
    finally:
        if trace:
            recording.trace = [tuple(e) for e in json.loads(_core.cudasim_trace(2))]
            _core.cudasim_trace(0)
        difference = _difference(stats(), before)
        for key in ("kernels", "library", "syncs", "graph_kernels"):
            difference[key] = _counts(difference.get(key, {}))
        for key in ("copies", "graph_copies"):
            difference[key] = {k: c for k, c in difference.get(key, {}).items() if c["count"]}
        recording.stats = difference
