"""The gradients of `vatt.kernels.gpu.patch_project` in Triton: of weight, bias, position and AGG. Pixels have none.

The weight's gradient is a product over all rows, cut into splits that fill the machine, each with a partial sum of its own.
The gradients of position and bias come from one walk: a program owns some places of the grid and adds up what each sample
kept there. No atomics: a gradient is the same every time.

A patch that one sample keeps twice gives a position gradient of NaN: reading the indices on the host, to raise, would make
it wait.

Legend: B samples, K patches kept, N patches of the grid, M = B K rows, F features of a patch, D of a token; otherwise as in
`vatt.kernels.gpu.patch_project`. Prefixes: o_ offsets, m_ mask, p_ pointer, b_ block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.dropout import DropoutMask
from vatt.kernels.gpu.dropout import keep_block, mask_arguments
from vatt.kernels.gpu.launch import Launch, Tuning, Tunings
from vatt.kernels.gpu.patch_project import EVERY_TARGET, patch_rows, patch_values, product_tunings, reading
from vatt.kernels.gpu.target import current_target

_BLOCKS = {"rows": "BLOCK_D", "columns": "BLOCK_F", "depth": "BLOCK_M"}
WEIGHT = {
    2: product_tunings("patch_project_weight", (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), **_BLOCKS),
    4: product_tunings("patch_project_weight_fp32", (64, 64, 32, 4, 2), **_BLOCKS),
}
# Reads the tokens' gradient half as often, for patches of many features; Ampere has too few registers for it.
LARGE = product_tunings("patch_project_weight_large", (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), **_BLOCKS)
PLACES = Tunings(
    "patch_project_places",
    {
        "8x256": Tuning({"BLOCK_N": 8, "BLOCK_D": 256}, warps=4, stages=3),
        "16x128": Tuning({"BLOCK_N": 16, "BLOCK_D": 128}, warps=4, stages=3),
    },
    default=dict.fromkeys(EVERY_TARGET, "8x256"),
)
WHERE = Tuning({"BLOCK_N": 128, "BLOCK_K": 32}, warps=4, stages=2)
MOST_SPLITS, LEAST_WASTE = 8, 1.05


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


def splits_of(tiles: int, steps: int, multiprocessors: int) -> int:
    """Into how many parts the rows of the weight's gradient are cut: as few as keep all multiprocessors busy to the end, for
    every part is a copy of the gradient in fp32. tiles: programs of a part; steps: blocks of rows there are.
    """
    most = min(steps, max(MOST_SPLITS, multiprocessors // tiles))

    def waste(splits: int) -> float:
        return triton.cdiv(tiles * splits, multiprocessors) * multiprocessors / (tiles * splits)

    return min(range(1, most + 1), key=lambda splits: (max(waste(splits), LEAST_WASTE), splits))


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

    arguments, constants = reading(signal, index, patch, grid, K)
    F, target = constants["F"], current_target()
    large = target.capability >= 90 and grad.dtype.itemsize == 2 and F >= 256
    tuning = (LARGE if large else WEIGHT[grad.dtype.itemsize]).pick(target)
    tiles = triton.cdiv(D, tuning.blocks["BLOCK_D"]) * triton.cdiv(F, tuning.blocks["BLOCK_F"])
    steps = triton.cdiv(B * K, tuning.blocks["BLOCK_M"])
    steps_of_a_split = triton.cdiv(steps, splits_of(tiles, steps, target.multiprocessors))
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
    tuning = PLACES.pick(target)
    parts = triton.cdiv(N, tuning.blocks["BLOCK_N"])
    dposition = grad.new_empty(N, D) if has_position else None
    partial = torch.empty(parts, D, dtype=torch.float32, device=grad.device)
    arguments = {"p_grad": grad, "p_where": where, "p_dposition": dposition, "p_partial": partial}
    arguments |= {"B": B, "K": K, "N": N, "D": D, **of_mask}
    Launch(_places, (parts, triton.cdiv(D, tuning.blocks["BLOCK_D"])), arguments, flags, tuning)()
    dbias = partial.sum(0).to(grad.dtype)

    daggregate = grad[:, 0].sum(0, dtype=torch.float32).to(grad.dtype) if has_aggregate else grad.new_empty(0)
    return dweight, dbias, grad.new_empty(0) if dposition is None else dposition, daggregate
