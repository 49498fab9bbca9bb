"""A dropout fused into a kernel that walks over blocks of rows and columns: its arguments, and its mask; and one by itself.

Legend: M rows, C columns. Prefixes: o_ offsets, m_ mask, p_ pointer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.dropout import DropoutMask
from vatt.kernels.gpu.counter import keep
from vatt.kernels.gpu.launch import Launch, Tuning, Tunings
from vatt.kernels.gpu.target import current_target

TUNINGS = Tunings(
    "dropout",
    {"wide": Tuning({"BLOCK_M": 1, "BLOCK_C": 1024}), "square": Tuning({"BLOCK_M": 8, "BLOCK_C": 256}, warps=8)},
    {"sm_80": "wide"},
)


@triton.jit
def keep_block(o_m, first_c, C, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_C: tl.constexpr):
    """bool (M, BLOCK_C): what dropout keeps of rows `o_m` (those under the mask m_m) and the columns from `first_c`, a
    multiple of 4; C is the width of a whole row. See `vatt.kernels.dropout` for which word an element takes.
    """
    sample = tl.load(p_sample + o_m // rows_per_sample, mask=m_m, other=0)
    group = first_c // 4 + tl.arange(0, BLOCK_C // 4)
    position = (o_m % rows_per_sample)[:, None] * tl.cdiv(C, 4) + group[None, :]
    return keep(position, sample[:, None], tl.load(p_step), stream, tl.load(p_seed), threshold)


def mask_arguments(dropout: DropoutMask | None, rows: int) -> dict[str, Tensor | int | float | None]:
    """The run-time arguments of a fused dropout, for kernels that name them p_seed, p_step, p_sample and so on."""
    if dropout is None:
        names = ("p_seed", "p_step", "p_sample", "rows_per_sample", "stream", "threshold", "scale")
        return dict.fromkeys(names)
    return {
        "p_seed": dropout.seed,
        "p_step": dropout.step,
        "p_sample": dropout.sample_id,
        "rows_per_sample": rows // dropout.sample_id.shape[0],
        "stream": dropout.stream,
        "threshold": dropout.threshold,
        "scale": 1.0 / (1.0 - dropout.rate),
    }


@triton.jit
def _dropout(
    p_x,
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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_C
    o_c = first_c + tl.arange(0, BLOCK_C)
    m_m = o_m < M
    m_x = m_m[:, None] & (o_c < C)[None, :]
    o_x = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
    x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    kept = keep_block(o_m, first_c, C, rows_per_sample, p_sample, p_step, p_seed, stream, threshold, m_m, BLOCK_C)
    tl.store(p_y + o_x, tl.where(kept, x * scale, 0.0).to(p_y.dtype.element_ty), mask=m_x)


def dropout(x: Tensor, mask: DropoutMask) -> Tensor:
    """Forward; of a gradient, backward."""
    x = x.contiguous()
    y = torch.empty_like(x)
    M, C = x.numel() // x.shape[-1], x.shape[-1]
    tuning = TUNINGS.pick(current_target())
    grid = triton.cdiv(M, tuning.blocks["BLOCK_M"]), triton.cdiv(C, tuning.blocks["BLOCK_C"])
    Launch(_dropout, grid, {"p_x": x, "p_y": y, "M": M, "C": C, **mask_arguments(mask, M)}, {}, tuning)()
    return y
