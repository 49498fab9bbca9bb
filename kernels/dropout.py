"""Dropout whose mask is a function of (seed, step, sample, site): the same on any layout, and replayed in backward.

B = samples, R = rows per sample (1, or the caption candidates of a clip), x has shape (B * R, ...).
The mask is never stored: backward draws it again from the counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vatt.kernels.counter import philox, seed_key


def keep_mask(shape: torch.Size, rate: float, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int) -> Tensor:
    """bool mask of `shape`, False with probability `rate`.

    seed, step: int64 scalars on the device. sample_id: int64 (B,); shape[0] must be a multiple of B, and element j of
    sample b (counted over its rows in order) takes word j % 4 of the counter (j // 4, sample_id[b], step, stream).
    """
    samples = sample_id.shape[0]
    if shape[0] % samples:
        raise ValueError(f"dropout: {shape[0]} rows are not a multiple of {samples} samples")
    per_sample = shape.numel() // samples
    position = torch.arange(-(-per_sample // 4), device=sample_id.device)[None, :]
    counter = (position, sample_id[:, None], step, torch.full_like(step, stream))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, seed_key(seed))), dim=-1)
    return (words.reshape(samples, -1)[:, :per_sample] >= int(rate * 2**32)).reshape(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rate, seed, step, sample_id, stream):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(seed, step, sample_id)
        ctx.rate, ctx.stream = rate, stream
        return x * keep_mask(x.shape, rate, seed, step, sample_id, stream) / (1.0 - rate)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        seed, step, sample_id = ctx.saved_tensors
        mask = keep_mask(grad.shape, ctx.rate, seed, step, sample_id, ctx.stream)
        return grad * mask / (1.0 - ctx.rate), None, None, None, None, None


def dropout(x: Tensor, rate: float, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int) -> Tensor:
    """x with each element zeroed with probability `rate` and the rest divided by 1 - rate; arguments as for keep_mask."""
    return x if rate == 0.0 else _Dropout.apply(x, rate, seed, step, sample_id, stream)
