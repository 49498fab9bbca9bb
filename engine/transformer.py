"""Tokens to features: the pre-norm encoder of the video, audio and modality-agnostic towers (paper, section 3.2).

B = samples, N = tokens with AGG, D = width, H = heads, E = features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt.engine.config import EncoderConfig
from vatt.engine.randomness import Draws, Dropout
from vatt.engine.recompute import recomputed
from vatt.engine.tokens import LAYER_NORM_EPSILON
from vatt.kernels.attention import attention
from vatt.kernels.capability import widens
from vatt.kernels.linear import Linear


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection to queries, keys and values.

    bias: the linear layers have one (video, audio), or none (T5). scale: what the scores are multiplied by.
    """

    def __init__(self, config: EncoderConfig, layer: int, attention_dropout: float, *, bias: bool, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = config.heads, scale
        self.qkv = Linear(config.width, 3 * config.width, bias=bias)
        self.out = Linear(config.width, config.width, bias=bias)
        self.weight_dropout = Dropout(attention_dropout, "attention_weights", layer)

    def forward(self, x_BND: Tensor, draws: Draws | None, score_bias: Tensor | None = None) -> Tensor:
        """(B, N, D). score_bias broadcasts to (B, H, N, N) and is added to the scaled scores."""
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.training and self.weight_dropout.rate > 0.0:
            out_BHNE = self._with_dropout(q, k, v, draws, score_bias)
        else:
            out_BHNE = attention(q, k, v, score_bias, self.scale)
        return self.out(out_BHNE.transpose(1, 2).flatten(2))

    def _with_dropout(self, q: Tensor, k: Tensor, v: Tensor, draws: Draws | None, score_bias: Tensor | None) -> Tensor:
        """Attention with its weights held in memory, so that the counter's mask can be applied to them."""
        dtype = q.dtype
        if widens(q):
            q, k, v = q.float(), k.float(), v.float()
        scores = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * self.scale
        if score_bias is not None:
            scores = scores + score_bias
        return (self.weight_dropout(scores.softmax(-1).to(v.dtype), draws) @ v).to(dtype)


class FeedForward(nn.Module):
    """Linear, exact (erf) GELU, dropout, linear."""

    def __init__(self, config: EncoderConfig, layer: int, dropout: float, *, bias: bool) -> None:
        super().__init__()
        self.up = Linear(config.width, config.hidden, bias=bias)
        self.dropout = Dropout(dropout, "hidden", layer)
        self.down = Linear(config.hidden, config.width, bias=bias)

    def forward(self, x_BND: Tensor, draws: Draws | None) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(x_BND)), draws))


class Block(nn.Module):
    """x + Drop(Attention(LN(x))), then x + Drop(FeedForward(LN(x)))."""

    def __init__(self, config: EncoderConfig, layer: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPSILON)
        self.attention = Attention(config, layer, attention_dropout, bias=True, scale=config.head_width**-0.5)
        self.attention_dropout = Dropout(dropout, "attention_output", layer)
        self.feed_forward_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPSILON)
        self.feed_forward = FeedForward(config, layer, dropout, bias=True)
        self.feed_forward_dropout = Dropout(dropout, "output", layer)

    def forward(self, x_BND: Tensor, draws: Draws | None, score_bias: Tensor | None = None) -> Tensor:
        x_BND = x_BND + self.attention_dropout(self.attention(self.attention_norm(x_BND), draws, score_bias), draws)
        return x_BND + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x_BND), draws), draws)


class Encoder(nn.Module):
    """Blocks, then LayerNorm and dropout. Only the last hidden state leaves.

    recompute_layers: so many of the first blocks keep no activations for backward but run again in it.
    """

    def __init__(self, config: EncoderConfig, dropout: float, attention_dropout: float, recompute_layers: int = 0) -> None:
        super().__init__()
        self.recompute_layers = recompute_layers
        self.blocks = nn.ModuleList(Block(config, i, dropout, attention_dropout) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPSILON)
        self.dropout = Dropout(dropout, "final")

    def forward(self, x_BND: Tensor, draws: Draws | None = None, score_bias: Tensor | None = None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            arguments = x_BND, draws, score_bias
            x_BND = recomputed(block, *arguments) if layer < self.recompute_layers else block(*arguments)
        return self.dropout(self.norm(x_BND), draws)
