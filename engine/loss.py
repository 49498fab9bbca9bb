"""Common space to losses: NCE (video-audio) and MIL-NCE (video-text) over the global batch (paper, section 3.3).

G = clips of the global batch, L = candidates per clip (1 sound, P captions), D = features of a common space.
Every rank holds the same rows and computes the same losses; logits and sums are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vatt.engine.config import LossConfig
from vatt.engine.model import CommonSpace, l2_normalise

MASKED_LOGIT = -1e9


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
    """
    clips, candidates = valid_GL.shape
    cosine = l2_normalise(video_GD) @ l2_normalise(other_RD).T
    logits_GGL = (cosine / config.temperature).unflatten(1, (clips, candidates))
    logits_GGL = logits_GGL.masked_fill(~valid_GL, MASKED_LOGIT)
    loss_G = FORMS[config.form](logits_GGL)
    return mean_over_valid(loss_G, valid_GL.any(1), replicas if config.mean == "per_replica" else 1)


def row_column(logits_GGL: Tensor) -> Tensor:
    """(G,) released default, "asymmetric NCE": both directions share one denominator.

    -log( sum over own candidates / (sum over row i + sum over column block i) ). Own pairs are in the row and in the
    column block, so a perfect match costs ln 2.
    """
    positive, row, column = _log_sums(logits_GGL)
    return torch.logaddexp(row, column) - positive


def symmetric(logits_GGL: Tensor) -> Tensor:
    """(G,) released option, "symmetric NCE": one term with the row as denominator plus one with the column block."""
    positive, row, column = _log_sums(logits_GGL)
    return (row - positive) + (column - positive)


def all_pairs(logits_GGL: Tensor) -> Tensor:
    """(G,) the paper's equations 4 and 5: the denominator adds all non-matching pairs of the batch to the own pairs."""
    positive = _own(logits_GGL).logsumexp(-1)
    own = torch.eye(len(logits_GGL), dtype=torch.bool, device=logits_GGL.device)[:, :, None]
    negatives = logits_GGL.masked_fill(own, MASKED_LOGIT).logsumexp((0, 1, 2))
    return torch.logaddexp(positive, negatives) - positive


FORMS = {"row_column": row_column, "symmetric": symmetric, "all_pairs": all_pairs}


def _own(logits_GGL: Tensor) -> Tensor:
    """(G, L): each video with its own clip's candidates."""
    return logits_GGL.diagonal(dim1=0, dim2=1).T


def _log_sums(logits_GGL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp over own candidates, row i (video i with all candidates) and column block i (all videos with clip i's)."""
    return _own(logits_GGL).logsumexp(-1), logits_GGL.logsumexp((1, 2)), logits_GGL.logsumexp((0, 2))


def mean_over_valid(loss_G: Tensor, valid_G: Tensor, replicas: int = 1) -> Tensor:
    """Mean of the valid clips' losses; with replicas, the mean of each replica's own mean (an empty one counts as 0)."""
    loss_RB = torch.where(valid_G, loss_G, 0.0).unflatten(0, (replicas, -1))
    return (loss_RB.sum(1) / valid_G.unflatten(0, (replicas, -1)).sum(1).clamp(min=1)).mean()
