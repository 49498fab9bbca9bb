"""FLOPs in closed form, because counters that patch torch see nothing inside fused kernels. Two conventions side by side.

N = tokens with AGG, D = width, H = heads, F = hidden features, L = layers, G = clips of the global batch.

**True**: the matrix products a clip needs, a multiply-add = 2. Only kept patches are projected; QK^T and AV both count.
Left out, as in every published MFU: elementwise work (GELU, softmax, norms, residual and bias adds, dropout, L2 and batch
normalisation, the loss after its logits), position resampling, table look-ups, the optimizer, and whatever an implementation
does twice (recomputing attention or whole blocks in backward, towers run again by gradient caching, heads run by every rank).
The rows describe the model, all tokens through all blocks. A run's FLOP/s and MFU (`step_flops`) also leave out what
`model.last_block` = "agg" does not compute, so they never count a product that was not made.

**Paper**: what the paper's tables count, found by reproducing them to 0.5 %: TensorFlow's profiler on the released code, where
 - QK^T is written as an einsum and is not counted; AV is;
 - a score costs 7: softmax 5, scale 1, mask 1;
 - biases and residual sums cost 1 an element; norms, GELU and positions nothing;
 - every patch is projected, because the released code drops tokens afterwards;
 - in training mode, each element that passes a dropout site costs 3.
This is the *forward* pass only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vatt.engine.config import EncoderConfig, RunConfig, kept_tokens
from vatt.engine.profile.peak import peak_tflops

__all__ = ["FlopRow", "add_up", "encoder_flops", "executed_flops", "peak_tflops", "run_flops", "step_flops"]

SCORE_FLOPS = 7
DROPOUT_FLOPS = 3


@dataclass(frozen=True)
class FlopRow:
    """FLOPs of one module for one clip: forward in both conventions, and its backward in the true one."""

    tower: str
    module: str
    true: float
    paper: float
    backward: float

    def times(self, count: float) -> FlopRow:
        """The same module run `count` times."""
        return replace(self, true=count * self.true, paper=count * self.paper, backward=count * self.backward)


def add_up(rows: Iterable[FlopRow], name: str = "total") -> FlopRow:
    """One row with the sums of all columns."""
    rows = list(rows)
    return FlopRow(name, "total", *(sum(getattr(row, column) for row in rows) for column in ("true", "paper", "backward")))


def run_flops(config: RunConfig, *, training: bool) -> list[FlopRow]:
    """Rows for one clip of a run: its frames, its waveform, its `data.captions` captions, heads and contrastive logits.

    training: DropToken and dropout are on (the paper column counts a dropout site where its rate is above 0). Otherwise all
    tokens are kept. Logits are the clip's share of the global batch's, in either case. Backward is given in either case.
    """
    dropout = (config.model.dropout > 0 and training, config.model.attention_dropout > 0 and training)
    towers = _agnostic if config.model.kind == "agnostic" else _specific
    rows = towers(config, _Signal.video(config, training), _Signal.audio(config, training), dropout)
    return [row for row in rows if row.true or row.paper] + _heads(config)


def step_flops(config: RunConfig) -> float:
    """True FLOPs of one training step over the global batch: forward, and the gradients of inputs and weights.

    Pixels and samples of sound need no gradient, so patch projections have one product in backward instead of two. What
    `model.last_block` leaves out is not counted.
    """
    total, unneeded = add_up(run_flops(config, training=True)), add_up(_unneeded(config))
    return config.batch_size * (total.true + total.backward - unneeded.true - unneeded.backward)


def executed_flops(config: RunConfig, ranks: int = 1) -> float:
    """`step_flops` and what is done again for the sake of memory, on `ranks` ranks. For information: no MFU is made of it."""
    rows, unneeded = run_flops(config, training=True), add_up(_unneeded(config))
    again = 0.0
    if 0 < config.backend.chunk < config.batch_size // ranks:
        again += add_up(row for row in rows if row.tower in ("video", "audio", "text")).true - unneeded.true
    for encoder in _encoders(config):
        layers = min(config.backend.recompute_layers, encoder.shape.layers)
        blocks = add_up(encoder_flops(encoder.tower, encoder.shape, encoder.tokens)).true
        again += encoder.runs * blocks * layers / encoder.shape.layers
        if layers == encoder.shape.layers:
            again -= encoder.unneeded(config).true
    return step_flops(config) + config.batch_size * again


@dataclass(frozen=True)
class _Signal:
    """What enters a video or audio tower: patches of the full grid, how many are kept, and values in one."""

    tower: str
    patches: int
    kept: int
    features: int

    @classmethod
    def video(cls, config: RunConfig, training: bool) -> _Signal:
        return cls._of("video", math.prod(config.video_grid), 3 * math.prod(config.model.video.patch), config, training)

    @classmethod
    def audio(cls, config: RunConfig, training: bool) -> _Signal:
        return cls._of("audio", config.audio_grid, config.model.audio.patch, config, training)

    @classmethod
    def _of(cls, tower: str, patches: int, features: int, config: RunConfig, training: bool) -> _Signal:
        rate = getattr(config.drop_rate, tower) if training else 0.0
        return cls(tower, patches, kept_tokens(patches, rate, config.drop_rate.align) if rate else patches, features)

    def projection(self, width: int) -> FlopRow:
        """Patches to tokens. No gradient flows to the signal."""
        once = 2.0 * self.features * width
        return FlopRow(self.tower, "patch projection", self.kept * once, self.patches * once, backward=self.kept * once)


def encoder_flops(
    tower: str,
    shape: EncoderConfig,
    tokens: int,
    *,
    bias: bool = True,
    dropout: bool = False,
    attention_dropout: bool = False,
) -> list[FlopRow]:
    """Rows of a Transformer encoder run once on `tokens` tokens, AGG included.

    bias: its linear layers have one (T5's have none). The dropouts only enter the paper column.
    """
    layers, n, d, f = shape.layers, float(tokens), shape.width, shape.hidden
    scores = shape.heads * n * n
    # Per layer, the elements that a bias is added to (q, k, v, out, up, down), and those of the two residual sums.
    adds = (n * (5 * d + f) if bias else 0.0) + 2 * n * d
    dropped = dropout * (n * (2 * d + f) + n * d / layers) + attention_dropout * scores
    return [
        _product(tower, "attention projections", layers * 8 * n * d * d),
        replace(_product(tower, "attention scores", layers * 2 * n * n * d), paper=0.0),
        _product(tower, "attention values", layers * 2 * n * n * d),
        _product(tower, "feed-forward", layers * 4 * n * d * f),
        _paper_only(tower, "softmax", layers * SCORE_FLOPS * scores),
        _paper_only(tower, "biases and residuals", layers * adds),
        _paper_only(tower, "dropout", layers * DROPOUT_FLOPS * dropped),
    ]


@dataclass(frozen=True)
class _Encoder:
    """A stack of blocks, the tokens that enter it in training, AGG included, and how often it runs for a clip."""

    tower: str
    shape: EncoderConfig
    tokens: int
    runs: int = 1

    def unneeded(self, config: RunConfig) -> FlopRow:
        """What its last block computes for other tokens than AGG that AGG's feature does not depend on.

        Keys and values of all tokens are needed; queries, scores, output projection and feed-forward of AGG alone.
        """
        n, d, f = float(self.tokens), self.shape.width, self.shape.hidden
        signal = self.tower in ("video", "audio")
        others = (n - 1) if config.model.last_block == "agg" and signal else 0.0
        return _product(self.tower, "last block", others * (4 * d * d + 4 * n * d + 4 * d * f))


def _encoders(config: RunConfig) -> list[_Encoder]:
    """The stacks that one clip runs through in training."""
    m, words, captions = config.model, config.data.words, config.data.captions
    signals = _Signal.video(config, training=True), _Signal.audio(config, training=True)
    shared = m.kind == "agnostic"
    shapes = (m.shared, m.shared) if shared else (m.video, m.audio)
    stacks = [_Encoder(signal.tower, shape, signal.kept + 1) for signal, shape in zip(signals, shapes, strict=True)]
    if shared or m.text.tower == "t5":
        stacks.append(_Encoder("text", m.shared if shared else m.text, words + 1, captions))
    return stacks


def _unneeded(config: RunConfig) -> list[FlopRow]:
    """What the last blocks leave out of a clip's rows."""
    return [encoder.unneeded(config) for encoder in _encoders(config)]


def _specific(config: RunConfig, video: _Signal, audio: _Signal, dropout: tuple[bool, bool]) -> list[FlopRow]:
    """The three towers of the modality-specific model."""
    rows = []
    for signal, shape in ((video, config.model.video), (audio, config.model.audio)):
        rows += [signal.projection(shape.width), *_signal_encoder(signal, shape, dropout)]
    return rows + [row.times(config.data.captions) for row in _text(config, dropout)]


def _signal_encoder(signal: _Signal, shape: EncoderConfig, dropout: tuple[bool, bool]) -> list[FlopRow]:
    """Encoder of the kept tokens and AGG, after the dropout that follows the positions of all patches."""
    embedding = DROPOUT_FLOPS * dropout[0] * float(signal.patches) * shape.width
    return [
        _paper_only(signal.tower, "embedding dropout", embedding),
        *encoder_flops(signal.tower, shape, signal.kept + 1, dropout=dropout[0], attention_dropout=dropout[1]),
    ]


def _text(config: RunConfig, dropout: tuple[bool, bool]) -> list[FlopRow]:
    """One caption through the text tower of the modality-specific model."""
    text, words = config.model.text, config.data.words
    if text.tower == "linear":
        row = _product("text", "word projection", 2.0 * words * text.word_width * text.linear_width)
        return [row if text.word_table == "learned" else replace(row, backward=row.true)]
    tokens = words + 1
    # AGG enters before the projection and is learned, so its input gradient is needed even under a frozen word table.
    return [
        _product("text", "word projection", 2.0 * tokens * text.word_width * text.width),
        _paper_only("text", "embedding dropout", DROPOUT_FLOPS * dropout[0] * float(tokens) * text.width),
        *encoder_flops("text", text, tokens, bias=False, dropout=dropout[0], attention_dropout=dropout[1]),
    ]


def _agnostic(config: RunConfig, video: _Signal, audio: _Signal, dropout: tuple[bool, bool]) -> list[FlopRow]:
    """The shared encoder run once per modality, between each modality's own projections."""
    m, words, d = config.model, config.data.words, config.model.shared.width
    rows = []
    for signal in (video, audio):
        before = replace(
            _product(signal.tower, "pre-projection", 2.0 * signal.kept * d * d), paper=2.0 * signal.patches * d * d
        )
        rows += [signal.projection(d), before, *_signal_encoder(signal, m.shared, dropout)]
        rows.append(_post_projection(config, signal.tower, signal.kept + 1))
    before = _product("text", "word projection", 2.0 * words * m.text.word_width * d)
    if m.text.word_table == "frozen":
        before = replace(before, backward=before.true)
    caption = [
        before,
        _paper_only("text", "embedding dropout", DROPOUT_FLOPS * dropout[0] * float(words) * d),
        *encoder_flops("text", m.shared, words + 1, dropout=dropout[0], attention_dropout=dropout[1]),
        _post_projection(config, "text", words + 1),
    ]
    return rows + [row.times(config.data.captions) for row in caption]


def _post_projection(config: RunConfig, tower: str, tokens: int) -> FlopRow:
    """Only AGG is read, so only AGG is projected here; the released code projects every token."""
    once = 2.0 * config.model.shared.width * config.model.post_width
    return replace(_product(tower, "post-projection", once), paper=tokens * once)


def _heads(config: RunConfig) -> list[FlopRow]:
    """Common-space projections of a clip, and its rows of the similarity matrices with the global batch."""
    m, captions, clips = config.model, config.data.captions, config.batch_size
    va, vt = m.heads.video_audio, m.heads.video_text
    if m.kind == "agnostic":
        video = audio = text = m.post_width
    else:
        video, audio = m.video.width, m.audio.width
        text = m.text.linear_width if m.text.tower == "linear" else m.text.width
    return [
        _product("heads", "video", 2.0 * (video * va + va * va + va * vt)),
        _product("heads", "audio", 2.0 * audio * va),
        _product("heads", "text", 2.0 * captions * text * vt),
        _product("loss", "video-audio logits", 2.0 * clips * va),
        _product("loss", "video-text logits", 2.0 * clips * captions * vt),
    ]


def _product(tower: str, module: str, flops: float) -> FlopRow:
    """A matrix product of two operands that both need gradients: two more products of the same size in backward."""
    return FlopRow(tower, module, true=flops, paper=flops, backward=2.0 * flops)


def _paper_only(tower: str, module: str, flops: float) -> FlopRow:
    """Elementwise work that only the paper's convention counts."""
    return FlopRow(tower, module, true=0.0, paper=flops, backward=0.0)
