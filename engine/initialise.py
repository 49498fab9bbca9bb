"""The released code's initialisation, drawn from the run's seed on the CPU: the same weights on any layout and device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vatt.engine.config import ConfigError, RunConfig
from vatt.engine.text_encoder import RelativeBias
from vatt.engine.tokens import PatchTokens, PositionBuckets
from vatt.engine.transformer import Attention

if TYPE_CHECKING:
    from vatt.engine.model import VATT

EMBEDDING_LIMIT = 0.05  # Keras's default for embeddings: uniform in +-0.05


def initialise(model: VATT, config: RunConfig) -> None:
    """Set every parameter of the model. Norms keep their 1 and 0.

    Raises ConfigError when the word table's file is absent or of another shape.
    """
    generator = torch.Generator().manual_seed(config.seed)
    packed = {id(m.qkv): 3 for m in model.modules() if isinstance(m, Attention)}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            initialise_linear(module, generator, parts=packed.get(id(module), 1))
        elif isinstance(module, nn.Embedding):
            initialise_embedding(module.weight, generator)
        elif isinstance(module, RelativeBias):
            initialise_embedding(module.table, generator)
        elif isinstance(module, PositionBuckets):
            for table in module.tables:
                truncated_normal_(table, table.shape[1] ** -0.5, generator, corrected=False)
        elif isinstance(module, PatchTokens):
            signal = config.model.video if module.modality == "video" else config.model.audio
            channels = 3 if module.modality == "video" else 1
            initialise_patches(module, channels, signal.initial_gain, generator)
        aggregate = getattr(module, "aggregate", None)
        if isinstance(aggregate, nn.Parameter):
            # Keras's glorot_normal on shape (D,) takes D as both fans: standard deviation D^-0.5.
            truncated_normal_(aggregate, aggregate.shape[0] ** -0.5, generator, corrected=True)
    if config.model.text.word_table_file:
        load_word_table(model.text.words.weight, Path(config.model.text.word_table_file))


def initialise_linear(linear: nn.Linear, generator: torch.Generator, parts: int = 1) -> None:
    """Glorot uniform, zero bias; a packed projection is initialised as the `parts` separate ones it stands for."""
    for part in linear.weight.chunk(parts):
        glorot_uniform_(part, linear.in_features, part.shape[0], generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def initialise_embedding(table: Tensor, generator: torch.Generator) -> None:
    """Uniform in +-0.05."""
    with torch.no_grad():
        table.uniform_(-EMBEDDING_LIMIT, EMBEDDING_LIMIT, generator=generator)


def initialise_patches(module: PatchTokens, channels: int, gain: float, generator: torch.Generator) -> None:
    """Glorot with a convolution's fans: the receptive field counts in fan_out too, which starts projections 14x smaller.

    Beside positions of spread 1 that is a whisper (0.05 video, 0.03 audio), and short runs may not have the time to
    raise it: `gain` does.
    """
    width, features = module.weight.shape
    glorot_uniform_(module.weight, features, features // channels * width, generator)
    with torch.no_grad():
        module.weight.mul_(gain)
    nn.init.zeros_(module.bias)


def load_word_table(table: Tensor, path: Path) -> None:
    """Fill the word table from a NumPy .npy file of its shape."""
    if not path.is_file():
        raise ConfigError(f"model.text.word_table_file: {path} does not exist: name a .npy file of shape {tuple(table.shape)}")
    values = np.load(path, allow_pickle=False)
    if values.shape != tuple(table.shape):
        raise ConfigError(
            f"model.text.word_table_file: {path} has shape {values.shape}, the table is {tuple(table.shape)}: "
            "set model.text.vocabulary and model.text.word_width to match"
        )
    with torch.no_grad():
        table.copy_(torch.from_numpy(values))


def glorot_uniform_(weight: Tensor, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)): Keras's default for dense and convolution kernels."""
    limit = math.sqrt(6.0 / (fan_in + fan_out))
    with torch.no_grad():
        weight.uniform_(-limit, limit, generator=generator)


def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator, *, corrected: bool) -> None:
    """Normal cut at two standard deviations. `corrected` widens it first, so that `std` holds after the cut.

    Keras's glorot_normal corrects (AGG tokens), its TruncatedNormal does not (position tables).
    """
    std = std / 0.87962566103423978 if corrected else std
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
