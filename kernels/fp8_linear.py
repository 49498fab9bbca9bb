"""A linear layer whose three products of training have eight-bit operands: an option, for GPUs that multiply them faster.

Each operand gets one scale, chosen when it is used, so that its largest magnitude lies at the end of the format's range:
activations and weights in e4m3 (3 bits of mantissa), gradients in e5m2 (2 bits, more range), as in Micikevicius et al., "FP8
formats for deep learning", 2022. Sums are fp32, rounded once. Parameters, gradients and their dtypes stay what they are.

Legend: M rows, K input features, N output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels.implementation import require

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# What the GPU's eight-bit products take: each side a multiple of 16 long.
MULTIPLE = 16


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values of `dtype`, fp32 scale) with x = values x scale, as nearly as the format allows; a tensor of zeros stays one."""
    largest = x.detach().abs().amax().float()
    scale = torch.where(largest > 0, largest / torch.finfo(dtype).max, 1.0)
    return (x / scale).to(dtype), scale


def fp8_linear_reference(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b of the quantised x and W, products and sum in fp32, rounded once to the dtype of `x`."""
    y = _multiplied(quantised(x.reshape(-1, x.shape[-1]), E4M3), quantised(weight_NK, E4M3), torch.float32)
    y = y if bias_N is None else y + bias_N.float()
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def fp8_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Affine map of the last axis of `x` (..., K) to (..., N), differentiable; both of one dtype, bf16 on a GPU.

    On a CPU, and on GPUs before sm_89, the eight-bit values are multiplied in fp32: the same numbers, for tests and loss
    curves, and no faster. Raises KernelError where K or N is not a multiple of 16.
    """
    for name, size in (("K", weight_NK.shape[1]), ("N", weight_NK.shape[0])):
        require(size % MULTIPLE == 0, "fp8_linear", "weight", f"{name} = {size} is not a multiple of {MULTIPLE}; use `linear`")
    y: Tensor = torch.ops.vatt.fp8_linear(x, weight_NK, bias_N)
    return y


def multiplies_eight_bits(device: torch.device) -> bool:
    """Whether eight-bit products are the device's own."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _multiplied(a_MK: tuple[Tensor, Tensor], b_NK: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """(M, N) a b^T of two quantised operands."""
    (a, scale_a), (b, scale_b) = a_MK, b_NK
    if not multiplies_eight_bits(a.device):
        return (F.linear(a.float(), b.float()) * (scale_a * scale_b)).to(dtype)
    spare = -len(a) % MULTIPLE
    if spare:
        a = torch.cat([a, a.new_zeros(spare, a.shape[1])])
    out: Tensor = torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)
    return out[: len(out) - spare]


def _padded_rows(x: Tensor) -> Tensor:
    """With rows of zeros up to a multiple of 16: rows are what the weight's gradient sums over."""
    spare = -len(x) % MULTIPLE
    return torch.cat([x, x.new_zeros(spare, x.shape[1])]) if spare else x


@torch.library.custom_op("vatt::fp8_linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    wide = torch.float32 if bias is not None or not x.is_cuda else x.dtype
    y = _multiplied(quantised(rows, E4M3), quantised(weight, E4M3), wide)
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], -1)


@_forward.register_fake
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("vatt::fp8_linear_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); dbias is empty without a bias."""
    grad_MN, x_MK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    values, scale = quantised(grad_MN, E5M2)
    w_values, w_scale = quantised(weight, E4M3)
    dx = _multiplied((values, scale), (w_values.t().contiguous(), w_scale), x.dtype).view(x.shape)
    x_values, x_scale = quantised(x_MK, E4M3)
    rows = (_padded_rows(t).t().contiguous() for t in (values, x_values))
    dweight = _multiplied((next(rows), scale), (next(rows), x_scale), weight.dtype)
    return dx, dweight, grad_MN.float().sum(0).to(weight.dtype) if bias else grad.new_empty(0)


@_backward.register_fake
def _(grad, x, weight, bias):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight),
        x.new_empty(len(weight) if bias else 0),
    )


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias = bias is not None


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _backward(grad, x, weight, ctx.bias)
    return dx, dweight, dbias if ctx.bias else None


_forward.register_autograd(_differentiate, setup_context=_save)
