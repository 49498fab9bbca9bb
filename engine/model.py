"""VATT: tokens -> Transformers -> common space, composed (paper, Figure 1).

B = samples of this rank, G = samples of the global batch, P = caption candidates, R = G x P, N = tokens, D = width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt.engine.common_space import CommonSpaceHeads
from vatt.engine.config import ConfigError, DropRateConfig, RunConfig
from vatt.engine.data.batch import Batch
from vatt.engine.distributed import all_gather_rows
from vatt.engine.initialise import initialise
from vatt.engine.randomness import Draws, Dropout, Modality
from vatt.engine.streams import side_by_side
from vatt.engine.text_encoder import PADDING, LinearText, TextEncoder, padding_bias
from vatt.engine.tokens import AudioTokens, PatchTokens, PositionBuckets, VideoTokens, prepend_aggregate
from vatt.engine.transformer import Encoder
from vatt.kernels.fp8_linear import MULTIPLE
from vatt.kernels.linear import Linear


@dataclass
class CommonSpace:
    """What a forward pass returns: fp32 head outputs, none of them L2-normalised, and each tower's AGG feature.

    video_audio (G, A) and audio_video (G, A) meet in the video-audio space; video_text (G, T) and text_video (R, T),
    clip-major, in the video-text space. audio_valid bool (G,) and text_valid bool (G, P) say which audio and which
    candidates count. In training the rows are the global batch's, in rank order; in evaluation this rank's.
    """

    video_audio: Tensor
    audio_video: Tensor
    video_text: Tensor
    text_video: Tensor
    video_features: Tensor
    audio_features: Tensor
    text_features: Tensor
    audio_valid: Tensor
    text_valid: Tensor


@dataclass
class Features:
    """The towers' AGG features of this rank: video (B, D), audio (B, D), text (B x P, D), clip-major."""

    video: Tensor
    audio: Tensor
    text: Tensor


@dataclass(frozen=True)
class Kept:
    """Kept token indices in a given order, instead of DropToken's draw: int64 (B, K) each; None keeps every token."""

    video: Tensor | None = None
    audio: Tensor | None = None


class SignalTower(nn.Module):
    """Patches -> tokens -> dropout -> AGG in front -> encoder -> the AGG feature. Video and audio."""

    def __init__(self, tokens: PatchTokens, encoder: Encoder, width: int, dropout: float, aggregate_only: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.dropout = Dropout(dropout, "embedding")
        self.aggregate = nn.Parameter(torch.empty(width))
        self.encoder = encoder
        self.aggregate_only = aggregate_only

    def forward(self, signal: Tensor, index_BK: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        """(B, D)."""
        x_BND = self.tokens(signal, index_BK, aggregate_D=self.aggregate, dropout=self.dropout.mask(draws))
        return self.encoder(x_BND, draws, aggregate_only=self.aggregate_only)[:, 0]


class GeluLinear(nn.Sequential):
    """Linear, then exact GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(Linear(inputs, outputs), nn.GELU())


class SharedSignalTower(nn.Module):
    """The modality-agnostic form: own patches, projections, positions and AGG around the encoder all modalities share."""

    def __init__(self, tokens: PatchTokens, width: int, post_width: int, dropout: float, aggregate_only: bool) -> None:
        super().__init__()
        self.aggregate_only = aggregate_only
        self.tokens = tokens
        self.pre_projection = GeluLinear(width, width)
        self.dropout = Dropout(dropout, "embedding")
        self.aggregate = nn.Parameter(torch.empty(width))
        self.post_projection = GeluLinear(width, post_width)

    def forward(self, encoder: Encoder, signal: Tensor, index_BK: Tensor | None, draws: Draws | None) -> Tensor:
        """(B, post_width)."""
        x_BND = self.tokens(signal, index_BK, self.pre_projection, self.aggregate, self.dropout.mask(draws))
        return self.post_projection(encoder(x_BND, draws, aggregate_only=self.aggregate_only)[:, 0])


class SharedTextTower(nn.Module):
    """Words for the shared encoder: absolute positions (no relative bias), the padding masked, AGG always seen."""

    def __init__(self, vocabulary: int, word_width: int, words: int, width: int, post_width: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, word_width)
        self.pre_projection = GeluLinear(word_width, width)
        self.positions = PositionBuckets((words,), width)
        self.dropout = Dropout(dropout, "embedding")
        self.aggregate = nn.Parameter(torch.empty(width))
        self.post_projection = GeluLinear(width, post_width)

    def forward(self, encoder: Encoder, ids_RL: Tensor, draws: Draws | None) -> Tensor:
        """(R, post_width)."""
        tokens = self.pre_projection(self.words(ids_RL)) + self.positions((ids_RL.shape[1],))
        x_RND = prepend_aggregate(self.aggregate, self.dropout(tokens, draws))
        return self.post_projection(encoder(x_RND, draws, padding_bias(ids_RL))[:, 0])


class VATT(nn.Module):
    """Three towers and the heads of one run's configuration, initialised from its seed.

    Raises ConfigError for settings no model can be built from.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config = config.with_buckets()
        self.drop_rate: DropRateConfig = config.drop_rate
        m = config.model
        self.agnostic = m.kind == "agnostic"
        self.video: SharedSignalTower | SignalTower
        self.audio: SharedSignalTower | SignalTower
        self.text: SharedTextTower | LinearText | TextEncoder
        if self.agnostic:
            width, only = m.shared.width, m.last_block == "agg"
            self.encoder = Encoder(m.shared, m.dropout, m.attention_dropout, config.backend.recompute_layers)
            self.video = SharedSignalTower(VideoTokens(m.video, width, m.remainder), width, m.post_width, m.dropout, only)
            self.audio = SharedSignalTower(AudioTokens(m.audio, width, m.remainder), width, m.post_width, m.dropout, only)
            self.text = SharedTextTower(m.text.vocabulary, m.text.word_width, config.data.words, width, m.post_width, m.dropout)
            widths = (m.post_width,) * 3
        else:
            self.video = self._signal_tower(VideoTokens(m.video, m.video.width, m.remainder), m.video)
            self.audio = self._signal_tower(AudioTokens(m.audio, m.audio.width, m.remainder), m.audio)
            linear = m.text.tower == "linear"
            recompute = config.backend.recompute_layers
            self.text = LinearText(m.text) if linear else TextEncoder(m.text, m.dropout, m.attention_dropout, recompute)
            widths = (m.video.width, m.audio.width, m.text.linear_width if linear else m.text.width)
        self.heads = CommonSpaceHeads(m.heads, *widths)
        self.text.words.weight.requires_grad_(m.text.word_table == "learned")
        initialise(self, config)
        if config.backend.fp8:
            self._multiply_in_eight_bits()

    def _multiply_in_eight_bits(self) -> None:
        """Linear layers of the blocks whose sizes allow it; the patch projections, heads and the rest stay as they are."""
        for stack in [module for module in self.modules() if isinstance(module, nn.ModuleList)]:
            for layer in [module for module in stack.modules() if isinstance(module, Linear)]:
                layer.eight_bit = layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0

    def _signal_tower(self, tokens: PatchTokens, shape) -> SignalTower:  # type: ignore[no-untyped-def]
        m = self.config.model
        encoder = Encoder(shape, m.dropout, m.attention_dropout, self.config.backend.recompute_layers)
        return SignalTower(tokens, encoder, shape.width, m.dropout, m.last_block == "agg")

    def forward(
        self,
        batch: Batch,
        draws: Draws | None = None,
        kept: Kept | None = None,
        *,
        features: Features | None = None,
        towers_only: bool = False,
    ) -> CommonSpace | Features:
        """The common space of a batch; or its first half, the features, with `towers_only`, or its second, from `features`.

        Training keeps the tokens `draws` says (or those of `kept`), gathers every rank's features and runs the heads
        once on all of them; evaluation keeps every token and stays on this rank. Raises ConfigError when training with
        neither draws nor kept while a drop rate is above 0.
        """
        if features is None:
            features = self.encode(batch, draws, kept)
        return features if towers_only else self.project(features, batch)

    def encode(self, batch: Batch, draws: Draws | None, kept: Kept | None) -> Features:
        """Tokens to features, on this rank."""
        if kept is None:
            kept = self.choose_kept(batch, draws) if self.training else Kept()
        towers = (
            lambda: self.encode_video(batch.video, kept.video, draws),
            lambda: self.encode_audio(batch.audio, kept.audio, draws),
            lambda: self.encode_text(batch.text, draws),
        )
        if self.config.backend.tower_streams and batch.video.is_cuda:
            return Features(*side_by_side(towers, batch.video.device))
        return Features(*(encode() for encode in towers))

    def project(self, features: Features, batch: Batch) -> CommonSpace:
        """Features to the common space, over all ranks in training; of `batch` only the flags and the words are read."""
        video, audio, text = features.video, features.audio, features.text
        audio_valid = batch.has_audio
        text_valid = batch.has_text[:, None] & (batch.text != PADDING).any(-1)
        if self.training:
            video, audio, text = all_gather_rows(video), all_gather_rows(audio), all_gather_rows(text)
            audio_valid, text_valid = all_gather_rows(audio_valid), all_gather_rows(text_valid)
        video_audio, video_text = self.heads.project_video(video)
        return CommonSpace(
            video_audio=video_audio,
            audio_video=self.heads.project_audio(audio),
            video_text=video_text,
            text_video=self.heads.project_text(text),
            video_features=video,
            audio_features=audio,
            text_features=text,
            audio_valid=audio_valid,
            text_valid=text_valid,
        )

    def choose_kept(self, batch: Batch, draws: Draws | None) -> Kept:
        """DropToken's draw for both signals."""
        if draws is None:
            if self.drop_rate.video or self.drop_rate.audio:
                call = "model(batch, draws=Draws.at(seed, step, batch.sample_id))"
                raise ConfigError(f"drop_rate: training needs draws: pass {call}")
            return Kept()
        video, audio = self.video.tokens, self.audio.tokens
        return Kept(
            video.choose(video.grid(video.extent(batch.video)), self.drop_rate, draws),
            audio.choose(audio.grid(audio.extent(batch.audio)), self.drop_rate, draws),
        )

    def encode_video(self, video: Tensor, index_BK: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        """(B, D) AGG features of uint8 or [-1, 1] frames (B, T, 3, H, W)."""
        draws = draws and draws.of(Modality.VIDEO)
        return self.video(self.encoder, video, index_BK, draws) if self.agnostic else self.video(video, index_BK, draws)

    def encode_audio(self, audio: Tensor, index_BK: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        """(B, D) AGG features of waveforms (B, S)."""
        draws = draws and draws.of(Modality.AUDIO)
        return self.audio(self.encoder, audio, index_BK, draws) if self.agnostic else self.audio(audio, index_BK, draws)

    def encode_text(self, text: Tensor, draws: Draws | None = None) -> Tensor:
        """(B x P, D) AGG features of word ids (B, P, L), clip-major; or (R, D) of ids (R, L)."""
        ids = text.flatten(0, -2)
        draws = draws and draws.of(Modality.TEXT)
        return self.text(self.encoder, ids, draws) if self.agnostic else self.text(ids, draws)


def l2_normalise(x: Tensor) -> Tensor:
    """x / |x|, with 1e-12 under the root of the squared norm, as in the released code."""
    return F.normalize(x, dim=-1, eps=1e-6)
