"""Gradients of several backward passes that are one step's, added up on this rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class GradientSum:
    """Sums bf16 gradients in fp32 and rounds them once, as if one backward had made them.

    Added to each other in bf16, a hundred small gradients would lose most of what each of them says. fp32 gradients are
    left to autograd, which adds them up where they are.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = [weight for weight in weights if weight.dtype == torch.bfloat16]
        self.sums: dict[Tensor, Tensor] | None = None

    @contextmanager
    def over_passes(self) -> Iterator[None]:
        """Backward passes inside are summed; at the end each weight's gradient is its sum."""
        sums = self.sums = {}
        try:
            yield
        finally:
            self.sums = None
        for weight, total in sums.items():
            assert weight.grad is not None, "add leaves it there, at 0"
            weight.grad.copy_(total)  # in place, because under ZeRO-3 a weight that is away takes no gradient of its shape

    @torch.no_grad()
    def add(self) -> None:
        """After a backward pass: take what it left on the weights. Outside of `over_passes`, nothing."""
        if self.sums is None:
            return
        for weight in self.weights:
            if weight.grad is None:
                continue
            if weight in self.sums:
                self.sums[weight].add_(weight.grad)
            else:
                self.sums[weight] = weight.grad.float()
            weight.grad.zero_()
