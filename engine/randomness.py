"""Which random numbers a forward pass uses: what the model needs to draw, and replay, every kept token and mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor, nn

from vatt.kernels.counter import Stream
from vatt.kernels.dropout import DropoutMask, dropout


class Modality(IntEnum):
    """Offsets the dropout streams, so that a shared encoder draws afresh for each modality. Never renumber."""

    VIDEO = 0
    AUDIO = 1
    TEXT = 2


@dataclass(frozen=True)
class Draws:
    """Seed, step and samples of a training step, as tensors on the device (nothing in the step waits for the host).

    seed, step: int64 scalars; sample_id: int64 (B,), see Batch; modality: the tower that is drawing.
    """

    seed: Tensor
    step: Tensor
    sample_id: Tensor
    modality: Modality = Modality.VIDEO

    @staticmethod
    def at(seed: int, step: int, sample_id: Tensor) -> Draws:
        """The draws of one step for these samples, on their device."""

        def scalar(value: int) -> Tensor:
            # Filled there by a kernel; torch.tensor would copy it there and wait.
            return torch.full((), value, dtype=torch.int64, device=sample_id.device)

        return Draws(scalar(seed), scalar(step), sample_id)

    def rows(self, part: slice) -> Draws:
        """What is drawn for some of the samples."""
        return replace(self, sample_id=self.sample_id[part])

    def of(self, modality: Modality) -> Draws:
        """The same draws, made by another tower."""
        return replace(self, modality=modality)


# Sites of one block, and of the tower around the blocks (layer = -1 below). Values fix the streams: never renumber.
SITES = {"embedding": 0, "final": 1, "attention_weights": 2, "attention_output": 3, "hidden": 4, "output": 5}
_SITES_PER_LAYER, _SITES_PER_MODALITY = 8, 8 * 512


class Dropout(nn.Module):
    """Dropout at one named site, drawn from the counter; identity in evaluation and at rate 0."""

    def __init__(self, rate: float, site: str, layer: int = -1) -> None:
        super().__init__()
        self.rate = rate
        self.site = (layer + 1) * _SITES_PER_LAYER + SITES[site]

    def mask(self, draws: Draws | None) -> DropoutMask | None:
        """What this site drops now, for a kernel that drops it in passing; None in evaluation and at rate 0.

        Raises ValueError when training at a rate above 0 without draws.
        """
        if not self.training or self.rate == 0.0:
            return None
        if draws is None:
            raise ValueError("dropout in training needs draws: pass model(batch, draws=Draws.at(seed, step, batch.sample_id))")
        stream = Stream.DROPOUT + draws.modality * _SITES_PER_MODALITY + self.site
        return DropoutMask(self.rate, draws.seed, draws.step, draws.sample_id, stream)

    def forward(self, x: Tensor, draws: Draws | None) -> Tensor:
        """x: (B * R, ...) with R rows per sample. Raises as `mask`."""
        mask = self.mask(draws)
        return x if mask is None else dropout(x, *mask)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
