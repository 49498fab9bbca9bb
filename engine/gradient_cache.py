"""Gradient caching: a batch whose features fit and whose activations do not (Gao et al., "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup", 2021).

The loss needs the features of all clips at once, each tower's activations only those of a chunk. So the towers run twice on
every chunk, with the same kept tokens and dropout masks, and the heads, batch norm and loss once on the whole global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from vatt.engine.backend.interface import Backend
from vatt.engine.data.batch import Batch
from vatt.engine.loss import Losses
from vatt.engine.model import CommonSpace, Features
from vatt.engine.randomness import Draws


def backward_in_chunks(
    backend: Backend, batch: Batch, draws: Draws, chunk: int, losses_of: Callable[[CommonSpace], Losses]
) -> Losses:
    """Losses and gradients of one step with at most `chunk` clips' activations alive; the same as without chunks.

    Costs one more forward pass of the towers. Every rank must have the same number of clips. Collective.
    """
    parts = [slice(start, start + chunk) for start in range(0, len(batch), chunk)]
    with torch.no_grad():
        features = joined([backend.module(batch.rows(part), draws.rows(part), towers_only=True) for part in parts])
    with backend.one_reduction():
        losses = losses_of(backend.module(batch, features=features))
        backend.backward(losses.total)
        for part, gradients in zip(parts, cut(features, chunk, len(batch)), strict=True):
            again = backend.module(batch.rows(part), draws.rows(part), towers_only=True)
            # Its gradient with respect to the chunk's features is the cached one, to the last bit.
            pulled = [(feature * g).sum() for feature, g in zip(tensors(again), gradients, strict=True)]
            backend.backward(torch.stack(pulled).sum())
    return losses


def tensors(features: Features) -> list[Tensor]:
    """A modality each."""
    return [getattr(features, field.name) for field in fields(features)]


def joined(chunks: list[Features]) -> Features:
    """All chunks' features as leaves that collect their gradients."""
    return Features(*(torch.cat(pieces).requires_grad_() for pieces in zip(*map(tensors, chunks), strict=True)))


def cut(features: Features, chunk: int, clips: int) -> list[tuple[Tensor, ...]]:
    """The gradients of each chunk's features, a modality each; a clip may have several rows."""
    pieces = []
    for feature in tensors(features):
        assert feature.grad is not None, "the loss reads every modality"
        pieces.append(feature.grad.split(chunk * (len(feature) // clips)))
    return list(zip(*pieces, strict=True))
