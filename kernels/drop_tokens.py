"""DropToken: which tokens of each clip are kept (paper, section 3.4).

B = samples, N = tokens of the full grid, K = kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vatt.kernels.counter import philox, seed_key
from vatt.kernels.implementation import gpu_module, require, resolve

MOST_TOKENS = 65536  # that a program of the GPU kernel holds at once


def drop_tokens_reference(
    total: int, kept: int, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int, *, shared: bool = False
) -> Tensor:
    """int64 (B, K): `kept` of `total` token indices for each sample, drawn without replacement; nothing waits for the host.

    Each token draws one word from the counter (position // 4, sample_id, step, stream) and the K smallest are kept.
    By default every sample draws for itself and indices are sorted, so that reads go forward through the clip.
    `shared` makes one draw for the whole global batch and leaves it in drawn order, as the released code does for each
    replica.
    """
    require(1 <= kept <= total, "drop_tokens", "kept", f"cannot keep {kept} of {total} tokens; keep 1 to {total}")
    samples = sample_id.shape[0]
    who = torch.zeros_like(sample_id[:1]) if shared else sample_id
    position = torch.arange(-(-total // 4), device=sample_id.device)[None, :]
    counter = (position, who[:, None], step, torch.full_like(step, stream))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, seed_key(seed))), dim=-1).reshape(len(who), -1)[:, :total]
    # The index in the low bits breaks ties between equal words, the same way on every device.
    keys = words * total + torch.arange(total, device=words.device)
    smallest = keys.topk(kept, dim=1, largest=False, sorted=True).values % total
    return smallest.expand(samples, kept) if shared else smallest.sort(dim=1).values


def drop_tokens(
    total: int,
    kept: int,
    seed: Tensor,
    step: Tensor,
    sample_id: Tensor,
    stream: int,
    *,
    shared: bool = False,
    implementation: str = "native",
) -> Tensor:
    """`drop_tokens_reference` on any device: the same integers from every implementation.

    seed, step: int64 scalars; sample_id: int64 (B,), ids in [0, 2^32); all on one device. stream: `counter.Stream`.
    total: up to 65536 on a GPU. shared: (B, K) is then one row seen B times, without a copy.
    implementation: see `vatt.kernels.implementation`; "native" on a CPU is the reference. Raises KernelError.
    """
    op = "drop_tokens"
    require(sample_id.dim() == 1 and len(sample_id) > 0, op, "sample_id", f"has shape {tuple(sample_id.shape)}; make it (B,)")
    for name, tensor in {"seed": seed, "step": step, "sample_id": sample_id}.items():
        require(tensor.dtype == torch.int64, op, name, f"is {tensor.dtype}; make it int64")
        require(
            tensor.device == sample_id.device, op, name, f"is on {tensor.device}, the rest on {sample_id.device}; move it there"
        )
    require(seed.numel() == 1 and step.numel() == 1, op, "seed", "and step are scalars; there is one of each for the batch")
    require(1 <= kept <= total, op, "kept", f"cannot keep {kept} of {total} tokens; keep 1 to {total}")
    # The draw has no dtype that an implementation could lack: fp32 stands in for it.
    how = resolve(op, implementation, sample_id.new_empty(0, dtype=torch.float32))
    if how != "triton":
        return drop_tokens_reference(total, kept, seed, step, sample_id, stream, shared=shared)
    require(total <= MOST_TOKENS, op, "total", f"{total} tokens, the GPU kernel takes up to {MOST_TOKENS}; use 'reference'")
    index: Tensor = torch.ops.vatt.drop_tokens(total, kept, seed, step, sample_id, stream, shared)
    return index.expand(len(sample_id), kept)


@torch.library.custom_op("vatt::drop_tokens", mutates_args=())
def _forward(total: int, kept: int, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int, shared: bool) -> Tensor:
    """(B, K); (1, K) when shared: an op may not return a view that repeats itself."""
    return gpu_module("drop_tokens").forward(total, kept, seed, step, sample_id, stream, shared)


@_forward.register_fake
def _(total, kept, seed, step, sample_id, stream, shared):  # type: ignore[no-untyped-def]
    return sample_id.new_empty(1 if shared else sample_id.shape[0], kept)
