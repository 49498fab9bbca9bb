"""What this machine can run, and what to do about the rest.

Every package is imported in a process of its own: one that is broken, prints, hangs or dies takes nothing with it, and
the reason it gave (the first line) is shown instead. Codecs are tried by encoding and decoding a few frames.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 120  # an import that takes longer is called broken


class NotUsable(Exception):
    """A probe's "no"; the message is the reason."""


@dataclass(frozen=True)
class Probe:
    """One row: what is looked at, how, and what to do if the answer is no.

    look: returns (version, detail) or raises; its message becomes the reason.
    """

    name: str
    look: Callable[[], tuple[str, str]]
    remedy: str
    required: bool = False


def examine() -> list[dict[str, object]]:
    """One row a probe: name, usable, required, version, and `note`: what it is, or the reason and remedy."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(_row, PROBES))


def healthy(rows: list[dict[str, object]]) -> bool:
    """Everything that training cannot do without is usable."""
    return all(row["usable"] for row in rows if row["required"])


def show(rows: list[dict[str, object]]) -> str:
    """The rows as a table for a terminal."""
    width = max(len(str(row["name"])) for row in rows)
    versions = max(len(str(row["version"])) for row in rows)
    lines = [f"{'':{width}}  usable  {'version':{versions}}"]
    for row in rows:
        answer = "yes" if row["usable"] else "NO" if row["required"] else "no"
        lines.append(f"{row['name']:{width}}  {answer:6}  {row['version']:{versions}}  {row['note']}".rstrip())
    return "\n".join(lines)


def _row(probe: Probe) -> dict[str, object]:
    usable, version = True, ""
    try:
        version, note = probe.look()
    except Exception as reason:  # whatever a broken package does is an answer here, and it is shown
        usable, note = False, f"{_first_line(reason)}; {probe.remedy}"
    return {"name": probe.name, "usable": usable, "required": probe.required, "version": version, "note": note}


def _first_line(reason: BaseException) -> str:
    text = str(reason).strip().splitlines()
    line = text[0] if text else type(reason).__name__
    return line if isinstance(reason, NotUsable) else f"{type(reason).__name__}: {line}"


def _child(code: str) -> Any:
    """The value of `answer` after running `code` in a fresh interpreter. Raises NotUsable with the reason it failed."""
    program = "import json\ntry:\n" + textwrap.indent(textwrap.dedent(code), "    ")
    program += "\n    print('\\n' + json.dumps({'answer': answer}))\nexcept BaseException as e:\n"
    program += (
        "    print('\\n' + json.dumps({'problem': f'{type(e).__name__}: ' + ((str(e).strip().splitlines() or [''])[0])}))\n"
    )
    try:
        # -P: a folder of the current directory must not be taken for the package asked about.
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise NotUsable(f"did not answer within {SECONDS} s") from None
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise NotUsable(f"importing it ended the interpreter (exit code {done.returncode})") from None
    if "problem" in result:
        raise NotUsable(result["problem"])
    return result["answer"]


# ---- the interpreter and torch ---------------------------------------------------------------------------------------


def _python() -> tuple[str, str]:
    # An older Python cannot be seen from here: it fails to import this package.
    return platform.python_version(), f"{sys.executable} on {platform.machine()}, {os.cpu_count()} cores"


def _torch() -> tuple[str, str]:
    version, cuda = _child("import torch; answer = [torch.__version__, torch.version.cuda]")
    return version, f"built for CUDA {cuda}" if cuda else "CPU build"


def _cuda() -> tuple[str, str]:
    answer = _child(
        """
        import torch
        if torch.backends.cuda.is_built():
            torch.cuda.init()
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        answer = [torch.version.cuda, [f"{d.name} ({d.total_memory / 2**30:.0f} GiB, sm_{d.major}{d.minor})" for d in devices]]
        """
    )
    version, devices = answer
    if not version:
        raise NotUsable("this torch is built without CUDA")
    return version, ", ".join(devices)


# ---- packages --------------------------------------------------------------------------------------------------------


def _package(module: str, distribution: str = "") -> Callable[[], tuple[str, str]]:
    """A probe that imports `module` and asks the installed metadata, or the module, for its version."""

    def look() -> tuple[str, str]:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            raise NotUsable("not installed")
        version = _child(
            f"""
            import importlib, importlib.metadata
            found = importlib.import_module({module!r})
            try:
                answer = importlib.metadata.version({distribution or module!r})
            except importlib.metadata.PackageNotFoundError:
                answer = getattr(found, "__version__", "")
            """
        )
        return str(version), ""

    return look


def _apex() -> tuple[str, str]:
    if importlib.util.find_spec("apex") is None:
        raise NotUsable("not installed")
    # PyPI's project of that name is a web toolkit; NVIDIA's is told by its modules, never by the name.
    if _child("import importlib.util; answer = importlib.util.find_spec('apex.normalization') is not None") is not True:
        raise NotUsable("the installed `apex` is not NVIDIA's (PyPI's project of that name is another one)")
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        raise NotUsable("NVIDIA's apex is installed without its CUDA extensions")
    return _package("apex.normalization", "apex")()


# ---- tools -----------------------------------------------------------------------------------------------------------


def _tool(*names: str, variable: str = "") -> Callable[[], tuple[str, str]]:
    """A probe for the first of several programs that exists and answers --version."""

    def look() -> tuple[str, str]:
        candidates = [os.environ[variable]] if os.environ.get(variable) else []
        # A virtual environment's programs are not on the path unless it is activated.
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        found = next((path for name in (*candidates, *names) if (path := shutil.which(name, path=search))), None)
        if found is None:
            raise NotUsable(f"no {' or '.join(names)} found")
        done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode != 0:
            raise NotUsable(f"{found} --version failed with exit code {done.returncode}")
        version = re.search(r"\d+(\.\d+)+", done.stdout)
        return version.group() if version else "", found

    return look


def _nvcc() -> tuple[str, str]:
    homes = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return _tool(*map(str, homes), "nvcc", "/usr/local/cuda/bin/nvcc")()


def _native() -> tuple[str, str]:
    reason, file = _child(
        """
        import torch
        from vatt.kernels import native
        reason = native._load("cpu")
        answer = [reason, "" if reason else str(native.prebuilt() or native.built())]
        """
    )
    if reason:
        raise NotUsable(reason.partition(";")[0])
    return "", file


def _nvdec() -> tuple[str, str]:
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError as reason:
        raise NotUsable(str(reason)) from None
    return "", "libnvcuvid loads"


# ---- codecs ----------------------------------------------------------------------------------------------------------

# container: (extension, video encoder, audio encoder)
_CODECS = {"H.264": ("mp4", "libx264"), "AAC": ("mp4", "aac"), "VP9": ("webm", "libvpx-vp9"), "Opus": ("webm", "libopus")}


def round_trip(name: str) -> int:
    """Encode a little with a codec of _CODECS, decode it, and return how many frames came back (PyAV, in memory)."""
    import av

    container, encoder = _CODECS[name]
    memory = io.BytesIO()
    with av.open(memory, "w", format=container) as out:
        stream: Any
        frames: list[Any]
        if name in ("H.264", "VP9"):
            stream = out.add_stream(encoder, rate=10, width=64, height=64, pix_fmt="yuv420p")
            frames = [av.VideoFrame(64, 64, "yuv420p") for _ in range(3)]
        else:
            stream = out.add_stream(encoder, rate=48000, layout="mono")
            sample_format = stream.codec_context.codec.audio_formats[0].name
            frames = [av.AudioFrame(format=sample_format, layout="mono", samples=960) for _ in range(3)]
        for i, frame in enumerate(frames):
            if isinstance(frame, av.AudioFrame):
                frame.sample_rate, frame.pts = 48000, 960 * i
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    memory.seek(0)
    with av.open(memory, "r") as written:
        return len(list(written.decode(written.streams[0])))


def _codec(name: str) -> Callable[[], tuple[str, str]]:
    def look() -> tuple[str, str]:
        count = _child(f"from vatt.engine.doctor import round_trip; answer = round_trip({name!r})")
        if not count:
            raise NotUsable("what was encoded does not decode")
        container, encoder = _CODECS[name]
        return "", f"{encoder} in {container}: encodes and decodes"

    return look


# ---- the table -------------------------------------------------------------------------------------------------------

_WHEELS = "reinstall PyAV from its binary wheel: pip install --force-reinstall --only-binary=av av"

PROBES = (
    Probe("Python", _python, "install Python 3.11 or newer", required=True),
    Probe("torch", _torch, "pip install torch", required=True),
    Probe("numpy", _package("numpy"), "pip install numpy", required=True),
    Probe("safetensors", _package("safetensors"), "pip install safetensors", required=True),
    Probe("PyAV", _package("av"), "pip install av", required=True),
    *(Probe(f"codec {name}", _codec(name), _WHEELS) for name in _CODECS),
    Probe("CUDA devices", _cuda, "training runs on the CPU; with a GPU, install its driver and a CUDA build of torch"),
    Probe("Triton", _package("triton"), "pip install triton (Linux); the reference kernels are used without it"),
    Probe(
        "C++ compiler",
        _tool("c++", "g++", "clang++", variable="CXX"),
        "install g++ or clang++; the reference kernels are used without it",
    ),
    Probe("ninja", _tool("ninja"), "pip install ninja"),
    Probe("C++ kernels", _native, "install g++ and ninja, unset VATT_NATIVE; PyTorch's functions are used without them"),
    Probe("nvcc", _nvcc, "install the CUDA toolkit of torch's CUDA version, or set CUDA_HOME; needed only for CUDA sources"),
    Probe("DeepSpeed", _package("deepspeed"), "pip install 'vatt-engine[deepspeed]', or set backend.name = \"torch\""),
    Probe(
        "DALI",
        _package("nvidia.dali", "nvidia-dali-cuda130"),
        "pip install 'vatt-engine[dali]'; clips are decoded by PyAV without it",
    ),
    Probe("NVDEC", _nvdec, "comes with the GPU's driver (in containers: NVIDIA_DRIVER_CAPABILITIES=compute,utility,video)"),
    Probe("flash-attn", _package("flash_attn", "flash-attn"), "optional: pip install flash-attn --no-build-isolation"),
    Probe("apex (NVIDIA's)", _apex, "optional: build it from source, https://github.com/NVIDIA/apex"),
    Probe("TensorBoard", _package("tensorboard"), "pip install 'vatt-engine[tensorboard]', or set log.tensorboard = false"),
    Probe("Weights & Biases", _package("wandb"), "optional: pip install 'vatt-engine[wandb]'"),
    Probe("matplotlib", _package("matplotlib"), "pip install 'vatt-engine[report]'; needed for the plots of report.html"),
)
