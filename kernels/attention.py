"""Scaled dot-product attention: softmax(scale q k^T + bias) v. The specification, and what is used in its place.

reference   `attention_reference`: products and softmax in at least fp32, every score in memory.
sdpa        PyTorch's `scaled_dot_product_attention` in the tensors' dtype.
wide        the same in fp32, rounded once: for bf16 on a CPU that cannot multiply bf16 (capability.py), where PyTorch's
            bf16 kernel takes 5 to 10 times as long forward and backward, and is less exact.

`auto` is `wide` on such a CPU and `sdpa` everywhere else. benchmarks/LOG.md has what was tried and lost, and
benchmarks/bench_attention.py measures all of it again.

Legend: B clips, H heads, N tokens, D features of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels.capability import widens

Implementation = Literal["auto", "reference", "sdpa", "wide"]


def attention_reference(
    q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """out = softmax(scale q k^T + bias) v over the last axis, in at least fp32, rounded once to the dtype of `q_BHND`.

    `bias` is added to the scaled scores and broadcasts to (B, H, N, N); `scale` defaults to D^-0.5.
    """
    exact = torch.promote_types(q_BHND.dtype, torch.float32)
    scale = q_BHND.shape[-1] ** -0.5 if scale is None else scale
    scores_BHNN = torch.matmul(q_BHND.to(exact), k_BHND.to(exact).transpose(-2, -1)) * scale
    if bias is not None:
        scores_BHNN = scores_BHNN + bias.to(exact)
    return torch.matmul(scores_BHNN.softmax(-1), v_BHND.to(exact)).to(q_BHND.dtype)


def attention(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attention without dropout; (B, H, N, D) of the dtype of `q_BHND`, differentiable in q, k, v and bias.

    `bias` is added to the scaled scores and broadcasts to (B, H, N, N): relative positions, and -1e9 where a key is
    padding. `scale` defaults to D^-0.5. Raises ValueError for an unknown implementation.
    """
    if implementation == "auto":
        implementation = "wide" if widens(q_BHND) else "sdpa"
    if implementation == "reference":
        return attention_reference(q_BHND, k_BHND, v_BHND, bias, scale)
    if implementation == "wide":
        wide = attention(q_BHND.float(), k_BHND.float(), v_BHND.float(), bias, scale, "sdpa")
        return wide.to(q_BHND.dtype)
    if implementation == "sdpa":
        mask = None if bias is None else bias.to(q_BHND.dtype)
        # Positionally, as far as its parameters allow: dropout_p = 0, is_causal = False.
        return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, mask, 0.0, False, scale=scale)
    raise ValueError(f"implementation: {implementation!r} is not one of auto, reference, sdpa, wide")
