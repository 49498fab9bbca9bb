"""Flash attention over a packed projection in Triton: the backward pass. See `vatt.kernels.attention`.

With P the weights, K the dropout mask over 1 - rate (all ones without), and dO the gradient of the output O = (K P) V:

    dV = (K P)^T dO        dS = P (K (dO V^T) - rowsum(dO O))        dQ = scale dS K        dK = scale dS^T Q

The weights are computed again, from the scores and their log-sum-exp. Two kernels, so that each sum is made by one program
in one order: the gradient is the same every time, and nothing is added up in memory. `_backward_q` holds queries and walks
over keys, and leaves rowsum(dO O) behind for `_backward_kv`, which holds keys and values and walks over queries with scores
transposed, so that weights and their gradients enter the products from registers. The gradients of queries, keys and values
are written side by side, as the projection's backward pass reads them.

Only the last tile of a walk is masked. Tokens a program holds beyond the last are read as zeros with weight 0 or never
stored, which needs no mask inside the walk.

Legend: as in gpu/attention.py; delta = rowsum(dO O).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.dropout import DropoutMask
from vatt.kernels.gpu.attention import LOG2_E, bias_arguments, keep_weights, load_bias, load_rows, tile_of
from vatt.kernels.gpu.attention_tuning import pick, tail
from vatt.kernels.gpu.dropout import mask_arguments
from vatt.kernels.gpu.launch import Launch
from vatt.kernels.gpu.target import current_target


@triton.jit
def _step_q(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    p_k,
    p_v,
    p_bias,
    p_dbias,
    p_delta,
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
    scale,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALONE: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of a walk over keys: b_dq + dS K, and dS itself where the bias has a gradient."""
    o_n = first_n + tl.arange(0, WIDTH)
    m_n = o_n < N
    b_k = load_rows(p_k, o_n, stride, m_n, D, MASKED)
    b_v = load_rows(p_v, o_n, stride, m_n, D, MASKED)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if p_bias is None:
        b_s = b_s * scale_log2 - b_lse[:, None]
    else:
        b_s = b_s * scale_log2 + load_bias(p_bias, o_m, o_n, m_m, m_n, stride_bm, stride_bn) - b_lse[:, None]
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_p = tl.exp2(b_s)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    if DROPOUT:
        kept = keep_weights(o_m, first_n, N, head_row, sample, step, stream, seed, threshold, WIDTH)
        b_dp = tl.where(kept, b_dp * scale, 0.0)
    if ALONE:
        # Where one key has all the weight this is exactly its b_dp, whatever rounding did to the weight.
        b_delta = tl.sum(b_p * b_dp, 1) / tl.maximum(tl.sum(b_p, 1), 1e-30)
        tl.store(p_delta + o_m, b_delta, mask=m_m)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if p_dbias is not None:
        tl.store(p_dbias + o_m.to(tl.int64)[:, None] * N + o_n[None, :], b_ds, mask=m_m[:, None] & m_n[None, :])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def _backward_q(
    p_grad,
    p_qkv,
    p_out,
    p_lse,
    p_bias,
    p_dqkv,
    p_dbias,
    p_delta,
    p_seed,
    p_step,
    p_sample,
    N,
    H,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    score_scale,
    rows_per_sample,
    stream,
    threshold,
    scale,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALONE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """scale: 1 / (1 - rate) of dropout. TAIL: width of the walk's last tile, 0 for none. ALONE: the walk is one step, which
    then has whole rows and takes delta from them: exact, where the output that was stored is rounded.
    """
    tile, h, b = tile_of(tl.cdiv(N, BLOCK_M), H)
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N
    stride = 3 * H * D
    head = b.to(tl.int64) * H + h
    first = b.to(tl.int64) * N * stride + h * D
    p_k, p_v = p_qkv + first + H * D, p_qkv + first + 2 * H * D
    if p_bias is not None:
        p_bias += b.to(tl.int64) * stride_bb + h.to(tl.int64) * stride_bh
    if p_dbias is not None:
        p_dbias += head * N * N
    head_row, sample, step, seed = 0, 0, 0, 0
    if DROPOUT:
        head_row = b % rows_per_sample * H + h
        sample, step, seed = tl.load(p_sample + b // rows_per_sample), tl.load(p_step), tl.load(p_seed)
    scale_log2 = score_scale * LOG2_E
    first_out = (b.to(tl.int64) * N * H + h) * D
    b_do = load_rows(p_grad + first_out, o_m, H * D, m_m, D, True)
    p_delta += head * N
    b_delta = tl.zeros([BLOCK_M], tl.float32)
    if not ALONE:
        b_out = load_rows(p_out + first_out, o_m, H * D, m_m, D, True)
        b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
        tl.store(p_delta + o_m, b_delta, mask=m_m)
    b_q = load_rows(p_qkv + first, o_m, stride, m_m, D, True)
    # Queries beyond the last have weights exp2(-inf) = 0.
    b_lse = tl.load(p_lse + head * N + o_m, mask=m_m, other=float("inf"))
    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    whole = N - N % BLOCK_N
    for first_n in tl.range(0, whole, BLOCK_N):
        # fmt: off
        b_dq = _step_q(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_bias, p_dbias, p_delta, o_m, m_m, first_n, N, stride, stride_bm,
            stride_bn, scale_log2, head_row, sample, step, stream, seed, threshold, scale, D, DROPOUT, ALONE, BLOCK_N, False,
        )
        # fmt: on
    if TAIL > 0:
        # fmt: off
        b_dq = _step_q(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_bias, p_dbias, p_delta, o_m, m_m, whole, N, stride, stride_bm,
            stride_bn, scale_log2, head_row, sample, step, stream, seed, threshold, scale, D, DROPOUT, ALONE, TAIL, True,
        )
        # fmt: on
    o_dq = o_m[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(p_dqkv + first + o_dq, (b_dq * score_scale).to(p_dqkv.dtype.element_ty), mask=m_m[:, None])


@triton.jit
def _step_kv(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_do,
    p_lse,
    p_delta,
    p_bias,
    o_n,
    m_n,
    first_m,
    first_n,
    N,
    stride,
    stride_out,
    stride_bm,
    stride_bn,
    scale_log2,
    head_row,
    sample,
    step,
    stream,
    seed,
    threshold,
    scale,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of a walk over queries: b_dk + dS^T Q and b_dv + (K P)^T dO. Scores and their gradients are (keys, queries)."""
    o_m = first_m + tl.arange(0, WIDTH)
    m_m = o_m < N
    b_q = load_rows(p_q, o_m, stride, m_m, D, MASKED)
    b_do = load_rows(p_do, o_m, stride_out, m_m, D, MASKED)
    if MASKED:
        # Queries beyond the last have weights exp2(-inf) = 0.
        b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
    else:
        b_lse = tl.load(p_lse + o_m)
        b_delta = tl.load(p_delta + o_m)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    if p_bias is None:
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
    else:
        b_bias = load_bias(p_bias, o_n, o_m, m_n, m_m, stride_bn, stride_bm)
        b_p = tl.exp2(b_s * scale_log2 + b_bias - b_lse[None, :])
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_kp = b_p
    if DROPOUT:
        kept = tl.trans(keep_weights(o_m, first_n, N, head_row, sample, step, stream, seed, threshold, BLOCK_N))
        b_kp = tl.where(kept, b_p * scale, 0.0)
        b_dp = tl.where(kept, b_dp * scale, 0.0)
    b_dv = tl.dot(b_kp.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def _backward_kv(
    p_grad,
    p_qkv,
    p_lse,
    p_delta,
    p_bias,
    p_dqkv,
    p_seed,
    p_step,
    p_sample,
    N,
    H,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    score_scale,
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
    tile, h, b = tile_of(tl.cdiv(N, BLOCK_N), H)
    first_n = tile * BLOCK_N
    o_n = first_n + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    stride = 3 * H * D
    head = b.to(tl.int64) * H + h
    p_q = p_qkv + b.to(tl.int64) * N * stride + h * D
    p_do = p_grad + (b.to(tl.int64) * N * H + h) * D
    p_lse += head * N
    p_delta += head * N
    if p_bias is not None:
        p_bias += b.to(tl.int64) * stride_bb + h.to(tl.int64) * stride_bh
    head_row, sample, step, seed = 0, 0, 0, 0
    if DROPOUT:
        head_row = b % rows_per_sample * H + h
        sample, step, seed = tl.load(p_sample + b // rows_per_sample), tl.load(p_step), tl.load(p_seed)
    scale_log2 = score_scale * LOG2_E
    b_k = load_rows(p_q + H * D, o_n, stride, m_n, D, True)
    b_v = load_rows(p_q + 2 * H * D, o_n, stride, m_n, D, True)
    b_dk = tl.zeros([BLOCK_N, D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, D], tl.float32)
    whole = N - N % BLOCK_M
    for first_m in tl.range(0, whole, BLOCK_M):
        # fmt: off
        b_dk, b_dv = _step_kv(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_bias, o_n, m_n, first_m, first_n, N, stride, H * D, stride_bm,
            stride_bn, scale_log2, head_row, sample, step, stream, seed, threshold, scale, D, DROPOUT, BLOCK_N, BLOCK_M, False,
        )
        # fmt: on
    if TAIL > 0:
        # fmt: off
        b_dk, b_dv = _step_kv(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, p_bias, o_n, m_n, whole, first_n, N, stride, H * D, stride_bm,
            stride_bn, scale_log2, head_row, sample, step, stream, seed, threshold, scale, D, DROPOUT, BLOCK_N, TAIL, True,
        )
        # fmt: on
    p_dk = p_dqkv + b.to(tl.int64) * N * stride + h * D + H * D + o_n[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(p_dk, (b_dk * score_scale).to(p_dqkv.dtype.element_ty), mask=m_n[:, None])
    tl.store(p_dk + H * D, b_dv.to(p_dqkv.dtype.element_ty), mask=m_n[:, None])


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
    grad, qkv = grad.contiguous(), qkv_BN3HD.contiguous()
    B, N, _, H, D = qkv.shape
    dqkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse_BHN)
    dscores = torch.empty(B, H, N, N, dtype=torch.float32, device=qkv.device) if bias_gradient else None
    arguments = {
        "p_grad": grad,
        "p_qkv": qkv,
        "p_lse": lse_BHN,
        "p_dqkv": dqkv,
        "p_delta": delta,
        "N": N,
        "H": H,
        "score_scale": scale,
        **bias_arguments(bias, qkv),
        **mask_arguments(dropout, B),
    }
    constants = {"D": D, "DROPOUT": dropout is not None}
    tuning = pick("backward_q", qkv, dropout is not None, current_target())
    block, walk = tuning.blocks["BLOCK_M"], tuning.blocks["BLOCK_N"]
    of_q = {"p_out": out, "p_dbias": dscores}
    walked = {"TAIL": tail(N, walk), "ALONE": walk >= N}
    Launch(_backward_q, (triton.cdiv(N, block) * H * B,), arguments | of_q, constants | walked, tuning)()
    tuning = pick("backward_kv", qkv, dropout is not None, current_target())
    block, walk = tuning.blocks["BLOCK_N"], tuning.blocks["BLOCK_M"]
    Launch(_backward_kv, (triton.cdiv(N, block) * H * B,), arguments, constants | {"TAIL": tail(N, walk)}, tuning)()
    if bias is None or dscores is None:
        return dqkv, lse_BHN.new_empty(0)
    return dqkv, dscores.sum_to_size(bias.shape).to(bias.dtype)
