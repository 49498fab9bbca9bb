"""What this processor computes well: the one place that answers it, for every kernel that has to choose."""

from __future__ import annotations

import functools

import torch


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether matrix products of bf16 tensors run at speed on this CPU.

    They do where oneDNN takes them (AVX-512 and newer, AMX, recent Arm). Elsewhere PyTorch falls back to generic loops:
    on an AVX2 processor a bf16 product was measured 8 to 200 times slower than the same product in fp32, so there the
    kernels widen the operands to fp32, multiply, and round the result once, which is also the more exact of the two.
    """
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widens(x: torch.Tensor) -> bool:
    """Whether matrix products of tensors like `x` are better computed in fp32 on the device that holds it."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not cpu_multiplies_bf16()
