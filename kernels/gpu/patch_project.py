"""Kept patches to tokens in Triton: gather, projection, position and dropout in one product. See `vatt.kernels.patch_project`.

Both signals are read as frames of planes of rows: a waveform is one row of one plane, its patch one row high. A patch is
then runs of PW contiguous values; where PW and the strides are multiples of 16 bytes each run is loaded 16 bytes at a time.
Pixels p enter the product as p - 127.5, which bf16 and fp16 hold exactly, and 2 / 255 multiplies its fp32 sum: neither
pixels nor weights are rounded. The AGG token is written in passing.

An index outside the grid gives a token of NaN: reading the indices on the host, to raise, would make it wait.

Legend: B samples, K patches kept, M = B K rows, F features of a patch, D of a token, C channels of a frame, PH and PW rows
and columns of a patch. Prefixes: o_ offsets, m_ mask, p_ pointer, b_ block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vatt.kernels.dropout import DropoutMask
from vatt.kernels.gpu.dropout import keep_block, mask_arguments
from vatt.kernels.gpu.launch import Launch, Tuning, Tunings
from vatt.kernels.gpu.target import current_target

EVERY_TARGET = ("sm_80", "sm_90", "sm_100")


def product_tunings(name: str, *candidates: tuple[int, int, int, int, int], rows: str, columns: str, depth: str) -> Tunings:
    """Candidates (rows, columns, depth of a product's block, warps, stages); the first is the default."""
    table = {f"{m}x{n}x{k}": Tuning({rows: m, columns: n, depth: k}, warps, stages) for m, n, k, warps, stages in candidates}
    return Tunings(name, table, dict.fromkeys(EVERY_TARGET, next(iter(table))))


# By the bytes of a weight: fp32 products run outside the tensor cores, and their blocks are twice as large in memory.
_BLOCKS = {"rows": "BLOCK_M", "columns": "BLOCK_D", "depth": "BLOCK_F"}
FORWARD = {
    2: product_tunings("patch_project", (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3), **_BLOCKS),
    4: product_tunings("patch_project_fp32", (64, 64, 32, 4, 2), **_BLOCKS),
}
# Reads the weights half as often; without dropout its registers suffice on Hopper, on the other targets they do not.
LARGE = product_tunings("patch_project_large", (256, 128, 64, 8, 3), (128, 128, 64, 8, 3), **_BLOCKS)


@triton.jit
def patch_rows(
    p_signal, p_index, o_m, K, places, w, hw, stride_ib, stride_ik, stride_b, stride_pt, stride_ph, PW: tl.constexpr
):
    """(pointer to each row's patch, its place in the grid, whether that is inside). stride_pt, stride_ph: from a patch to
    the next one in time and down.
    """
    sample, k = (o_m // K).to(tl.int64), o_m % K
    if p_index is not None:
        place = tl.load(p_index + sample * stride_ib + k * stride_ik)
        inside = (place >= 0) & (place < places)
        place = tl.where(inside, place, 0).to(tl.int32)
    else:
        place, inside = k, k >= 0
    start = (place // hw).to(tl.int64) * stride_pt + (place % hw // w).to(tl.int64) * stride_ph + place % w * PW
    return p_signal + sample * stride_b + start, place, inside


@triton.jit
def patch_values(
    p_rows, first_f, stride_t, stride_c, stride_h, dtype, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK_F) features from first_f on, ordered (frame, channel, row, column); bytes come as p - 127.5."""
    o_f = first_f + tl.arange(0, BLOCK_F)
    o_run = o_f // PW
    o_x = o_run // (PH * C) * stride_t + o_run // PH % C * stride_c + o_run % PH * stride_h + o_f % PW
    p_x = p_rows[:, None] + o_x[None, :]
    if F % BLOCK_F == 0:  # noqa: SIM108
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=(o_f < F)[None, :], other=0)
    if b_x.dtype == tl.uint8:
        b_x = b_x.to(tl.float32) - 127.5
    return b_x.to(dtype)


@triton.jit
def _project(
    p_signal,
    p_index,
    p_weight,
    p_bias,
    p_position,
    p_aggregate,
    p_y,
    p_seed,
    p_step,
    p_sample,
    M,
    K,
    D,
    places,
    w,
    hw,
    stride_ib,
    stride_ik,
    stride_b,
    stride_t,
    stride_c,
    stride_h,
    stride_pt,
    stride_ph,
    pixel_scale,
    rows_per_sample,
    stream,
    threshold,
    scale,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    F: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # Programs of the same rows are neighbours: the pixels of one are in the L2 cache for the next.
    tiles_d = tl.cdiv(D, BLOCK_D)
    first_d = tl.program_id(0) % tiles_d * BLOCK_D
    o_m = tl.program_id(0) // tiles_d * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_m = tl.minimum(o_m, M - 1)  # rows past the end read the last one again, so that no load is masked
    o_d = first_d + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_rows, place, inside = patch_rows(
        p_signal, p_index, o_m, K, places, w, hw, stride_ib, stride_ik, stride_b, stride_pt, stride_ph, PW
    )
    p_w = p_weight + tl.minimum(o_d, D - 1).to(tl.int64)[:, None] * F
    # W x^T: the right operand of a product comes from shared memory, to which converted pixels go 16 bytes at a time; as the
    # left one they would be read from there two at a time.
    b_yt = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    for first_f in tl.range(0, F, BLOCK_F):
        b_x = patch_values(p_rows, first_f, stride_t, stride_c, stride_h, p_weight.dtype.element_ty, C, PH, PW, F, BLOCK_F)
        o_f = first_f + tl.arange(0, BLOCK_F)
        if F % BLOCK_F == 0:  # noqa: SIM108
            b_w = tl.load(p_w + o_f[None, :])
        else:
            b_w = tl.load(p_w + o_f[None, :], mask=(o_f < F)[None, :], other=0.0)
        b_yt = tl.dot(b_w, tl.trans(b_x), b_yt, input_precision="ieee")
    b_y = tl.trans(b_yt)
    b_y = b_y * pixel_scale + tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if p_position is not None:
        p_p = p_position + place.to(tl.int64)[:, None] * D + o_d[None, :]
        b_y += tl.load(p_p, mask=m_d[None, :], other=0.0).to(tl.float32)
    if DROPOUT:
        kept = keep_block(o_m, first_d, D, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_D)
        b_y = tl.where(kept, b_y * scale, 0.0)
    if p_index is not None:
        b_y += tl.where(inside, 0.0, float("nan"))[:, None]
    dtype = p_y.dtype.element_ty
    o_y = (o_m if p_aggregate is None else o_m + o_m // K + 1).to(tl.int64) * D
    tl.store(p_y + o_y[:, None] + o_d[None, :], b_y.to(dtype), mask=m_m[:, None] & m_d[None, :])
    if p_aggregate is not None:
        first_m = tl.program_id(0) // tiles_d * BLOCK_M
        if tl.cdiv(first_m, K) * K < first_m + BLOCK_M:
            # Row 0 of a sample is AGG, and the program of its first patch writes it.
            b_aggregate = tl.broadcast_to(tl.load(p_aggregate + o_d, mask=m_d, other=0.0)[None, :], [BLOCK_M, BLOCK_D])
            m_first = m_m & (o_m % K == 0)
            tl.store(p_y + (o_y - D)[:, None] + o_d[None, :], b_aggregate.to(dtype), mask=m_first[:, None] & m_d[None, :])


def reading(signal: Tensor, index: Tensor | None, patch: Sequence[int], grid: Sequence[int], K: int) -> tuple[dict, dict]:
    """Run-time arguments and constants of a kernel that reads patches."""
    (pt, ph, pw), (t, h, w) = (patch, grid) if len(patch) == 3 else ((1, 1, *patch), (1, 1, *grid))
    stride_b, stride_t, stride_c, stride_h, _ = signal.stride() if signal.dim() == 5 else (signal.stride(0), 0, 0, 0, 1)
    channels = signal.shape[2] if signal.dim() == 5 else 1
    arguments = {
        "p_signal": signal,
        "p_index": index,
        "K": K,
        "places": t * h * w,
        "w": w,
        "hw": h * w,
        "stride_ib": None if index is None else index.stride(0),
        "stride_ik": None if index is None else index.stride(1),
        "stride_b": stride_b,
        "stride_t": stride_t,
        "stride_c": stride_c,
        "stride_h": stride_h,
        "stride_pt": pt * stride_t,
        "stride_ph": ph * stride_h,
        "pixel_scale": 2.0 / 255.0 if signal.dtype == torch.uint8 else 1.0,
    }
    return arguments, {"C": channels, "PH": ph, "PW": pw, "F": pt * channels * ph * pw}


def forward(
    signal: Tensor,
    index: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    aggregate: Tensor | None,
    patch: Sequence[int],
    grid: Sequence[int],
    dropout: DropoutMask | None,
) -> Tensor:
    """(B, 1 + K, D), or (B, K, D) without AGG. signal: its last axis contiguous."""
    B, D = signal.shape[0], weight.shape[0]
    K = math.prod(grid) if index is None else index.shape[1]
    y = weight.new_empty(B, K + (aggregate is not None), D)
    target = current_target()
    large = target.name == "sm_90" and weight.dtype.itemsize == 2 and dropout is None
    tuning = (LARGE if large else FORWARD[weight.dtype.itemsize]).pick(target)
    arguments, constants = reading(signal, index, patch, grid, K)
    arguments |= {"p_weight": weight.contiguous(), "p_bias": bias, "p_position": position, "p_aggregate": aggregate}
    arguments |= {"p_y": y, "M": B * K, "D": D, **mask_arguments(dropout, B * K)}
    programs = triton.cdiv(B * K, tuning.blocks["BLOCK_M"]) * triton.cdiv(D, tuning.blocks["BLOCK_D"])
    Launch(_project, (programs,), arguments, constants | {"DROPOUT": dropout is not None}, tuning)()
    return y


# Here and not beside the ops: importing torch's counter takes half a second, which not every `vatt` command should wait for.
@register_flop_formula(torch.ops.vatt.patch_project)
def _forward_flops(signal, index, weight, bias, position, aggregate, patch, grid, *rest, out_shape=None, **_):  # type: ignore[no-untyped-def]
    kept = math.prod(grid) if index is None else index[1]
    return 2 * signal[0] * kept * weight[0] * weight[1]


@register_flop_formula(torch.ops.vatt.patch_project_backward)
def _backward_flops(grad, signal, index, patch, grid, has_position, has_aggregate, *rest, out_shape=None, **_):  # type: ignore[no-untyped-def]
    features = math.prod(patch) * (signal[2] if len(signal) == 5 else 1)
    return 2 * grad[0] * (grad[1] - has_aggregate) * grad[2] * features
