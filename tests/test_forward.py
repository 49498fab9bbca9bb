"""What the forward pass returns: which pairs count, in what order rows come, and what depends on what."""

from __future__ import annotations

import pytest
import torch

from vatt.engine.config import (
    AudioConfig,
    DataConfig,
    DropRateConfig,
    EncoderConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.data.batch import Batch
from vatt.engine.loss import contrastive_losses
from vatt.engine.model import VATT, Kept
from vatt.engine.randomness import Draws

KINDS = ["specific", "agnostic"]


def build(kind: str = "specific", **drop_rate) -> tuple[VATT, Batch]:
    shape = {"size": "custom", "layers": 1, "width": 16, "heads": 2, "hidden": 24}
    model = ModelConfig(
        kind=kind,
        video=VideoConfig(**shape, patch=(2, 8, 8)),
        audio=AudioConfig(**shape, patch=16),
        text=TextConfig(**shape, vocabulary=40, word_width=12),
        shared=EncoderConfig(**shape),
        post_width=20,
    )
    data = DataConfig(frames=4, size=16, words=5, audio_samples=160, captions=3)
    config = RunConfig(model=model, data=data, drop_rate=DropRateConfig(**drop_rate))
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        video=torch.randint(0, 256, (4, 4, 3, 16, 16), generator=generator, dtype=torch.uint8),
        audio=torch.rand(4, 160, generator=generator) * 2 - 1,
        text=torch.randint(1, 40, (4, 3, 5), generator=generator),
        has_text=torch.tensor([True, True, False, True]),
        has_audio=torch.tensor([True, False, True, True]),
        sample_id=torch.arange(4),
    )
    batch.text[1, 2] = 0
    batch.text[3, 0, 3:] = 0
    return VATT(config), batch


@pytest.mark.parametrize("training", [True, False])
def test_a_caption_counts_if_its_clip_has_text_and_it_has_a_word(training: bool) -> None:
    model, batch = build()
    space = model.train(training)(batch, Draws.at(0, 0, batch.sample_id))
    assert space.text_valid.tolist() == [[True] * 3, [True, True, False], [False] * 3, [True] * 3]
    assert space.audio_valid.equal(batch.has_audio)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_order_of_rows(kind: str) -> None:
    model, batch = build(kind)
    with torch.no_grad():
        space = model.eval()(batch)
        assert space.video_audio.shape == space.audio_video.shape == (4, 512)
        assert space.video_text.shape == (4, 256) and space.text_video.shape == (12, 256)
        for clip in range(4):
            for candidate in range(3):
                alone = model.encode_text(batch.text[clip, candidate][None])
                torch.testing.assert_close(space.text_features[3 * clip + candidate], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_text(batch.text[:, 1]), space.text_features[1::3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_video(batch.video[2:3])[0], space.video_features[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_audio(batch.audio[2:3])[0], space.audio_features[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.heads.project_video(space.video_features)[1], space.video_text)
        torch.testing.assert_close(model.heads.project_audio(space.audio_features), space.audio_video)
        torch.testing.assert_close(model.heads.project_text(space.text_features), space.text_video)


@pytest.mark.parametrize("kind", KINDS)
def test_silenced_clips_and_captions_send_no_gradient(kind: str) -> None:
    """What a clip without sound or text holds in its place cannot change the step."""
    model, batch = build(kind)
    model.train()
    gradients = []
    for audio, words in ((0.0, 0), (0.5, 7)):
        batch.audio[1] = audio
        batch.text[2] = words
        model.zero_grad()
        contrastive_losses(model(batch, Draws.at(0, 0, batch.sample_id)), model.config.loss).total.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if n.startswith(("audio", "text", "heads"))})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_both_signals_drop_at_their_own_rate() -> None:
    model, batch = build(video=0.75, audio=0.2)
    kept = model.choose_kept(batch, Draws.at(0, 0, batch.sample_id))
    assert kept.video.shape == (4, 2) and kept.audio.shape == (4, 8)
    model, batch = build(video=0.0, audio=0.5)
    kept = model.choose_kept(batch, Draws.at(0, 0, batch.sample_id))
    assert kept.video is None and kept.audio.shape == (4, 5)


def test_given_indices_come_before_the_draw_and_the_order_of_tokens_does_not_matter() -> None:
    """Attention sees a set; each token carries its position."""
    model, batch = build()
    index = torch.tensor([[3, 0, 5], [1, 2, 7], [6, 4, 0], [2, 1, 0]])
    model.train()
    draws = Draws.at(0, 0, batch.sample_id)
    given = model(batch, draws, Kept(video=index)).video_features
    turned = model(batch, draws, Kept(video=index.flip(1))).video_features
    torch.testing.assert_close(given, turned, rtol=1e-4, atol=1e-5)
    assert (given - model(batch, draws).video_features).abs().max() > 1e-2
    assert (given - model(batch, draws, Kept()).video_features).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model, batch = build(kind)
    contrastive_losses(model.train()(batch, Draws.at(0, 0, batch.sample_id)), model.config.loss).total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not without
