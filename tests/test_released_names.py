"""Every parameter and buffer has one place in the released checkpoints, and comes back from it unchanged."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

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
from vatt.engine.released_names import ROOT, from_released, released_names, to_released

KINDS = ["specific", "agnostic"]


def config_of(kind: str) -> RunConfig:
    """Depths, widths and sides all different, so that no two axes can be mistaken for each other."""

    def shape(layers: int, width: int, heads: int, hidden: int) -> dict:
        return {"size": "custom", "layers": layers, "width": width, "heads": heads, "hidden": hidden}

    model = ModelConfig(
        kind=kind,
        video=VideoConfig(**shape(3, 12, 2, 20), patch=(2, 8, 4)),
        audio=AudioConfig(**shape(2, 8, 2, 14), patch=16),
        text=TextConfig(**shape(4, 16, 4, 22), vocabulary=30, word_width=10),
        shared=EncoderConfig(**shape(2, 12, 3, 18)),
        post_width=26,
        heads=HeadsConfig(video_audio=11, video_text=9),
    )
    return RunConfig(model=model, data=DataConfig(frames=4, size=16, words=6, audio_samples=64, captions=2))


def random_state(config: RunConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in VATT(config).state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str) -> None:
    config = config_of(kind)
    state = random_state(config)
    released = to_released(state, config)
    back = from_released(released, config)
    assert set(back) == set(state)
    for name, value in state.items():
        assert back[name].equal(value), name
    VATT(config).load_state_dict(back, strict=True)
    again = to_released(back, config)
    assert all(again[key].equal(value) for key, value in released.items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_named_once(kind: str) -> None:
    config = config_of(kind)
    names = released_names(config)
    ours = Counter(name.ours for name in names)
    assert set(ours) == set(VATT(config).state_dict()) and set(ours.values()) == {1}
    keys = Counter(key for name in names for key in name.released)
    assert set(keys.values()) == {1}
    assert all(key.startswith(f"{ROOT}/_") for key in keys)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_counts_the_same(kind: str) -> None:
    config = config_of(kind)
    state = random_state(config)
    assert sum(t.numel() for t in to_released(state, config).values()) == sum(t.numel() for t in state.values())


def test_layouts() -> None:
    """Dense kernels are (in, out); video patches (time, row, column, channel, out), audio ones (sample, 1, out)."""
    config = config_of("specific")
    state = random_state(config)
    released = to_released(state, config)
    base = f"{ROOT}/_base_layer"
    tower = f"{base}/vid_backbone/_base"
    kernel = released[f"{tower}/voxel_to_patch/kernel"]
    assert kernel.shape == (2, 8, 4, 3, 12)
    weight = state["video.tokens.weight"]
    for t, c, h, w in ((0, 0, 0, 0), (1, 2, 7, 3), (0, 1, 5, 2), (1, 0, 3, 1)):
        assert kernel[t, h, w, c].equal(weight[:, ((t * 3 + c) * 8 + h) * 4 + w])
    wave = released[f"{base}/aud_backbone/_base/wave_to_patch/kernel"]
    assert wave.shape == (16, 1, 8) and wave[5, 0].equal(state["audio.tokens.weight"][:, 5])
    packed, bias = state["video.encoder.blocks.1.attention.qkv.weight"], state["video.encoder.blocks.1.attention.qkv.bias"]
    for i, part in enumerate("qkv"):
        assert released[f"{tower}/tx/layers/1/mha/{part}/kernel"].equal(packed[12 * i : 12 * (i + 1)].T)
        assert released[f"{tower}/tx/layers/1/mha/{part}/bias"].equal(bias[12 * i : 12 * (i + 1)])
    assert released[f"{tower}/tx/layers/2/feed_forward/mlp/wi/kernel"].equal(
        state["video.encoder.blocks.2.feed_forward.up.weight"].T
    )
    positions = f"{tower}/pos_embedding_lookup"
    for i, axis in enumerate(("temporal", "vertical", "horizontal")):
        assert released[f"{positions}/{axis}_position_embeddings/embeddings"].equal(state[f"video.tokens.positions.tables.{i}"])
    head = f"{ROOT}/_head_layer/_bridge_heads/0"
    for ours, theirs in (
        ("video_hidden_norm", "hid_to_va/pre_bn"),
        ("video_audio_norm", "hid_to_va/bn"),
        ("video_text_norm", "va_to_vat/bn"),
    ):
        assert released[f"{head}/{theirs}/moving_mean"].equal(state[f"heads.{ours}.running_mean"])
        assert released[f"{head}/{theirs}/moving_variance"].equal(state[f"heads.{ours}.running_variance"])
        assert released[f"{head}/{theirs}/gamma"].equal(state[f"heads.{ours}.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_key_is_named(kind: str) -> None:
    config = config_of(kind)
    released = to_released(random_state(config), config)
    for key in list(released)[::17]:
        without = {k: v for k, v in released.items() if k != key}
        with pytest.raises(KeyError) as error:
            from_released(without, config)
        assert key in str(error.value)


def test_a_part_of_the_tensors_may_be_laid_out() -> None:
    """Gradients, say: a frozen word table has none."""
    config = config_of("specific")
    some = {name: t for name, t in random_state(config).items() if name.startswith("audio.")}
    released = to_released(some, config)
    assert released and all("/aud_backbone/" in key for key in released)
