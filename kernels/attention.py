"""Self-attention from a packed projection: softmax(scale q k^T + bias) v, with dropout on the weights.

auto        what is fastest here. On a GPU the candidates that load are measured once for each kind of call, see
            `attention_choice`. On a CPU nothing is measured: it is `native`.
native      on a GPU `triton`. On a CPU our C++ (native_attention.py) for the dtypes and head_dims it has, once it is built;
            else PyTorch's own functions: `wide` where the processor cannot multiply bf16 (capability.py), `sdpa` elsewhere, and
            with dropout the explicit products that have the weights to drop from.
triton      our flash attention (gpu/attention.py), bound to CUDA tensors: packed, no copy, any length, bias, dropout.
interpreter the same code on CPU tensors, for tests.
reference   `attention_reference`, every score in memory.
sdpa, cudnn, flash2, flash3, flash4, wide    other people's kernels, see `attention_libraries`.

Legend: B rows of the batch, N tokens, H heads, D features of a head. A row of the batch is a clip, or one of its captions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vatt.kernels import attention_choice, attention_libraries, native_attention
from vatt.kernels.attention_libraries import LIBRARIES, heads_of, joined
from vatt.kernels.capability import widens
from vatt.kernels.dropout import DropoutMask, check_mask, keep_mask
from vatt.kernels.implementation import GPU_DTYPES, KernelError, gpu_module, require, same_device

HEAD_DIMS = (32, 64, 128)
NAMES = ("auto", "native", "triton", "interpreter", "reference", *LIBRARIES)


def attention_reference(
    qkv_BN3HD: Tensor, bias: Tensor | None = None, scale: float | None = None, dropout: DropoutMask | None = None
) -> Tensor:
    """out = Dropout(softmax(scale q k^T + bias)) v in at least fp32, (B, N, H D), rounded once to the dtype of `qkv_BN3HD`.

    Arguments as for `attention`.
    """
    exact = torch.promote_types(qkv_BN3HD.dtype, torch.float32)
    q, k, v = heads_of(qkv_BN3HD.to(exact))
    scores_BHNN = torch.matmul(q, k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores_BHNN = scores_BHNN + bias.to(exact)
    weights_BHNN = scores_BHNN.softmax(-1)
    if dropout is not None:
        weights_BHNN = weights_BHNN * keep_mask(weights_BHNN.shape, *dropout) / (1.0 - dropout.rate)
    return joined(torch.matmul(weights_BHNN, v)).to(qkv_BN3HD.dtype)


def attention_eager(
    qkv_BN3HD: Tensor, bias: Tensor | None = None, scale: float | None = None, dropout: DropoutMask | None = None
) -> Tensor:
    """The same from PyTorch's own functions in the tensors' dtype: its SDPA, or explicit products where a mask is drawn."""
    scale = qkv_BN3HD.shape[-1] ** -0.5 if scale is None else scale
    if dropout is None:
        return attention_libraries.sdpa(qkv_BN3HD, bias, scale)
    return attention_libraries.products(qkv_BN3HD, bias, scale, dropout)


def attention(
    qkv_BN3HD: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: DropoutMask | None = None,
    implementation: str = "auto",
) -> Tensor:
    """(B, N, H D): attention of every token to every token, differentiable in qkv and bias.

    qkv: (B, N, 3, H, D), a view of what one linear layer gave: queries, keys, values, each head by head. On a GPU D is 32, 64
    or 128, and a tensor that is not contiguous is copied. bias: added to the scaled scores in fp32; broadcasts to (B, H, N, N).
    -1e9 (or anything below -3e4) takes a key away. Its gradient holds (B, H, N, N) fp32 for a moment. scale: above 0, default
    D^-0.5. dropout: of the weights, drawn from the counter over (B, H, N, N) and again in backward, never stored; None is none.
    implementation: see the top of this file. Raises KernelError for arguments that it, or any, cannot take.
    """
    dropout = None if dropout is None or dropout.rate == 0.0 else dropout
    scale = _check(qkv_BN3HD, bias, scale, dropout)
    require(implementation in NAMES, "attention", "implementation", f"{implementation!r} is not one of {', '.join(NAMES)}")
    if implementation == "auto":
        implementation = _auto(qkv_BN3HD, bias, scale, dropout)
    return _run(implementation, qkv_BN3HD, bias, scale, dropout)


def _run(implementation: str, qkv: Tensor, bias: Tensor | None, scale: float, dropout: DropoutMask | None) -> Tensor:
    if implementation == "reference":
        return attention_reference(qkv, bias, scale, dropout)
    if implementation == "native":
        implementation = _native(qkv, dropout)
    if implementation == "products":
        return attention_libraries.products(qkv, bias, scale, dropout)
    if implementation in LIBRARIES:
        return attention_libraries.run(implementation, qkv, bias, scale, dropout)
    if implementation != "cpp":
        _check_triton(implementation, qkv)
        implementation = "triton"
    mask = dropout if dropout is not None else (0.0, None, None, None, 0)
    out: Tensor = torch.ops.vatt.attention(qkv, bias, scale, *mask, implementation)[0]
    return out


def _native(qkv: Tensor, dropout: DropoutMask | None) -> str:
    if qkv.device.type != "cpu":
        return "triton"
    if native_attention.takes(qkv):
        return "cpp"
    if widens(qkv):
        return "wide"
    return "products" if dropout is not None else "sdpa"


def _auto(qkv: Tensor, bias: Tensor | None, scale: float, dropout: DropoutMask | None) -> str:
    if qkv.device.type == "meta":
        attention_choice.note(qkv, bias, scale, dropout)
    if qkv.device.type != "cuda":
        return "native"
    try:
        _check_triton("triton", qkv)
    except KernelError:
        names, refused = [], ["triton"]
    else:
        names, refused = ["triton"], []
    for name in LIBRARIES:
        (names if attention_libraries.refusal(name, qkv, bias, dropout) is None else refused).append(name)
    return attention_choice.choose(names or ["reference"], refused, _run, qkv, bias, scale, dropout)


def _check(qkv: Tensor, bias: Tensor | None, scale: float | None, dropout: DropoutMask | None) -> float:
    """The scale, once everything that no implementation could take has been refused."""
    op, shape = "attention", tuple(qkv.shape)
    require(qkv.dim() == 5 and shape[2] == 3, op, "qkv", f"has shape {shape}; unflatten it to (B, N, 3, H, D)")
    require(qkv.is_floating_point(), op, "qkv", f"is {qkv.dtype}; it must be floating point")
    require(qkv.numel() > 0, op, "qkv", f"has shape {shape}: nothing to attend to")
    B, N, _, H, D = shape
    same_device(op, qkv, bias=bias)
    if bias is not None:
        fits = bias.dim() <= 4 and all(
            have in (1, want) for have, want in zip(reversed(bias.shape), (N, N, H, B), strict=False)
        )
        require(fits, op, "bias", f"has shape {tuple(bias.shape)}; it must broadcast to {(B, H, N, N)}")
        require(bias.is_floating_point(), op, "bias", f"is {bias.dtype}; make it floating point, -1e9 where a key is hidden")
    scale = D**-0.5 if scale is None else scale
    require(math.isfinite(scale) and scale > 0.0, op, "scale", f"{scale} is not a positive number")
    if dropout is not None:
        check_mask(op, dropout, B, qkv)
        groups = B // dropout.sample_id.shape[0] * H * N * -(-N // 4)
        require(groups < 2**32, op, "dropout", f"{N} tokens need more than the counter's 2^32 positions; shorten them")
    return scale


def _check_triton(implementation: str, qkv: Tensor) -> None:
    """Refuse what the Triton kernels cannot take."""
    op, device = "attention", qkv.device.type
    if implementation == "interpreter":
        require(device == "cpu", op, "implementation", "'interpreter' takes CPU tensors; use 'native' on a GPU")
        require(qkv.dtype != torch.bfloat16, op, "implementation", "'interpreter' takes fp32 or fp16, bf16 is wrong in it")
    else:
        require(
            device in ("cuda", "meta"),
            op,
            "implementation",
            f"'triton' takes CUDA tensors, qkv is on {qkv.device}; use 'native'",
        )
    require(qkv.dtype in GPU_DTYPES, op, "qkv", f"{qkv.dtype} has no GPU kernel; use fp32, fp16 or bf16, or 'reference'")
    offered = ", ".join(map(str, HEAD_DIMS))
    require(qkv.shape[4] in HEAD_DIMS, op, "qkv", f"head_dim {qkv.shape[4]} is not one of {offered}; use 'sdpa'")
    elements = qkv[0].numel()
    require(elements < 2**31, op, "qkv", f"{elements} elements a row are too many for 32-bit offsets; use 'sdpa'")


def _mask(rate: float, seed: Tensor | None, step: Tensor | None, sample_id: Tensor | None, stream: int) -> DropoutMask | None:
    return None if seed is None or step is None or sample_id is None else DropoutMask(rate, seed, step, sample_id, stream)


@torch.library.custom_op("vatt::attention", mutates_args=())
def _forward(
    qkv: Tensor,
    bias: Tensor | None,
    scale: float,
    rate: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_id: Tensor | None,
    stream: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(out (B, N, H D), log2 of the sum of exp(score) of each query (B, H, N) in fp32, for backward)."""
    module = native_attention if implementation == "cpp" else gpu_module("attention")
    out, lse = module.forward(qkv, bias, scale, _mask(rate, seed, step, sample_id, stream))
    return out, lse


@_forward.register_fake
def _(qkv, bias, scale, rate, seed, step, sample_id, stream, implementation):  # type: ignore[no-untyped-def]
    B, N, _, H, D = qkv.shape
    return qkv.new_empty(B, N, H * D), qkv.new_empty(B, H, N, dtype=torch.float32)


@torch.library.custom_op("vatt::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    bias_gradient: bool,
    scale: float,
    rate: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_id: Tensor | None,
    stream: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(dqkv, contiguous; dbias, empty unless asked for)."""
    dropout = _mask(rate, seed, step, sample_id, stream)
    module = native_attention if implementation == "cpp" else gpu_module("attention_backward")
    dqkv, dbias = module.backward(grad, qkv, out, lse, bias, scale, dropout, bias_gradient)
    return dqkv, dbias


@_backward.register_fake
def _(grad, qkv, out, lse, bias, bias_gradient, *rest):  # type: ignore[no-untyped-def]
    dbias = (
        lse.new_empty(0) if bias is None or not bias_gradient else torch.empty_like(bias, memory_format=torch.contiguous_format)
    )
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), dbias


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    qkv, bias, scale, rate, seed, step, sample_id, stream, implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, bias, seed, step, sample_id)
    ctx.scale, ctx.rate, ctx.stream, ctx.implementation = scale, rate, stream, implementation


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    qkv, out, lse, bias, seed, step, sample_id = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    wanted = bias is not None and ctx.needs_input_grad[1]
    mask = ctx.rate, seed, step, sample_id, ctx.stream
    dqkv, dbias = _backward(grad, qkv, out, lse, bias, wanted, ctx.scale, *mask, ctx.implementation)
    return dqkv, dbias if wanted else None, *(None,) * 7


_forward.register_autograd(_differentiate, setup_context=_save)
