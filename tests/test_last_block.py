"""A last block that computes AGG alone: the same features and gradients, fewer products, and never more counted than made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vatt.engine.config import (
    AudioConfig,
    BackendConfig,
    ConfigError,
    DataConfig,
    DropRateConfig,
    EncoderConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.config_file import load_run
from vatt.engine.data.batch import Batch
from vatt.engine.loss import contrastive_losses
from vatt.engine.model import VATT
from vatt.engine.profile.flops import add_up, run_flops, step_flops
from vatt.engine.randomness import Draws
from vatt.engine.transformer import Attention, Block, Encoder, attend_from_one

SHAPE = {"size": "custom", "layers": 2, "width": 16, "heads": 2, "hidden": 24}
CONFIG = RunConfig(
    batch_size=3,
    data=DataConfig(frames=4, size=16, words=5, audio_samples=160, captions=2),
    drop_rate=DropRateConfig(video=0.25, audio=0.25),
    model=ModelConfig(
        video=VideoConfig(**SHAPE, patch=(2, 8, 8)),
        audio=AudioConfig(**SHAPE, patch=16),
        text=TextConfig(**SHAPE, vocabulary=40, word_width=12),
        shared=EncoderConfig(**SHAPE),
        post_width=20,
        dropout=0.1,
    ),
)


def set_to(config: RunConfig, last_block: str, kind: str = "specific", recompute_layers: int = 0) -> RunConfig:
    model = replace(config.model, last_block=last_block, kind=kind)
    return replace(config, model=model, backend=BackendConfig(recompute_layers=recompute_layers))


def clips() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        video=torch.randint(0, 256, (3, 4, 3, 16, 16), generator=generator, dtype=torch.uint8),
        audio=torch.rand(3, 160, generator=generator) * 2 - 1,
        text=torch.randint(0, 40, (3, 2, 5), generator=generator),
        has_text=torch.ones(3, dtype=torch.bool),
        has_audio=torch.ones(3, dtype=torch.bool),
        sample_id=torch.arange(3),
    )


def step_of(config: RunConfig, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features and gradients of a training step, dropout on."""
    model = VATT(config).train().to(dtype)
    batch = clips()
    batch.audio = batch.audio.to(dtype)
    space = model(batch, Draws.at(5, 3, batch.sample_id))
    contrastive_losses(space, config.loss).total.backward()
    features = {name: getattr(space, f"{name}_features").detach() for name in ("video", "audio", "text")}
    return features, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["specific", "agnostic"])
@pytest.mark.parametrize("recompute_layers", [0, 2])
def test_features_and_gradients_are_those_of_all_tokens(kind: str, recompute_layers: int) -> None:
    """In fp64, where nothing but rounding is left; hidden dropout is on, so its draws are the same too."""
    whole = step_of(set_to(CONFIG, "all", kind), torch.float64)
    ours = step_of(set_to(CONFIG, "agg", kind, recompute_layers), torch.float64)
    for expected, found in zip(whole, ours, strict=True):
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert (found[name] - tensor).norm() <= 1e-12 * max(1.0, float(tensor.norm())), name


def test_bf16_is_no_further_from_the_truth() -> None:
    truth, all_tokens, ours = (
        step_of(set_to(CONFIG, last_block), dtype)[0]
        for last_block, dtype in (("all", torch.float64), ("all", torch.bfloat16), ("agg", torch.bfloat16))
    )
    for name in ("video", "audio"):
        error = (all_tokens[name].double() - truth[name]).norm()
        assert (ours[name].double() - truth[name]).norm() <= 2 * error


def test_evaluation_gives_the_same_features() -> None:
    whole, ours = (VATT(set_to(CONFIG, last_block)).double().eval() for last_block in ("all", "agg"))
    batch = clips()
    batch.audio = batch.audio.double()
    for name in ("video_features", "audio_features", "video_text"):
        assert torch.allclose(getattr(ours(batch), name), getattr(whole(batch), name), rtol=0, atol=1e-12)


def test_other_tokens_take_no_part_in_the_last_block() -> None:
    model = VATT(set_to(CONFIG, "agg")).train()
    shapes: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if name.endswith(("feed_forward.up", "attention.out")):
            module.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: list(out.shape)}))
    batch = clips()
    model(batch, Draws.at(5, 3, batch.sample_id))
    for tower, tokens in (("video", 7), ("audio", 8)):
        for part in ("attention.out", "feed_forward.up"):
            assert shapes[f"{tower}.encoder.blocks.0.{part}"][:2] == [3, tokens]
            assert shapes[f"{tower}.encoder.blocks.1.{part}"][:2] == [3, 1]
    assert shapes["text.blocks.1.attention.out"][:2] == [6, 6]


def test_a_bias_on_the_scores_is_that_of_the_first_query() -> None:
    torch.manual_seed(0)
    attention = Attention(EncoderConfig(**SHAPE), 0, 0.0, bias=True, scale=0.3).double()
    x, bias = torch.randn(4, 7, 16, dtype=torch.float64), torch.randn(1, 2, 7, 7, dtype=torch.float64)
    assert torch.allclose(attention.of_aggregate(x, bias), attention(x, None, bias)[:, :1], rtol=0, atol=1e-12)
    assert torch.allclose(attention.of_aggregate(x), attention(x, None)[:, :1], rtol=0, atol=1e-12)


def test_one_query_is_computed_in_fp32() -> None:
    """Scores of a few hundred would differ by whole units if they were rounded to bf16 on the way."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, 1, 64).bfloat16() * 8,
        torch.randn(2, 3, 40, 64).bfloat16() * 8,
        torch.randn(2, 3, 40, 64).bfloat16(),
    )
    exact = attend_from_one(q.double(), k.double(), v.double(), None, 0.125)
    ours = attend_from_one(q, k, v, None, 0.125)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.bfloat16())


def test_one_block_is_enough() -> None:
    """The first block is then the last, and makes its own norm."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**SHAPE | {"layers": 1}), 0.0, 0.0).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert torch.allclose(encoder(x, aggregate_only=True), encoder(x)[:, :1], rtol=0, atol=1e-12)


def test_attention_dropout_needs_all_tokens() -> None:
    with pytest.raises(ConfigError, match="last_block: 'agg' cannot draw .*attention_dropout = 0"):
        ModelConfig(last_block="agg", attention_dropout=0.1)


@pytest.mark.parametrize(("size", "share"), [("bbs", 0.07), ("lbs", 0.04)])
def test_what_is_saved_is_not_counted(size: str, share: float) -> None:
    """MFU counts less; what the model needs by its definition stays as in the paper's tables."""
    config = load_run(f"pretrain/{size}").with_buckets()
    ours, whole = (replace(config, model=replace(config.model, last_block=which)) for which in ("agg", "all"))
    assert run_flops(ours, training=True) == run_flops(whole, training=True)
    total = add_up(run_flops(whole, training=True))
    assert step_flops(whole) == config.batch_size * (total.true + total.backward)
    assert 1 - step_flops(ours) / step_flops(whole) == pytest.approx(share, abs=0.01)


def test_block_is_the_only_user() -> None:
    """A block asked for AGG gives AGG, with the norm that follows and without."""
    torch.manual_seed(0)
    block = Block(EncoderConfig(**SHAPE), 0, 0.2, 0.0).double().train()
    x, draws = torch.randn(4, 7, 16, dtype=torch.float64), Draws.at(1, 2, torch.arange(4))
    everything = block(x, draws)
    assert torch.allclose(block(x, draws, aggregate_only=True), everything[:, :1], rtol=0, atol=1e-12)
    stream, normed = block(x, draws, following=block.attention_norm, aggregate_only=True)
    assert stream.shape == normed.shape == (4, 1, 16)
    assert torch.allclose(stream, everything[:, :1], rtol=0, atol=1e-12)
