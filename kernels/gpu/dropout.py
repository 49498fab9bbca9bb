"""A dropout fused into a kernel that walks over blocks of rows and columns: its arguments, and its mask."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.dropout import DropoutMask
from vatt.kernels.gpu.counter import keep


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
