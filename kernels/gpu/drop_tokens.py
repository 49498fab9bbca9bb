"""DropToken's draw in Triton. See `vatt.kernels.drop_tokens` for what it draws.

A program draws all N words of one sample, finds the K-th smallest bit by bit (the words are counted below a threshold, 32
times), and writes the indices below it by a running count, which leaves them sorted. Equal words go by their index. The
draw that a global batch shares keeps drawn order: there a token's place is how many tokens come before it.

Legend: B samples, N tokens of the full grid, K kept. Prefixes: o_ offsets, m_ mask, p_ pointer, b_ block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.gpu.counter import words
from vatt.kernels.gpu.launch import Launch, Tuning

WARPS_FROM = 4096  # tokens from which a program has 16 warps instead of 4
RANK_M, RANK_N = 32, 128  # of the shared draw: tokens a program ranks, and how many it compares them with at a time


@triton.jit
def draw(first, sample, step, stream, seed, WIDTH: tl.constexpr):
    """uint32 (WIDTH,): the words of the tokens from `first`, a multiple of 4."""
    position = first // 4 + tl.arange(0, WIDTH // 4)
    w0, w1, w2, w3 = words(position, sample, step, stream, seed)
    # join puts its pair on a new last axis; this order makes the reshaped words run w0 w1 w2 w3.
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(WIDTH)


@triton.jit
def _choose(p_index, p_seed, p_step, p_sample, N, K, stream, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b_word = draw(0, tl.load(p_sample + row), tl.load(p_step), stream, tl.load(p_seed), BLOCK_N)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    # The largest threshold with fewer than K words below it is the K-th smallest word.
    threshold = tl.zeros([], tl.uint32)
    bit = tl.full([], 2147483648, tl.uint32)
    for _ in tl.range(0, 32):
        below = tl.sum(((b_word < (threshold | bit)) & m_n).to(tl.int32), 0)
        threshold = tl.where(below < K, threshold | bit, threshold)
        bit = bit >> 1
    m_below = (b_word < threshold) & m_n
    m_equal = (b_word == threshold) & m_n
    room = K - tl.sum(m_below.to(tl.int32), 0)
    m_kept = m_below | (m_equal & (tl.cumsum(m_equal.to(tl.int32), 0) <= room))
    place = tl.cumsum(m_kept.to(tl.int32), 0) - 1
    tl.store(p_index + row * K + place, o_n.to(tl.int64), mask=m_kept)


@triton.jit
def _choose_shared(p_index, p_seed, p_step, N, K, stream, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    first_m = tl.program_id(0) * BLOCK_M
    o_m = first_m + tl.arange(0, BLOCK_M)
    step, seed = tl.load(p_step), tl.load(p_seed)
    b_mine = draw(first_m, 0, step, stream, seed, BLOCK_M)
    place = tl.zeros([BLOCK_M], tl.int32)
    for first_n in tl.range(0, N, BLOCK_N):
        o_n = first_n + tl.arange(0, BLOCK_N)
        b_word = draw(first_n, 0, step, stream, seed, BLOCK_N)
        before = (b_word[None, :] < b_mine[:, None]) | ((b_word[None, :] == b_mine[:, None]) & (o_n[None, :] < o_m[:, None]))
        place += tl.sum((before & (o_n < N)[None, :]).to(tl.int32), 1)
    tl.store(p_index + place, o_m.to(tl.int64), mask=(o_m < N) & (place < K))


def forward(total: int, kept: int, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int, shared: bool) -> Tensor:
    """int64 (B, K); (1, K) for a shared draw."""
    index = torch.empty(1 if shared else sample_id.shape[0], kept, dtype=torch.int64, device=sample_id.device)
    arguments: dict[str, Tensor | int | float | None] = {"p_index": index, "p_seed": seed, "p_step": step, "stream": stream}
    arguments |= {"N": total, "K": kept}
    if shared:
        tuning = Tuning({"BLOCK_M": RANK_M, "BLOCK_N": RANK_N}, warps=4, stages=1)
        Launch(_choose_shared, (triton.cdiv(total, RANK_M),), arguments, {}, tuning)()
        return index
    block = max(128, triton.next_power_of_2(total))
    tuning = Tuning({"BLOCK_N": block}, warps=16 if block >= WARPS_FROM else 4, stages=1)
    Launch(_choose, (len(index),), arguments | {"p_sample": sample_id.contiguous()}, {}, tuning)()
    return index
