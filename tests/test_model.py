"""The model's sizes, its switches, and what it promises beyond the golden arrays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vatt.engine.config import (
    AudioConfig,
    ConfigError,
    DataConfig,
    DropRateConfig,
    EncoderConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.data.batch import Batch
from vatt.engine.model import VATT
from vatt.engine.randomness import Draws


def count(module: torch.nn.Module, *, buffers: bool = False) -> int:
    tensors = [*module.parameters(), *(module.buffers() if buffers else ())]
    return sum(t.numel() for t in tensors)


def build(**model) -> VATT:
    """A full-size model without its memory or its initial values: only shapes are looked at."""
    with torch.device("meta"):
        return VATT(RunConfig(model=ModelConfig(**model)))


def random_batch(config: RunConfig, clips: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    d = config.data
    return Batch(
        video=torch.randint(0, 256, (clips, d.frames, 3, d.size, d.size), generator=generator, dtype=torch.uint8),
        audio=torch.rand(clips, d.audio_samples, generator=generator) * 2 - 1,
        text=torch.randint(1, config.model.text.vocabulary, (clips, d.captions, d.words), generator=generator),
        has_text=torch.ones(clips, dtype=torch.bool),
        has_audio=torch.ones(clips, dtype=torch.bool),
        sample_id=torch.arange(10, 10 + clips),
    )


def tiny(**changes) -> RunConfig:
    shape = {"size": "custom", "layers": 2, "width": 32, "heads": 2, "hidden": 64}
    model = ModelConfig(
        video=VideoConfig(**shape, patch=(2, 8, 8)),
        audio=AudioConfig(**shape, patch=16),
        text=TextConfig(**shape, vocabulary=50, word_width=20),
        shared=EncoderConfig(**shape),
        post_width=32,
        **changes,
    )
    return RunConfig(model=model, data=DataConfig(frames=4, size=32, words=6, audio_samples=320, captions=2))


# official-vatt section 2: parameter counts measured on the released modules.
def test_parameter_counts_of_the_released_sizes() -> None:
    bbs = build()
    assert count(bbs.video) == 87_446_016
    assert count(bbs.video.encoder) == 85_056_000
    assert count(bbs.audio) == 86_078_976
    assert count(bbs.text) == 38_699_052
    assert count(bbs.text) - count(bbs.text.words) == 19_038_252
    assert count(bbs.text.blocks) + count(bbs.text.norm) + count(bbs.text.relative_bias) == 18_884_352
    assert count(bbs.heads, buffers=True) == 1_316_608


def test_parameter_counts_medium_and_large() -> None:
    mbs = build(video=VideoConfig(size="medium"))
    assert count(mbs.video) == 154_343_424 and count(mbs.video.encoder) == 151_156_736
    assert count(mbs.heads, buffers=True) == 1_447_680
    lbs = build(video=VideoConfig(size="large"))
    assert count(lbs.video) == 305_498_112 and count(lbs.video.encoder) == 302_311_424
    assert count(build(audio=AudioConfig(size="medium")).audio) == 152_520_704


def test_parameter_counts_modality_agnostic(tmp_path) -> None:
    learned = build(kind="agnostic", shared=EncoderConfig(size="medium"))
    assert count(learned) - count(learned.heads) == 180_943_872
    assert count(learned.encoder) == 151_156_736
    assert count(learned.heads, buffers=True) == 1_709_824
    without_words = sum(p.numel() for n, p in learned.named_parameters() if not n.startswith(("heads", "text.words")))
    assert without_words == 161_283_072


def test_a_frozen_word_table_is_loaded_and_not_trained(tmp_path) -> None:
    import numpy as np

    table = np.arange(50 * 20, dtype=np.float32).reshape(50, 20)
    np.save(tmp_path / "words.npy", table)
    config = tiny()
    text = replace(config.model.text, word_table="frozen", word_table_file=str(tmp_path / "words.npy"))
    model = VATT(replace(config, model=replace(config.model, text=text)))
    assert not model.text.words.weight.requires_grad
    torch.testing.assert_close(model.text.words.weight.detach(), torch.from_numpy(table))
    with pytest.raises(ConfigError, match=r"word_table_file.*shape \(50, 20\).*\(60, 20\)"):
        VATT(replace(config, model=replace(config.model, text=replace(text, vocabulary=60))))
    with pytest.raises(ConfigError, match="word_table_file.*does not exist"):
        VATT(replace(config, model=replace(config.model, text=replace(text, word_table_file=str(tmp_path / "no.npy")))))


def test_initial_scales_are_the_released_ones() -> None:
    """official-vatt section 3: projections start at 0.05 (video) and 0.03 (audio) beside positions of 1."""
    model = VATT(
        replace(
            RunConfig(), model=ModelConfig(video=VideoConfig(layers=1), audio=AudioConfig(layers=1), text=TextConfig(layers=1))
        )
    )
    noise = torch.rand(1, 32, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        position = model.video.tokens.positions((8, 14, 14))
        assert position.std().item() == pytest.approx(1.0, abs=0.02)
        assert (model.video.tokens(noise) - position).std().item() == pytest.approx(0.05, rel=0.2)
        wave = torch.rand(1, 153600) * 2 - 1
        assert (model.audio.tokens(wave) - model.audio.tokens.positions((1200,))).std().item() == pytest.approx(0.03, rel=0.25)
    assert model.video.aggregate.std().item() == pytest.approx(768**-0.5, rel=0.1)
    block = model.video.encoder.blocks[0]
    limit = (6 / (768 + 768)) ** 0.5  # separate q, k, v: the packed matrix must not count 3 x 768 outputs
    assert block.attention.qkv.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
    assert block.attention.qkv.bias.abs().max() == 0
    assert model.text.words.weight.abs().max().item() == pytest.approx(0.05, rel=0.01)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = tiny()
    torch.manual_seed(1)
    one = VATT(config).state_dict()
    torch.manual_seed(2)
    two, other = VATT(config).state_dict(), VATT(replace(config, seed=1)).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["video.tokens.weight"], other["video.tokens.weight"])


@pytest.mark.parametrize("kind", ["specific", "agnostic"])
def test_drop_token_only_in_training(kind: str) -> None:
    config = tiny(kind=kind)
    model, batch = VATT(config), random_batch(config)
    lengths = []
    encoder = model.encoder if kind == "agnostic" else model.video.encoder
    encoder.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.train()(batch, Draws.at(0, 0, batch.sample_id))
    assert lengths[0] == 1 + 16  # half of the 2 x 4 x 4 tubelets, and AGG
    lengths.clear()
    model.eval()
    first, second = model(batch), model(batch, Draws.at(0, 5, batch.sample_id))
    assert lengths[0] == 1 + 32
    torch.testing.assert_close(first.video_audio, second.video_audio, rtol=0, atol=0)


def test_training_without_draws_is_refused() -> None:
    config = tiny()
    model, batch = VATT(config).train(), random_batch(config)
    with pytest.raises(ConfigError, match="drop_rate: training needs draws"):
        model(batch)
    no_drop = VATT(replace(tiny(dropout=0.1), drop_rate=DropRateConfig(video=0.0, audio=0.0))).train()
    with pytest.raises(ValueError, match="dropout in training needs draws"):
        no_drop(batch)


def test_a_samples_features_do_not_depend_on_its_neighbours_or_its_place() -> None:
    """Kept tokens and masks follow the sample's id, so a batch cut or reordered gives the same features per sample."""
    config = tiny(dropout=0.1, attention_dropout=0.1)
    model, batch = VATT(config).train(), random_batch(config, clips=4)
    whole = model(batch, Draws.at(3, 7, batch.sample_id))
    order = torch.tensor([2, 0])
    part = Batch(**{name: getattr(batch, name)[order] for name in vars(batch)})
    some = model(part, Draws.at(3, 7, part.sample_id))
    torch.testing.assert_close(some.video_features, whole.video_features[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.audio_features, whole.audio_features[order], rtol=1e-5, atol=1e-6)
    text = whole.text_features.unflatten(0, (4, 2))[order].flatten(0, 1)
    torch.testing.assert_close(some.text_features, text, rtol=1e-5, atol=1e-6)


def test_only_what_is_kept_is_read() -> None:
    """NaN in every dropped patch must not reach the features."""
    config = tiny()
    model, batch = VATT(config).train(), random_batch(config, clips=2)
    draws = Draws.at(0, 0, batch.sample_id)
    kept = model.choose_kept(batch, draws)
    video = batch.video.float() / 127.5 - 1
    audio = batch.audio.clone()
    for i in range(2):
        for token in set(range(32)) - set(kept.video[i].tolist()):
            t, h, w = token // 16, token // 4 % 4, token % 4
            video[i, 2 * t : 2 * t + 2, :, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] = torch.nan
        for token in set(range(20)) - set(kept.audio[i].tolist()):
            audio[i, 16 * token : 16 * token + 16] = torch.nan
    expected = model(batch, draws)
    batch.video, batch.audio = video, audio
    space = model(batch, draws)
    torch.testing.assert_close(space.video_features, expected.video_features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(space.audio_features, expected.audio_features, rtol=1e-4, atol=1e-5)


def test_uint8_and_float_frames_agree() -> None:
    config = tiny()
    model, batch = VATT(config).eval(), random_batch(config)
    expected = model(batch).video_features
    batch.video = batch.video.double().div(127.5).sub(1).float()
    torch.testing.assert_close(model(batch).video_features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("remainder", "tokens"), [("floor", 1 * 3 * 3), ("ceil", 2 * 4 * 4)])
def test_remainders_at_the_edge(remainder: str, tokens: int) -> None:
    config = replace(tiny(remainder=remainder), data=replace(tiny().data, frames=3, size=30, audio_samples=330))
    model, batch = VATT(config).eval(), random_batch(config)
    assert model.video.tokens(batch.video).shape[1] == tokens
    assert model.audio.tokens(batch.audio).shape[1] == (20 if remainder == "floor" else 21)


def test_an_axis_without_a_patch_is_an_error() -> None:
    model = VATT(tiny()).eval()
    with pytest.raises(ConfigError, match=r"video of size \(4, 7, 32\) has no whole patch of \(2, 8, 8\)"):
        model.encode_video(torch.zeros(1, 4, 3, 7, 32))
    with pytest.raises(ConfigError, match=r"data\.frames: 1 is less than one patch of 2"):
        replace(tiny(), data=replace(tiny().data, frames=1))
    with pytest.raises(ConfigError, match=r"data\.audio_samples: 15 is less than one patch of 16"):
        replace(tiny(), data=replace(tiny().data, audio_samples=15))


def test_linear_text_tower() -> None:
    config = tiny()
    text = replace(config.model.text, tower="linear", linear_width=24)
    model = VATT(replace(config, model=replace(config.model, text=text))).eval()
    ids = torch.tensor([[3, 4, 0, 0], [4, 3, 3, 0], [0, 0, 0, 0]])
    features = model.encode_text(ids)
    assert features.shape == (3, 24)
    torch.testing.assert_close(features[0], features[1])  # a set of words: order and repetition do not matter
    assert features[2].abs().max() == 0
    words = model.text.words.weight[torch.tensor([3, 4])]
    torch.testing.assert_close(
        features[0], torch.relu(words @ model.text.projection.weight.T + model.text.projection.bias).amax(0)
    )
