"""The C++ of csrc/, built on first use and loaded as `torch.ops.vatt_native`.

One shared library for one machine: it is compiled with -march=native into a cache folder named by a hash of everything
that went into it (sources, flags, compiler, torch, the processor's features), under a temporary name, and renamed when it is
whole. One process of a host builds while the others wait; the lock is the kernel's, so it dies with its holder. The CUDA
C++ is a second library, made by nvcc for the GPU that is there, so that neither can keep the other from loading. A library of
the CPU's ops made ahead of time (`VATT_BUILD_NATIVE=1 pip install --no-build-isolation .`) is used where it fits.

Sources use torch's stable C++ interface only: no Python.h, no OpenMP runtime but torch's, compiled in seconds. Without a
compiler the ops run in PyTorch, and that is said once. `required` makes it an error instead.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vatt.kernels.implementation import KernelError

REMEDY = "install a C++ compiler and ninja (Debian: apt install g++; pip install ninja), or set VATT_NATIVE=0 to do without"
CUDA_REMEDY = "install the CUDA toolkit of torch's CUDA version or set CUDA_HOME, or set VATT_NATIVE=0 to do without"
# No exceptions for a NaN, no errno: what lets a compiler turn the loops into vector instructions. No other liberties.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall")
NATIVE = ("-march=native", "-mprefer-vector-width=512")
# AVX2 and FMA, which processors have since about 2015: for a library that goes to other machines.
PORTABLE = ("-march=x86-64-v3",) if platform.machine() == "x86_64" else ()
CUDA_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA")


class NotBuilt(Exception):
    """Why there is no library; the message is one line with the remedy."""


@dataclass(frozen=True)
class Build:
    """How one library is made. kind: the folder of csrc/, "cpu" or "cuda". libraries: of torch, that it is linked to."""

    kind: str
    compiler: str
    flags: Sequence[str]
    libraries: Sequence[str] = ("torch_cpu", "c10")

    @property
    def file(self) -> str:
        return file_of(self.kind)


def file_of(kind: str) -> str:
    return f"libvatt_native_{kind}.so"


def loaded(required: bool = False, kind: str = "cpu") -> bool:
    """Whether the ops of `torch.ops.vatt_native` are there for CPU ("cpu") or CUDA ("cuda") tensors, built if need be.

    Raises KernelError if they are `required` and cannot be; otherwise says once why not.
    """
    reason = _load(kind)
    if reason is None:
        return True
    if required:
        raise KernelError(f"native: {reason}")
    if os.environ.get("VATT_NATIVE") != "0":
        _say_once(reason)
    return False


# For torch.compile: a constant of the machine, found when a graph is traced. (torch.compiler.assume_constant_result sets
# the same mark, but imports the whole of Dynamo to do so.)
loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _load(kind: str) -> str | None:
    if os.environ.get("VATT_NATIVE") == "0":
        return "VATT_NATIVE=0 turns the C++ kernels off; unset it"
    try:
        if kind == "cuda" and (reason := _load("cpu")) is not None:  # the ops are declared there
            return reason
        torch.ops.load_library(str((prebuilt() if kind == "cpu" else None) or built(kind)))
    except (NotBuilt, OSError) as error:
        return str(error)
    if kind == "cpu":
        for name, fake in _FAKES.items():
            torch.library.register_fake(f"vatt_native::{name}", fake)
    return None


_FAKES: dict[str, Callable[..., object]] = {}


def fake(name: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Decorates what `torch.ops.vatt_native.<name>` gives in shapes only, before the library is loaded."""

    def keep(function: Callable[..., object]) -> Callable[..., object]:
        _FAKES[name] = function
        if _load.cache_info().currsize and _load("cpu") is None:
            torch.library.register_fake(f"vatt_native::{name}", function)
        return function

    return keep


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"C++ kernels are not used, PyTorch's functions are: {reason}", stacklevel=3)


def folder() -> Path:
    """csrc/, wherever the package is installed."""
    import vatt.csrc

    return Path(next(iter(vatt.csrc.__path__)))


def sources(kind: str = "cpu") -> list[Path]:
    """What is compiled: csrc/cpu/*.cpp, or csrc/cuda/*.cu."""
    return sorted((folder() / kind).glob("*.cpp" if kind == "cpu" else "*.cu"))


def prebuilt() -> Path | None:
    """The library made ahead of time, if it was made from these sources for this torch, and this processor can run it."""
    record = folder() / "prebuilt" / "build.json"
    library = record.with_name(file_of("cpu"))
    if not (record.is_file() and library.is_file()):
        return None
    made = json.loads(record.read_text())
    fits = made["sources"] == digest() and made["torch"] == torch.__version__ and made["machine"] == platform.machine()
    return library if fits and (not PORTABLE or {"avx2", "fma", "bmi2", "f16c"} <= features()) else None


def build_ahead() -> Path:
    """Make the CPU's library for other machines too, next to its sources. Raises NotBuilt."""
    home = folder() / "prebuilt"
    shutil.rmtree(home, ignore_errors=True)
    build(Build("cpu", cpu_compiler(), (*FLAGS, *PORTABLE)), home)
    made = {"sources": digest(), "torch": torch.__version__, "machine": platform.machine()}
    (home / "build.json").write_text(json.dumps(made))
    return home / file_of("cpu")


def built(kind: str = "cpu") -> Path:
    """The library in the cache, made now if it is not there. Raises NotBuilt."""
    plan = recipe(kind)
    home = cache() / key(plan)
    library = home / plan.file
    if not library.is_file():
        try:
            with only_one(home):
                if not library.is_file():  # another process has not made it meanwhile
                    print(f"building C++ kernels ({kind}), once for this machine", file=sys.stderr, flush=True)
                    build(plan, home)
        except PermissionError as error:
            raise NotBuilt(f"{error.filename} cannot be written; set VATT_NATIVE_DIR to a folder that can") from error
    return library


def recipe(kind: str) -> Build:
    """How the library is made on this machine. Raises NotBuilt where a compiler is missing."""
    if kind == "cpu":
        return Build(kind, cpu_compiler(), (*FLAGS, *NATIVE))
    if torch.version.cuda is None:
        raise NotBuilt("this torch is built without CUDA; install a CUDA build of torch")
    major, minor = torch.cuda.get_device_capability()
    flags = (*CUDA_FLAGS, f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}")
    return Build(kind, nvcc(), flags, ("torch_cuda", "torch_cpu", "c10", "c10_cuda"))


def cpu_compiler() -> str:
    """CXX, or g++, or clang++. Raises NotBuilt."""
    found = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)
    if found is None:
        raise NotBuilt(f"no C++ compiler was found; {REMEDY}")
    return found


def nvcc() -> str:
    """CUDA_HOME's or CUDA_PATH's, or the first on the path. Raises NotBuilt."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(str(Path(home) / "bin" / "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for name in candidates if (path := shutil.which(name))), None)
    if found is None:
        raise NotBuilt(f"nvcc was not found; {CUDA_REMEDY}")
    return found


def ninja() -> list[str]:
    """The command of the package, or the program on the path. Raises NotBuilt."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise NotBuilt(f"ninja was not found; {REMEDY}")
    return [found]


def cache() -> Path:
    """Where libraries are kept: VATT_NATIVE_DIR, or the user's cache."""
    if "VATT_NATIVE_DIR" in os.environ:
        return Path(os.environ["VATT_NATIVE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vatt" / "native"


def build(plan: Build, home: Path) -> None:
    """Compile and link into `home`, which exists afterwards if and only if all of it worked. Raises NotBuilt."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".building-") as scratch:
        partial = Path(scratch) / "whole"
        partial.mkdir()
        (partial / "build.ninja").write_text(ninja_file(plan))
        run = subprocess.run([*ninja(), "-C", str(partial)], capture_output=True, text=True)
        if run.returncode != 0:
            lines = (run.stdout + run.stderr).splitlines()
            first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
            raise NotBuilt(f"the build failed ({first.strip()[:200]}); {REMEDY if plan.kind == 'cpu' else CUDA_REMEDY}")
        for leftover in [*partial.glob("*.o"), *partial.glob("*.d"), *partial.glob(".ninja*")]:
            leftover.unlink()
        try:
            partial.rename(home)
        except OSError:
            if not (home / plan.file).is_file():
                raise


def ninja_file(plan: Build) -> str:
    """The build, for ninja: an object a source, one library."""
    include = Path(torch.__file__).parent / "include"
    library = quoted(str(Path(torch.__file__).parent / "lib"))
    every = [*plan.flags, f"-I{include}", f"-I{folder()}"]
    linked = " ".join(f"-l{name}" for name in plan.libraries)
    rpath = "-Xlinker=-rpath," if plan.kind == "cuda" else "-Wl,-rpath,"
    lines = [
        f"cxx = {quoted(plan.compiler)}",
        f"flags = {' '.join(map(quoted, every))}",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{library} {linked} {rpath}{library}",
    ]
    objects = []
    for source in sources(plan.kind):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {escaped(str(source))}")
    return "\n".join([*lines, f"build {plan.file}: link {' '.join(objects)}", f"default {plan.file}", ""])


def quoted(word: str) -> str:
    """A word for ninja's shell: its `$` doubled, and quoted if it holds anything unusual."""
    plain = word.replace("$", "$$")
    return plain if all(c.isalnum() or c in "-_=./+,$" for c in plain) else "'" + plain.replace("'", "'\\''") + "'"


def escaped(path: str) -> str:
    """A path in a build line of ninja."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def key(plan: Build) -> str:
    """A name for the library that changes with everything that goes into it."""
    version = subprocess.run([plan.compiler, "--version"], capture_output=True, text=True).stdout
    parts = [digest(), plan.kind, *plan.flags, plan.compiler, version, torch.__version__, torch.__file__, machine()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@functools.cache
def digest() -> str:
    """Of every file of csrc/ that a build may read, names included."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder().rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")):
        total.update(f"{path.relative_to(folder())}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def machine() -> str:
    """The processor's family of instructions: what -march=native looks at."""
    return hashlib.sha256("\n".join([platform.machine(), *_cpuinfo("model\t", "flags", "Features")]).encode()).hexdigest()[:16]


def features() -> set[str]:
    """The instruction sets of the processor, as Linux names them."""
    return set(" ".join(_cpuinfo("flags", "Features")).split())


def _cpuinfo(*fields: str) -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return [next((line for line in lines if line.startswith(name)), "") for name in fields]


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Inside, this process is the only one of the host that builds into `home`."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process ends, however it ends
        yield


if __name__ == "__main__":
    try:
        print(build_ahead())
    except NotBuilt as reason:
        sys.exit(f"error: {reason}")
