"""Dropout whose mask is a function of (seed, step, sample, site): the same on any layout, and replayed in backward.

B = samples, R = rows per sample (1, or the caption candidates of a clip), x has shape (B * R, ..., C).
The mask is never stored: backward draws it again from the counter, and so do the kernels that fuse a dropout. On a CPU the
words are drawn in C++ (csrc/cpu/counter.cpp), the same bits as from PyTorch's integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vatt.kernels import native
from vatt.kernels.counter import words_tensor
from vatt.kernels.implementation import gpu_module, require, resolve


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
    threshold = int(rate * 2**32)
    if sample_id.device.type == "cpu" and native.loaded():
        kept: Tensor = torch.ops.vatt_native.keep_mask(shape, threshold, seed, step, sample_id.contiguous(), stream)
        return kept
    padded = -(-columns // 4) * 4
    words = words_tensor(seed, step, sample_id, stream, shape.numel() // (samples * columns) * padded)
    return (words.reshape(-1, padded)[:, :columns] >= threshold).reshape(shape)


@native.fake("keep_mask")
def _(shape, threshold, seed, step, sample_id, stream):  # type: ignore[no-untyped-def]
    return sample_id.new_empty(shape, dtype=torch.bool)


@native.fake("words")
def _(seed, step, sample_id, stream, count):  # type: ignore[no-untyped-def]
    return sample_id.new_empty(sample_id.shape[0], count)


@native.fake("dropout")
def _(x, rate, threshold, seed, step, sample_id, stream):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def dropout_reference(x: Tensor, rate: float, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int) -> Tensor:
    """`dropout` in at least fp32, rounded once to the dtype of x."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return (x.to(exact) * keep_mask(x.shape, rate, seed, step, sample_id, stream) / (1.0 - rate)).to(x.dtype)


def dropout_eager(x: Tensor, rate: float, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int) -> Tensor:
    """The same from PyTorch's own functions, in the dtype of x."""
    return x * keep_mask(x.shape, rate, seed, step, sample_id, stream) / (1.0 - rate)


def dropout(
    x: Tensor,
    rate: float,
    seed: Tensor,
    step: Tensor,
    sample_id: Tensor,
    stream: int,
    implementation: str = "native",
) -> Tensor:
    """x with each element zeroed with probability `rate` and the rest divided by 1 - rate; x itself at rate 0.

    x: (B * R, ..., C), copied unless contiguous; the rest as for keep_mask. Differentiable in x. implementation: see
    `vatt.kernels.implementation`; "native" on a CPU is C++ in fp32 and bf16, PyTorch's functions in other dtypes. Raises
    KernelError for what the kernels cannot take.
    """
    require(x.is_floating_point(), "dropout", "x", f"is {x.dtype}; it must be floating point")
    require(x.dim() > 0, "dropout", "x", "is a scalar; it needs an axis of samples")
    check_mask("dropout", DropoutMask(rate, seed, step, sample_id, stream), x.shape[0], x)
    how = resolve("dropout", implementation, x)
    if rate == 0.0 or x.numel() == 0:
        return x
    if how == "reference":
        return dropout_reference(x, rate, seed, step, sample_id, stream)
    y: Tensor = torch.ops.vatt.dropout(x, rate, seed, step, sample_id, stream, how)
    return y


@torch.library.custom_op("vatt::dropout", mutates_args=())
def _forward(x: Tensor, rate: float, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int, implementation: str) -> Tensor:
    mask, x = DropoutMask(rate, seed, step, sample_id, stream), x.contiguous()
    if implementation == "triton":
        y: Tensor = gpu_module("dropout").dropout(x, mask)
        return y
    if x.dtype not in (torch.float32, torch.bfloat16) or not native.loaded():
        return dropout_eager(x, *mask)
    y = torch.ops.vatt_native.dropout(x, rate, mask.threshold, seed, step, sample_id.contiguous(), stream)
    return y


@_forward.register_fake
def _(x, rate, seed, step, sample_id, stream, implementation):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, ctx.rate, seed, step, sample_id, ctx.stream, ctx.implementation = inputs
    ctx.save_for_backward(seed, step, sample_id)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    """The same op once more: a dropout is linear, and its mask is drawn again."""
    return _forward(grad, ctx.rate, *ctx.saved_tensors, ctx.stream, ctx.implementation), *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def dropped(x: Tensor, mask: DropoutMask | None) -> Tensor:
    """`dropout` of x by a mask; x itself without one."""
    return x if mask is None else dropout(x, *mask)


def mask_of(rate: float, seed: Tensor | None, step: Tensor | None, sample_id: Tensor | None, stream: int) -> DropoutMask | None:
    """The mask again, from the flat arguments of a dispatcher op, which takes no records; None if its tensors are."""
    return None if seed is None or step is None or sample_id is None else DropoutMask(rate, seed, step, sample_id, stream)
