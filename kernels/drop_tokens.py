"""DropToken: which tokens of each clip are kept (paper, section 3.4).

B = samples, N = tokens of the full grid, K = kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vatt.kernels.counter import philox, seed_key


def drop_tokens_reference(
    total: int, kept: int, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int, *, shared: bool = False
) -> Tensor:
    """int64 (B, K): `kept` of `total` token indices for each sample, drawn without replacement; nothing waits for the host.

    Each token draws one word from the counter (position // 4, sample_id, step, stream) and the K smallest are kept.
    By default every sample draws for itself and indices are sorted, so that reads go forward through the clip.
    `shared` makes one draw for the whole global batch and leaves it in drawn order, as the released code does for each
    replica.
    """
    if not 1 <= kept <= total:
        raise ValueError(f"drop_tokens: cannot keep {kept} of {total} tokens")
    samples = sample_id.shape[0]
    who = torch.zeros_like(sample_id[:1]) if shared else sample_id
    position = torch.arange(-(-total // 4), device=sample_id.device)[None, :]
    counter = (position, who[:, None], step, torch.full_like(step, stream))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, seed_key(seed))), dim=-1).reshape(len(who), -1)[:, :total]
    # The index in the low bits breaks ties between equal words, the same way on every device.
    keys = words * total + torch.arange(total, device=words.device)
    smallest = keys.topk(kept, dim=1, largest=False, sorted=True).values % total
    return smallest.expand(samples, kept) if shared else smallest.sort(dim=1).values
