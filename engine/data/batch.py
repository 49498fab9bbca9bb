"""The record that leaves the data pipeline and enters the model."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """One rank's clips of one step. B clips, T frames, P caption candidates, L words, S samples.

    video      uint8 (B, T, 3, H, W) planar, or float in [-1, 1] of the same shape
    audio      float32 (B, S) in [-1, 1]; zeros where there is none
    text       int64 (B, P, L) word ids, 0 = padding
    has_text   bool (B,): the clip has at least one known word
    has_audio  bool (B,): the clip has sound
    sample_id  int64 (B,): which sample of the run this is; with the seed and the step it fixes every random draw
    """

    video: Tensor
    audio: Tensor
    text: Tensor
    has_text: Tensor
    has_audio: Tensor
    sample_id: Tensor

    def __len__(self) -> int:
        return self.video.shape[0]

    def rows(self, part: slice) -> Batch:
        """Some of the clips; views, not copies."""
        return Batch(**{f.name: getattr(self, f.name)[part] for f in fields(self)})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; copies from pinned memory do not wait."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})
