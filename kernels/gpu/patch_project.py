"""Kept patches to tokens in Triton: gather, projection, position and dropout in one product. See `vatt.kernels.patch_project`.

Both signals are read as frames of planes of rows: a waveform is one row of one plane, its patch one row high. A patch is
then runs of PW contiguous values; where PW and the strides are multiples of 16 bytes each run is loaded 16 bytes at a time.
Pixels p enter the product as p - 127.5, which bf16 and fp16 hold exactly, and 2 / 255 multiplies its fp32 sum: neither
pixels nor weights are rounded.

The projection is one product over rows (sample, kept patch) with the AGG token written in passing. The weight's gradient is
a product over all rows, cut into splits that fill the machine, each with a partial sum of its own. The gradients of position
and bias come from one walk: a program owns some places of the grid and adds up what each sample kept there. No atomics: a
gradient is the same every time.

An index outside the grid gives a token of NaN, a patch kept twice by one sample a position gradient of NaN: reading the
indices on the host to raise would stop it.

Legend: B samples, K patches kept, N patches of the grid, M = B K rows, F features of a patch, D of a token, S splits.
Prefixes: o_ offsets, m_ mask, p_ pointer, b_ block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.dropout import DropoutMask
from vatt.kernels.gpu.dropout import keep_block, mask_arguments
from vatt.kernels.gpu.launch import Launch, Tuning, Tunings
from vatt.kernels.gpu.target import current_target

_EVERY_TARGET = ("sm_80", "sm_90", "sm_100")


def _tunings(name: str, *candidates: tuple[int, int, int, int, int], rows: str, columns: str, depth: str) -> Tunings:
    """Candidates (rows, columns, depth of a product's block, warps, stages); the first is the default."""
    table = {f"{m}x{n}x{k}": Tuning({rows: m, columns: n, depth: k}, warps, stages) for m, n, k, warps, stages in candidates}
    return Tunings(name, table, dict.fromkeys(_EVERY_TARGET, next(iter(table))))


_PRODUCT = {"rows": "BLOCK_M", "columns": "BLOCK_D", "depth": "BLOCK_F"}
_GRADIENT = {"rows": "BLOCK_D", "columns": "BLOCK_F", "depth": "BLOCK_M"}
# By the bytes of a weight: fp32 products run outside the tensor cores, and their blocks are twice as large in memory.
FORWARD = {
    2: _tunings("patch_project", (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3), **_PRODUCT),
    4: _tunings("patch_project_fp32", (64, 64, 32, 4, 2), **_PRODUCT),
}
WEIGHT = {
    2: _tunings("patch_project_weight", (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3), **_GRADIENT),
    4: _tunings("patch_project_weight_fp32", (64, 64, 32, 4, 2), **_GRADIENT),
}
PLACES = Tunings(
    "patch_project_places",
    {
        "8x256": Tuning({"BLOCK_N": 8, "BLOCK_D": 256}, warps=4, stages=3),
        "16x128": Tuning({"BLOCK_N": 16, "BLOCK_D": 128}, warps=4, stages=3),
    },
    default=dict.fromkeys(_EVERY_TARGET, "8x256"),
)
WHERE = Tuning({"BLOCK_N": 128, "BLOCK_K": 32}, warps=4, stages=2)
# Programs that the weight's gradient is cut into at least: two for each multiprocessor of an H100.
PROGRAMS = 264


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


@triton.jit
def _weight(
    p_signal,
    p_index,
    p_grad,
    p_partial,
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
    rows_of_a_split,
    pixel_scale,
    rows_per_sample,
    stream,
    threshold,
    scale,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    F: tl.constexpr,
    AGGREGATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    tiles_f = tl.cdiv(F, BLOCK_F)
    first_f = tl.program_id(0) % tiles_f * BLOCK_F
    first_d = tl.program_id(0) // tiles_f * BLOCK_D
    o_d = first_d + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    dtype = p_grad.dtype.element_ty
    first_m = tl.program_id(1) * rows_of_a_split
    b_dw = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    for start in tl.range(0, rows_of_a_split, BLOCK_M):
        o_m = first_m + start + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        o_m = tl.minimum(o_m, M - 1)
        p_rows, _, _ = patch_rows(
            p_signal, p_index, o_m, K, places, w, hw, stride_ib, stride_ik, stride_b, stride_pt, stride_ph, PW
        )
        b_x = patch_values(p_rows, first_f, stride_t, stride_c, stride_h, dtype, C, PH, PW, F, BLOCK_F)
        o_g = (o_m + o_m // K + 1 if AGGREGATE else o_m).to(tl.int64) * D
        b_g = tl.load(p_grad + o_g[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
        if DROPOUT:
            kept = keep_block(o_m, first_d, D, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_D)
            b_g = tl.where(kept, b_g, 0.0)
        b_dw = tl.dot(tl.trans(b_g), b_x, b_dw, input_precision="ieee")
    if DROPOUT:
        b_dw *= scale
    o_f = first_f + tl.arange(0, BLOCK_F)
    p_out = p_partial + tl.program_id(1).to(tl.int64) * D * F + o_d[:, None] * F + o_f[None, :]
    tl.store(p_out, b_dw * pixel_scale, mask=m_d[:, None] & (o_f < F)[None, :])


@triton.jit
def _where(p_index, p_where, K, N, stride_ib, stride_ik, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """For each place of a sample: 0 if it was dropped, k + 1 if it was kept as the k-th, -1 if more than once."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(1).to(tl.int64)
    found = tl.zeros([BLOCK_N], tl.int32)
    times = tl.zeros([BLOCK_N], tl.int32)
    for first_k in tl.range(0, K, BLOCK_K):
        o_k = first_k + tl.arange(0, BLOCK_K)
        index = tl.load(p_index + sample * stride_ib + o_k * stride_ik, mask=o_k < K, other=-1)
        same = index[None, :] == o_n[:, None]
        found += tl.sum(tl.where(same, o_k[None, :] + 1, 0), 1)
        times += tl.sum(same.to(tl.int32), 1)
    tl.store(p_where + sample * N + o_n, tl.where(times > 1, -1, found), mask=o_n < N)


@triton.jit
def _places(
    p_grad,
    p_where,
    p_dposition,
    p_partial,
    p_seed,
    p_step,
    p_sample,
    B,
    K,
    N,
    D,
    rows_per_sample,
    stream,
    threshold,
    scale,
    AGGREGATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over the samples, place by place: the position's gradient, and over the places: a part of the bias's."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_d = tl.program_id(1) * BLOCK_D
    o_d = first_d + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    wrong = tl.zeros([BLOCK_N], tl.float32)
    for sample in tl.range(0, B):
        o_b = tl.zeros([], tl.int64) + sample
        if p_where is not None:
            k = tl.load(p_where + o_b * N + o_n, mask=o_n < N, other=0) - 1
            wrong += tl.where(k < -1, float("nan"), 0.0)
        else:
            k = tl.where(o_n < N, o_n, -1)
        m_m = k >= 0
        o_m = sample * K + k
        o_g = (o_m + sample + 1 if AGGREGATE else o_m).to(tl.int64) * D
        b_g = tl.load(p_grad + o_g[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        if DROPOUT:
            kept = keep_block(o_m, first_d, D, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_D)
            b_g = tl.where(kept, b_g * scale, 0.0)
        b_sum += b_g
    tl.store(p_partial + tl.program_id(0).to(tl.int64) * D + o_d, tl.sum(b_sum + wrong[:, None], 0), mask=m_d)
    if p_dposition is not None:
        o_p = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
        b_dposition = (b_sum + wrong[:, None]).to(p_dposition.dtype.element_ty)
        tl.store(p_dposition + o_p, b_dposition, mask=(o_n < N)[:, None] & m_d[None, :])


def _reading(signal: Tensor, index: Tensor | None, patch: Sequence[int], grid: Sequence[int], K: int) -> tuple[dict, dict]:
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
    tuning = FORWARD[weight.dtype.itemsize].pick(current_target())
    arguments, constants = _reading(signal, index, patch, grid, K)
    arguments |= {"p_weight": weight.contiguous(), "p_bias": bias, "p_position": position, "p_aggregate": aggregate}
    arguments |= {"p_y": y, "M": B * K, "D": D, **mask_arguments(dropout, B * K)}
    programs = triton.cdiv(B * K, tuning.blocks["BLOCK_M"]) * triton.cdiv(D, tuning.blocks["BLOCK_D"])
    Launch(_project, (programs,), arguments, constants | {"DROPOUT": dropout is not None}, tuning)()
    return y


def backward(
    grad: Tensor,
    signal: Tensor,
    index: Tensor | None,
    patch: Sequence[int],
    grid: Sequence[int],
    has_position: bool,
    has_aggregate: bool,
    dropout: DropoutMask | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dweight, dbias, dposition, daggregate); the last two empty where there are none."""
    grad = grad.contiguous()
    B, rows, D = grad.shape
    K = rows - has_aggregate
    of_mask = mask_arguments(dropout, B * K)
    flags = {"AGGREGATE": has_aggregate, "DROPOUT": dropout is not None}

    tuning = WEIGHT[grad.dtype.itemsize].pick(current_target())
    arguments, constants = _reading(signal, index, patch, grid, K)
    F = constants["F"]
    tiles = triton.cdiv(D, tuning.blocks["BLOCK_D"]) * triton.cdiv(F, tuning.blocks["BLOCK_F"])
    steps = triton.cdiv(B * K, tuning.blocks["BLOCK_M"])
    steps_of_a_split = triton.cdiv(steps, min(steps, triton.cdiv(PROGRAMS, tiles)))
    splits = triton.cdiv(steps, steps_of_a_split)
    partial = torch.empty(splits, D, F, dtype=torch.float32, device=grad.device)
    arguments |= {"p_grad": grad, "p_partial": partial, "M": B * K, "D": D, **of_mask}
    arguments["rows_of_a_split"] = steps_of_a_split * tuning.blocks["BLOCK_M"]
    Launch(_weight, (tiles, splits), arguments, constants | flags, tuning)()
    dweight = partial.sum(0).to(grad.dtype)

    where, N = None, K
    if has_position and index is not None:
        N = arguments["places"]
        where = torch.empty(B, N, dtype=torch.int32, device=grad.device)
        arguments = {"p_index": index, "p_where": where, "K": K, "N": N}
        arguments |= {"stride_ib": index.stride(0), "stride_ik": index.stride(1)}
        Launch(_where, (triton.cdiv(N, WHERE.blocks["BLOCK_N"]), B), arguments, {}, WHERE)()
    tuning = PLACES.pick(current_target())
    parts = triton.cdiv(N, tuning.blocks["BLOCK_N"])
    dposition = grad.new_empty(N, D) if has_position else None
    partial = torch.empty(parts, D, dtype=torch.float32, device=grad.device)
    arguments = {"p_grad": grad, "p_where": where, "p_dposition": dposition, "p_partial": partial}
    arguments |= {"B": B, "K": K, "N": N, "D": D, **of_mask}
    Launch(_places, (parts, triton.cdiv(D, tuning.blocks["BLOCK_D"])), arguments, flags, tuning)()
    dbias = partial.sum(0).to(grad.dtype)

    daggregate = grad[:, 0].sum(0, dtype=torch.float32).to(grad.dtype) if has_aggregate else grad.new_empty(0)
    return dweight, dbias, grad.new_empty(0) if dposition is None else dposition, daggregate
