"""The affine map of every projection: y = x W^T + b.

`linear` is `torch.nn.functional.linear` wherever the library multiplies the tensors' dtype at speed. Where it does not
(bf16 on a CPU without bf16 instructions, `capability.widens`) the three products of training are computed in fp32 from
bf16 tensors: operands are widened, fp32 results rounded once to bf16. Storage, gradients and their dtypes stay the same.

Legend: M rows, K input features, N output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt.kernels.capability import widens


def linear_reference(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y[..., n] = sum_k x[..., k] W[n, k] + b[n], products and sum in at least fp32, rounded once to the dtype of `x`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    y = torch.einsum("...k,nk->...n", x.to(exact), weight_NK.to(exact))
    return (y if bias_N is None else y + bias_N.to(exact)).to(x.dtype)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Affine map of the last axis of `x` (..., K) to (..., N); weight (N, K), bias (N,) or None, all of one dtype."""
    if not widens(x):
        return F.linear(x, weight_NK, bias_N)
    y: Tensor = _WideLinear.apply(x, weight_NK, bias_N)
    return y


class Linear(nn.Linear):
    """`torch.nn.Linear` (same parameters, same initialisation) through `linear`, or `fp8_linear` where `eight_bit` is set."""

    eight_bit = False

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias_N: Tensor | None, outputs: slice | None = None) -> Tensor:
        """x W^T + bias_N: for a caller that adds the layer's bias itself, and passes None. outputs: which of W's rows."""
        weight = self.weight if outputs is None else self.weight[outputs]
        if self.eight_bit:
            from vatt.kernels.fp8_linear import fp8_linear

            return fp8_linear(x, weight, bias_N)
        return linear(x, weight, bias_N)


class _WideLinear(torch.autograd.Function):
    """bf16 in, fp32 products, bf16 out. Saves the bf16 operands only: widening them again costs less than keeping them."""

    @staticmethod
    def forward(ctx, x, weight_NK, bias_N):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight_NK)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return F.linear(x.float(), weight_NK.float(), None if bias_N is None else bias_N.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight_NK = ctx.saved_tensors
        grad_MN = grad.reshape(-1, grad.shape[-1]).float()
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (grad_MN @ weight_NK.float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = (grad_MN.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight_NK.dtype)
        if ctx.needs_input_grad[2]:
            dbias = grad_MN.sum(0).to(ctx.bias_dtype)
        return dx, dweight, dbias
