"""The whole of a run as one tree of typed, frozen records.

Every field carries one sentence; `vatt config reference` prints them all, so the records are the only documentation of
the settings. The records know nothing of torch: they can be built, checked and printed in milliseconds. Reading them
from TOML and from the command line is in `config_file`.

Relations between fields are checked in `__post_init__`, which raises `ConfigError` naming the key and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vatt.engine.config_backend import BackendConfig
from vatt.engine.config_record import ConfigError as ConfigError
from vatt.engine.config_record import option, require, section

# (layers, width, heads, hidden): paper Table 7 and the released code; XLarge exists in the released code only.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "small": (6, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "medium": (12, 1024, 16, 4096),
    "large": (24, 1024, 16, 4096),
    "xlarge": (24, 1536, 24, 4096),
}
SizeName = Literal["small", "base", "medium", "large", "xlarge", "custom"]


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of one Transformer encoder. A named `size` fills in whatever is left at 0."""

    size: SizeName = option("base", "Named shape; fills in layers, width, heads and hidden where they are 0.")
    layers: int = option(0, "Number of blocks.")
    width: int = option(0, "Features of a token (the paper's d).")
    heads: int = option(0, "Attention heads; width must be a multiple of it.")
    hidden: int = option(0, "Features between the two projections of the feed-forward network.")

    def __post_init__(self) -> None:
        if self.size != "custom":
            for name, value in zip(("layers", "width", "heads", "hidden"), SIZES[self.size], strict=True):
                if getattr(self, name) == 0:
                    object.__setattr__(self, name, value)
        for name in ("layers", "width", "heads", "hidden"):
            require(getattr(self, name) > 0, name, f"must be positive (size = {self.size!r} leaves it to you)")
        require(self.width % self.heads == 0, "heads", f"width {self.width} is not a multiple of {self.heads} heads")

    @property
    def head_width(self) -> int:
        """Features of one head (the paper's d_kv)."""
        return self.width // self.heads


@dataclass(frozen=True)
class VideoConfig(EncoderConfig):
    """The video tower: tubelets in, one AGG feature out."""

    patch: tuple[int, int, int] = option((4, 16, 16), "Tubelet: frames, rows, columns.")
    buckets: tuple[int, int, int] = option(
        (0, 0, 0), "Learned positions per axis: time, rows, columns; 0 = as many as the training grid has."
    )
    initial_gain: float = option(1.0, "Multiplies the patch projection's initial weights; released: 1.")


@dataclass(frozen=True)
class AudioConfig(EncoderConfig):
    """The audio tower: waveform patches in, one AGG feature out."""

    patch: int = option(128, "Samples in a waveform patch.")
    buckets: int = option(0, "Learned positions; 0 = as many as the training grid has.")
    initial_gain: float = option(1.0, "Multiplies the patch projection's initial weights; released: 1.")


@dataclass(frozen=True)
class TextConfig(EncoderConfig):
    """The text tower: word ids in, one AGG feature out."""

    size: SizeName = option("small", "Named shape; fills in layers, width, heads and hidden where they are 0.")
    tower: Literal["t5", "linear"] = option("t5", "T5-style encoder, or linear + ReLU + max over words (MMV's).")
    vocabulary: int = option(65536, "Rows of the word table; id 0 is padding, id 1 an unknown word.")
    word_width: int = option(300, "Features of a word in the table, before the projection to the tower's width.")
    word_table: Literal["learned", "frozen"] = option("learned", "Train the word table, or keep it as loaded.")
    word_table_file: str = option("", "NumPy .npy file of shape (vocabulary, word_width) to start from; needed if frozen.")
    relative_buckets: int = option(32, "Buckets of the relative position bias (T5).")
    relative_distance: int = option(64, "Offset from which all distances share the last bucket (T5).")
    linear_width: int = option(2048, "Output features of the linear tower.")


@dataclass(frozen=True)
class HeadsConfig:
    """The common-space projections ("fac" heads of the released code)."""

    video_audio: int = option(512, "Features of the video-audio space.")
    video_text: int = option(256, "Features of the video-text space.")


@dataclass(frozen=True)
class ModelConfig:
    """The networks."""

    kind: Literal["specific", "agnostic"] = option("specific", "One encoder per modality, or one shared by all three.")
    video: VideoConfig = section(VideoConfig, "Video tower (agnostic: only patch and buckets are used).")
    audio: AudioConfig = section(AudioConfig, "Audio tower (agnostic: only patch and buckets are used).")
    text: TextConfig = section(TextConfig, "Text tower (agnostic: only the word table is used).")
    shared: EncoderConfig = section(EncoderConfig, "The shared encoder of the modality-agnostic model.")
    post_width: int = option(1024, "Output features of the modality-agnostic model's post-projections.")
    heads: HeadsConfig = section(HeadsConfig, "Common-space heads.")
    dropout: float = option(0.0, "Hidden dropout: position add, attention output, hidden, feed-forward output, final norm.")
    attention_dropout: float = option(0.0, "Dropout on the attention weights.")
    remainder: Literal["floor", "ceil"] = option("floor", "At the edge of a frame or wave: drop a partial patch, or pad it.")
    last_block: Literal["all", "agg"] = option(
        "all",
        "The last block of a video or audio tower updates all tokens, or only AGG, the one that is read: the same features.",
    )

    def __post_init__(self) -> None:
        for name in ("dropout", "attention_dropout"):
            require(0.0 <= getattr(self, name) < 1.0, name, "must be in [0, 1)")
        require(
            self.last_block == "all" or self.attention_dropout == 0.0,
            "last_block",
            "'agg' cannot draw the same dropout on attention weights as 'all'; use 'all', or attention_dropout = 0",
        )
        if self.text.word_table == "frozen":
            require(bool(self.text.word_table_file), "text.word_table_file", "a frozen word table needs a file to load")


@dataclass(frozen=True)
class DropRateConfig:
    """DropToken: the fraction of tokens dropped before projection, in training only."""

    video: float = option(0.5, "Fraction of video tokens dropped.")
    audio: float = option(0.5, "Fraction of audio tokens dropped.")
    align: int = option(1, "Round AGG + kept to a multiple of this many tokens (64 or 128 fill attention tiles).")
    choice: Literal["per_sample", "shared"] = option(
        "per_sample", "Kept tokens: drawn for each sample and sorted, or one unsorted draw for the whole batch (released)."
    )

    def __post_init__(self) -> None:
        for name in ("video", "audio"):
            require(0.0 <= getattr(self, name) < 1.0, name, "must be in [0, 1): the fraction that is dropped")
        require(self.align >= 1, "align", "must be at least 1")


@dataclass(frozen=True)
class DataConfig:
    """Clips on disk, and how much of each is seen."""

    train: str = option("", "Catalogue (JSON lines) to train on.")
    test: str = option("", "Catalogue to evaluate on at the end; empty = no evaluation.")
    frames: int = option(32, "Frames of a clip.")
    fps: float = option(10.0, "Frames per second.")
    size: int = option(224, "Rows and columns of a frame after cropping.")
    audio_rate: int = option(48000, "Audio samples per second.")
    audio_samples: int = option(0, "Audio samples of a clip; 0 = frames / fps seconds.")
    captions: int = option(5, "Caption candidates per clip.")
    words: int = option(16, "Words of a caption, cut or padded.")
    decoder: Literal["auto", "pyav", "dali"] = option("auto", "What reads the files; auto is pyav, dali is not there yet.")
    workers: int = option(2, "Decoding processes per rank; 0 = decode in the training process.")
    prefetch: int = option(2, "Batches prepared ahead.")
    cache: Literal["none", "memory"] = option("none", "Keep decoded clips in memory; each file is decoded once.")
    cache_bytes: int = option(4 << 30, "Limit of the cache, over all workers of a rank.")
    on_bad_clip: Literal["substitute", "error"] = option(
        "substitute", "An unreadable clip is replaced and counted, or ends the run."
    )
    on_short_clip: Literal["loop", "error"] = option(
        "loop", "A clip shorter than the window is looped and counted, or ends the run."
    )
    on_missing_audio: Literal["mask", "error"] = option(
        "mask", "Silence that is left out of the loss, and counted; or end the run."
    )

    def __post_init__(self) -> None:
        for name in ("frames", "size", "audio_rate", "captions", "words", "prefetch"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        require(self.fps > 0, "fps", "must be positive")
        require(self.workers >= 0, "workers", "must not be negative")
        if self.audio_samples == 0:
            object.__setattr__(self, "audio_samples", round(self.frames / self.fps * self.audio_rate))

    @property
    def seconds(self) -> float:
        """Length of a clip's window."""
        return self.frames / self.fps


@dataclass(frozen=True)
class AugmentConfig:
    """What training does to a clip; evaluation takes the centre crop and nothing else."""

    crop: Literal["inception", "scale_jitter", "centre"] = option(
        "inception", "Random box (paper), scale jitter + random crop (released pre-training), or centre crop."
    )
    area: tuple[float, float] = option((0.08, 1.0), "Inception box: area as a fraction of the frame.")
    aspect: tuple[float, float] = option((0.5, 2.0), "Inception box: width over height.")
    scale_jitter_probability: float = option(0.8, "Scale jitter: probability.")
    scale_jitter: tuple[float, float] = option((0.8, 1.2), "Scale jitter: height and width factors, drawn independently.")
    flip: float = option(0.5, "Probability of a horizontal flip.")
    jitter_probability: float = option(1.0, "Colour jitter: probability.")
    brightness: float = option(32 / 255, "Colour jitter: largest shift, of a full range of 1.")
    saturation: float = option(0.4, "Colour jitter: how far from 1 the factor may be.")
    contrast: float = option(0.4, "Colour jitter: how far from 1 the factor may be.")
    hue: float = option(0.2, "Colour jitter: largest shift, in turns.")
    audio_noise: float = option(0.0, "Gaussian noise: standard deviation as a fraction of the clip's peak.")

    def __post_init__(self) -> None:
        for name in ("scale_jitter_probability", "flip", "jitter_probability"):
            require(0.0 <= getattr(self, name) <= 1.0, name, "a probability must be in [0, 1]")
        for name in ("area", "aspect", "scale_jitter"):
            low, high = getattr(self, name)
            require(0.0 < low <= high, name, "must be a positive range, low then high")


@dataclass(frozen=True)
class LossConfig:
    """NCE (video-audio) + MIL-NCE (video-text)."""

    form: Literal["row_column", "symmetric", "all_pairs"] = option(
        "row_column",
        "Negatives: row + column with the positive twice (released default), two sums (released), "
        "or all pairs (paper eq. 4-5).",
    )
    temperature: float = option(0.07, "Divides the cosine similarities.")
    video_audio_weight: float = option(1.0, "Weight of the video-audio loss in the weighted mean.")
    video_text_weight: float = option(1.0, "Weight of the video-text loss in the weighted mean.")
    mean: Literal["global", "per_replica"] = option(
        "global", "Mean over the valid clips of the global batch, or of each rank, averaged."
    )
    replicas: int = option(0, "per_replica: how many replicas the batch is divided into; 0 = one per rank.")

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", "must be positive")
        require(self.video_audio_weight + self.video_text_weight > 0, "video_audio_weight", "both loss weights are 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its learning rate."""

    learning_rate: float = option(1e-4, "Learning rate at the end of the warm-up.")
    final_learning_rate: float = option(5e-5, "Learning rate at the last step.")
    warmup: int = option(10000, "Steps of linear warm-up from 0.")
    schedule: Literal["quarter_cosine", "half_cosine", "constant"] = option("quarter_cosine", "Decay after the warm-up.")
    beta1: float = option(0.9, "Adam: decay of the first moment.")
    beta2: float = option(0.999, "Adam: decay of the second moment.")
    epsilon: float = option(1e-8, "Adam: epsilon.")
    epsilon_form: Literal["pytorch", "tensorflow"] = option(
        "pytorch", "Where epsilon is added: to the bias-corrected root (pytorch) or the uncorrected one (tensorflow)."
    )
    kernel: Literal["torch", "apex", "deepspeed"] = option("torch", "Whose fused Adam; torch's own needs nothing installed.")

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", "must be positive")
        require(self.warmup >= 0, "warmup", "must not be negative")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = option(10000, "Steps between checkpoints; the last step is always saved.")
    keep: int = option(2, "Newest checkpoints kept.")

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", "must be at least 1")
        require(self.keep >= 1, "keep", "must be at least 1")


@dataclass(frozen=True)
class LogConfig:
    """What a run tells while it runs."""

    every: int = option(10, "Steps between lines of metrics.jsonl.")
    tensorboard: bool = option(True, "Write TensorBoard events into the run directory.")
    wandb: str = option("", "Weights & Biases project; empty = off.")
    peak_tflops: float = option(0.0, "Nominal bf16 TFLOP/s of the device, for MFU; 0 = by the device's name, or unknown.")

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", "must be at least 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Zero-shot retrieval at the end of a run."""

    windows: int = option(4, "Uniform windows per clip, whose embeddings are averaged; 1 = the centre.")
    batch_size: int = option(16, "Windows embedded at a time.")
    strips: int = option(8, "Queries shown with frames in the report.")


@dataclass(frozen=True)
class RunConfig:
    """One run, whole."""

    output: str = option("runs/vatt", "Run directory.")
    seed: int = option(0, "Seed of everything random.")
    steps: int = option(500000, "Training steps.")
    stop_after: int = option(0, "Save and stop cleanly after this step, resumable; 0 = run to the end.")
    batch_size: int = option(2048, "Clips per step over all ranks.")
    data: DataConfig = section(DataConfig, "Clips.")
    augment: AugmentConfig = section(AugmentConfig, "Augmentation.")
    drop_rate: DropRateConfig = section(DropRateConfig, "DropToken.")
    model: ModelConfig = section(ModelConfig, "Networks.")
    loss: LossConfig = section(LossConfig, "Loss.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "Optimizer and schedule.")
    backend: BackendConfig = section(BackendConfig, "Backend.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "Checkpoints.")
    log: LogConfig = section(LogConfig, "Logging.")
    evaluate: EvaluateConfig = section(EvaluateConfig, "Evaluation.")

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "must be at least 1")
        require(self.batch_size >= 2, "batch_size", "must be at least 2: a contrastive loss needs negatives")
        require(0 <= self.seed < 2**63, "seed", "must be in [0, 2^63)")
        self._check_grid()

    def _check_grid(self) -> None:
        """An axis with no whole patch is an error here, before anything is decoded."""
        clip = (self.data.frames, self.data.size, self.data.size)
        grid = patch_grid(clip, self.model.video.patch, self.model.remainder)
        for axis, count, extent, patch in zip(("frames", "size", "size"), grid, clip, self.model.video.patch, strict=True):
            problem = f"{extent} is less than one patch of {patch} (model.video.patch): no token on this axis"
            require(count > 0, f"data.{axis}", problem)
        waves = patch_grid((self.data.audio_samples,), (self.model.audio.patch,), self.model.remainder)
        require(
            waves[0] > 0,
            "data.audio_samples",
            f"{self.data.audio_samples} is less than one patch of {self.model.audio.patch} (model.audio.patch): no audio token",
        )

    @property
    def video_grid(self) -> tuple[int, int, int]:
        """Tokens of the training clip on each axis: time, rows, columns."""
        clip = (self.data.frames, self.data.size, self.data.size)
        t, h, w = patch_grid(clip, self.model.video.patch, self.model.remainder)
        return t, h, w

    @property
    def audio_grid(self) -> int:
        """Tokens of the training waveform."""
        return patch_grid((self.data.audio_samples,), (self.model.audio.patch,), self.model.remainder)[0]

    def with_buckets(self) -> RunConfig:
        """The same run with every 0 among the position buckets replaced by the training grid's count."""
        t, h, w = (bucket or count for bucket, count in zip(self.model.video.buckets, self.video_grid, strict=True))
        video = replace(self.model.video, buckets=(t, h, w))
        audio = replace(self.model.audio, buckets=self.model.audio.buckets or self.audio_grid)
        return replace(self, model=replace(self.model, video=video, audio=audio))


def patch_grid(extent: tuple[int, ...], patch: tuple[int, ...], remainder: str) -> tuple[int, ...]:
    """Patches on each axis. `floor` drops a partial patch at the edge (released code), `ceil` pads it (paper, section 3.1)."""
    if remainder == "ceil":
        return tuple(-(-e // p) for e, p in zip(extent, patch, strict=True))
    return tuple(e // p for e, p in zip(extent, patch, strict=True))


def kept_tokens(total: int, drop_rate: float, align: int = 1) -> int:
    """Tokens DropToken keeps of `total`: max(1, floor(total (1 - rate) + 1e-6)).

    With `align` > 1, the count nearest to that for which AGG + kept is a multiple of `align`, never more than `total`;
    a count that no multiple fits is left as it is.
    """
    kept = max(1, int(total * (1.0 - drop_rate) + 1e-6))
    if align == 1 or drop_rate == 0.0:
        return kept
    below = (kept + 1) // align * align - 1
    candidates = [c for c in (below, below + align) if 1 <= c <= total]
    return min(candidates, key=lambda c: abs(c - kept), default=kept)
