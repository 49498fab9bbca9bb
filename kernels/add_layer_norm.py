"""Where a sub-layer meets the residual stream, in one pass: sum = residual + Dropout(branch), and the norm of that sum.

The next sub-layer reads the norm, the one after it adds to the sum: both leave together, and the stream is read once.
Two forms: `layer`, LayerNorm; `rms`, x / sqrt(mean(x^2) + eps) * weight, without mean and bias (T5). A norm is of the sum
as it is handed on, after rounding. The projection before may leave its bias to this kernel (`branch_bias`): the forward
pass reads it at no cost, and its gradient is added up where the branch's gradient is in registers anyway.

M rows (any leading axes), D columns.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels.dropout import DropoutMask, check_mask, dropped, mask_of
from vatt.kernels.implementation import gpu_module, require, resolve, same_device

Form = Literal["layer", "rms"]
MOST_COLUMNS = 8192  # a row has to fit the registers of one block of threads


def add_layer_norm_reference(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dropout: DropoutMask | None = None,
    form: Form = "layer",
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum, normed) in at least fp32, each rounded once to the dtype of `residual`."""
    exact = torch.promote_types(residual.dtype, torch.float32)
    total = residual.to(exact)
    if branch is not None:
        total = total + dropped(_biased(branch.to(exact), branch_bias), dropout)
    centred = total - total.mean(-1, keepdim=True) if form == "layer" else total
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(exact)
    return total.to(residual.dtype), (normed if bias is None else normed + bias.to(exact)).to(residual.dtype)


def add_layer_norm_eager(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dropout: DropoutMask | None = None,
    form: Form = "layer",
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same from PyTorch's own functions, in the dtype of `residual` throughout: what the kernel has to beat."""
    total = residual if branch is None else residual + dropped(_biased(branch, branch_bias), dropout)
    if form == "rms":
        return total, F.rms_norm(total, weight.shape, weight, eps)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def add_layer_norm(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dropout: DropoutMask | None = None,
    form: Form = "layer",
    branch_bias: Tensor | None = None,
    implementation: str = "native",
) -> tuple[Tensor, Tensor]:
    """(sum, normed): sum = residual + Dropout(branch + branch_bias), normed = norm(sum) * weight + bias; both (..., D).

    residual, branch: (..., D) of one shape, contiguous on a GPU (else copied). branch None: the plain norm of `residual`,
    which is returned as the sum. weight, bias, branch_bias: (D,); all of one dtype. dropout: None is no dropout; its mask is
    drawn again in backward, never stored. Differentiable in branch, branch_bias, residual, weight and bias, for gradients
    of either output or both. A GPU kernel takes up to 8192 columns; statistics are fp32 in it.
    implementation: see `vatt.kernels.implementation`; "native" on a CPU is PyTorch's own functions, called directly: the way
    through the dispatcher op costs more there than it saves. Raises KernelError for what the kernels cannot take.
    """
    op = "add_layer_norm"
    require(form in ("layer", "rms"), op, "form", f"{form!r} is not one of layer, rms")
    require(residual.is_floating_point(), op, "residual", f"is {residual.dtype}; it must be floating point")
    require(residual.dim() > 0 and residual.numel() > 0, op, "residual", f"has shape {tuple(residual.shape)}: nothing to norm")
    require(eps >= 0.0, op, "eps", f"{eps} is negative")
    same_device(op, residual, branch=branch, weight=weight, bias=bias, branch_bias=branch_bias)
    columns = residual.shape[-1]
    for name, vector in {"weight": weight, "bias": bias, "branch_bias": branch_bias}.items():
        if vector is not None:
            shape = tuple(vector.shape)
            require(shape == (columns,), op, name, f"has shape {shape}; residual has {columns} columns")
            require(vector.dtype == residual.dtype, op, name, f"is {vector.dtype}, residual is {residual.dtype}; cast it")
    require(bias is None or form == "layer", op, "bias", "the rms form has none; pass None")
    if branch is None:
        require(branch_bias is None, op, "branch_bias", "there is no branch to add it to; pass None")
        require(dropout is None, op, "dropout", "there is no branch to drop from; pass None")
    else:
        require(branch.shape == residual.shape, op, "branch", f"is {tuple(branch.shape)}, residual {tuple(residual.shape)}")
        require(branch.dtype == residual.dtype, op, "branch", f"is {branch.dtype}, residual is {residual.dtype}; cast it")
    if dropout is not None:
        check_mask(op, dropout, residual.shape[0], residual)
        dropout = dropout if dropout.rate > 0.0 else None
    how = resolve(op, implementation, residual)
    if how != "triton":
        plain = add_layer_norm_reference if how == "reference" else add_layer_norm_eager
        return plain(branch, residual, weight, bias, eps, dropout, form, branch_bias)
    limit = f"has {columns} columns, the GPU kernel takes up to {MOST_COLUMNS}; use 'reference'"
    require(columns <= MOST_COLUMNS, op, "residual", limit)
    mask = dropout if dropout is not None else (0.0, None, None, None, 0)
    total, normed, _, _ = torch.ops.vatt.add_layer_norm(
        branch, residual, weight, bias, branch_bias, eps, form == "rms", *mask, how
    )
    return residual if branch is None else total, normed


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


@torch.library.custom_op("vatt::add_layer_norm", mutates_args=())
def _forward(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    eps: float,
    rms: bool,
    rate: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_id: Tensor | None,
    stream: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum, normed, mean, 1 / deviation): the last two (M,), for backward. No branch: sum is empty. rms: mean is empty."""
    dropout = mask_of(rate, seed, step, sample_id, stream)
    if implementation != "native":
        return gpu_module("add_layer_norm").forward(branch, residual, weight, bias, branch_bias, eps, rms, dropout)
    residual = residual.contiguous()
    total = residual if branch is None else (residual + dropped(_biased(branch, branch_bias), dropout)).contiguous()
    out = residual.new_empty(0) if branch is None else total
    if rms:
        wide = total.to(torch.promote_types(total.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return out, (wide * rstd).to(total.dtype) * weight, rstd.new_empty(0), rstd.reshape(-1)
    normed, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
    return out, normed, mean.reshape(-1), rstd.reshape(-1)


@_forward.register_fake
def _(branch, residual, weight, bias, branch_bias, eps, rms, rate, seed, step, sample_id, stream, implementation):  # type: ignore[no-untyped-def]
    normed = torch.empty_like(residual, memory_format=torch.contiguous_format)
    total = residual.new_empty(0) if branch is None else torch.empty_like(normed)
    # PyTorch's LayerNorm on a CPU keeps its statistics in the tensors' dtype.
    kept = residual.dtype if implementation == "native" and not rms else torch.promote_types(residual.dtype, torch.float32)
    rows = residual.numel() // residual.shape[-1]
    return total, normed, residual.new_empty(0 if rms else rows, dtype=kept), residual.new_empty(rows, dtype=kept)


@torch.library.custom_op("vatt::add_layer_norm_backward", mutates_args=())
def _backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_bias: bool,
    has_branch_bias: bool,
    rms: bool,
    rate: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_id: Tensor | None,
    stream: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dresidual, dbranch, dweight, dbias, dbranch_bias); dbranch is empty when it equals dresidual (no dropout)."""
    dropout = mask_of(rate, seed, step, sample_id, stream)
    if implementation != "native":
        return gpu_module("add_layer_norm").backward(
            grad_sum, grad_normed, total, mean, rstd, weight, has_bias, has_branch_bias, rms, dropout
        )
    dresidual, dweight, dbias = (_rms_backward if rms else _layer_backward)(grad_normed, total, mean, rstd, weight, has_bias)
    if grad_sum is not None:
        dresidual += grad_sum
    dbranch = dresidual if dropout is None else dropped(dresidual, dropout)
    dbranch_bias = dbranch.flatten(0, -2).sum(0) if has_branch_bias else weight.new_empty(0)
    return dresidual, weight.new_empty(0) if dropout is None else dbranch, dweight, dbias, dbranch_bias


def _layer_backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = (s.view(*total.shape[:-1], 1) for s in (mean, rstd))
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), total, weight.shape, *statistics, weight, weight if has_bias else None, [True, True, has_bias]
    )
    return found if has_bias else (*found[:2], weight.new_empty(0))


def _rms_backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(total.dtype, torch.float32)
    scale = rstd.view(*total.shape[:-1], 1)
    x_hat = total.to(wide) * scale
    slope = grad.to(wide)
    dweight = (slope * x_hat).flatten(0, -2).sum(0).to(weight.dtype)
    slope = slope * weight.to(wide)
    dx = (slope - x_hat * (slope * x_hat).mean(-1, keepdim=True)) * scale
    return dx.to(total.dtype), dweight, weight.new_empty(0)


@_backward.register_fake
def _(grad_sum, grad_normed, total, mean, rstd, weight, has_bias, has_branch_bias, rms, rate, seed, *rest):  # type: ignore[no-untyped-def]
    dresidual = torch.empty_like(total)
    dbranch = weight.new_empty(0) if seed is None else torch.empty_like(total)
    vectors = (torch.empty_like(weight) if there else weight.new_empty(0) for there in (True, has_bias, has_branch_bias))
    return dresidual, dbranch, *vectors


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    branch, residual, weight, bias, branch_bias, _, rms, rate, seed, step, sample_id, stream, implementation = inputs
    total, _, mean, rstd = output
    # A gradient that does not come (the sum after the last norm) is then None, not a tensor of zeros to be read.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual if branch is None else total, mean, rstd, weight, seed, step, sample_id)
    ctx.has_branch, ctx.has_bias, ctx.has_branch_bias = branch is not None, bias is not None, branch_bias is not None
    ctx.rms, ctx.rate, ctx.stream, ctx.implementation = rms, rate, stream, implementation


def _differentiate(ctx, grad_sum, grad_normed, *_):  # type: ignore[no-untyped-def]
    total, mean, rstd, weight, seed, step, sample_id = ctx.saved_tensors
    total = total.contiguous()
    grad_normed = torch.zeros_like(total) if grad_normed is None else grad_normed
    mask = ctx.rate, seed, step, sample_id, ctx.stream
    options = ctx.has_bias, ctx.has_branch_bias, ctx.rms
    dresidual, dbranch, dweight, dbias, dbranch_bias = _backward(
        grad_sum if ctx.has_branch else None, grad_normed, total, mean, rstd, weight, *options, *mask, ctx.implementation
    )
    if seed is None:
        dbranch = dresidual
    return (
        dbranch if ctx.has_branch else None,
        dresidual,
        dweight,
        dbias if ctx.has_bias else None,
        dbranch_bias if ctx.has_branch_bias else None,
        *(None,) * 8,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
