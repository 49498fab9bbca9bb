"""Words to features: the T5-style encoder of the released code, and MMV's linear tower.

R = captions (samples x candidates), L = words, N = L + 1 with AGG, V = vocabulary, W = word width, D = width, H = heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt.engine.config import TextConfig
from vatt.engine.norm import RMSNorm
from vatt.engine.randomness import Draws, Dropout
from vatt.engine.tokens import prepend_aggregate
from vatt.engine.transformer import Block, run_blocks
from vatt.kernels.linear import Linear

PADDING = 0
MASKED_SCORE = -1e9


def relative_bucket(offset: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each key-minus-query offset (T5, bidirectional).

    Half the buckets are for positive offsets. In each half, distances below a quarter of all buckets have one each; the
    rest grow logarithmically up to `max_distance`, beyond which all share the last.
    """
    half = buckets // 2
    exact = half // 2
    distance = offset.abs()
    ratio = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    logarithmic = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, logarithmic) + half * (offset > 0)


class RelativeBias(nn.Module):
    """One column of `buckets` biases per head, added to the scores of every layer; AGG counts as position 0."""

    def __init__(self, buckets: int, max_distance: int, heads: int) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Parameter(torch.empty(buckets, heads))

    def forward(self, length: int) -> Tensor:
        """(1, H, length, length)."""
        position = torch.arange(length, device=self.table.device)
        bucket = relative_bucket(position[None, :] - position[:, None], self.buckets, self.max_distance)
        return self.table[bucket].permute(2, 0, 1)[None]


def padding_bias(ids_RL: Tensor) -> Tensor:
    """(R, 1, 1, 1 + L): -1e9 where a key is padding; AGG is always seen, so a row of padding attends to AGG alone."""
    visible = F.pad(ids_RL != PADDING, (1, 0), value=True)
    return torch.where(visible, 0.0, MASKED_SCORE)[:, None, None, :]


class TextBlock(Block):
    """RMS norm before attention, LayerNorm before the feed-forward network; no linear has a bias; scores are not scaled."""

    def __init__(self, config: TextConfig, layer: int, dropout: float, attention_dropout: float) -> None:
        super().__init__(config, layer, dropout, attention_dropout, attention_norm=RMSNorm, bias=False, scale=1.0)


class TextEncoder(nn.Module):
    """T5-style tower: words -> AGG in front, in word space -> Linear + GELU -> blocks -> RMS norm.

    recompute_layers: see `transformer.run_blocks`.
    """

    def __init__(self, config: TextConfig, dropout: float, attention_dropout: float, recompute_layers: int = 0) -> None:
        super().__init__()
        self.recompute_layers = recompute_layers
        self.words = nn.Embedding(config.vocabulary, config.word_width)
        self.aggregate = nn.Parameter(torch.empty(config.word_width))
        self.projection = Linear(config.word_width, config.width, bias=False)
        self.embedding_dropout = Dropout(dropout, "embedding")
        self.relative_bias = RelativeBias(config.relative_buckets, config.relative_distance, config.heads)
        self.blocks = nn.ModuleList(TextBlock(config, i, dropout, attention_dropout) for i in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.final_dropout = Dropout(dropout, "final")

    def forward(self, ids_RL: Tensor, draws: Draws | None = None) -> Tensor:
        """(R, D): the AGG feature of each caption."""
        words_RNW = prepend_aggregate(self.aggregate, self.words(ids_RL))
        x_RND = self.embedding_dropout(F.gelu(self.projection(words_RNW)), draws)
        score_bias = self.relative_bias(x_RND.shape[1]) + padding_bias(ids_RL)
        normed_RND = run_blocks(self.blocks, self.norm, x_RND, draws, score_bias, self.recompute_layers)
        return self.final_dropout(normed_RND, draws)[:, 0]


class LinearText(nn.Module):
    """MMV's tower, an option of the released code: each word through Linear + ReLU, then the maximum over words.

    Padding counts as 0, the least a ReLU gives.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.word_width)
        self.projection = Linear(config.word_width, config.linear_width)

    def forward(self, ids_RL: Tensor, draws: Draws | None = None) -> Tensor:
        """(R, linear_width)."""
        features = F.relu(self.projection(self.words(ids_RL)))
        return (features * (ids_RL != PADDING)[..., None]).amax(dim=1)
