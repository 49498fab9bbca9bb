"""A run's model and batch as shapes without memory: they go through a step on any machine, in a second, and compute nothing."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from vatt.engine.config import RunConfig
from vatt.engine.data.batch import Batch
from vatt.engine.model import VATT


def shapes_only(config: RunConfig, dtype: torch.dtype) -> tuple[VATT, Batch]:
    """(the model in training mode with parameters of `dtype`, a batch of `config.batch_size` clips), on the meta device."""
    with torch.device("meta"), mock.patch("vatt.engine.model.initialise"):  # there is nothing to fill
        return VATT(config).to(dtype).train(), meta_batch(config)


def meta_batch(config: RunConfig) -> Batch:
    """A batch that has shapes only."""
    data, count = config.data, config.batch_size

    def shaped(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return Batch(
        video=shaped(count, data.frames, 3, data.size, data.size, dtype=torch.uint8),
        audio=shaped(count, data.audio_samples, dtype=torch.float32),
        text=shaped(count, data.captions, data.words, dtype=torch.int64),
        has_text=shaped(count, dtype=torch.bool),
        has_audio=shaped(count, dtype=torch.bool),
        sample_id=shaped(count, dtype=torch.int64),
    )
