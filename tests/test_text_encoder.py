"""The T5-style tower: relative buckets, the shared bias, padding, unscaled scores; written out a second time in fp64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.engine.config import AudioConfig, DataConfig, HeadsConfig, ModelConfig, RunConfig, TextConfig, VideoConfig
from vatt.engine.model import VATT
from vatt.engine.released_names import from_released
from vatt.engine.text_encoder import RelativeBias, RMSNorm, TextEncoder, padding_bias, relative_bucket

GOLDEN = Path(__file__).parent / "golden"


def custom(layers: int, width: int, heads: int, hidden: int, **fields) -> dict:
    return {"size": "custom", "layers": layers, "width": width, "heads": heads, "hidden": hidden, **fields}


def released_tower(dtype: torch.dtype = torch.float32) -> tuple[TextEncoder, dict[str, Tensor]]:
    """The golden file's text tower, and the file."""
    model = ModelConfig(
        video=VideoConfig(**custom(2, 64, 4, 128, patch=(2, 8, 8), buckets=(2, 2, 3))),
        audio=AudioConfig(**custom(2, 48, 3, 96, patch=32)),
        text=TextConfig(**custom(3, 32, 2, 64, vocabulary=64, word_width=20)),
        heads=HeadsConfig(video_audio=40, video_text=24),
    )
    config = RunConfig(model=model, data=DataConfig(frames=4, size=16, words=8, audio_samples=320))
    arrays = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "tx_fac_tiny.npz", allow_pickle=False).items()}
    vatt = VATT(config)
    vatt.load_state_dict(from_released({k.removeprefix("w/"): v for k, v in arrays.items() if k.startswith("w/")}, config))
    return vatt.text.eval().to(dtype), arrays


def random_tower(layers: int = 2) -> TextEncoder:
    tower = TextEncoder(TextConfig(**custom(layers, 16, 4, 24, vocabulary=30, word_width=10)), 0.0, 0.0).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in tower.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return tower


def test_every_relative_bucket_is_the_released_one() -> None:
    golden = np.load(GOLDEN / "t5_relative_buckets.npz", allow_pickle=False)
    offsets = torch.from_numpy(golden["relative_position_key_minus_query"].astype(np.int64))
    assert len(offsets) == 401
    ours = relative_bucket(offsets, 32, 64)
    assert ours.equal(torch.from_numpy(golden["bucket_bidirectional_32_64"].astype(np.int64)))


def test_bias_is_read_at_key_minus_query() -> None:
    bias = RelativeBias(32, 64, 3)
    with torch.no_grad():
        bias.table.copy_(torch.arange(96).view(32, 3))
    out = bias(17)
    assert out.shape == (1, 3, 17, 17)
    for query, key in ((0, 0), (0, 5), (5, 0), (16, 3), (2, 16)):
        bucket = relative_bucket(torch.tensor(key - query), 32, 64)
        assert out[0, :, query, key].equal(bias.table[bucket])
    assert relative_bucket(torch.tensor(5), 32, 64) == 21 and relative_bucket(torch.tensor(-5), 32, 64) == 5


def test_rms_norm_has_no_mean() -> None:
    norm = RMSNorm(6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7.0))
    x = torch.randn(4, 6, dtype=torch.float64) + 5
    expected = x / (x.square().sum(-1, keepdim=True) / 6 + 1e-6).sqrt() * torch.arange(1.0, 7.0)
    torch.testing.assert_close(norm(x), expected)
    small = torch.full((1, 6), 1e-3, dtype=torch.float64)
    torch.testing.assert_close(norm(small)[0, 0].item(), 0.5**0.5, rtol=1e-6, atol=0)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_padding_hides_words_never_the_aggregate() -> None:
    bias = padding_bias(torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]]))
    hidden = bias[:, 0, 0] < -1e8
    assert bias.shape == (3, 1, 1, 5)
    assert hidden.tolist() == [[False, False, False, True, True], [False, True, True, True, True], [False] * 5]
    assert (bias[~hidden[:, None, None]] == 0).all()


def written_out(tower: TextEncoder, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(final hidden states, attention weights of each layer), one head and one row at a time, scores not scaled."""
    rows, length = ids.shape
    width, heads = tower.projection.out_features, tower.blocks[0].attention.heads
    each, total = width // heads, length + 1
    states, weights = [], [torch.zeros(rows, heads, total, total, dtype=torch.float64) for _ in tower.blocks]
    for r in range(rows):
        x = torch.stack([tower.aggregate, *(tower.words.weight[i] for i in ids[r])]) @ tower.projection.weight.T
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        for layer, block in enumerate(tower.blocks):
            normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.attention_norm.weight
            q, k, v = (normed @ w.T for w in block.attention.qkv.weight.split(width))
            joined = []
            for h in range(heads):
                cut = slice(h * each, (h + 1) * each)
                scores = q[:, cut] @ k[:, cut].T
                for query in range(total):
                    for key in range(total):
                        scores[query, key] += tower.relative_bias.table[relative_bucket(torch.tensor(key - query), 32, 64), h]
                seen = torch.tensor([True, *(ids[r] != 0).tolist()])
                attention = scores[:, seen].softmax(-1)
                weights[layer][r, h][:, seen] = attention
                joined.append(attention @ v[seen][:, cut])
            x = x + torch.cat(joined, dim=-1) @ block.attention.out.weight.T
            norm = block.feed_forward_norm
            centred = x - x.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
            hidden = normed @ block.feed_forward.up.weight.T
            x = x + (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ block.feed_forward.down.weight.T
        states.append(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tower.norm.weight)
    return torch.stack(states), weights


def test_tower_written_out_in_fp64() -> None:
    tower = random_tower()
    ids = torch.tensor([[4, 9, 2, 7], [5, 0, 0, 0], [0, 0, 0, 0]])
    with torch.no_grad():
        expected, _ = written_out(tower, ids)
        torch.testing.assert_close(tower(ids), expected[:, 0], rtol=1e-10, atol=1e-10)


def test_attention_weights_are_the_released_ones() -> None:
    """Through the written-out tower, which equals ours: the golden file holds the softmax of every layer."""
    tower, golden = released_tower(torch.float64)
    ids = golden["in/text"].long()[:3]
    with torch.no_grad():
        expected, weights = written_out(tower, ids)
        torch.testing.assert_close(tower(ids), expected[:, 0], rtol=1e-10, atol=1e-10)
    for layer in range(3):
        torch.testing.assert_close(weights[layer].float(), golden[f"eval/text/attn{layer}"], rtol=0, atol=2e-5)
    torch.testing.assert_close(expected.float(), golden["eval/text/final_norm"][:3], rtol=0, atol=2e-5)


def test_first_steps_are_the_released_ones() -> None:
    tower, golden = released_tower()
    ids = golden["in/text"].long()
    with torch.no_grad():
        words = torch.cat([tower.aggregate.expand(len(ids), 1, -1), tower.words(ids)], dim=1)
        torch.testing.assert_close(words, golden["eval/text/embedded_with_agg"], rtol=0, atol=0)
        torch.testing.assert_close(F.gelu(tower.projection(words)), golden["eval/text/pre_proj"], rtol=0, atol=2e-5)
        torch.testing.assert_close(tower(ids), golden["eval/text/features_pooled"], rtol=0, atol=2e-5)


def test_padding_has_no_effect() -> None:
    """Neither the padding's word vector, nor how much padding follows, reaches the feature."""
    tower = random_tower()
    ids = torch.tensor([[4, 9, 0, 0], [5, 6, 7, 0]])
    with torch.no_grad():
        before = tower(ids)
        longer = tower(F.pad(ids, (0, 6)))
        tower.words.weight[0] = 1e3
        torch.testing.assert_close(tower(ids), before, rtol=0, atol=0)
        torch.testing.assert_close(longer, before, rtol=1e-12, atol=1e-12)


def test_a_row_of_padding_is_the_aggregate_alone() -> None:
    tower = random_tower()
    with torch.no_grad():
        features = tower(torch.zeros(2, 5, dtype=torch.long))
        alone = tower(torch.zeros(1, 0, dtype=torch.long))
    assert features.isfinite().all()
    torch.testing.assert_close(features, alone.expand(2, -1), rtol=1e-12, atol=1e-12)


def test_rows_do_not_see_each_other() -> None:
    tower = random_tower()
    ids = torch.tensor([[4, 9, 2], [5, 6, 0], [1, 1, 1]])
    with torch.no_grad():
        whole = tower(ids)
        for r in range(3):
            torch.testing.assert_close(tower(ids[r : r + 1])[0], whole[r], rtol=1e-12, atol=1e-12)


def test_word_order_matters_through_the_bias_alone() -> None:
    tower = random_tower()
    ids, swapped = torch.tensor([[4, 9, 2]]), torch.tensor([[9, 4, 2]])
    with torch.no_grad():
        assert not torch.allclose(tower(ids), tower(swapped))
        tower.relative_bias.table.zero_()
        torch.testing.assert_close(tower(ids), tower(swapped), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_bias_table_serves_every_layer(layer: int) -> None:
    """Silencing all other layers' attention leaves a dependence on the table in each layer."""
    tower = random_tower(layers=3)
    with torch.no_grad():
        for i, block in enumerate(tower.blocks):
            if i != layer:
                block.attention.out.weight.zero_()
    tower(torch.tensor([[4, 9, 2]])).sum().backward()
    assert tower.relative_bias.table.grad.abs().max() > 1e-6
    assert [n for n, _ in tower.named_parameters() if "relative" in n] == ["relative_bias.table"]


def test_gradients_of_words_reach_only_words_seen() -> None:
    tower = random_tower()
    tower(torch.tensor([[4, 9, 0], [9, 0, 0]])).sum().backward()
    assert tower.words.weight.grad.abs().amax(1).nonzero().flatten().tolist() == [4, 9]
