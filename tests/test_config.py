"""The records: what a named size fills in, what the grid of a clip is, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_type_hints

import pytest

from vatt.engine.config import (
    AudioConfig,
    BackendConfig,
    ConfigError,
    DataConfig,
    DropRateConfig,
    EncoderConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
    kept_tokens,
    patch_grid,
)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ("small", (6, 512, 8, 2048)),
        ("base", (12, 768, 12, 3072)),
        ("medium", (12, 1024, 16, 4096)),
        ("large", (24, 1024, 16, 4096)),
        ("xlarge", (24, 1536, 24, 4096)),
    ],
)
def test_a_named_size_is_the_papers_shape(size, shape):
    encoder = EncoderConfig(size=size)
    assert (encoder.layers, encoder.width, encoder.heads, encoder.hidden) == shape
    assert encoder.head_width == 64


def test_an_explicit_number_wins_over_the_named_size():
    encoder = EncoderConfig(size="large", layers=2)
    assert (encoder.layers, encoder.width) == (2, 1024)


@pytest.mark.parametrize("missing", ["layers", "width", "heads", "hidden"])
def test_a_custom_size_needs_every_number(missing):
    shape = {"layers": 1, "width": 8, "heads": 2, "hidden": 16, missing: 0}
    with pytest.raises(ConfigError, match=f"^{missing}: must be positive"):
        EncoderConfig(size="custom", **shape)


def test_the_defaults_are_the_papers_pretraining():
    run = RunConfig()
    assert (run.video_grid, run.audio_grid) == ((8, 14, 14), 1200)
    assert run.data.audio_samples == 153600
    assert run.data.seconds == pytest.approx(3.2)
    assert run.model.text.layers == 6
    assert run.with_buckets().model.video.buckets == (8, 14, 14)
    assert run.with_buckets().model.audio.buckets == 1200


def test_buckets_that_were_chosen_are_kept():
    model = ModelConfig(video=VideoConfig(buckets=(4, 0, 7)), audio=AudioConfig(buckets=600))
    filled = RunConfig(model=model).with_buckets().model
    assert (filled.video.buckets, filled.audio.buckets) == ((4, 14, 7), 600)


def test_grid_floors_or_pads_the_edge():
    assert patch_grid((9, 30, 33), (4, 16, 16), "floor") == (2, 1, 2)
    assert patch_grid((9, 30, 33), (4, 16, 16), "ceil") == (3, 2, 3)


@pytest.mark.parametrize(
    ("total", "rate", "kept"),
    [
        (1568, 0.5, 784),
        (1200, 0.5, 600),
        (1568, 0.75, 392),
        (10, 0.9, 1),
        (10, 0.99, 1),
        (7, 0.5, 3),
        (5, 0.0, 5),
        (10, 0.7, 3),
    ],
)
def test_kept_tokens_floors_but_not_below_one(total, rate, kept):
    assert kept_tokens(total, rate) == kept


@pytest.mark.parametrize(
    ("total", "rate", "align", "kept"),
    [
        (1568, 0.5, 64, 767),  # 785 tokens with AGG: 768 = 12 tiles is nearer than 832
        (1568, 0.5, 128, 767),
        (1200, 0.5, 64, 575),  # 601: 576 is nearer than 640
        (1568, 0.0, 64, 1568),  # nothing dropped, nothing to round
        (40, 0.5, 64, 20),  # no multiple fits into 40 tokens
    ],
)
def test_aligned_counts_fill_tiles_with_agg(total, rate, align, kept):
    assert kept_tokens(total, rate, align) == kept


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncoderConfig(width=100), "heads: width 100 is not a multiple of 12"),
        (lambda: RunConfig(data=DataConfig(frames=3)), r"data.frames: 3 is less than one patch of 4 \(model.video.patch\)"),
        (lambda: RunConfig(data=DataConfig(size=15)), "data.size: 15 is less than one patch of 16"),
        (lambda: RunConfig(data=DataConfig(audio_samples=100)), "data.audio_samples: 100 is less than one patch of 128"),
        (lambda: BackendConfig(gradient_accumulation_steps=2), "gradient_accumulation_steps: must be 1: .*lower batch_size"),
        (lambda: DropRateConfig(video=1.0), r"video: must be in \[0, 1\)"),
        (lambda: DropRateConfig(audio=-0.1), r"audio: must be in \[0, 1\)"),
        (lambda: ModelConfig(dropout=1.0), r"^dropout: must be in \[0, 1\)"),
        (lambda: ModelConfig(text=TextConfig(word_table="frozen")), "text.word_table_file: a frozen word table needs a file"),
        (lambda: LossConfig(temperature=0.0), "temperature: must be positive"),
        (lambda: LossConfig(video_audio_weight=0.0, video_text_weight=0.0), "both loss weights are 0"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate: must be positive"),
        (lambda: DataConfig(fps=0.0), "fps: must be positive"),
        (lambda: RunConfig(batch_size=1), "batch_size: must be at least 2: a contrastive loss needs negatives"),
        (lambda: RunConfig(seed=-1), "seed: must be in"),
        (lambda: RunConfig(steps=0), "steps: must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_padding_the_edge_saves_a_short_axis():
    run = RunConfig(data=DataConfig(frames=3), model=ModelConfig(remainder="ceil"))
    assert run.video_grid == (1, 14, 14)


def _records(record: type) -> set[type]:
    nested = {kind for kind in get_type_hints(record).values() if dataclasses.is_dataclass(kind)}
    return {record}.union(*map(_records, nested))


@pytest.mark.parametrize("record", sorted(_records(RunConfig), key=lambda r: r.__name__), ids=lambda r: r.__name__)
def test_every_record_is_frozen_and_every_field_explained(record):
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().anything = 1
    for field in dataclasses.fields(record):
        assert field.metadata["sentence"].endswith("."), field.name


def test_the_records_know_nothing_of_torch():
    code = "import sys, vatt.engine.config_file; print(sorted({'torch', 'numpy', 'av'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
