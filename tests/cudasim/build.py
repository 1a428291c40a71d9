"""Builds the simulator for one Python and its CuPy; see README.md.

Run by `setup`.  Everything goes to a folder of the cache whose name depends on
what it was built from, so that a finished build is found again at once.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUPY_PACKAGE = "cupy-cuda13x"
CXX = os.environ.get("CUDASIM_CXX") or "g++"

# How kernels are compiled.  -fwrapv: integer overflow wraps on a GPU.
KERNEL_FLAGS = [
    "-std=gnu++17",
    "-O2",
    "-fPIC",
    "-w",
    "-fno-gnu-unique",
    "-fno-threadsafe-statics",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-semantic-interposition",
    "-fwrapv",
]


def die(message):
    sys.exit(f"cudasim: {message}")


def cache_home():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "cudasim"


def machine_flags():
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = re.search(r"^flags\s*:(.*)$", cpu, re.M)
    have = set(flags.group(1).split()) if flags else set()
    wanted = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}
    return ["-march=x86-64-v3"] if wanted <= have else []


def check_environment():
    """Returns (CuPy's version, the folder it is installed in)."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        die("only Linux on x86_64 is supported")
    if not shutil.which(CXX):
        die(f"the C++ compiler '{CXX}' (version 12 or later) is needed: apt-get install g++")
    try:
        version = importlib.metadata.version(CUPY_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        die(f"{CUPY_PACKAGE} is not installed in {sys.executable}: {sys.executable} -m pip install {CUPY_PACKAGE}")
    spec = importlib.util.find_spec("cupy_backends")
    return version, Path(next(iter(spec.submodule_search_locations))).parent


def source_files():
    return sorted(
        p
        for folder in ("src", "include", "python")
        for p in (HERE / folder).rglob("*")
        if p.is_file() and p.suffix != ".pyc"
    ) + [HERE / "build.py"]


def build_key(cupy_version):
    h = hashlib.sha256()
    for p in source_files():
        h.update(str(p.relative_to(HERE)).encode() + b"\0" + p.read_bytes() + b"\0")
    compiler = subprocess.run([CXX, "--version"], capture_output=True, text=True)
    h.update(repr((cupy_version, sysconfig.get_config_var("EXT_SUFFIX"), compiler.stdout, machine_flags())).encode())
    return h.hexdigest()[:16]


def run(cmd, **kwargs):
    r = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, **kwargs)
    if r.returncode != 0:
        die(f"failed: {' '.join(str(c) for c in cmd)}\n{r.stdout}{r.stderr}")
    return r.stdout


def pip(*args, env=None):
    cmd = [sys.executable, "-m", "pip", *args, "--quiet", "--disable-pip-version-check"]
    run(cmd, env={**os.environ, **(env or {})})


class Build:
    def __init__(self, root, downloads, cupy_version, site):
        self.root = root
        self.downloads = downloads
        self.cupy_version = cupy_version
        self.site = site  # where CuPy is installed
        self.tmp = root / "build"
        self.headers = self.tmp / "cuda-headers"
        self.lib = root / "lib"
        for d in (self.tmp, self.headers, self.lib, root / "pch"):
            d.mkdir(parents=True, exist_ok=True)
        self.cuda_version = int(
            run(
                [sys.executable, "-c", "from cupy_backends.cuda.api import driver\nprint(driver.get_build_version())"]
            ).split()[-1]
        )

    # ------------------------------------------------------------ downloads

    def download(self, pattern, requirement, *options, env=None):
        """The file that pip downloads for a requirement (kept for later builds)."""
        found = sorted(self.downloads.glob(pattern))
        if not found:
            with tempfile.TemporaryDirectory(dir=self.downloads) as d:
                pip("download", "--no-deps", "--dest", d, *options, requirement, env=env)
                for f in Path(d).iterdir():
                    os.replace(f, self.downloads / f.name)
            found = sorted(self.downloads.glob(pattern))
        if not found:
            die(f"pip brought no file {pattern} for {requirement}")
        return found[-1]

    def get_cuda_headers(self):
        major, minor = self.cuda_version // 1000, self.cuda_version % 1000 // 10
        for package in ("nvidia-cuda-runtime", "nvidia-cuda-crt"):
            wheel = self.download(
                f"{package.replace('-', '_')}-{major}.{minor}.*.whl", f"{package}>={major}.{minor},<{major}.{minor + 1}"
            )
            with zipfile.ZipFile(wheel) as z:
                prefix = f"nvidia/cu{major}/include/"
                for name in z.namelist():
                    if name.startswith(prefix) and name.endswith((".h", ".hpp")):
                        target = self.headers / name[len(prefix) :]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(z.read(name))

    def get_cupy_source(self):
        # pip prepares the metadata of what it downloads; a "stub" build of
        # CuPy does that without a CUDA toolkit.  Nothing is compiled.
        sdist = self.download(
            f"cupy-{self.cupy_version}.tar.gz",
            f"cupy=={self.cupy_version}",
            "--no-binary",
            "cupy",
            env={"CUPY_INSTALL_USE_STUB": "1"},
        )
        with tarfile.open(sdist) as t:
            members = [
                m
                for m in t.getmembers()
                if "/cupy_backends/" in m.name or "/cupy/_core/" not in m.name and m.name.endswith((".pxd", ".pxi"))
            ]
            t.extractall(self.tmp, members)
        return self.tmp / f"cupy-{self.cupy_version}"

    # -------------------------------------------------------------- libraries

    def compile(self, name):
        obj = self.tmp / f"{name}.o"
        run(
            [
                CXX,
                "-std=c++17",
                "-O3",
                "-Wall",
                *machine_flags(),
                "-fPIC",
                "-fvisibility=hidden",
                f"-DSIM_CUDA_VERSION={self.cuda_version}",
                f'-DSIM_BUILD_ID="{self.root.name}"',
                "-I",
                self.headers,
                "-I",
                HERE / "src/compat",
                "-I",
                HERE / "include",
                "-c",
                HERE / f"src/{name}.cpp",
                "-o",
                obj,
            ]
        )
        return obj

    def link(self, soname, objects, libs=(), version=None):
        cmd = [
            CXX,
            "-shared",
            f"-Wl,-soname,{soname}",
            "-Wl,-z,defs",
            "-Wl,--no-as-needed",
            "-o",
            self.lib / soname,
            *objects,
        ]
        if version:  # the symbol version that CuPy's modules ask for
            script = self.tmp / f"{soname}.map"
            script.write_text(f"{version} {{ global: *; }};\n")
            cmd.append(f"-Wl,--version-script={script}")
        if libs:
            cmd += [f"-L{self.lib}", *(f"-l:{x}" for x in libs), "-Wl,-rpath,$ORIGIN"]
        run([*cmd, "-ldl", "-lpthread"])

    def undefined_symbols(self, module):
        """The versioned symbols that a CuPy module wants: {version: {symbol}}."""
        wanted = {}
        for so in self.site.glob(module + ".*.so"):
            for line in run(["nm", "-D", "--undefined-only", so]).splitlines():
                m = re.match(r"\s*U (\w+)@+(lib\w+\.so\.\d+)$", line)
                if m:
                    wanted.setdefault(m.group(2), set()).add(m.group(1))
        return wanted

    def stubs(self, symbols, status):
        """C++ for functions that say they are not simulated and return `status`."""
        lines = ["#include <cstdio>"]
        for s in sorted(symbols):
            if s.endswith(("GetErrorName", "GetErrorString")):
                lines.append(f'extern "C" const char* {s}() {{ return "not simulated"; }}')
                continue
            lines.append(
                f'extern "C" int {s}() {{ fprintf(stderr, "cudasim: {s} is not simulated\\n"); return {status}; }}'
            )
        return "\n".join(lines) + "\n"

    def build_libraries(self, pool):
        core = ["memory", "stream", "launch", "stats", "runtime", "driver"]
        jobs = {n: pool.submit(self.compile, n) for n in ("cublas", "cublaslt", *core, "nvrtc", "curand")}
        self.link("libcudasim.so", [jobs[n].result() for n in core])
        core_lib = ["libcudasim.so"]
        # The runtime and the driver are the core under their own names.
        for soname in ("libcudart.so.13", "libcuda.so.1"):
            self.link(soname, [], core_lib)
        self.link("libnvrtc.so.13", [jobs["nvrtc"].result()])
        self.link("libcurand.so.10", [jobs["curand"].result()], core_lib, "libcurand.so.10")
        self.link("libcublasLt.so.13", [jobs["cublaslt"].result()], core_lib, "libcublasLt.so.13")

        # cuBLAS, with stubs for what CuPy wants and src/cublas.cpp lacks; and
        # libraries that are nothing but stubs.
        cublas = jobs["cublas"].result()
        defined = {x.split()[-1] for x in run(["nm", "--defined-only", cublas]).splitlines()}
        wanted = {}
        for module, status in (
            ("cupy_backends/cuda/libs/cublas", 15),
            ("cupy_backends/cuda/libs/cusparse", 10),
            ("cupy_backends/cuda/libs/cusolver", 9),
            ("cupyx/_cusolver", 9),
            ("cupy/cuda/cufft", 16),
        ):
            for version, symbols in self.undefined_symbols(module).items():
                wanted.setdefault(version, (set(), status))[0].update(symbols)
        wanted.setdefault("libnvJitLink.so.13", (set(), 3))
        for soname, (symbols, status) in wanted.items():
            objects = []
            if soname == "libcublas.so.13":
                symbols = symbols - defined
                objects.append(cublas)
            source = self.tmp / f"{soname}.cpp"
            source.write_text(self.stubs(symbols, status))
            obj = self.tmp / f"{soname}.o"
            run([CXX, "-O1", "-fPIC", "-c", source, "-o", obj])
            self.link(soname, [*objects, obj], core_lib, soname)

    # ---------------------------------------------------- CuPy's runtime module

    def build_runtime_module(self, source):
        """cupy_backends.cuda.api.runtime, which has the CUDA runtime linked in
        statically, once more against ours."""
        wheel_module = next(self.site.glob("cupy_backends/cuda/api/runtime.*.so"))
        m = re.search(rb"_cython_(\d+)_(\d+)_(\d+)", wheel_module.read_bytes())
        cython_version = ".".join(x.decode() for x in m.groups())
        # The same Cython, so that its types are shared with the other modules.
        cython = self.downloads / f"cython-{cython_version}"
        if not cython.is_dir():
            pip("install", "--no-deps", "--target", cython, f"Cython=={cython_version}")
        cpp = source / "cupy_backends/cuda/api/runtime.cpp"
        cmd = [sys.executable, "-m", "cython", "-3", "--cplus", cpp.with_suffix(".pyx"), "-o", cpp]
        for directive in (
            "embedsignature=True",
            "c_api_binop_methods=True",
            "binding=False",
            "warn.deprecated.IF=False",
            "freethreading_compatible=True",
        ):
            cmd += ["-X", directive]
        for constant in (
            "CUPY_USE_CUDA_PYTHON=False",
            f"CUPY_CUDA_VERSION={self.cuda_version}",
            "CUPY_HIP_VERSION=0",
            "CUPY_CUFFT_STATIC=False",
            f'CUPY_CYTHON_VERSION="{cython_version}"',
        ):
            cmd += ["-E", constant]
        run(cmd, cwd=source, env={**os.environ, "PYTHONPATH": str(cython)})
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        target = self.root / "python" / "cudasim_overrides" / f"runtime{suffix}"
        run(
            [
                CXX,
                "-std=c++17",
                "-O1",
                "-w",
                "-fPIC",
                "-shared",
                "-DNDEBUG",
                "-I",
                sysconfig.get_path("include"),
                "-I",
                self.headers,
                "-I",
                HERE / "src/compat",
                cpp,
                "-o",
                target,
                f"-L{self.lib}",
                "-l:libcudart.so.13",
                "-l:libcudasim.so",
                "-Wl,-rpath,$ORIGIN/../../lib",
            ]
        )

    # --------------------------------------------------------- kernel headers

    def build_precompiled_headers(self):
        flags = KERNEL_FLAGS + machine_flags()
        (self.root / "flags.txt").write_text("\n".join(flags) + "\n")
        cupy_include = self.site / "cupy/_core/include"
        plain = '#include "cudasim_kernel.h"\n#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n'
        # What CuPy puts in front of its kernels.  (Its float16.cuh and
        # bfloat16.cuh are left out: their functions are not inline and so
        # would be compiled each time.)
        cupy = "".join(
            f"#include <cupy/{h}>\n" for h in ("complex.cuh", "carray.cuh", "atomics.cuh", "math_constants.h")
        )
        for name, text in (("plain", plain), ("cupy", plain + cupy)):
            header = self.root / f"pch/cudasim_{name}.h"
            header.write_text(text)
            run(
                [
                    CXX,
                    "-x",
                    "c++-header",
                    *flags,
                    "-I",
                    self.root / "include",
                    "-I",
                    cupy_include,
                    header,
                    "-o",
                    f"{header}.gch",
                ]
            )

    def build(self):
        shutil.copytree(HERE / "include", self.root / "include")
        shutil.copytree(HERE / "python", self.root / "python", ignore=shutil.ignore_patterns("__pycache__"))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            source = pool.submit(self.get_cupy_source)
            pch = pool.submit(self.build_precompiled_headers)
            self.get_cuda_headers()
            self.build_libraries(pool)
            self.build_runtime_module(source.result())
            pch.result()
        shutil.rmtree(self.tmp)


@contextlib.contextmanager
def locked(path):
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def main():
    parser = argparse.ArgumentParser(prog="setup", description="Builds cudasim for a Python.")
    parser.add_argument("--print-root", action="store_true", help="print only the folder of the build")
    args = parser.parse_args()
    cupy_version, site = check_environment()
    cache = cache_home()
    root = cache / f"{cupy_version}-{build_key(cupy_version)}"
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    if not (root / "ready").exists():
        with locked(cache / "lock"):
            if not (root / "ready").exists():
                if root.exists():
                    shutil.rmtree(root)  # a build that was interrupted
                Build(root, downloads, cupy_version, site).build()
                (root / "ready").touch()
    if args.print_root:
        print(root)
    else:
        print(f"cudasim is ready for CuPy {cupy_version} of {sys.executable}: {root}")


if __name__ == "__main__":
    main()
