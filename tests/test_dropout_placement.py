"""Where dropout acts: six sites in every tower, each at its rate, drawn apart from all others, replayed in backward.

The towers are written out here a second time, in fp64 and from the paper's and the released code's description, with
the mask of each site drawn from the stream the site is documented to use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.engine import norm as norms
from vatt.engine import randomness, transformer
from vatt.engine import tokens as patches
from vatt.engine.config import (
    AudioConfig,
    DataConfig,
    DropRateConfig,
    EncoderConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.data.batch import Batch
from vatt.engine.loss import contrastive_losses
from vatt.engine.model import VATT
from vatt.engine.randomness import SITES, Draws, Dropout, Modality
from vatt.kernels.counter import Stream
from vatt.kernels.dropout import DropoutMask, keep_mask

LAYERS, CLIPS, CANDIDATES, RATE = 2, 8, 2, 0.1
KINDS = ["specific", "agnostic"]
WHERE = {"embedding": 0, "final": 1, "attention_weights": 2, "attention_output": 3, "hidden": 4, "output": 5}


def config_of(kind: str = "specific", dropout: float = RATE, attention_dropout: float = RATE, **data) -> RunConfig:
    shape = {"size": "custom", "layers": LAYERS, "width": 32, "heads": 4, "hidden": 48}
    model = ModelConfig(
        kind=kind,
        video=VideoConfig(**shape, patch=(2, 8, 8)),
        audio=AudioConfig(**shape, patch=16),
        text=TextConfig(**shape, vocabulary=50, word_width=20),
        shared=EncoderConfig(**shape),
        post_width=24,
        heads=HeadsConfig(video_audio=16, video_text=12),
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    fields = {"frames": 4, "size": 32, "words": 9, "audio_samples": 512, "captions": CANDIDATES} | data
    return RunConfig(model=model, data=DataConfig(**fields), drop_rate=DropRateConfig(video=0.5, audio=0.5))


def batch_of(config: RunConfig, clips: int = CLIPS) -> Batch:
    generator = torch.Generator().manual_seed(1)
    d = config.data
    text = torch.randint(1, 50, (clips, d.captions, d.words), generator=generator)
    text[0, 0, 4:] = 0
    return Batch(
        video=torch.rand(clips, d.frames, 3, d.size, d.size, generator=generator, dtype=torch.float64) * 2 - 1,
        audio=torch.rand(clips, d.audio_samples, generator=generator, dtype=torch.float64) * 2 - 1,
        text=text,
        has_text=torch.ones(clips, dtype=torch.bool),
        has_audio=torch.ones(clips, dtype=torch.bool),
        sample_id=torch.arange(clips) * 7 + 100,
    )


def model_of(config: RunConfig) -> VATT:
    """In fp64, with biases, gains and positions that are not their initial 0 and 1."""
    model = VATT(config).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return model


@dataclass
class Applied:
    """One call of dropout."""

    stream: int
    rate: float
    x: Tensor
    y: Tensor


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[Applied]:
    """Every dropout of any site, in order, alone or in passing.

    Of a kernel that drops in passing the result shows what it dropped: where the stream gained exactly nothing from a
    branch, and where a GELU came out as exactly 0. Attention shows its weights to values that are the unit vectors.
    """
    calls: list[Applied] = []
    alone, joining, activating = randomness.dropout, norms.add_layer_norm, transformer.bias_gelu
    projecting, embedding = patches.patch_project, patches.dropped
    attending = transformer.attention

    def watch_alone(x: Tensor, rate: float, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int) -> Tensor:
        y = alone(x, rate, seed, step, sample_id, stream)
        calls.append(Applied(int(stream), rate, x.detach(), y.detach()))
        return y

    def watch_joining(
        branch: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        mask: DropoutMask | None,
        *rest,
    ) -> tuple[Tensor, Tensor]:
        total, normed = joining(branch, residual, weight, bias, eps, mask, *rest)
        if mask is not None:
            calls.append(Applied(int(mask.stream), mask.rate, branch.detach(), (total - residual).detach()))
        return total, normed

    def watch_activating(x: Tensor, bias: Tensor | None, mask: DropoutMask | None) -> Tensor:
        y = activating(x, bias, mask)
        if mask is not None:
            calls.append(Applied(int(mask.stream), mask.rate, F.gelu(x if bias is None else x + bias).detach(), y.detach()))
        return y

    def watch_attending(qkv: Tensor, bias: Tensor | None, scale: float, mask: DropoutMask | None) -> Tensor:
        if mask is not None:
            before, after = (weights_of(qkv.detach(), bias, scale, drawn) for drawn in (None, mask))
            calls.append(Applied(int(mask.stream), mask.rate, before, after))
        return attending(qkv, bias, scale, mask)

    def weights_of(qkv: Tensor, bias: Tensor | None, scale: float, mask: DropoutMask | None) -> Tensor:
        B, N, _, H, D = qkv.shape
        columns = []
        for unit in torch.eye(N, -(-N // D) * D, dtype=qkv.dtype).split(D, dim=1):
            values = unit[None, :, None, :].expand(B, N, H, D)
            shown = attending(torch.stack((qkv[:, :, 0], qkv[:, :, 1], values), dim=2), bias, scale, mask)
            columns.append(shown.unflatten(-1, (H, D)).transpose(1, 2))
        return torch.cat(columns, dim=-1)[..., :N].detach()

    def watch_projecting(signal: Tensor, *arguments) -> Tensor:
        tokens, mask = projecting(signal, *arguments), arguments[-1]
        if isinstance(mask, DropoutMask):
            whole = projecting(signal, *arguments[:-1])
            assert tokens[:, 0].equal(whole[:, 0]), "AGG is never dropped"
            calls.append(Applied(int(mask.stream), mask.rate, whole[:, 1:].detach(), tokens[:, 1:].detach()))
        return tokens

    def watch_embedding(x: Tensor, mask: DropoutMask | None) -> Tensor:
        y = embedding(x, mask)
        if mask is not None:
            calls.append(Applied(int(mask.stream), mask.rate, x.detach(), y.detach()))
        return y

    monkeypatch.setattr(patches, "patch_project", watch_projecting)
    monkeypatch.setattr(patches, "dropped", watch_embedding)
    monkeypatch.setattr(transformer, "attention", watch_attending)
    monkeypatch.setattr(randomness, "dropout", watch_alone)
    monkeypatch.setattr(norms, "add_layer_norm", watch_joining)
    monkeypatch.setattr(transformer, "bias_gelu", watch_activating)
    return calls


def stream_of(modality: int, site: str, layer: int = -1) -> int:
    """The numbering that runs already made depend on."""
    return 1024 + 4096 * modality + 8 * (layer + 1) + WHERE[site]


def expected_streams() -> dict[int, str]:
    sites = {}
    for modality in range(3):
        for site in ("embedding", "final"):
            sites[stream_of(modality, site)] = f"{modality} {site}"
        for layer in range(LAYERS):
            for site in ("attention_weights", "attention_output", "hidden", "output"):
                sites[stream_of(modality, site, layer)] = f"{modality} {site} {layer}"
    return sites


@pytest.mark.parametrize("kind", KINDS)
def test_each_site_of_each_layer_of_each_tower_once_at_its_rate(kind: str, applied: list[Applied]) -> None:
    config = config_of(kind)
    batch = batch_of(config)
    model_of(config).train()(batch, Draws.at(3, 5, batch.sample_id))
    names = expected_streams()
    assert sorted(call.stream for call in applied) == sorted(names), "one call per site, no two from one stream"
    for call in applied:
        name = names[call.stream]
        live = call.x != 0  # padded words have attention weights of exactly 0
        dropped = ((call.y == 0) & live).sum().item()
        count = int(live.sum())
        assert abs(dropped / count - RATE) < 5 * (RATE * (1 - RATE) / count) ** 0.5, f"{name}: {dropped} of {count}"
        kept = call.y != 0
        torch.testing.assert_close(call.y[kept], call.x[kept] / (1 - RATE), msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_at_the_sites(kind: str, applied: list[Applied]) -> None:
    """The position-add site comes before AGG is prepended; only the T5 tower, whose AGG is a word, includes it."""
    config = config_of(kind)
    batch = batch_of(config)
    model_of(config).train()(batch, Draws.at(3, 5, batch.sample_id))
    shape = {call.stream: tuple(call.x.shape) for call in applied}
    text_tokens = config.data.words + (1 if kind == "specific" else 0)
    for modality, rows, tokens, embedded in ((0, CLIPS, 17, 16), (1, CLIPS, 17, 16), (2, CLIPS * CANDIDATES, 10, text_tokens)):
        assert shape[stream_of(modality, "embedding")] == (rows, embedded, 32)
        assert shape[stream_of(modality, "final")] == (rows, tokens, 32)
        for layer in range(LAYERS):
            assert shape[stream_of(modality, "attention_weights", layer)] == (rows, 4, tokens, tokens)
            assert shape[stream_of(modality, "attention_output", layer)] == (rows, tokens, 32)
            assert shape[stream_of(modality, "hidden", layer)] == (rows, tokens, 48)
            assert shape[stream_of(modality, "output", layer)] == (rows, tokens, 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.2, 0.0), (0.0, 0.3), (0.2, 0.3)])
def test_two_keys_govern_the_sites(kind: str, dropout: float, attention_dropout: float, applied: list[Applied]) -> None:
    config = config_of(kind, dropout, attention_dropout)
    batch = batch_of(config, clips=2)
    model_of(config).train()(batch, Draws.at(3, 5, batch.sample_id))
    rates: dict[bool, set[float]] = {True: set(), False: set()}
    for call in applied:
        rates[call.stream % 8 == WHERE["attention_weights"]].add(call.rate)
    assert rates[True] - {0.0} == {attention_dropout} - {0.0}
    assert rates[False] - {0.0} == {dropout} - {0.0}
    assert len([c for c in applied if c.rate > 0]) == 3 * ((2 + 3 * LAYERS) * (dropout > 0) + LAYERS * (attention_dropout > 0))


@pytest.mark.parametrize("kind", KINDS)
def test_none_in_evaluation(kind: str, applied: list[Applied]) -> None:
    config = config_of(kind)
    batch = batch_of(config)
    model, bare = model_of(config).eval(), model_of(config_of(kind, 0.0, 0.0)).eval()
    with torch.no_grad():
        ours, expected = model(batch, Draws.at(3, 5, batch.sample_id)), bare(batch)
    assert not applied
    for field in ("video_features", "audio_features", "text_features", "video_text"):
        torch.testing.assert_close(getattr(ours, field), getattr(expected, field))


def test_sites_of_the_deepest_tower_do_not_run_into_the_next_modality() -> None:
    deepest = 128
    numbers = [Dropout(0.1, "embedding").site, Dropout(0.1, "final").site]
    numbers += [Dropout(0.1, s, i).site for i in range(deepest) for s in SITES if s not in ("embedding", "final")]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) >= 0 and max(numbers) < 4096
    assert SITES == WHERE
    assert {m.name: int(m) for m in Modality} == {"VIDEO": 0, "AUDIO": 1, "TEXT": 2}
    assert max(s for s in Stream if s != Stream.DROPOUT) < Stream.DROPOUT


Drop = Callable[[Tensor, str, int], Tensor]


def dropper(batch: Batch, modality: int, seed: int, step: int) -> Drop:
    def drop(x: Tensor, site: str, layer: int = -1) -> Tensor:
        draws = torch.tensor(seed), torch.tensor(step), batch.sample_id
        return x * keep_mask(x.shape, RATE, *draws, stream_of(modality, site, layer)) / (1 - RATE)

    return drop


def layer_norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-6).sqrt() * norm.weight + norm.bias


def rms_norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def attend(x: Tensor, attention: torch.nn.Module, scale: float, bias: Tensor | float, drop: Drop, layer: int) -> Tensor:
    width, heads = x.shape[-1], []
    weights = attention.qkv.weight.split(width)
    biases = attention.qkv.bias.split(width) if attention.qkv.bias is not None else (0.0,) * 3
    q, k, v = (x @ w.T + b for w, b in zip(weights, biases, strict=True))
    each = width // attention.heads
    cut = [slice(h * each, (h + 1) * each) for h in range(attention.heads)]
    scores = torch.stack([q[..., c] @ k[..., c].transpose(1, 2) * scale for c in cut], dim=1) + bias
    weights = drop(scores.softmax(-1), "attention_weights", layer)
    heads = [weights[:, h] @ v[..., c] for h, c in enumerate(cut)]
    return F.linear(torch.cat(heads, dim=-1), attention.out.weight, attention.out.bias)


def feed_forward(x: Tensor, module: torch.nn.Module, drop: Drop, layer: int) -> Tensor:
    hidden = F.linear(x, module.up.weight, module.up.bias)
    hidden = drop(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), "hidden", layer)
    return F.linear(hidden, module.down.weight, module.down.bias)


def encode(x: Tensor, encoder: torch.nn.Module, bias: Tensor | float, drop: Drop) -> Tensor:
    """Pre-norm blocks, final norm, dropout; the feature of AGG."""
    for i, block in enumerate(encoder.blocks):
        x = x + drop(
            attend(layer_norm(x, block.attention_norm), block.attention, 8**-0.5, bias, drop, i), "attention_output", i
        )
        x = x + drop(feed_forward(layer_norm(x, block.feed_forward_norm), block.feed_forward, drop, i), "output", i)
    return drop(layer_norm(x, encoder.norm), "final", -1)[:, 0]


def with_aggregate(aggregate: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([aggregate.expand(len(tokens), 1, -1), tokens], dim=1)


def padding(ids: Tensor) -> Tensor:
    return F.pad((ids == 0).double() * -1e9, (1, 0))[:, None, None, :]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def expected_features(model: VATT, batch: Batch, seed: int, step: int) -> dict[str, Tensor]:
    """The three AGG features, written out."""
    kept = model.choose_kept(batch, Draws.at(seed, step, batch.sample_id))
    out = {}
    for name, modality in (("video", 0), ("audio", 1)):
        tower, drop = getattr(model, name), dropper(batch, modality, seed, step)
        signal, index = getattr(batch, name), getattr(kept, name)
        if model.agnostic:
            tokens = drop(tower.tokens(signal, index, tower.pre_projection), "embedding", -1)
            pooled = encode(with_aggregate(tower.aggregate, tokens), model.encoder, 0.0, drop)
            out[name] = gelu(F.linear(pooled, tower.post_projection[0].weight, tower.post_projection[0].bias))
        else:
            tokens = drop(tower.tokens(signal, index), "embedding", -1)
            out[name] = encode(with_aggregate(tower.aggregate, tokens), tower.encoder, 0.0, drop)
    tower, drop, ids = model.text, dropper(batch, 2, seed, step), batch.text.flatten(0, 1)
    words = tower.words.weight[ids]
    if model.agnostic:
        tokens = gelu(F.linear(words, tower.pre_projection[0].weight, tower.pre_projection[0].bias))
        tokens = drop(tokens + layer_norm(tower.positions.tables[0], tower.positions.norm), "embedding", -1)
        pooled = encode(with_aggregate(tower.aggregate, tokens), model.encoder, padding(ids), drop)
        out["text"] = gelu(F.linear(pooled, tower.post_projection[0].weight, tower.post_projection[0].bias))
        return out
    x = drop(gelu(with_aggregate(tower.aggregate, words) @ tower.projection.weight.T), "embedding", -1)
    bias = tower.relative_bias(x.shape[1]) + padding(ids)
    for i, block in enumerate(tower.blocks):
        x = x + drop(attend(rms_norm(x, block.attention_norm), block.attention, 1.0, bias, drop, i), "attention_output", i)
        x = x + drop(feed_forward(layer_norm(x, block.feed_forward_norm), block.feed_forward, drop, i), "output", i)
    out["text"] = drop(rms_norm(x, tower.norm), "final", -1)[:, 0]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_towers_written_out_give_the_same_features(kind: str) -> None:
    config = config_of(kind)
    batch = batch_of(config, clips=3)
    model = model_of(config).train()
    with torch.no_grad():
        space = model(batch, Draws.at(3, 5, batch.sample_id))
        expected = expected_features(model, batch, 3, 5)
    for name, features in expected.items():
        torch.testing.assert_close(
            getattr(space, f"{name}_features"), features, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def loss_of(model: VATT, batch: Batch, step: int = 5) -> Tensor:
    return contrastive_losses(model(batch, Draws.at(3, step, batch.sample_id)), LossConfig()).total


@pytest.mark.parametrize("kind", KINDS)
def test_backward_uses_the_masks_of_forward(kind: str) -> None:
    """With dropout on at every site, autograd's slope of the loss along a random direction is that of finite differences."""
    config = config_of(kind, frames=2, size=16, audio_samples=128, words=4)
    batch = batch_of(config, clips=3)
    model = model_of(config).train()
    loss_of(model, batch).backward()
    generator, step = torch.Generator().manual_seed(3), 1e-6
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.dtype == torch.float64:  # batch norm stays in fp32
            groups.setdefault(name.split(".")[0], []).append(p)
    assert set(groups) >= {"video", "audio", "text", "heads"}
    for name, parameters in groups.items():
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p += sign * step * d
                ends.append(loss_of(model, batch).item())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
        assert slope.item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8), name


def test_the_same_draws_give_the_same_step_and_others_do_not() -> None:
    config = config_of()
    batch = batch_of(config, clips=3)
    runs = []
    for step in (5, 5, 6):
        model = model_of(config).train()
        loss = loss_of(model, batch, step)
        loss.backward()
        runs.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert runs[0][0].equal(runs[1][0]) and not runs[0][0].equal(runs[2][0])
    assert all(a.equal(b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_dropout_alone_needs_draws_too() -> None:
    site = Dropout(0.1, "hidden", 0)
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="dropout in training needs draws: pass model"):
        site(x, None)
    assert site.eval()(x, None) is x
    assert replace(Draws.at(0, 0, torch.arange(2)), modality=Modality.TEXT).of(Modality.AUDIO).modality == Modality.AUDIO
