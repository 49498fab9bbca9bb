"""The contrastive loss in Triton: sums of tiles of logits, and their gradients. See `vatt.kernels.contrastive`.

Forward: a program holds BLOCK_M videos and walks over clips; of each tile of logits it keeps the sums along its rows and
along its columns. Backward: for CHUNK videos at a time, their logits' gradients are written (CHUNK x R numbers, the only
matrix kept), and two products make of them the gradients of both features. Partial sums are added in a fixed order.

bf16 features are read as they are, and the lengths they are divided by scale their products, so that nothing is rounded to
bf16. Others are divided first, in fp32: rounding them evens out in a product, rounding their lengths would not. Both passes
compute a logit from the same numbers in the same order, so what rounding did to it forward cancels in backward.

Legend: G clips, L candidates of a clip, R = G L candidates, D features; tiles of M videos, N clips or candidates, K of the
sum of a product. Prefixes: o_ offsets, m_ mask, p_ pointer, b_ block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.contrastive_tiles import lengths, through_length
from vatt.kernels.gpu.launch import Launch, Tuning, Tunings
from vatt.kernels.gpu.target import current_target

if TYPE_CHECKING:
    from vatt.kernels.contrastive import Slopes

LEAST = tl.constexpr(-1e30)  # a start for running maxima, below every logit, finite: a difference of two is 0
CHUNK = 512  # videos whose logits' gradients are kept at a time
SUM_TILES = 128  # tiles of videos whose column sums are kept apart at a time
PROGRAMS = 512  # enough to fill the largest GPU; a fixed number, so that sums have one order everywhere
LEAST_SPAN = 1024  # of a product's sum, that one program adds up


def _tunings(name: str, *candidates: str, withheld: dict[str, tuple[str, ...]] | None = None, **default: str) -> Tunings:
    """Candidates are called by their blocks, MxNxK; all have 8 warps and 3 stages. withheld: see `Tunings`."""
    sizes = {candidate: [int(size) for size in candidate.split("x")] for candidate in candidates}
    blocks = {name: dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), found, strict=True)) for name, found in sizes.items()}
    return Tunings(f"contrastive_{name}", {name: Tuning(block, 8, 3) for name, block in blocks.items()}, default, withheld)


# By the bytes of an element of the operands. A target's sums and weights have one BLOCK_K: so their logits are the same.
SUMS = {
    4: _tunings(
        "sums",
        "64x64x16",
        "64x64x32",
        "128x64x32",
        withheld={"sm_80": ("64x64x32", "128x64x32")},
        sm_80="64x64x16",
        sm_90="128x64x32",
        sm_100="64x64x16",
    ),
    2: _tunings(
        "sums_bf16",
        "128x64x64",
        "64x64x64",
        withheld={"sm_100": ("128x64x64",)},
        sm_80="128x64x64",
        sm_90="128x64x64",
        sm_100="64x64x64",
    ),
}
WEIGHTS = {
    4: _tunings("weights", "128x64x16", "128x64x32", sm_80="128x64x16", sm_90="128x64x32", sm_100="128x64x16"),
    2: _tunings(
        "weights_bf16",
        "128x128x64",
        "128x64x64",
        withheld={"sm_100": ("128x128x64",)},
        sm_80="128x128x64",
        sm_90="128x128x64",
        sm_100="128x64x64",
    ),
}
PRODUCT = {
    4: _tunings("product", "128x128x32", "128x64x32", sm_80="128x128x32", sm_90="128x128x32", sm_100="128x128x32"),
    2: _tunings("product_bf16", "128x128x64", "128x64x64", sm_80="128x128x64", sm_90="128x128x64", sm_100="128x128x64"),
}


@triton.jit
def _logits(
    p_video,
    p_other,
    p_video_scale,
    p_other_scale,
    o_m,
    o_n,
    m_n,
    D,
    PRECISION: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(logits (M, N), scale of rows, scale of columns, valid columns). o_m, o_n: rows that exist; m_n: columns that count."""
    p_v = p_video + o_m.to(tl.int64)[:, None] * D
    p_o = p_other + o_n.to(tl.int64)[:, None] * D
    b_s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_k in tl.range(0, D, BLOCK_K):
        o_k = first_k + tl.arange(0, BLOCK_K)
        if WHOLE_K:
            b_v, b_o = tl.load(p_v + o_k[None, :]), tl.load(p_o + o_k[None, :])
        else:
            b_v = tl.load(p_v + o_k[None, :], mask=o_k[None, :] < D, other=0.0)
            b_o = tl.load(p_o + o_k[None, :], mask=o_k[None, :] < D, other=0.0)
        b_s = tl.dot(b_v, tl.trans(b_o), b_s, input_precision=PRECISION)
    b_rows = tl.load(p_video_scale + o_m)
    b_columns = tl.load(p_other_scale + o_n)
    return b_s * b_rows[:, None] * b_columns[None, :], b_rows, b_columns, m_n & (b_columns > 0.0)


@triton.jit
def _sums(
    p_video,
    p_other,
    p_video_scale,
    p_other_scale,
    p_own,
    p_row,
    p_column,
    first,
    G,
    L,
    D,
    span,
    ALL_PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of videos first + BLOCK_M tile, and the `span` clips of a split: row (splits, G), column (tiles, G), own (G, L)."""
    o_m = first + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < G
    b_row_max = tl.full([BLOCK_M], LEAST, tl.float32)
    b_row = tl.zeros([BLOCK_M], tl.float32)
    first_m = first + tl.program_id(0) * BLOCK_M
    start = tl.program_id(1) * span
    for first_n in tl.range(start, tl.minimum(start + span, G), BLOCK_N):
        o_n = first_n + tl.arange(0, BLOCK_N)
        m_n = o_n < G
        b_column_max = tl.full([BLOCK_N], LEAST, tl.float32)
        b_column = tl.zeros([BLOCK_N], tl.float32)
        for c in tl.range(0, L):
            o_j = tl.minimum(o_n, G - 1) * L + c
            # fmt: off
            b_l, _, _, m_valid = _logits(
                p_video, p_other, p_video_scale, p_other_scale, tl.minimum(o_m, G - 1), o_j, m_n, D,
                PRECISION, WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )
            # fmt: on
            b_l = tl.where(m_m[:, None] & m_valid[None, :], b_l, float("-inf"))
            if (first_n < first_m + BLOCK_M) & (first_m < first_n + BLOCK_N):
                b_own = o_m[:, None] == o_n[None, :]
                here = m_m & (o_m >= first_n) & (o_m < first_n + BLOCK_N)
                b_value = tl.max(tl.where(b_own, b_l, float("-inf")), 1)
                tl.store(p_own + o_m.to(tl.int64) * L + c, b_value, mask=here)
                if ALL_PAIRS:
                    b_l = tl.where(b_own, float("-inf"), b_l)
            b_new = tl.maximum(b_row_max, tl.max(b_l, 1))
            b_row = b_row * tl.exp(b_row_max - b_new) + tl.sum(tl.exp(b_l - b_new[:, None]), 1)
            b_row_max = b_new
            if not ALL_PAIRS:
                b_new_n = tl.maximum(b_column_max, tl.max(b_l, 0))
                b_column = b_column * tl.exp(b_column_max - b_new_n) + tl.sum(tl.exp(b_l - b_new_n[None, :]), 0)
                b_column_max = b_new_n
        if not ALL_PAIRS:
            p_here = p_column + tl.program_id(0).to(tl.int64) * G + o_n
            tl.store(p_here, (b_column_max + tl.log(b_column)), mask=m_n)
    tl.store(p_row + tl.program_id(1).to(tl.int64) * G + o_m, (b_row_max + tl.log(b_row)), mask=m_m)


@triton.jit
def _weights(
    p_video,
    p_other,
    p_video_scale,
    p_other_scale,
    p_row,
    p_row_sum,
    p_column,
    p_column_sum,
    p_own,
    p_own_sum,
    p_weights,
    first,
    last,
    L,
    R,
    D,
    ALL_PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the product of a video's operand and a candidate's: (last - first, R). See `Slopes`."""
    first_m, first_j = first + tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    o_m, o_j = first_m + tl.arange(0, BLOCK_M), first_j + tl.arange(0, BLOCK_N)
    m_m, m_j = o_m < last, o_j < R
    o_row, o_column = tl.minimum(o_m, last - 1), tl.minimum(o_j, R - 1)
    # fmt: off
    b_l, b_rows, b_columns, m_valid = _logits(
        p_video, p_other, p_video_scale, p_other_scale, o_row, o_column, m_j, D,
        PRECISION, WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    # fmt: on
    o_clip = o_column // L
    b_grad = tl.load(p_row + o_row)[:, None] * tl.exp(b_l - tl.load(p_row_sum + o_row)[:, None])
    if not ALL_PAIRS:
        b_grad += tl.load(p_column + o_clip)[None, :] * tl.exp(b_l - tl.load(p_column_sum + o_clip)[None, :])
    if (first_j // L < first_m + BLOCK_M) & (first_m <= (first_j + BLOCK_N - 1) // L):
        b_own = tl.load(p_own + o_row)[:, None] * tl.exp(b_l - tl.load(p_own_sum + o_row)[:, None])
        if not ALL_PAIRS:
            b_own += b_grad
        b_grad = tl.where(o_m[:, None] == o_clip[None, :], b_own, b_grad)
    b_grad = tl.where(m_valid[None, :], b_grad * b_rows[:, None] * b_columns[None, :], 0.0)
    o_w = (o_m - first).to(tl.int64)[:, None] * R + o_j[None, :]
    tl.store(p_weights + o_w, b_grad.to(p_weights.dtype.element_ty), mask=m_m[:, None] & m_j[None, :])


@triton.jit
def _product(
    p_left,
    p_right,
    p_out,
    M,
    K,
    D,
    span,
    stride_m,
    stride_k,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (splits, M, D) (+)= left (M, K) @ right (K, D), a split over `span` of K."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_d = o_m < M, o_d < D
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    start = tl.program_id(2) * span
    p_l = p_left + o_m.to(tl.int64)[:, None] * stride_m
    for first_k in tl.range(start, tl.minimum(start + span, K), BLOCK_K):
        o_k = first_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_l = tl.load(p_l + o_k.to(tl.int64)[None, :] * stride_k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        p_r = p_right + o_k.to(tl.int64)[:, None] * D + o_d[None, :]
        b_r = tl.load(p_r, mask=m_k[:, None] & m_d[None, :], other=0.0)
        b_out = tl.dot(b_l, b_r, b_out, input_precision=PRECISION)
    p_here = p_out + (tl.program_id(2) * M + o_m).to(tl.int64)[:, None] * D + o_d[None, :]
    m_out = m_m[:, None] & m_d[None, :]
    if ADD:
        b_out += tl.load(p_here, mask=m_out, other=0.0)
    tl.store(p_here, b_out, mask=m_out)


class _Features:
    """Contiguous operands of the products with their scales, the features' lengths, and how exact the products are."""

    def __init__(self, video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, temperature: float) -> None:
        self.given = video_GD, other_RD
        self.lengths = lengths(video_GD), lengths(other_RD)
        self.G, self.L, self.R, self.D = *valid_GL.shape, *other_RD.shape
        valid_R, scale = valid_GL.flatten(), 1.0 / temperature
        if video_GD.dtype == torch.bfloat16:
            self.precision = "ieee"
            self.video, self.other = video_GD.contiguous(), other_RD.contiguous()
            self.video_scale, other_scale = scale / self.lengths[0], 1.0 / self.lengths[1]
        else:
            self.precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
            self.video, self.other = (_divided(x, by) for x, by in zip(self.given, self.lengths, strict=True))
            self.video_scale, other_scale = torch.full_like(self.lengths[0], scale), torch.ones_like(self.lengths[1])
        # A scale below 0 marks a candidate that is not valid: one vector to read instead of two.
        self.other_scale = torch.where(valid_R, other_scale, -1.0)
        self.dtype = self.video.dtype

    def through_lengths(self, dvideo_GD: Tensor, dother_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the given features from those of the operands, which are overwritten."""
        for grad, length in zip((dvideo_GD, dother_RD), self.lengths, strict=True):
            if self.dtype != torch.bfloat16:
                grad.div_(length[:, None])
        return (
            through_length(dvideo_GD, self.given[0], self.lengths[0]),
            through_length(dother_RD, self.given[1], self.lengths[1]),
        )

    def tuning(self, tables: dict[int, Tunings]) -> Tuning:
        return tables[self.dtype.itemsize].pick(current_target())

    def arguments(self) -> dict[str, Tensor | int | float | None]:
        scales = {"p_video_scale": self.video_scale, "p_other_scale": self.other_scale}
        return {"p_video": self.video, "p_other": self.other, **scales, "L": self.L, "D": self.D}

    def constants(self, all_pairs: bool, tuning: Tuning) -> dict[str, bool | str]:
        whole = self.D % tuning.blocks["BLOCK_K"] == 0
        return {"ALL_PAIRS": all_pairs, "PRECISION": self.precision, "WHOLE_K": whole}


def forward(
    video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, temperature: float, all_pairs: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-sum-exps (positive, row, column), (G,) fp32 each, -inf over nothing. all_pairs: rows without own pairs, no column."""
    features = _Features(video_GD, other_RD, valid_GL, temperature)
    tuning, G = features.tuning(SUMS), features.G
    block_m, block_n = tuning.blocks["BLOCK_M"], tuning.blocks["BLOCK_N"]
    rows = min(triton.cdiv(G, block_m), SUM_TILES)
    span = triton.cdiv(G, triton.cdiv(PROGRAMS, rows) * block_n) * block_n
    new = features.lengths[0].new_empty
    own_GL, row_SG = new(valid_GL.shape), new((triton.cdiv(G, span), G))
    partial = None if all_pairs else new((rows, G))
    column: Tensor | None = None
    for first in range(0, G, rows * block_m):
        here = min(rows, triton.cdiv(G - first, block_m))
        arguments = features.arguments() | {"p_own": own_GL, "p_row": row_SG, "p_column": partial, "first": first}
        grid = here, triton.cdiv(G, span)
        constants = features.constants(all_pairs, tuning)
        Launch(_sums, grid, arguments | {"G": G, "span": span}, constants, tuning)()
        if partial is not None:
            found = partial[:here].logsumexp(0)
            column = found if column is None else torch.logaddexp(column, found)
    return own_GL.logsumexp(1), row_SG.logsumexp(0), column


def backward(slopes: Slopes, video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(dvideo, dother) in the dtype of the features."""
    features = _Features(video_GD, other_RD, valid_GL, temperature)
    tuning, all_pairs = features.tuning(WEIGHTS), slopes.column is None
    vectors = {f"p_{name}": None if x is None else x.contiguous() for name, x in slopes._asdict().items()}
    G, R, D = features.G, features.R, features.D
    dvideo, dother = (torch.empty(n, D, dtype=torch.float32, device=video_GD.device) for n in (G, R))
    buffer = torch.empty(min(CHUNK, G), R, dtype=features.dtype, device=video_GD.device)
    for first in range(0, G, CHUNK):
        last = min(first + CHUNK, G)
        weights = buffer[: last - first]
        grid = triton.cdiv(last - first, tuning.blocks["BLOCK_M"]), triton.cdiv(R, tuning.blocks["BLOCK_N"])
        arguments = features.arguments() | vectors | {"p_weights": weights, "first": first, "last": last, "R": R}
        Launch(_weights, grid, arguments, features.constants(all_pairs, tuning), tuning)()
        _multiply(features, weights, features.other, dvideo[first:last], add=False)
        _multiply(features, weights.T, features.video[first:last], dother, add=first > 0)
    return features.through_lengths(dvideo, dother)


def _multiply(features: _Features, left_MK: Tensor, right_KD: Tensor, out_MD: Tensor, add: bool) -> None:
    """out (+)= left @ right; a long sum over few rows is divided over programs."""
    (M, K), D = left_MK.shape, features.D
    tuning = features.tuning(PRODUCT)
    tiles = triton.cdiv(M, tuning.blocks["BLOCK_M"]), triton.cdiv(D, tuning.blocks["BLOCK_N"])
    splits = 1 if add or M > CHUNK else max(1, min(PROGRAMS // (tiles[0] * tiles[1]), K // LEAST_SPAN))
    span = triton.cdiv(K, splits * tuning.blocks["BLOCK_K"]) * tuning.blocks["BLOCK_K"]
    splits = triton.cdiv(K, span)
    out = out_MD if splits == 1 else out_MD.new_empty(splits, M, D)
    tensors = {"p_left": left_MK, "p_right": right_KD, "p_out": out}
    sizes = {"M": M, "K": K, "D": D, "span": span, "stride_m": left_MK.stride(0), "stride_k": left_MK.stride(1)}
    Launch(_product, (*tiles, splits), tensors | sizes, {"ADD": add, "PRECISION": features.precision}, tuning)()
    if splits > 1:
        torch.sum(out, 0, out=out_MD)


def _divided(x_RD: Tensor, length_R: Tensor) -> Tensor:
    return (x_RD / length_R[:, None]).contiguous()
