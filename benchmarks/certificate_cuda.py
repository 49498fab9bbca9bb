"""The certificate's rows of the kernels in CUDA C++ (csrc/cuda), compiled with nvcc where it is installed.

Nothing records their launches, so what VATT's shapes launch is written down here: which instance of which template, and how
many threads a block has. Where nvcc is missing each row says so instead.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vatt.kernels.contract import Shape
from vatt.kernels.gpu.target import TARGETS

RESERVED = 1024  # bytes of static shared memory that the listing counts and the driver takes, from capability 9.0 on


@dataclass(frozen=True)
class CudaKernel:
    """source: file under csrc/cuda. instance: what the mangled name of the function contains. threads: of a block."""

    source: str
    launch: str
    instance: str
    threads: int
    shapes: Sequence[Shape]


def _read(name: str, clips: int, kept: int, features: int) -> Shape:
    """Kept pixels and their indices are read, bf16 patches are written."""
    patches = clips * kept
    return Shape(name, lambda dtype, device: {}, forward_bytes=patches * (features * (1 + 2) + 8), backward_bytes=0)


KERNELS = {
    "read_patches": CudaKernel(
        "read_patches.cu",
        launch="read_vectors",
        instance="read_vectorsIh13__nv_bfloat16E",  # from uint8 to bf16
        threads=192,
        shapes=(_read("video, 50 % drop", 64, 784, 3072), _read("video, 75 % drop", 64, 392, 3072)),
    )
}


def compile_cuda(name: str, target: str) -> dict[str, Any]:
    """What the binary uses, as fields of a row; {"skipped": why} without nvcc, {"error": ...} where it does not compile."""
    from vatt.kernels.gpu.compiled import inspect
    from vatt.kernels.gpu.occupancy import resident_blocks
    from vatt.kernels.native import CUDA_FLAGS, NotBuilt, folder, nvcc

    kernel, goal = KERNELS[name], TARGETS[target]
    include = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        try:
            command = [nvcc(), "-cubin", f"-arch={target}", *CUDA_FLAGS, f"-I{include}", f"-I{folder()}"]
        except NotBuilt as missing:
            return {"skipped": str(missing)}
        done = subprocess.run(
            [*command, str(folder() / "cuda" / kernel.source), "-o", str(cubin)], capture_output=True, text=True
        )
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()
            return {"error": next((line for line in lines if "error" in line), f"nvcc exited with {done.returncode}")[:300]}
        found = [(usage, counts) for function, usage, counts in inspect(cubin.read_bytes()) if kernel.instance in function]
    if len(found) != 1:
        return {"error": f"{len(found)} functions are called *{kernel.instance}*; correct benchmarks/certificate_cuda.py"}
    ((usage, counts),) = found
    shared = usage.shared - (RESERVED if goal.capability >= 90 and usage.shared else 0)
    blocks = resident_blocks(goal, kernel.threads, usage.registers, shared)
    facts = {"threads": kernel.threads, "products": 0, "tensor_columns": 0, "resident_blocks": blocks}
    return facts | asdict(usage) | asdict(counts) | {"shared_memory": shared}
