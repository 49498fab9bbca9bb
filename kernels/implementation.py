"""Which code runs behind an op, chosen by name, and the errors for what cannot run.

native       what this project uses on the tensors' device: Triton or CUDA C++ on a GPU; on a CPU, C++ from csrc/ where that
             exists for the op, else PyTorch's own functions. The default.
reference    the plain-PyTorch specification at the top of the op's file, on any device.
interpreter  the Triton kernels on CPU tensors, in Triton's interpreter: slow, for tests. fp32 and fp16 only: the interpreter
             multiplies bf16 bit patterns, and truncates where it should round.

Nothing falls back in silence: an implementation that cannot run raises, with the remedy.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KernelError(ValueError):
    """Arguments an op cannot take; one line with the op, the argument and the remedy, raised before anything is launched."""


def require(condition: bool, op: str, argument: str, problem: str) -> None:
    """Raise KernelError("op: argument: problem") unless `condition` holds."""
    if not condition:
        raise KernelError(f"{op}: {argument}: {problem}")


def resolve(op: str, implementation: str, x: Tensor, offered: tuple[str, ...] = ("native", "reference", "interpreter")) -> str:
    """`implementation`, checked against what `op` offers and against the device and dtype of `x`.

    Returns "reference", "native" (a CPU tensor) or "triton": the Triton kernels, compiled for a CUDA tensor or interpreted.
    A meta tensor takes the GPU's way, so that a step's work can be counted where there is no GPU.
    """
    require(implementation in offered, op, "implementation", f"{implementation!r} is not one of {', '.join(offered)}")
    if implementation == "reference" or (implementation == "native" and x.device.type == "cpu"):
        return implementation
    if implementation == "interpreter":
        require(x.device.type == "cpu", op, "implementation", "'interpreter' takes CPU tensors; use 'native' on a GPU")
        require(x.dtype != torch.bfloat16, op, "implementation", "'interpreter' takes fp32 or fp16, bf16 is wrong in it")
    require(
        x.device.type in ("cpu", "cuda", "meta"), op, "device", f"{x.device} is not offered; move the tensors to cpu or cuda"
    )
    require(x.dtype in GPU_DTYPES, op, "dtype", f"{x.dtype} has no GPU kernel; use fp32, fp16 or bf16, or 'reference'")
    return "triton"


def gpu_module(name: str) -> ModuleType:
    """`vatt.kernels.gpu.<name>`, imported on first use: Triton enters here and nowhere else.

    Raises KernelError when Triton is missing, and when CPU tensors were given without TRITON_INTERPRET=1.
    """
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    if not runs and not importlib.import_module("vatt.kernels.gpu.launch").is_recording():
        raise KernelError(
            f"{name}: implementation: 'interpreter' needs TRITON_INTERPRET=1 in the environment before Python starts"
        )
    try:
        return importlib.import_module(f"vatt.kernels.gpu.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise KernelError(
            f"{name}: Triton is not installed, and the GPU kernels are written in it; pip install 'vatt-engine[triton]', "
            "or choose implementation 'reference'"
        ) from error


def same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise KernelError naming the first of `others` that is on another device than `first`."""
    for name, tensor in others.items():
        if tensor is not None:
            require(
                tensor.device == first.device, op, name, f"is on {tensor.device}, the rest on {first.device}; move it there"
            )
