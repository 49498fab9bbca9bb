"""Tokens to features: the pre-norm encoder of the video, audio and modality-agnostic towers (paper, section 3.2).

B = samples, N = tokens with AGG, D = width, H = heads, E = features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vatt.engine.config import EncoderConfig
from vatt.engine.norm import LayerNorm, Norm
from vatt.engine.randomness import Draws, Dropout
from vatt.engine.recompute import recomputed
from vatt.kernels.attention import attention
from vatt.kernels.bias_gelu import bias_gelu, takes_bias
from vatt.kernels.dropout import DropoutMask
from vatt.kernels.linear import Linear


class PackedLinear(Linear):
    """Several projections in one, of which some may be asked for alone: `outputs` are rows of the weight and the bias."""

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        if outputs is None:
            return self.product(x, self.bias)
        return self.product(x, None if self.bias is None else self.bias[outputs], outputs)


def attend_from_one(q_BH1E: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, score_bias: Tensor | None, scale: float) -> Tensor:
    """(B, H, 1, E): attention of one query, in at least fp32. Two products of a single row are no work for a tiled kernel."""
    exact = torch.promote_types(q_BH1E.dtype, torch.float32)
    scores_BH1N = (q_BH1E.to(exact) @ k_BHNE.to(exact).transpose(-2, -1)) * scale
    if score_bias is not None:
        scores_BH1N = scores_BH1N + score_bias[..., :1, :]
    return (scores_BH1N.softmax(-1) @ v_BHNE.to(exact)).to(q_BH1E.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection to queries, keys and values.

    bias: the linear layers have one (video, audio), or none (T5). scale: what the scores are multiplied by.
    """

    def __init__(self, config: EncoderConfig, layer: int, attention_dropout: float, *, bias: bool, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = config.heads, scale
        self.qkv = PackedLinear(config.width, 3 * config.width, bias=bias)
        self.out = Linear(config.width, config.width, bias=bias)
        self.weight_dropout = Dropout(attention_dropout, "attention_weights", layer)

    def forward(self, x_BND: Tensor, draws: Draws | None, score_bias: Tensor | None = None) -> Tensor:
        """(B, N, D). score_bias broadcasts to (B, H, N, N) and is added to the scaled scores."""
        qkv_BN3HE = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1))
        return self.out(attention(qkv_BN3HE, score_bias, self.scale, self.weight_dropout.mask(draws)))

    def of_aggregate(self, x_BND: Tensor, score_bias: Tensor | None = None) -> Tensor:
        """(B, 1, D): what `forward` gives AGG, the first token, without attention dropout (see ModelConfig.last_block)."""
        width = x_BND.shape[-1]
        q_BH1E = self.qkv(x_BND[:, :1], slice(0, width)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv_BN2HE = self.qkv(x_BND, slice(width, None)).unflatten(-1, (2, self.heads, -1))
        k_BHNE, v_BHNE = kv_BN2HE.permute(2, 0, 3, 1, 4)
        return self.out(attend_from_one(q_BH1E, k_BHNE, v_BHNE, score_bias, self.scale).transpose(1, 2).flatten(2))


class LinearGelu(Linear):
    """Linear, exact (erf) GELU, dropout: the first half of a feed-forward network; the parameters of a linear layer."""

    def forward(self, x: Tensor, dropout: DropoutMask | None = None) -> Tensor:
        if takes_bias(x):
            return bias_gelu(self.product(x, None), self.bias, dropout)
        return bias_gelu(self.product(x, self.bias), None, dropout)


class FeedForward(nn.Module):
    """Linear, exact (erf) GELU, dropout, linear."""

    def __init__(self, config: EncoderConfig, layer: int, dropout: float, *, bias: bool) -> None:
        super().__init__()
        self.up = LinearGelu(config.width, config.hidden, bias=bias)
        self.dropout = Dropout(dropout, "hidden", layer)
        self.down = Linear(config.hidden, config.width, bias=bias)

    def forward(self, x_BND: Tensor, draws: Draws | None) -> Tensor:
        return self.down(self.up(x_BND, self.dropout.mask(draws)))


class Block(nn.Module):
    """x + Drop(Attention(norm(x))), then x + Drop(FeedForward(LN(x))).

    attention_norm, bias, scale: what differs in the text tower.
    """

    def __init__(
        self,
        config: EncoderConfig,
        layer: int,
        dropout: float,
        attention_dropout: float,
        attention_norm: type[Norm] = LayerNorm,
        bias: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        scale = config.head_width**-0.5 if scale is None else scale
        self.attention_norm = attention_norm(config.width)
        self.attention = Attention(config, layer, attention_dropout, bias=bias, scale=scale)
        self.attention_dropout = Dropout(dropout, "attention_output", layer)
        self.feed_forward_norm = LayerNorm(config.width)
        self.feed_forward = FeedForward(config, layer, dropout, bias=bias)
        self.feed_forward_dropout = Dropout(dropout, "output", layer)

    def forward(
        self,
        x_BND: Tensor,
        draws: Draws | None,
        score_bias: Tensor | None = None,
        normed_BND: Tensor | None = None,
        following: Norm | None = None,
        aggregate_only: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The stream after this block; with `following`, the norm that reads it next, (stream, following(stream)).

        aggregate_only: only AGG's (B, 1, D), the same numbers; only its attention and feed-forward are computed.

        Adding a branch to the stream and the norm after it are one pass over memory, and so belong together even where
        the norm is the next block's. normed_BND: this block's own attention norm of x_BND, if that is how it came.
        """
        normed_BND = self.attention_norm(x_BND) if normed_BND is None else normed_BND
        if aggregate_only:
            # AGG's row is the first of its sample, so it has the dropout it would have among all.
            x_BND, branch_BND = x_BND[:, :1], self.attention.of_aggregate(normed_BND, score_bias)
        else:
            branch_BND = self.attention(normed_BND, draws, score_bias)
        x_BND, normed_BND = self.feed_forward_norm(x_BND, branch_BND, self.attention_dropout.mask(draws))
        branch_BND = self.feed_forward(normed_BND, draws)
        if following is None:
            return x_BND + self.feed_forward_dropout(branch_BND, draws)
        joined: tuple[Tensor, Tensor] = following(x_BND, branch_BND, self.feed_forward_dropout.mask(draws))
        return joined


def run_blocks(
    blocks: nn.ModuleList,
    norm: Norm,
    x_BND: Tensor,
    draws: Draws | None,
    score_bias: Tensor | None,
    recompute_layers: int,
    aggregate_only: bool = False,
) -> Tensor:
    """norm(the stream after the last block); of AGG alone, (B, 1, D), with `aggregate_only`.

    recompute_layers: so many of the first blocks keep no activations for backward but run again in it. What they keep is the
    stream alone, so the norm between two of them is taken by the second.
    """
    normed_BND = None
    for layer, block in enumerate(blocks):
        last = layer + 1 == len(blocks)
        if layer < recompute_layers:
            x_BND = recomputed(block, x_BND, draws, score_bias, None, None, aggregate_only and last)
        else:
            following = norm if last else blocks[layer + 1].attention_norm
            x_BND, normed_BND = block(x_BND, draws, score_bias, normed_BND, following, aggregate_only and last)
    return norm(x_BND) if normed_BND is None else normed_BND


class Encoder(nn.Module):
    """Blocks, then LayerNorm and dropout. Only the last hidden state leaves. recompute_layers: see `run_blocks`."""

    def __init__(self, config: EncoderConfig, dropout: float, attention_dropout: float, recompute_layers: int = 0) -> None:
        super().__init__()
        self.recompute_layers = recompute_layers
        self.blocks = nn.ModuleList(Block(config, i, dropout, attention_dropout) for i in range(config.layers))
        self.norm = LayerNorm(config.width)
        self.dropout = Dropout(dropout, "final")

    def forward(
        self,
        x_BND: Tensor,
        draws: Draws | None = None,
        score_bias: Tensor | None = None,
        *,
        aggregate_only: bool = False,
    ) -> Tensor:
        """(B, N, D), or with `aggregate_only` (B, 1, D): AGG's, whose feature is all that a tower hands on."""
        recompute = self.recompute_layers
        normed_BND = run_blocks(self.blocks, self.norm, x_BND, draws, score_bias, recompute, aggregate_only)
        return self.dropout(normed_BND, draws)
