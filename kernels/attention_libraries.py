"""Attention by other people's kernels, each by name: what it takes, where it comes from, and how it is called.

sdpa        PyTorch's `scaled_dot_product_attention` in the tensors' dtype, by the backend PyTorch prefers.
cudnn       the same by its cuDNN backend alone.
flash2      FlashAttention-2, the `flash_attn` package.
flash3      FlashAttention-3 (Hopper), the `flash_attn_interface` module.
flash4      FlashAttention-4 (Hopper, Blackwell), `flash_attn.cute`.
wide        PyTorch's in fp32, rounded once: for bf16 on a CPU that cannot multiply bf16, where its bf16 kernel takes 5 to 10
            times as long and is less exact.

Their dropout comes from generators that cannot be replayed from a counter, so none but `wide` takes one.

Legend: as in attention.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels.dropout import DropoutMask, dropout
from vatt.kernels.implementation import KernelError, require

Run = Callable[[Tensor, Tensor | None, float], Tensor]  # (qkv_BN3HD, bias, scale) -> (B, N, H D)
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Library:
    """One implementation. dtypes: empty for any. module, install: what is imported, and how one gets it."""

    run: Run
    cuda: bool = True
    bias: bool = False
    dropout: bool = False
    dtypes: Sequence[torch.dtype] = HALF
    module: str | None = None
    install: str = ""


def heads_of(qkv_BN3HD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each a (B, H, N, D) view."""
    q, k, v = qkv_BN3HD.permute(2, 0, 3, 1, 4)
    return q, k, v


def joined(out_BHND: Tensor) -> Tensor:
    """(B, N, H D)."""
    return out_BHND.transpose(1, 2).flatten(2)


def sdpa(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    mask = None if bias is None else bias.to(qkv.dtype)
    # Positionally, as far as its parameters allow: dropout_p = 0, is_causal = False.
    return joined(F.scaled_dot_product_attention(*heads_of(qkv), mask, 0.0, False, scale=scale))


def products(qkv: Tensor, bias: Tensor | None, scale: float, mask: DropoutMask | None) -> Tensor:
    """With the weights in memory, so that the counter's mask can be applied to them; their softmax is fp32 at least."""
    q, k, v = heads_of(qkv)
    scores = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    weights = (scores if bias is None else scores + bias).softmax(-1).to(v.dtype)
    return joined((weights if mask is None else dropout(weights, *mask)) @ v)


def wide(qkv: Tensor, bias: Tensor | None, scale: float, mask: DropoutMask | None = None) -> Tensor:
    exact = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    return (sdpa(exact, bias, scale) if mask is None else products(exact, bias, scale, mask)).to(qkv.dtype)


def _cudnn(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(qkv, bias, scale)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise KernelError("attention: implementation: cuDNN has no kernel for these arguments; use 'native'") from error


def _flash(module: str, packed: bool) -> Run:
    def run(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        library = importlib.import_module(module)
        if packed:
            out = library.flash_attn_qkvpacked_func(qkv, softmax_scale=scale)
        else:
            out = library.flash_attn_func(*qkv.unbind(2), softmax_scale=scale)
        first: Tensor = out if isinstance(out, Tensor) else out[0]  # some versions add the log-sum-exp
        return first.flatten(2)

    return run


LIBRARIES = {
    "sdpa": Library(sdpa, cuda=False, bias=True, dtypes=()),
    "cudnn": Library(_cudnn, bias=True),
    "flash2": Library(
        _flash("flash_attn", True), module="flash_attn", install="pip install flash-attn --no-build-isolation (needs nvcc)"
    ),
    "flash3": Library(
        _flash("flash_attn_interface", True),
        module="flash_attn_interface",
        install="install the flash_attn_3 wheel from the PyTorch index, or build hopper/ of flash-attention",
    ),
    "flash4": Library(_flash("flash_attn.cute", False), module="flash_attn.cute", install="pip install flash-attn-4"),
    "wide": Library(wide, cuda=False, bias=True, dropout=True, dtypes=()),
}


def refusal(name: str, qkv: Tensor, bias: Tensor | None, dropout: DropoutMask | None) -> str | None:
    """Why library `name` cannot take these arguments here, with the remedy; None when it can."""
    library = LIBRARIES[name]
    if library.cuda and qkv.device.type != "cuda":
        return f"{name!r} takes CUDA tensors, qkv is on {qkv.device}; use 'native'"
    if library.dtypes and qkv.dtype not in library.dtypes:
        return f"{name!r} takes fp16 or bf16, qkv is {qkv.dtype}; cast it, or use 'native'"
    if dropout is not None and not library.dropout:
        return f"{name!r} draws dropout that no counter can replay; use 'native', 'wide' or 'reference'"
    if bias is not None and not library.bias:
        return f"{name!r} takes no bias; use 'native', 'sdpa' or 'cudnn'"
    if library.module is not None:
        try:
            importlib.import_module(library.module)
        except (ImportError, OSError) as error:  # OSError: a shared library that was built for another torch
            return f"{name!r} cannot be imported ({_first_line(error)}); {library.install}, or use 'native'"
    return None


def run(name: str, qkv: Tensor, bias: Tensor | None, scale: float, dropout: DropoutMask | None) -> Tensor:
    """Attention by library `name`. Raises KernelError with the reason and the remedy when it cannot take the arguments."""
    reason = refusal(name, qkv, bias, dropout)
    require(reason is None, "attention", "implementation", str(reason))
    options: dict[str, Any] = {} if dropout is None else {"mask": dropout}
    return LIBRARIES[name].run(qkv, bias, scale, **options)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
