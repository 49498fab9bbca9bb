"""The spread of every kind of initial weight: official Keras defaults, with the fans a convolution has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vatt.engine.config import (
    AudioConfig,
    DataConfig,
    EncoderConfig,
    HeadsConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.model import VATT
from vatt.engine.text_encoder import RMSNorm

CUT = 0.87962566103423978  # standard deviation of a standard normal cut at two


def build(kind: str = "specific", seed: int = 0) -> VATT:
    shape = {"size": "custom", "layers": 1, "width": 128, "heads": 4, "hidden": 192}
    model = ModelConfig(
        kind=kind,
        video=VideoConfig(**shape, patch=(2, 4, 8), buckets=(32, 33, 34)),
        audio=AudioConfig(**shape, patch=16, buckets=60),
        text=TextConfig(**shape, vocabulary=200, word_width=96),
        shared=EncoderConfig(**shape),
        post_width=80,
        heads=HeadsConfig(video_audio=48, video_text=40),
    )
    return VATT(RunConfig(seed=seed, model=model, data=DataConfig(frames=4, size=16, words=40, audio_samples=64)))


def assert_uniform(weight: Tensor, limit: float, name: str) -> None:
    assert weight.abs().max().item() == pytest.approx(limit, rel=0.02), name
    assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.05), name
    assert abs(weight.mean().item()) < 5 * limit / (3 * weight.numel()) ** 0.5, name


@pytest.mark.parametrize("kind", ["specific", "agnostic"])
def test_linear_layers_are_glorot_uniform_with_zero_bias(kind: str) -> None:
    for name, module in build(kind).named_modules():
        if isinstance(module, nn.Linear):
            outputs = module.out_features // (3 if name.endswith("qkv") else 1)
            assert_uniform(module.weight, (6 / (module.in_features + outputs)) ** 0.5, name)
            assert module.bias is None or module.bias.abs().max() == 0, name


def test_patch_projections_count_the_receptive_field_in_both_fans() -> None:
    model = build()
    video, audio = model.video.tokens, model.audio.tokens
    field = 2 * 4 * 8
    assert_uniform(video.weight, (6 / (field * 3 + field * 128)) ** 0.5, "video")
    assert_uniform(audio.weight, (6 / (16 + 16 * 128)) ** 0.5, "audio")
    assert video.bias.abs().max() == 0 and audio.bias.abs().max() == 0


@pytest.mark.parametrize("kind", ["specific", "agnostic"])
def test_tables_and_aggregates(kind: str) -> None:
    """Position tables: a normal of D^-0.5 cut at two of them. AGG: widened before the cut, so that D^-0.5 holds after it."""
    model = build(kind)
    tables = [p for n, p in model.named_parameters() if "positions.tables" in n]
    assert len(tables) == (4 if kind == "specific" else 5)
    for table in tables:
        assert table.std().item() == pytest.approx(CUT * 128**-0.5, rel=0.06)
        assert table.abs().max().item() <= 2 * 128**-0.5
        assert table.abs().max().item() == pytest.approx(2 * 128**-0.5, rel=0.05)
    aggregates = [p for n, p in model.named_parameters() if n.endswith("aggregate")]
    assert len(aggregates) == 3
    for aggregate in aggregates:
        assert aggregate.abs().max().item() <= 2 / CUT * len(aggregate) ** -0.5 * (1 + 1e-6)
    pooled = torch.cat([a * len(a) ** 0.5 for a in aggregates])
    assert pooled.std().item() == pytest.approx(1.0, rel=0.12)
    assert_uniform(model.text.words.weight, 0.05, "words")
    if kind == "specific":
        table = model.text.relative_bias.table
        assert 0.04 < table.abs().max().item() <= 0.05 and table.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.2)


def test_aggregate_is_widened_before_the_cut() -> None:
    """Over many seeds, so that the 12 % between the two kinds of cut show."""
    aggregates = torch.cat([build(seed=s).video.aggregate.detach() for s in range(12)]) * 128**0.5
    assert aggregates.std().item() == pytest.approx(1.0, rel=0.06)
    assert aggregates.abs().max() > 2.05


@pytest.mark.parametrize("kind", ["specific", "agnostic"])
def test_norms_start_as_the_identity(kind: str) -> None:
    for name, module in build(kind).named_modules():
        if isinstance(module, (nn.LayerNorm, RMSNorm)) or name.endswith(("hidden_norm", "audio_norm", "text_norm")):
            assert (module.weight == 1).all(), name
            assert getattr(module, "bias", None) is None or (module.bias == 0).all(), name
    heads = build(kind).heads
    assert (heads.video_text_norm.running_mean == 0).all() and (heads.video_text_norm.running_variance == 1).all()


@pytest.mark.parametrize("kind", ["specific", "agnostic"])
def test_no_two_tensors_share_their_draw(kind: str) -> None:
    drawn = {n: p.flatten()[:4] for n, p in build(kind).named_parameters() if p.std() > 0}
    first = {tuple(v.tolist()) for v in drawn.values()}
    assert len(first) == len(drawn)
