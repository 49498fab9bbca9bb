"""Dropout whose mask is a function of (seed, step, sample, site): the same on any layout, and replayed in backward.

B = samples, R = rows per sample (1, or the caption candidates of a clip), x has shape (B * R, ..., C).
The mask is never stored: backward draws it again from the counter, and so do the kernels that fuse a dropout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vatt.kernels.counter import philox, seed_key
from vatt.kernels.implementation import require


class DropoutMask(NamedTuple):
    """Which elements a dropout zeroes: a rate in [0, 1), and the counter they are drawn from.

    seed, step: int64 scalars on the device. sample_id: int64 (B,). stream: which site of the model this is.
    """

    rate: float
    seed: Tensor
    step: Tensor
    sample_id: Tensor
    stream: int

    @property
    def threshold(self) -> int:
        """An element is kept when its 32-bit word is at least this."""
        return int(self.rate * 2**32)


def check_mask(op: str, mask: DropoutMask, rows: int, x: Tensor) -> None:
    """Raise KernelError unless `mask` fits a tensor like `x` whose first axis has `rows` rows."""
    require(0.0 <= mask.rate < 1.0, op, "rate", f"{mask.rate} is not in [0, 1)")
    samples = mask.sample_id.shape[0]
    require(samples > 0 and rows % samples == 0, op, "sample_id", f"{rows} rows are not a multiple of {samples} samples")
    for name in ("seed", "step", "sample_id"):
        tensor = getattr(mask, name)
        require(tensor.dtype == torch.int64, op, name, f"is {tensor.dtype}; make it int64")
        require(tensor.device == x.device, op, name, f"is on {tensor.device}, the rest on {x.device}; move it there")


def keep_mask(shape: torch.Size, rate: float, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int) -> Tensor:
    """bool mask of `shape`, False with probability `rate`.

    seed, step: int64 scalars on the device. sample_id: int64 (B,); shape[0] must be a multiple of B. With C the last axis
    and r counting the rows of a sample over all other axes in order, the element in row r and column c takes word c % 4 of
    the counter (r ceil(C / 4) + c // 4, sample id, step, stream): four neighbours share one counter, in every row alike.
    """
    samples, columns = sample_id.shape[0], shape[-1]
    require(shape[0] % samples == 0, "dropout", "sample_id", f"{shape[0]} rows are not a multiple of {samples} samples")
    groups = -(-columns // 4)
    position = torch.arange(shape.numel() // (samples * columns) * groups, device=sample_id.device)[None, :]
    counter = (position, sample_id[:, None], step, torch.full_like(step, stream))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, seed_key(seed))), dim=-1)
    return (words.reshape(-1, 4 * groups)[:, :columns] >= int(rate * 2**32)).reshape(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(mask.seed, mask.step, mask.sample_id)
        ctx.rate, ctx.stream = mask.rate, mask.stream
        return x * keep_mask(x.shape, *mask) / (1.0 - mask.rate)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        mask = keep_mask(grad.shape, ctx.rate, *ctx.saved_tensors, ctx.stream)
        return grad * mask / (1.0 - ctx.rate), None


def dropout(x: Tensor, rate: float, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int) -> Tensor:
    """x with each element zeroed with probability `rate` and the rest divided by 1 - rate; arguments as for keep_mask."""
    return x if rate == 0.0 else _Dropout.apply(x, DropoutMask(rate, seed, step, sample_id, stream))


def dropped(x: Tensor, mask: DropoutMask | None) -> Tensor:
    """`dropout` of x by a mask; x itself without one."""
    return x if mask is None else dropout(x, *mask)


def mask_of(rate: float, seed: Tensor | None, step: Tensor | None, sample_id: Tensor | None, stream: int) -> DropoutMask | None:
    """The mask again, from the flat arguments of a dispatcher op, which takes no records; None if its tensors are."""
    return None if seed is None or step is None or sample_id is None else DropoutMask(rate, seed, step, sample_id, stream)
