"""The middle of a feed-forward network in one pass: Dropout(GELU(x + bias)), GELU in its exact (erf) form.

M rows (any leading axes), C columns. GELU(z) = z Phi(z) with Phi the normal distribution function, as in the released code;
GEMM libraries offer the tanh approximation as an epilogue, which is another function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels import native
from vatt.kernels.dropout import DropoutMask, check_mask, dropped, mask_of
from vatt.kernels.implementation import gpu_module, require, resolve, same_device


def bias_gelu_reference(x: Tensor, bias_C: Tensor | None = None, dropout: DropoutMask | None = None) -> Tensor:
    """Dropout(GELU(x + bias)) in at least fp32, rounded once to the dtype of `x`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    z = x.to(exact) if bias_C is None else x.to(exact) + bias_C.to(exact)
    return dropped(F.gelu(z), dropout).to(x.dtype)


def bias_gelu_eager(x: Tensor, bias_C: Tensor | None = None, dropout: DropoutMask | None = None) -> Tensor:
    """The same from PyTorch's own functions, in the dtype of `x` throughout: what the kernel has to beat."""
    return dropped(F.gelu(x if bias_C is None else x + bias_C), dropout)


def takes_bias(x: Tensor) -> bool:
    """Whether the projection before should leave its bias to `bias_gelu`.

    Wherever a kernel of ours reads every element anyway, and its backward has them in registers when the bias gradient is
    summed. Before PyTorch's own GELU the matrix product adds it for less.
    """
    return x.device.type != "cpu" or _in_cpp(x)


def bias_gelu(
    x: Tensor, bias_C: Tensor | None = None, dropout: DropoutMask | None = None, implementation: str = "native"
) -> Tensor:
    """Dropout(GELU(x + bias)), differentiable in x and bias; the mask is drawn again in backward, never stored.

    x: (..., C), contiguous on a GPU (else copied). bias: (C,) of the same dtype, or None. dropout: None is no dropout.
    implementation: see `vatt.kernels.implementation`; "native" on a CPU is the C++ of csrc/ for rows of 512 columns or more in
    fp32 and bf16. Below, PyTorch's own functions are called directly: the way through the dispatcher op costs more there than
    it saves. The rows' number does not decide, so that a run is the same on any number of ranks. Raises KernelError for what
    the kernels cannot take.
    """
    op = "bias_gelu"
    require(x.is_floating_point(), op, "x", f"is {x.dtype}; it must be floating point")
    require(x.dim() > 0 and x.numel() > 0, op, "x", f"has shape {tuple(x.shape)}: nothing to compute")
    same_device(op, x, bias=bias_C)
    if bias_C is not None:
        shape = tuple(bias_C.shape)
        require(shape == x.shape[-1:], op, "bias", f"has shape {shape}; x has {x.shape[-1]} columns")
        require(bias_C.dtype == x.dtype, op, "bias", f"is {bias_C.dtype}, x is {x.dtype}; cast it")
    if dropout is not None:
        check_mask(op, dropout, x.shape[0], x)
        dropout = dropout if dropout.rate > 0.0 else None
    how = resolve(op, implementation, x)
    if how != "triton" and not (how == "native" and _in_cpp(x)):
        return (bias_gelu_reference if how == "reference" else bias_gelu_eager)(x, bias_C, dropout)
    mask = dropout if dropout is not None else (0.0, None, None, None, 0)
    y: Tensor = torch.ops.vatt.bias_gelu(x, bias_C, *mask, how)
    return y


def _in_cpp(x: Tensor) -> bool:
    wide = x.shape[-1] >= 512 and x.dtype in (torch.float32, torch.bfloat16)
    return wide and native.loaded()


@torch.library.custom_op("vatt::bias_gelu", mutates_args=())
def _forward(
    x: Tensor,
    bias: Tensor | None,
    rate: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_id: Tensor | None,
    stream: int,
    implementation: str,
) -> Tensor:
    dropout = mask_of(rate, seed, step, sample_id, stream)
    if implementation == "native" and _in_cpp(x):
        return dropped(torch.ops.vatt_native.bias_gelu(x.contiguous(), bias), dropout)
    if implementation == "native":
        return bias_gelu_eager(x, bias, dropout).contiguous()
    return gpu_module("bias_gelu").forward(x, bias, dropout)


@_forward.register_fake
def _(x, bias, rate, seed, step, sample_id, stream, implementation):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("vatt::bias_gelu_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    rate: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_id: Tensor | None,
    stream: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(dx, dbias); dbias is empty when there is no bias."""
    dropout = mask_of(rate, seed, step, sample_id, stream)
    if implementation == "native" and _in_cpp(x):
        dx, sums = torch.ops.vatt_native.bias_gelu_backward(dropped(grad, dropout).contiguous(), x.contiguous(), bias)
        return dx, x.new_empty(0) if bias is None else sums.sum(0).to(bias.dtype)
    if implementation == "native":
        dx = torch.ops.aten.gelu_backward(dropped(grad, dropout), x if bias is None else x + bias).contiguous()
        return dx, x.new_empty(0) if bias is None else dx.flatten(0, -2).sum(0)
    return gpu_module("bias_gelu").backward(grad, x, bias, dropout)


@_backward.register_fake
def _(grad, x, bias, rate, seed, step, sample_id, stream, implementation):  # type: ignore[no-untyped-def]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, bias, rate, seed, step, sample_id, stream, implementation = inputs
    ctx.save_for_backward(x, bias, seed, step, sample_id)
    ctx.rate, ctx.stream, ctx.implementation = rate, stream, implementation


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    x, bias, seed, step, sample_id = ctx.saved_tensors
    dx, dbias = _backward(grad, x, bias, ctx.rate, seed, step, sample_id, ctx.stream, ctx.implementation)
    return dx, None if bias is None else dbias, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
