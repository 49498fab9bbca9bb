"""Common space to losses: NCE (video-audio) and MIL-NCE (video-text) over the global batch (paper, section 3.3).

G = clips of the global batch, L = candidates per clip (1 sound, P captions), D = features of a common space.
Every rank holds the same rows and computes the same losses; logits and sums are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vatt.engine.config import LossConfig
from vatt.engine.model import CommonSpace
from vatt.kernels.contrastive import contrastive


@dataclass
class Losses:
    """fp32 scalars; total is the weighted mean of the other two, as in the released code (the paper writes the sum)."""

    total: Tensor
    video_audio: Tensor
    video_text: Tensor


def contrastive_losses(space: CommonSpace, config: LossConfig, replicas: int = 1) -> Losses:
    """The losses of a global batch. replicas: how many the batch is divided into where `mean` is per_replica."""
    video_audio = contrastive_loss(space.video_audio, space.audio_video, space.audio_valid[:, None], config, replicas)
    video_text = contrastive_loss(space.video_text, space.text_video, space.text_valid, config, replicas)
    weights = config.video_audio_weight, config.video_text_weight
    total = (weights[0] * video_audio + weights[1] * video_text) / sum(weights)
    return Losses(total, video_audio, video_text)


def contrastive_loss(video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, config: LossConfig, replicas: int = 1) -> Tensor:
    """The mean loss over the clips that have a valid candidate; 0 where no clip has.

    video_GD (G, D) and other_RD (G L, D), clip-major, need not be normalised. valid_GL bool (G, L): candidates that
    count; the others are neither positives nor negatives. The heads give fp32 (or fp64), which the logits keep.
    The three forms: `vatt.kernels.contrastive.losses_of`.
    """
    # No GPU kernel computes in fp64, and none is asked for: the one definition serves the comparisons made in it.
    exact = video_GD.dtype == torch.float64 and video_GD.device.type != "cpu"
    implementation = "reference" if exact else "native"
    loss_G = contrastive(video_GD, other_RD, valid_GL, config.temperature, config.form, implementation)
    return mean_over_valid(loss_G, valid_GL.any(1), replicas if config.mean == "per_replica" else 1)


def mean_over_valid(loss_G: Tensor, valid_G: Tensor, replicas: int = 1) -> Tensor:
    """Mean of the valid clips' losses; with replicas, the mean of each replica's own mean (an empty one counts as 0)."""
    loss_RB = torch.where(valid_G, loss_G, 0.0).unflatten(0, (replicas, -1))
    return (loss_RB.sum(1) / valid_G.unflatten(0, (replicas, -1)).sum(1).clamp(min=1)).mean()
