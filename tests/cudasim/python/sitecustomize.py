"""Puts the simulator under CuPy; on PYTHONPATH by `run`.

The installed CuPy stays as it is: two of its modules are found elsewhere, two
are patched when they are loaded, and the CUDA libraries are loaded from here
before CuPy looks for them.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_overrides = os.path.join(_here, "cudasim_overrides")


def _patch_cub(module):
    # Contains GPU code: have it decline, so that CuPy takes its own kernels.
    for name in ("cub_reduction", "cub_scan", "cub_histogram"):
        setattr(module, name, lambda *args: None)


def _patch_generator(module):
    # Contains GPU code, and would return whatever was in memory.
    class Generator(module.Generator):
        def __init__(self, *args, **kwargs):
            raise NotImplementedError("cudasim does not simulate cupy.random.Generator; cupy.random.RandomState works")

    module.Generator = Generator


_patches = {"cupy.cuda.cub": _patch_cub, "cupy.random._generator_api": _patch_generator}


class _PatchingLoader(importlib.machinery.ExtensionFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        _patches[self.name](module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self):
        self.loaded = False

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("cupy", "cupy_backends"):
            return None
        if not self.loaded:
            self.loaded = True
            import cudasim

            cudasim._load_libraries()
        if name == "cupy_backends.cuda.api.runtime":
            suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
            file = os.path.join(_overrides, "runtime" + suffix)
        elif name == "cupy.cuda.thrust":
            file = os.path.join(_overrides, "thrust.py")
        elif name in _patches:
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is not None and spec.origin:
                spec.loader = _PatchingLoader(name, spec.origin)
            return spec
        else:
            return None
        return importlib.util.spec_from_file_location(name, file)


sys.meta_path.insert(0, _Finder())


def _next_sitecustomize():
    """Runs the sitecustomize that this one hides, if there is one."""
    path = [p for p in sys.path if os.path.abspath(p or ".") != _here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


_next_sitecustomize()
