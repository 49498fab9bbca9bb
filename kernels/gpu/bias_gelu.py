"""Dropout(GELU(x + bias)) in Triton, forward and backward. See `vatt.kernels.bias_gelu` for what it computes.

Arithmetic, not memory, is what binds a GELU in 16 bits: with erf as the CUDA library computes it, an element takes more
instructions than an H200 issues in the time it needs to copy it. `upper_tail` takes less than half as many. fp32 tensors,
of twice the bytes, keep erf.

Legend: M rows, C columns, P programs that share a column block. Prefixes: o_ offsets, m_ mask, p_ pointer, b_ block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.dropout import DropoutMask
from vatt.kernels.gpu.dropout import keep_block, mask_arguments
from vatt.kernels.gpu.launch import Launch, Tuning, Tunings
from vatt.kernels.gpu.partial_sums import add_up, programs
from vatt.kernels.gpu.target import current_target

# A warp holds 256 columns, 8 of them (16 bytes) a thread, and warps lie side by side along a row: then the bias is loaded in
# the order it is used in, and sums over rows stay in a thread.
FORWARD = Tunings(
    "bias_gelu_forward",
    {
        "4x1024": Tuning({"BLOCK_M": 4, "BLOCK_C": 1024}, warps=4, stages=1),
        "2x1024": Tuning({"BLOCK_M": 2, "BLOCK_C": 1024}, warps=4, stages=1),
        "4x512": Tuning({"BLOCK_M": 4, "BLOCK_C": 512}, warps=2, stages=1),
        "4x256": Tuning({"BLOCK_M": 4, "BLOCK_C": 256}, warps=1, stages=1),
    },
    default={"sm_80": "4x512", "sm_90": "4x512", "sm_100": "4x512"},
)
# Programs: about four blocks of 128 threads for each multiprocessor of A100, H200 and B200.
BACKWARD = Tunings(
    "bias_gelu_backward",
    {
        f"{m}x{columns}_{programs}": Tuning({"BLOCK_M": m, "BLOCK_C": columns}, warps, 1, programs)
        for m, columns, warps, each in ((2, 512, 2, 12), (4, 512, 2, 8), (2, 1024, 4, 6), (4, 1024, 4, 4))
        for programs in (108 * each, 132 * each, 148 * each)
    },
    default={"sm_80": "2x512_1296", "sm_90": "2x512_1584", "sm_100": "2x512_1776"},
)


@triton.jit
def upper_tail(b_a):
    """Phi(-a) for a >= 0, Phi the normal distribution function: 7 multiply-adds and one power of two.

    log2 Phi(-a) is so smooth that a polynomial of degree 7 meets it: fitted for the least largest error over 0 <= a <= 6,
    which leaves a relative error below 8e-6 in Phi, rounding included. Beyond, where Phi < 1e-9, it falls faster than Phi.
    """
    b_p = -1.834809134543185e-06 * b_a + 6.159824685397207e-05
    b_p = b_p * b_a - 0.0009305244723603214
    b_p = b_p * b_a + 0.008507889426594334
    b_p = b_p * b_a - 0.053960066056659234
    b_p = b_p * b_a - 0.45846439647135856
    b_p = b_p * b_a - 1.1512510436573915
    return tl.exp2(b_p * b_a - 0.9999952947017104)


@triton.jit
def _gelu(b_z, FITTED: tl.constexpr):
    if FITTED:
        # z Phi(z) = max(z, 0) - |z| Phi(-|z|), without cancellation on either side. A NaN stays one: in the product.
        b_a = tl.abs(b_z)
        return tl.maximum(b_z, 0.0) - b_a * upper_tail(b_a)
    return 0.5 * b_z * (1.0 + tl.erf(b_z * 0.7071067811865476))


@triton.jit
def _gelu_slope(b_z, FITTED: tl.constexpr):
    """GELU'(z) = Phi(z) + z phi(z)."""
    if FITTED:
        b_tail = upper_tail(tl.abs(b_z))
        b_phi = tl.where(b_z > 0.0, 1.0 - b_tail, b_tail)
    else:
        b_phi = 0.5 * (1.0 + tl.erf(b_z * 0.7071067811865476))
    return b_phi + b_z * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * b_z * b_z)


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
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_C
    o_c = first_c + tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < M, o_c < C
    m_x = m_m[:, None] & m_c[None, :]
    o_x = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
    b_z = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_z += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_y = _gelu(b_z, p_x.dtype.element_ty != tl.float32)
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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_c = tl.program_id(1) * BLOCK_C
    o_c = first_c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_dbias = tl.zeros([BLOCK_C], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        m_x = m_m[:, None] & m_c[None, :]
        o_x = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
        b_z = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        if p_bias is not None:
            b_z += b_bias[None, :]
        b_dz = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
        if DROPOUT:
            kept = keep_block(o_m, first_c, C, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_C)
            b_dz = tl.where(kept, b_dz * scale, 0.0)
        b_dz *= _gelu_slope(b_z, p_x.dtype.element_ty != tl.float32)
        tl.store(p_dx + o_x, b_dz.to(p_dx.dtype.element_ty), mask=m_x)
        if p_bias is not None:
            b_dbias += tl.sum(b_dz, 0)
    if p_bias is not None:
        tl.store(p_partial + tl.program_id(0) * C + o_c, b_dbias, mask=m_c)


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
    column_blocks = triton.cdiv(C, tuning.blocks["BLOCK_C"])
    P = programs(tuning.programs // column_blocks, M)
    partial = None if bias is None else torch.empty(1, P, C, dtype=torch.float32, device=x.device)
    arguments = {"p_grad": grad, "p_x": x, "p_bias": bias, "p_dx": dx, "p_partial": partial, "M": M, "C": C}
    constants = {"DROPOUT": dropout is not None}
    Launch(_backward, (P, column_blocks), arguments | mask_arguments(dropout, M), constants, tuning)()
    return dx, x.new_empty(0) if partial is None else add_up(partial, x.dtype)[0]
