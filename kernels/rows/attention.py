"""attention: every token to every token, in every block of every tower."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vatt.kernels.attention import attention, attention_eager, attention_reference
from vatt.kernels.contract import Arguments, Case, Kernel, Make, Shape, divisible, drawn
from vatt.kernels.dropout import DropoutMask
from vatt.kernels.rows.bias_gelu import mask

Bias = Literal["", "heads", "padding", "text", "scores"]


def _make(
    B: int,
    N: int,
    H: int,
    D: int,
    bias: Bias = "",
    samples: int = 0,
    scale: float | None = None,
    spread: float = 1.0,
    strided: bool = False,
) -> Make:
    """bias: relative positions (heads), hidden keys (padding), their sum (text), or one for every score. samples: 0 for no
    dropout. spread: of queries, keys and values; scores are peaked where it is large.
    """

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        # strided: as if the projection had made something else behind the queries, keys and values of each token.
        packed = drawn((B, N, (4 if strided else 3) * H * D), dtype, device, 1, spread)
        return {
            "qkv_BN3HD": packed[..., : 3 * H * D].unflatten(-1, (3, H, D)),
            "bias": _bias(bias, B, N, H, device) if bias else None,
            "scale": scale,
            "dropout": mask(samples, device, stream=1042) if samples else None,
        }

    return make


def _bias(kind: Bias, B: int, N: int, H: int, device: torch.device) -> Tensor:
    """fp32, exact in bf16 and fp16; every row sees its first key, the last row of the batch nothing else."""
    if kind == "scores":
        return drawn((B, H, N, N), torch.bfloat16, device, 2).float()
    relative = drawn((1, H, N, N), torch.bfloat16, device, 3).float()
    if kind == "heads":
        return relative
    seen = torch.arange(B, 0, -1, device=device) * N // B
    padding = torch.where(torch.arange(N, device=device) < seen[:, None].clamp(min=1), 0.0, -1e9)[:, None, None]
    return padding if kind == "padding" else relative + padding


def _launches(qkv_BN3HD: Tensor, bias: Tensor | None, scale: float | None, dropout: DropoutMask | None) -> None:
    from vatt.kernels.gpu.attention import forward
    from vatt.kernels.gpu.attention_backward import backward

    scale = qkv_BN3HD.shape[-1] ** -0.5 if scale is None else scale
    out, lse = forward(qkv_BN3HD, bias, scale, dropout)
    backward(out, qkv_BN3HD, out, lse, bias, scale, dropout, bias is not None)


@divisible("B", "samples")
def _shape(
    name: str, B: int, N: int, H: int, D: int = 64, bias: Bias = "", samples: int = 0, scale: float | None = None
) -> Shape:
    """Forward reads queries, keys, values and writes the output and its log-sum-exp; backward reads all of these and the
    output's gradient and writes three gradients, and delta for its second half. A bias is read, and its dS written, in fp32.
    """
    tensor, rows, scores = B * N * H * D * 2, B * H * N * 4, B * H * N * N * 4 if bias else 0
    return Shape(
        name,
        _make(B, N, H, D, bias, samples, scale),
        forward_bytes=4 * tensor + rows + scores,
        backward_bytes=8 * tensor + 3 * rows + 2 * scores,
        forward_flops=4 * B * H * N * N * D,
        backward_flops=10 * B * H * N * N * D,
    )


ROW = Kernel(
    name="attention",
    op=attention,
    reference=attention_reference,
    eager=attention_eager,
    differentiable=("qkv_BN3HD", "bias"),
    matrix=True,
    cases=(
        Case("one_token", _make(2, 1, 3, 64)),
        Case("seven_tokens", _make(3, 7, 2, 32)),
        Case("one_tile", _make(1, 64, 2, 64)),
        Case("one_token_more", _make(1, 65, 2, 64)),
        Case("tail_of_two", _make(1, 130, 2, 64)),
        Case("tail_of_nine", _make(2, 201, 1, 64)),
        Case("tail_of_a_quarter", _make(1, 92, 2, 64)),
        Case("head_dim_32", _make(1, 130, 3, 32)),
        Case("head_dim_128", _make(1, 130, 1, 128)),
        Case("peaked", _make(1, 79, 2, 64, spread=3.0)),
        Case("scale", _make(2, 66, 2, 32, scale=1.0, spread=0.3)),
        Case("strided", _make(2, 33, 2, 32, strided=True)),
        Case("bias_of_heads", _make(2, 70, 2, 32, bias="heads")),
        Case("bias_of_every_score", _make(2, 67, 2, 64, bias="scores")),
        Case("padding", _make(3, 18, 2, 32, bias="padding")),
        Case("padding_over_tiles", _make(4, 75, 1, 32, bias="padding")),
        Case("text", _make(6, 17, 2, 64, bias="text", scale=1.0, spread=0.3)),
        Case("dropout", _make(2, 130, 2, 64, samples=2)),
        Case("dropout_odd", _make(2, 67, 1, 32, samples=2)),
        Case("dropout_captions", _make(6, 18, 2, 32, bias="text", samples=2, scale=1.0, spread=0.3)),
    ),
    shapes=(
        _shape("video large, 50 % drop", 64, 785, 16),
        _shape("video large, no drop", 64, 1569, 16),
        _shape("video large, 75 % drop", 64, 393, 16),
        _shape("video medium, 50 % drop", 64, 785, 12),
        _shape("video base, 50 % drop", 64, 785, 8),
        _shape("audio base, 50 % drop", 64, 601, 12),
        _shape("audio base, no drop", 64, 1201, 12),
        _shape("audio base, 75 % drop", 64, 301, 12),
        _shape("text small", 320, 17, 8, bias="text", scale=1.0),
        _shape("video large, dropout", 64, 785, 16, samples=64),
        _shape("audio base, dropout", 64, 601, 12, samples=64),
        _shape("text small, dropout", 320, 17, 8, bias="text", samples=64, scale=1.0),
        _shape("video large, 50 % drop, local batch 4", 4, 785, 16),
        _shape("video large, drop aligned to 768", 64, 768, 16),
    ),
    launches=_launches,
)
