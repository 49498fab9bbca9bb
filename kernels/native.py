"""The C++ of csrc/, built on first use and loaded as `torch.ops.vatt_native`.

One shared library for one machine: it is compiled with -march=native into a cache folder named by a hash of everything
that went into it (sources, flags, compiler, torch, the processor's features), under a temporary name, and renamed when it is
whole. One process of a host builds while the others wait; the lock is the kernel's, so it dies with its holder. A library
made ahead of time (`VATT_BUILD_NATIVE=1 pip install .`) is used where it fits.

Without a compiler the ops run in PyTorch, and that is said once. `required` makes it an error instead.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from vatt.kernels.implementation import KernelError

LIBRARY = "libvatt_native.so"
REMEDY = "install a C++ compiler and ninja (Debian: apt install g++; pip install ninja), or set VATT_NATIVE=0 to do without"
# No exceptions for a NaN, no errno: what lets a compiler turn the loops into vector instructions. No other liberties.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall")
NATIVE = ("-march=native", "-mprefer-vector-width=512")


class NotBuilt(Exception):
    """Why there is no library; the message is one line with the remedy."""


def loaded(required: bool = False) -> bool:
    """Whether `torch.ops.vatt_native` is there, after building it if need be.

    Raises KernelError if it is `required` and cannot be; otherwise says once why not.
    """
    reason = _load()
    if reason is None:
        return True
    if required:
        raise KernelError(f"native: {reason}")
    if os.environ.get("VATT_NATIVE") != "0":
        _say_once(reason)
    return False


@functools.cache
def _load() -> str | None:
    if os.environ.get("VATT_NATIVE") == "0":
        return "VATT_NATIVE=0 turns the C++ kernels off; unset it"
    try:
        torch.ops.load_library(str(prebuilt() or built()))
    except (NotBuilt, OSError) as error:
        return str(error)
    return None


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
    """The library made ahead of time, if it was made from these sources for this torch, on a processor like this."""
    record = folder() / "prebuilt" / "build.json"
    library = record.with_name(LIBRARY)
    if not (record.is_file() and library.is_file()):
        return None
    made = json.loads(record.read_text())
    fits = made["sources"] == digest() and made["torch"] == torch.__version__ and made["machine"] in (machine(), "portable")
    return library if fits else None


def built() -> Path:
    """The library in the cache, made now if it is not there. Raises NotBuilt."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotBuilt(f"no C++ compiler was found; {REMEDY}")
    flags = [*FLAGS, *NATIVE]
    home = cache() / key(compiler, flags)
    library = home / LIBRARY
    if not library.is_file():
        with only_one(home):
            if not library.is_file():  # another process has not made it meanwhile
                print("building C++ kernels, once for this machine", file=sys.stderr, flush=True)
                build(compiler, flags, home)
    return library


def cache() -> Path:
    """Where libraries are kept: VATT_NATIVE_DIR, or the user's cache."""
    if "VATT_NATIVE_DIR" in os.environ:
        return Path(os.environ["VATT_NATIVE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vatt" / "native"


def build(compiler: str, flags: Sequence[str], home: Path) -> None:
    """Compile and link into `home`, which exists afterwards if and only if all of it worked. Raises NotBuilt."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".building-") as scratch:
        partial = Path(scratch) / "whole"
        partial.mkdir()
        (partial / "build.ninja").write_text(ninja_file(compiler, flags))
        run = subprocess.run([sys.executable, "-m", "ninja", "-C", str(partial)], capture_output=True, text=True)
        if run.returncode != 0:
            lines = (run.stdout + run.stderr).splitlines()
            first = next((line for line in lines if "error" in line.lower() or "No module" in line), lines[-1] if lines else "")
            raise NotBuilt(f"the build failed ({first.strip()[:200]}); {REMEDY}")
        try:
            partial.rename(home)
        except OSError:
            if not (home / LIBRARY).is_file():
                raise


def ninja_file(compiler: str, flags: Sequence[str]) -> str:
    """The build, for ninja: an object a source, one library."""
    include = Path(torch.__file__).parent / "include"
    library = quoted(str(Path(torch.__file__).parent / "lib"))
    every = [*flags, f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", f"-I{folder()}"]
    lines = [
        f"cxx = {quoted(compiler)}",
        f"flags = {' '.join(map(quoted, every))}",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -shared -fopenmp $in -o $out -L{library} -ltorch_cpu -lc10 -Wl,-rpath,{library}",
    ]
    objects = []
    for source in sources():
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {escaped(str(source))}")
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(objects)}", f"default {LIBRARY}", ""])


def quoted(word: str) -> str:
    """A word for ninja's shell: its `$` doubled, and quoted if it holds anything unusual."""
    plain = word.replace("$", "$$")
    return plain if all(c.isalnum() or c in "-_=./+,$" for c in plain) else "'" + plain.replace("'", "'\\''") + "'"


def escaped(path: str) -> str:
    """A path in a build line of ninja."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def key(compiler: str, flags: Sequence[str]) -> str:
    """A name for the library that changes with everything that goes into it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [digest(), *flags, compiler, version, torch.__version__, torch.__file__, machine()]
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
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = [next((line for line in lines if line.startswith(name)), "") for name in ("model\t", "flags", "Features")]
    return hashlib.sha256("\n".join([platform.machine(), *found]).encode()).hexdigest()[:16]


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Inside, this process is the only one of the host that builds into `home`."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process ends, however it ends
        yield
