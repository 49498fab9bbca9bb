"""Dropout(GELU(x + bias)) in Triton, forward and backward. See `vatt.kernels.bias_gelu` for what it computes.

Legend: M rows, C columns, P groups of rows that one program adds up for the bias gradient. Prefixes: o_ offsets, m_ mask,
p_ pointer, b_ block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.dropout import DropoutMask
from vatt.kernels.gpu.dropout import keep_block, mask_arguments
from vatt.kernels.gpu.launch import Launch, Tuning, Tunings
from vatt.kernels.gpu.target import current_target

FORWARD = Tunings(
    "bias_gelu_forward",
    {
        "8x512": Tuning({"BLOCK_M": 8, "BLOCK_C": 512}, warps=8, stages=1),
        "4x512": Tuning({"BLOCK_M": 4, "BLOCK_C": 512}, warps=4, stages=1),
        "2x1024": Tuning({"BLOCK_M": 2, "BLOCK_C": 1024}, warps=4, stages=1),
    },
    default={"sm_80": "4x512", "sm_90": "4x512", "sm_100": "4x512"},
)
BACKWARD = Tunings(
    "bias_gelu_backward",
    {
        "4x256": Tuning({"BLOCK_M": 4, "BLOCK_C": 256}, warps=4, stages=2),
        "8x256": Tuning({"BLOCK_M": 8, "BLOCK_C": 256}, warps=4, stages=2),
        "4x512": Tuning({"BLOCK_M": 4, "BLOCK_C": 512}, warps=8, stages=2),
    },
    default={"sm_80": "8x256", "sm_90": "8x256", "sm_100": "8x256"},
)
ROWS_PER_PROGRAM = 64  # of the backward pass: what one partial sum of the bias gradient covers


@triton.jit
def _forward(
    p_x,
    p_bias,
    p_y,
    p_seed,
    p_step,
    p_sample,
    M,
    C,
    rows_per_sample,
    stream,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_C
    o_c = first_c + tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < M, o_c < C
    m_x = m_m[:, None] & m_c[None, :]
    o_x = o_m[:, None] * C + o_c[None, :]
    b_z = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_z += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_y = 0.5 * b_z * (1.0 + tl.erf(b_z * 0.7071067811865476))
    if DROPOUT:
        kept = keep_block(o_m, first_c, C, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_C)
        b_y = tl.where(kept, b_y * scale, 0.0)
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit
def _backward(
    p_grad,
    p_x,
    p_bias,
    p_dx,
    p_partial,
    p_seed,
    p_step,
    p_sample,
    M,
    C,
    rows_per_sample,
    stream,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_c = tl.program_id(1) * BLOCK_C
    o_c = first_c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_dbias = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in tl.range(0, ROWS, BLOCK_M):
        o_m = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        m_x = m_m[:, None] & m_c[None, :]
        o_x = o_m[:, None] * C + o_c[None, :]
        b_z = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        if p_bias is not None:
            b_z += b_bias[None, :]
        b_dz = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
        if DROPOUT:
            kept = keep_block(o_m, first_c, C, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_C)
            b_dz = tl.where(kept, b_dz * scale, 0.0)
        # GELU'(z) = Phi(z) + z phi(z)
        b_dz *= 0.5 * (1.0 + tl.erf(b_z * 0.7071067811865476)) + b_z * 0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)
        tl.store(p_dx + o_x, b_dz.to(p_dx.dtype.element_ty), mask=m_x)
        if p_bias is not None:
            b_dbias += b_dz
    if p_bias is not None:
        o_p = tl.program_id(0).to(tl.int64) * C + o_c
        tl.store(p_partial + o_p, tl.sum(b_dbias, 0), mask=m_c)


def forward(x: Tensor, bias: Tensor | None, dropout: DropoutMask | None) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    M, C = x.numel() // x.shape[-1], x.shape[-1]
    tuning = FORWARD.pick(current_target())
    grid = triton.cdiv(M, tuning.blocks["BLOCK_M"]), triton.cdiv(C, tuning.blocks["BLOCK_C"])
    arguments = {"p_x": x, "p_bias": bias, "p_y": y, "M": M, "C": C, **mask_arguments(dropout, M)}
    Launch(_forward, grid, arguments, {"DROPOUT": dropout is not None}, tuning)()
    return y


def backward(grad: Tensor, x: Tensor, bias: Tensor | None, dropout: DropoutMask | None) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    M, C = x.numel() // x.shape[-1], x.shape[-1]
    tuning = BACKWARD.pick(current_target())
    programs = triton.cdiv(M, ROWS_PER_PROGRAM)
    partial = None if bias is None else torch.empty(programs, C, dtype=torch.float32, device=x.device)
    grid = programs, triton.cdiv(C, tuning.blocks["BLOCK_C"])
    arguments = {"p_grad": grad, "p_x": x, "p_bias": bias, "p_dx": dx, "p_partial": partial, "M": M, "C": C}
    constants = {"DROPOUT": dropout is not None, "ROWS": ROWS_PER_PROGRAM}
    Launch(_backward, grid, arguments | mask_arguments(dropout, M), constants, tuning)()
    # Partial sums in a fixed order: the same gradient every time, which atomic additions would not give.
    return dx, x.new_empty(0) if bias is None or partial is None else partial.sum(0).to(bias.dtype)
