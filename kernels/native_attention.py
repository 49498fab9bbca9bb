"""The CPU's attention in C++ (csrc/cpu/attention.cpp): packed tiles on the vector units, nothing of size N x N in memory.

fp32, and bf16 whose products are bf16 pairs summed in fp32 where the processor multiplies them (AVX512-BF16), fp32 elsewhere.
A result is the same for any number of threads. What it does not take goes to PyTorch's functions, see attention.py.

Legend: as in attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vatt.kernels import native
from vatt.kernels.dropout import DropoutMask

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)
HIDDEN = -3e4  # a bias this low takes a key away


def takes(qkv_BN3HD: Tensor) -> bool:
    """Whether these are tensors of a kind that the C++ attention computes, and it could be built."""
    kind = qkv_BN3HD.device.type == "cpu" and qkv_BN3HD.dtype in DTYPES and qkv_BN3HD.shape[4] in HEAD_DIMS
    return kind and native.loaded()


def forward(qkv_BN3HD: Tensor, bias: Tensor | None, scale: float, dropout: DropoutMask | None) -> tuple[Tensor, Tensor]:
    """(out (B, N, H D), log2 of the sum of exp(score) of each query (B, H, N) in fp32)."""
    qkv = _rows(qkv_BN3HD)
    out, lse = torch.ops.vatt_native.attention(qkv, _expanded(bias, qkv), scale, *_mask(dropout))
    return out.flatten(2), lse


def backward(
    grad: Tensor,
    qkv_BN3HD: Tensor,
    out: Tensor,
    lse_BHN: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: DropoutMask | None,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(dqkv, dbias). dbias is empty unless asked for; it is added up from (B, H, N, N) fp32, held for as long as this takes."""
    qkv, heads = _rows(qkv_BN3HD), qkv_BN3HD.shape[3:]
    grad_BNHD, out_BNHD = _rows(grad.unflatten(-1, heads)), out.unflatten(-1, heads)
    options = _expanded(bias, qkv), bias_gradient, scale, *_mask(dropout)
    dqkv, dscores = torch.ops.vatt_native.attention_backward(grad_BNHD, qkv, out_BNHD, lse_BHN, *options)
    if bias is None or not bias_gradient:
        return dqkv, lse_BHN.new_empty(0)
    return dqkv, dscores.sum_to_size(bias.shape).to(bias.dtype)


def _rows(x: Tensor) -> Tensor:
    """`x` if the features of a head lie side by side, else a copy where they do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _expanded(bias: Tensor | None, qkv_BN3HD: Tensor) -> Tensor | None:
    B, N, _, H, _ = qkv_BN3HD.shape
    # 2^-43000 is 0, and what a query scores that is shown no key at all stays finite.
    return None if bias is None else bias.float().clamp(min=HIDDEN).expand(B, H, N, N)


def _mask(dropout: DropoutMask | None) -> tuple[float, Tensor | None, Tensor | None, Tensor | None, int]:
    if dropout is None:
        return 0.0, None, None, None, 0
    rate, seed, step, sample_id, stream = dropout
    return rate, seed, step, sample_id.contiguous(), stream
