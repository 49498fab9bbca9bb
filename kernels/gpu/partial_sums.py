"""Sums over all rows (the gradients of biases and gains) from few partial sums, in a fixed order: no atomic additions.

Each program of a kernel writes one row, its own sum; here they are added up. As many programs as keep the GPU busy and no
more: the buffer is 1 or 2 % of the bytes at VATT's large shapes, and where there are few rows `programs` keeps it small.

Legend: K sums, P partial sums of each, C columns. Prefixes: o_ offsets, m_ mask, p_ pointer, b_ block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.gpu.launch import Launch, Tuning

# 128-byte pieces of the buffer's rows: enough programs even for narrow buffers.
TUNING = Tuning({"BLOCK_P": 64, "BLOCK_C": 32}, warps=4, stages=1)

LEAST_ROWS = 16  # of the input, for each row of the buffer


def programs(most: int, rows: int) -> int:
    """How many programs share `rows` rows: `most`, or fewer so that each has LEAST_ROWS."""
    return max(1, min(most, rows // LEAST_ROWS))


@triton.jit
def _add_up(p_partial, p_first, p_second, p_third, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    which = tl.program_id(1)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        o_x = (which * P + o_p)[:, None] * C + o_c[None, :]
        b_sum += tl.load(p_partial + o_x, mask=(o_p < P)[:, None] & m_c[None, :], other=0.0)
    b_out = tl.sum(b_sum, 0).to(p_first.dtype.element_ty)
    if which == 0:
        tl.store(p_first + o_c, b_out, mask=m_c)
    if p_second is not None and which == 1:
        tl.store(p_second + o_c, b_out, mask=m_c)
    if p_third is not None and which == 2:
        tl.store(p_third + o_c, b_out, mask=m_c)


def add_up(partial_KPC: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The K sums (at most three), each (C,) of `dtype`, of an fp32 buffer."""
    K, P, C = partial_KPC.shape
    sums = [partial_KPC.new_empty(C, dtype=dtype) for _ in range(K)]
    outputs = dict(zip(("p_first", "p_second", "p_third"), (*sums, None, None), strict=False))
    grid = triton.cdiv(C, TUNING.blocks["BLOCK_C"]), K
    Launch(_add_up, grid, {"p_partial": partial_KPC, **outputs, "P": P, "C": C}, {}, TUNING)()
    return sums
