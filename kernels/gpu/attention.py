"""Flash attention over a packed projection in Triton: the forward pass. See `vatt.kernels.attention` for what it computes.

A program holds BLOCK_M queries of one head and walks over the keys, with the softmax rescaled as larger scores turn up.
Queries, keys and values are read where the projection left them, and the output is written where the next one reads it.
Scores are in units of log 2, so that a weight is one multiply-add and one exp2. Only the walk's last tile is masked.

Legend: B rows of the batch, H heads, N tokens, D features of a head, M queries of a tile. Prefixes: o_ offsets, m_ mask,
p_ pointer, b_ block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.dropout import DropoutMask
from vatt.kernels.gpu.attention_tuning import pick, tail
from vatt.kernels.gpu.counter import keep
from vatt.kernels.gpu.dropout import mask_arguments
from vatt.kernels.gpu.launch import Launch
from vatt.kernels.gpu.target import current_target

LOG2_E = tl.constexpr(1.4426950408889634)
# A lower bias (padding is -1e9, others use -inf) changes no weight, and would leave a wholly masked row without digits.
LEAST_BIAS = tl.constexpr(-30000.0)


@triton.jit
def tile_of(tiles, H):
    """(tile, head, row of the batch) of this program; neighbours share a head, and so its keys in the L2 cache."""
    program = tl.program_id(0)
    return program % tiles, program // tiles % H, program // tiles // H


@triton.jit
def load_rows(p_rows, o_r, stride, m_r, D: tl.constexpr, MASKED: tl.constexpr):
    """(rows, D) of a head; rows outside m_r are 0."""
    p_block = p_rows + o_r[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(p_block, mask=m_r[:, None], other=0.0)
    return tl.load(p_block)


@triton.jit
def load_bias(p_bias, o_m, o_n, m_m, m_n, stride_m, stride_n):
    """(M, N) of a head's bias, in units of log 2."""
    m_mn = m_m[:, None] & m_n[None, :]
    b_bias = tl.load(p_bias + o_m.to(tl.int64)[:, None] * stride_m + o_n[None, :] * stride_n, mask=m_mn, other=0.0)
    return tl.maximum(b_bias.to(tl.float32), LEAST_BIAS) * LOG2_E


@triton.jit
def keep_weights(o_m, first_n, N, head_row, sample, step, stream, seed, threshold, WIDTH: tl.constexpr):
    """bool (M, WIDTH): which attention weights dropout keeps. head_row: how many (caption, head) pairs of the sample come
    before; a row of weights is (caption, head, query), its column the key. first_n: a multiple of 4.
    """
    group = first_n // 4 + tl.arange(0, WIDTH // 4)
    position = (head_row * N + o_m)[:, None] * tl.cdiv(N, 4) + group[None, :]
    return keep(position, sample, step, stream, seed, threshold)


@triton.jit
def _attend(
    b_q,
    b_out,
    b_sum,
    b_max,
    p_k,
    p_v,
    p_bias,
    o_m,
    m_m,
    first_n,
    N,
    stride,
    stride_bm,
    stride_bn,
    scale_log2,
    head_row,
    sample,
    step,
    stream,
    seed,
    threshold,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the walk: WIDTH keys from first_n. Returns the output, sum of weights and largest score so far."""
    o_n = first_n + tl.arange(0, WIDTH)
    m_n = o_n < N
    b_k = load_rows(p_k, o_n, stride, m_n, D, MASKED)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if p_bias is not None:
        b_s = b_s * scale_log2 + load_bias(p_bias, o_m, o_n, m_m, m_n, stride_bm, stride_bn)
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    if p_bias is not None:
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
    else:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
    b_shrink = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    if DROPOUT:
        kept = keep_weights(o_m, first_n, N, head_row, sample, step, stream, seed, threshold, WIDTH)
        b_p = tl.where(kept, b_p, 0.0)
    b_v = load_rows(p_v, o_n, stride, m_n, D, MASKED)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
    return b_out, b_sum, b_new


@triton.jit
def _forward(
    p_qkv,
    p_bias,
    p_out,
    p_lse,
    p_seed,
    p_step,
    p_sample,
    N,
    H,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    scale_log2,
    rows_per_sample,
    stream,
    threshold,
    scale,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """scale: 1 / (1 - rate) of dropout. TAIL: width of the walk's last tile, 0 for none."""
    tile, h, b = tile_of(tl.cdiv(N, BLOCK_M), H)
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N
    stride = 3 * H * D
    p_q = p_qkv + b.to(tl.int64) * N * stride + h * D
    p_k, p_v = p_q + H * D, p_q + 2 * H * D
    if p_bias is not None:
        p_bias += b.to(tl.int64) * stride_bb + h.to(tl.int64) * stride_bh
    head_row, sample, step, seed = 0, 0, 0, 0
    if DROPOUT:
        head_row = b % rows_per_sample * H + h
        sample, step, seed = tl.load(p_sample + b // rows_per_sample), tl.load(p_step), tl.load(p_seed)
    b_q = load_rows(p_q, o_m, stride, m_m, D, True)
    b_out = tl.zeros([BLOCK_M, D], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    whole = N - N % BLOCK_N
    for first_n in tl.range(0, whole, BLOCK_N):
        # fmt: off
        b_out, b_sum, b_max = _attend(
            b_q, b_out, b_sum, b_max, p_k, p_v, p_bias, o_m, m_m, first_n, N, stride, stride_bm, stride_bn, scale_log2,
            head_row, sample, step, stream, seed, threshold, D, DROPOUT, BLOCK_N, False,
        )
        # fmt: on
    if TAIL > 0:
        # fmt: off
        b_out, b_sum, b_max = _attend(
            b_q, b_out, b_sum, b_max, p_k, p_v, p_bias, o_m, m_m, whole, N, stride, stride_bm, stride_bn, scale_log2,
            head_row, sample, step, stream, seed, threshold, D, DROPOUT, TAIL, True,
        )
        # fmt: on
    b_inverse = 1.0 / b_sum
    if DROPOUT:
        b_inverse *= scale
    p_out += (b.to(tl.int64) * N * H + h) * D
    o_out = o_m[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(p_out + o_out, (b_out * b_inverse[:, None]).to(p_out.dtype.element_ty), mask=m_m[:, None])
    tl.store(p_lse + (b.to(tl.int64) * H + h) * N + o_m, b_max + tl.log2(b_sum), mask=m_m)


def bias_arguments(bias: Tensor | None, qkv_BN3HD: Tensor) -> dict[str, Tensor | int | None]:
    """The bias and its strides over (B, H, N, N); an axis it is broadcast along has stride 0."""
    names = ("stride_bb", "stride_bh", "stride_bm", "stride_bn")
    if bias is None:
        return {name: None for name in ("p_bias", *names)}
    B, N, _, H, _ = qkv_BN3HD.shape
    return {"p_bias": bias, **dict(zip(names, bias.expand(B, H, N, N).stride(), strict=True))}


def forward(qkv_BN3HD: Tensor, bias: Tensor | None, scale: float, dropout: DropoutMask | None) -> tuple[Tensor, Tensor]:
    """(out (B, N, H D), log2 of the sum of exp(score) of each query (B, H, N) in fp32)."""
    qkv = qkv_BN3HD.contiguous()
    B, N, _, H, D = qkv.shape
    out = torch.empty(B, N, H * D, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, H, N, dtype=torch.float32, device=qkv.device)
    tuning = pick("forward", qkv, dropout is not None, current_target())
    arguments = {
        "p_qkv": qkv,
        "p_out": out,
        "p_lse": lse,
        "N": N,
        "H": H,
        "scale_log2": scale * LOG2_E.value,
        **bias_arguments(bias, qkv),
        **mask_arguments(dropout, B),
    }
    constants = {"D": D, "DROPOUT": dropout is not None, "TAIL": tail(N, tuning.blocks["BLOCK_N"])}
    Launch(_forward, (triton.cdiv(N, tuning.blocks["BLOCK_M"]) * H * B,), arguments, constants, tuning)()
    return out, lse
