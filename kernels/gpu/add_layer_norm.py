"""residual + Dropout(branch) and the norm of it in Triton, forward and backward. See `vatt.kernels.add_layer_norm`.

A program holds whole rows. Its warps lie side by side along a row, 8 elements (16 bytes in bf16) a thread, so that a sum
over rows stays in a thread's registers and only the sums along a row cross warps; a width that is no power of two leaves
warps idle without reading for them.

Backward is bound by memory only if the sums over all rows (weight, bias, branch bias) cost nothing. One buffer row for
each few rows of input would be half as large as the input itself. So a fixed number of programs walk over all rows, each
keeping its sums in registers, and one buffer row a program is added up in the end (`partial_sums`): deterministic, and
a small part of the bytes.

Legend: M rows, D columns, P programs. Prefixes: o_ offsets, m_ mask, p_ pointer, b_ block.
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
from vatt.kernels.gpu.target import TARGETS, current_target


def _forward_tunings(width: int, warps: int, *rows: int) -> Tunings:
    """Candidates for rows of up to `width` columns; the first is the default."""
    candidates = {f"{m}_rows": Tuning({"BLOCK_M": m, "BLOCK_D": width}, warps, 1) for m in rows}
    return Tunings(f"add_layer_norm_forward_{width}", candidates, dict.fromkeys(TARGETS, f"{rows[0]}_rows"))


def _backward_tunings(width: int, warps: int, *choices: tuple[int, int]) -> Tunings:
    """Candidates (rows of a step, programs of a multiprocessor) for rows of up to `width` columns; the first is the default."""
    candidates, default = {}, {}
    for target in TARGETS.values():
        names = [f"{m}_rows_{each}x{target.multiprocessors}" for m, each in choices]
        for name, (m, each) in zip(names, choices, strict=True):
            candidates[name] = Tuning({"BLOCK_M": m, "BLOCK_D": width}, warps, 1, each * target.multiprocessors)
        default[target.name] = names[0]
    return Tunings(f"add_layer_norm_backward_{width}", candidates, default)


# By the widest row each is for. In backward no more programs than are resident at once, with the registers of either Triton:
# one that had to wait for another to end would walk over its rows alone.
FORWARD = {
    width: _forward_tunings(width, warps, *rows)
    for width, warps, *rows in (
        (16, 1, 16),
        (128, 1, 8, 4),
        (256, 1, 8, 4),
        (512, 2, 4, 8, 2),
        (1024, 4, 4, 2, 8),
        (2048, 8, 2, 4, 1),
        (4096, 16, 1, 2),
        (8192, 16, 1),
    )
}
BACKWARD = {
    width: _backward_tunings(width, warps, *choices)
    for width, warps, *choices in (
        (16, 1, (16, 8)),
        (128, 1, (8, 8)),
        (256, 1, (8, 8)),
        (512, 2, (2, 8)),
        (1024, 4, (2, 4), (2, 5), (4, 3), (1, 6)),
        (2048, 8, (2, 2), (1, 3)),
        (4096, 16, (1, 1)),
        (8192, 16, (1, 1)),
    )
}


@triton.jit
def _forward(
    p_branch,
    p_residual,
    p_weight,
    p_bias,
    p_branch_bias,
    p_sum,
    p_normed,
    p_mean,
    p_rstd,
    p_seed,
    p_step,
    p_sample,
    M,
    D,
    eps,
    rows_per_sample,
    stream,
    threshold,
    scale,
    RMS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < M, o_d < D
    m_x = m_m[:, None] & m_d[None, :]
    o_x = o_m.to(tl.int64)[:, None] * D + o_d[None, :]
    b_x = tl.load(p_residual + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_branch is not None:
        b_z = tl.load(p_branch + o_x, mask=m_x, other=0.0).to(tl.float32)
        if p_branch_bias is not None:
            b_z += tl.load(p_branch_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if DROPOUT:
            kept = keep_block(o_m, 0, D, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_D)
            b_z = tl.where(kept, b_z * scale, 0.0)
        b_sum = (b_x + b_z).to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_x, b_sum, mask=m_x)
        b_x = b_sum.to(tl.float32)
    if not RMS:
        b_mean = tl.sum(b_x, 1) / D
        tl.store(p_mean + o_m, b_mean, mask=m_m)
        # The variance of what is left after the mean: exact however far from 0 the row lies.
        b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps)
    tl.store(p_rstd + o_m, b_rstd, mask=m_m)
    b_y = b_x * b_rstd[:, None] * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    tl.store(p_normed + o_x, b_y.to(p_normed.dtype.element_ty), mask=m_x)


@triton.jit
def _backward(
    p_grad_sum,
    p_grad_normed,
    p_sum,
    p_mean,
    p_rstd,
    p_weight,
    p_dresidual,
    p_dbranch,
    p_partial,
    p_seed,
    p_step,
    p_sample,
    M,
    D,
    rows_per_sample,
    stream,
    threshold,
    scale,
    RMS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BIAS: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With x^ = (sum - mean) rstd and g = grad_normed * weight: dLN = rstd (g - mean(g) - x^ mean(g x^)); rms: mean(g) = 0."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_D], tl.float32)
    b_dbias = tl.zeros([BLOCK_D], tl.float32)
    b_dbranch_bias = tl.zeros([BLOCK_D], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        m_x = m_m[:, None] & m_d[None, :]
        o_x = o_m.to(tl.int64)[:, None] * D + o_d[None, :]
        b_hat = tl.load(p_sum + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dy = tl.load(p_grad_normed + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_rstd = tl.load(p_rstd + o_m, mask=m_m, other=0.0)
        if not RMS:
            b_hat -= tl.load(p_mean + o_m, mask=m_m, other=0.0)[:, None]
        # Beyond the columns x^ is not 0 but b_dy is, and so is every product that is summed.
        b_hat *= b_rstd[:, None]
        b_dweight += tl.sum(b_dy * b_hat, 0)
        if BIAS:
            b_dbias += tl.sum(b_dy, 0)
        b_dy *= b_weight[None, :]
        if RMS:
            b_dx = b_dy - b_hat * (tl.sum(b_dy * b_hat, 1) / D)[:, None]
        else:
            b_dx = b_dy - b_hat * (tl.sum(b_dy * b_hat, 1) / D)[:, None] - (tl.sum(b_dy, 1) / D)[:, None]
        b_dx *= b_rstd[:, None]
        if p_grad_sum is not None:
            b_dx += tl.load(p_grad_sum + o_x, mask=m_x, other=0.0).to(tl.float32)
        tl.store(p_dresidual + o_x, b_dx.to(p_dresidual.dtype.element_ty), mask=m_x)
        if DROPOUT:
            kept = keep_block(o_m, 0, D, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_D)
            b_dx = tl.where(kept, b_dx * scale, 0.0)
            tl.store(p_dbranch + o_x, b_dx.to(p_dbranch.dtype.element_ty), mask=m_x)
        if BRANCH_BIAS:
            b_dbranch_bias += tl.sum(b_dx, 0)
    # Buffer (gradients, P, D), in the order weight, bias, branch bias of those there are.
    p_row = p_partial + tl.program_id(0) * D + o_d
    stride = tl.num_programs(0) * D
    tl.store(p_row, b_dweight, mask=m_d)
    if BIAS:
        tl.store(p_row + stride, b_dbias, mask=m_d)
    if BRANCH_BIAS:
        tl.store(p_row + (stride * 2 if BIAS else stride), b_dbranch_bias, mask=m_d)


def forward(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    eps: float,
    rms: bool,
    dropout: DropoutMask | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum, normed, mean, rstd); sum is empty without a branch, mean in the rms form."""
    branch, residual = None if branch is None else branch.contiguous(), residual.contiguous()
    D = residual.shape[-1]
    M = residual.numel() // D
    total = residual.new_empty(0) if branch is None else torch.empty_like(residual)
    normed = torch.empty_like(residual)
    mean = residual.new_empty(0 if rms else M, dtype=torch.float32)
    rstd = residual.new_empty(M, dtype=torch.float32)
    tuning = FORWARD[_width(D)].pick(current_target())
    arguments = {
        "p_branch": branch,
        "p_residual": residual,
        "p_weight": weight,
        "p_bias": bias,
        "p_branch_bias": branch_bias,
        "p_sum": None if branch is None else total,
        "p_normed": normed,
        "p_mean": None if rms else mean,
        "p_rstd": rstd,
        "M": M,
        "D": D,
        "eps": eps,
        **mask_arguments(dropout, M),
    }
    grid = (triton.cdiv(M, tuning.blocks["BLOCK_M"]),)
    Launch(_forward, grid, arguments, {"RMS": rms, "DROPOUT": dropout is not None}, tuning)()
    return total, normed, mean, rstd


def backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_bias: bool,
    has_branch_bias: bool,
    rms: bool,
    dropout: DropoutMask | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dresidual, dbranch, dweight, dbias, dbranch_bias); empty where there is none, and dbranch where it is dresidual."""
    D = total.shape[-1]
    M = total.numel() // D
    dresidual = torch.empty_like(total)
    dbranch = total.new_empty(0) if dropout is None else torch.empty_like(total)
    tuning = BACKWARD[_width(D)].pick(current_target())
    P = programs(tuning.programs, M)
    there = (True, has_bias, has_branch_bias)
    partial = torch.empty(sum(there), P, D, dtype=torch.float32, device=total.device)
    arguments = {
        "p_grad_sum": None if grad_sum is None else grad_sum.contiguous(),
        "p_grad_normed": grad_normed.contiguous(),
        "p_sum": total,
        "p_mean": None if rms else mean,
        "p_rstd": rstd,
        "p_weight": weight,
        "p_dresidual": dresidual,
        "p_dbranch": None if dropout is None else dbranch,
        "p_partial": partial,
        "M": M,
        "D": D,
        **mask_arguments(dropout, M),
    }
    constants = {"RMS": rms, "DROPOUT": dropout is not None, "BIAS": has_bias, "BRANCH_BIAS": has_branch_bias}
    Launch(_backward, (P,), arguments, constants, tuning)()
    sums = iter(add_up(partial, weight.dtype))
    dweight, dbias, dbranch_bias = (next(sums) if found else weight.new_empty(0) for found in there)
    return dresidual, dbranch, dweight, dbias, dbranch_bias


def _width(columns: int) -> int:
    """The narrowest block that holds a row."""
    return next(width for width in FORWARD if width >= columns)
