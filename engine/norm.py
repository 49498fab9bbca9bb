"""The norms of a residual stream, each able to take in the branch that was just computed (`vatt.kernels.add_layer_norm`)."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from vatt.engine.tokens import LAYER_NORM_EPSILON
from vatt.kernels.add_layer_norm import add_layer_norm
from vatt.kernels.dropout import DropoutMask


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` of the last axis (same parameters) that can add a branch to the stream in the same pass."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=LAYER_NORM_EPSILON)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, branch: Tensor, dropout: DropoutMask | None) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, branch: Tensor | None = None, dropout: DropoutMask | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x); with a branch (x + Dropout(branch), the norm of that)."""
        joined = add_layer_norm(branch, x, self.weight, self.bias, self.eps, dropout)
        return joined[1] if branch is None else joined


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: no mean, no bias; computed in at least fp32. Takes a branch like LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, branch: Tensor, dropout: DropoutMask | None) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, branch: Tensor | None = None, dropout: DropoutMask | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x); with a branch (x + Dropout(branch), the norm of that)."""
        joined = add_layer_norm(branch, x, self.weight, None, LAYER_NORM_EPSILON, dropout, "rms")
        return joined[1] if branch is None else joined


Norm = LayerNorm | RMSNorm
