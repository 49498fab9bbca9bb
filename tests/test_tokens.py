"""Positions, their resampling and their LayerNorm, and what a tower's tokens are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vatt.engine.config import AudioConfig, ConfigError, DropRateConfig, VideoConfig
from vatt.engine.randomness import Draws
from vatt.engine.tokens import AudioTokens, PositionBuckets, VideoTokens, prepend_aggregate, resample_positions, spline_matrix
from vatt.kernels.counter import Stream
from vatt.kernels.drop_tokens import drop_tokens_reference

GOLDEN = np.load(Path(__file__).parent / "golden" / "position_embeddings.npz", allow_pickle=False)
RESAMPLED = [(8, 1), (8, 16), (14, 7), (14, 20), (14, 24), (16, 16), (20, 14), (40, 50)]


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key])


@pytest.mark.parametrize(("buckets", "count"), RESAMPLED)
def test_resampling_is_the_released_one(buckets: int, count: int) -> None:
    key = f"interp_{buckets}_to_{count}"
    ours = resample_positions(golden(f"{key}/in"), count)
    torch.testing.assert_close(ours, golden(f"{key}/out_float64_solver"), rtol=0, atol=1e-6)


def polyharmonic(table: np.ndarray, count: int) -> np.ndarray:
    """Order 3 in one dimension, solved densely: sum_i w_i |x - x_i|^3 + a + b x through the table's rows at i / A."""
    buckets = len(table)
    knots, queries = np.arange(buckets) / buckets, np.arange(count) / count
    linear = np.stack([np.ones(buckets), knots], axis=1)
    system = np.block([[np.abs(knots[:, None] - knots) ** 3, linear], [linear.T, np.zeros((2, 2))]])
    weights = np.linalg.solve(system, np.concatenate([table, np.zeros((2, table.shape[1]))]))
    return (
        np.abs(queries[:, None] - knots) ** 3 @ weights[:buckets]
        + np.stack([np.ones(count), queries], axis=1) @ weights[buckets:]
    )


@pytest.mark.parametrize("buckets", [2, 3, 4, 8, 14, 40])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 15, 29, 64])
def test_spline_is_the_polyharmonic_one(buckets: int, count: int) -> None:
    table = np.random.default_rng(buckets).normal(size=(buckets, 3))
    ours = spline_matrix(buckets, count) @ torch.from_numpy(table)
    np.testing.assert_allclose(ours.numpy(), polyharmonic(table, count), rtol=0, atol=1e-8)


def test_spline_keeps_constants_lines_and_knots() -> None:
    for buckets, count in ((5, 12), (9, 4), (2, 6), (3, 3)):
        matrix = spline_matrix(buckets, count)
        line = torch.arange(buckets, dtype=torch.float64) / buckets
        torch.testing.assert_close(matrix.sum(1), torch.ones(count, dtype=torch.float64))
        torch.testing.assert_close(matrix @ line, torch.arange(count, dtype=torch.float64) / count)
    torch.testing.assert_close(spline_matrix(7, 14)[::2], torch.eye(7, dtype=torch.float64))
    assert spline_matrix(1, 3).equal(torch.ones(3, 1, dtype=torch.float64))


def test_resampling_is_differentiable_and_exact_at_its_own_size() -> None:
    table = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert resample_positions(table, 6) is table
    assert torch.autograd.gradcheck(lambda t: resample_positions(t, 9), (table,))
    half = torch.randn(6, 3, dtype=torch.bfloat16)
    assert resample_positions(half, 9).dtype == torch.bfloat16


def released_positions(folder: str, inner: str, axes: tuple[str, ...]) -> PositionBuckets:
    tables = [golden(f"{folder}/w/{inner}/{axis}_position_embeddings/embeddings") for axis in axes]
    module = PositionBuckets([len(t) for t in tables], tables[0].shape[1])
    with torch.no_grad():
        for ours, table in zip(module.tables, tables, strict=True):
            ours.copy_(table)
        module.norm.weight.copy_(golden(f"{folder}/w/{inner}/layer_norm/gamma"))
        module.norm.bias.copy_(golden(f"{folder}/w/{inner}/layer_norm/beta"))
    return module


def test_video_positions_are_the_released_ones() -> None:
    module = released_positions("spatiotemporal", "spatio_temporal_embeddings", ("temporal", "vertical", "horizontal"))
    torch.testing.assert_close(module((3, 4, 5)), golden("spatiotemporal/out_t3h4w5")[0], rtol=0, atol=2e-6)
    # The stored one went through the released fp32 solver, which is up to 1e-3 from exact (see `out` of the same file).
    torch.testing.assert_close(module((6, 7, 5)), golden("spatiotemporal/out_t6h7w5_interpolated")[0], rtol=0, atol=1e-4)


def test_audio_positions_are_the_released_ones() -> None:
    module = released_positions("temporal", "temporal_embeddings", ("temporal",))
    torch.testing.assert_close(module((12,)), golden("temporal/out_t12")[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(module((20,)), golden("temporal/out_t20_interpolated")[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("grid", [(3, 4, 5), (6, 7, 5), (1, 9, 2), (3, 4, 11)])
def test_positions_of_another_grid_are_the_norm_of_the_resampled_sum(grid: tuple[int, int, int]) -> None:
    module = PositionBuckets((3, 4, 5), 8).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    t, h, w = (torch.from_numpy(polyharmonic(table.detach().numpy(), n)) for table, n in zip(module.tables, grid, strict=True))
    total = (t[:, None, None] + h[None, :, None] + w).reshape(-1, 8)
    expected = (total - total.mean(-1, keepdim=True)) / (total.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(module(grid), expected * module.norm.weight + module.norm.bias, rtol=1e-7, atol=1e-7)


def test_a_position_is_the_layer_norm_of_the_sum_of_its_buckets() -> None:
    module = PositionBuckets((2, 3, 4), 10).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=3.0)
    positions = module((2, 3, 4)).detach()
    token = 0
    for t in range(2):
        for h in range(3):
            for w in range(4):
                total = module.tables[0][t] + module.tables[1][h] + module.tables[2][w]
                scaled = (total - total.mean()) / (total.var(unbiased=False) + 1e-6).sqrt()
                torch.testing.assert_close(positions[token], (scaled * module.norm.weight + module.norm.bias).detach())
                token += 1
    assert positions.shape == (token, 10)


def test_position_norm_uses_the_released_epsilon() -> None:
    module = PositionBuckets((2,), 4)
    with torch.no_grad():
        module.tables[0].copy_(torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]]) * 1e-3)
    torch.testing.assert_close(module((2,))[0].abs().mean().item(), 0.5**0.5, rtol=1e-4, atol=0)


def test_a_grid_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError):
        PositionBuckets((2, 3, 4), 8)((6, 4))


def video_tokens(remainder: str = "floor", buckets: tuple[int, int, int] = (2, 3, 4)) -> VideoTokens:
    module = VideoTokens(
        VideoConfig(size="custom", layers=1, width=6, heads=1, hidden=6, patch=(2, 4, 4), buckets=buckets), 6, remainder
    )
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def audio_tokens() -> AudioTokens:
    module = AudioTokens(AudioConfig(size="custom", layers=1, width=6, heads=1, hidden=6, patch=8, buckets=10), 6, "floor")
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def test_tokens_are_projected_patches_plus_positions() -> None:
    tower = video_tokens()
    video = torch.rand(2, 4, 3, 12, 16)
    with torch.no_grad():
        for token, (t, h, w) in enumerate((t, h, w) for t in range(2) for h in range(3) for w in range(4)):
            patch = video[:, 2 * t : 2 * t + 2, :, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4].flatten(1)
            expected = patch @ tower.weight.T + tower.bias + tower.positions((2, 3, 4))[token]
            torch.testing.assert_close(tower(video)[:, token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("pre_projection", [False, True])
def test_kept_tokens_are_those_of_the_whole_clip_in_the_given_order(modality: str, pre_projection: bool) -> None:
    tower = video_tokens() if modality == "video" else audio_tokens()
    signal = torch.rand(2, 4, 3, 12, 16) if modality == "video" else torch.rand(2, 80)
    extra = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.GELU()) if pre_projection else None
    index = torch.tensor([[7, 0, 9, 4], [3, 8, 1, 1]])
    every, some = tower(signal, None, extra), tower(signal, index, extra)
    for b in range(2):
        torch.testing.assert_close(some[b], every[b, index[b]], rtol=1e-5, atol=1e-5)


def test_pre_projection_comes_before_the_position() -> None:
    tower, signal = audio_tokens(), torch.rand(1, 80)
    extra = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.GELU())
    patches = signal.unflatten(1, (10, 8))
    expected = extra(patches @ tower.weight.T + tower.bias) + tower.positions((10,))
    torch.testing.assert_close(tower(signal, None, extra), expected)


def test_positions_of_a_larger_clip_are_resampled() -> None:
    tower = video_tokens()
    video = torch.zeros(1, 8, 3, 12, 8)
    expected = tower.bias + tower.positions((4, 3, 2))
    torch.testing.assert_close(tower(video)[0], expected)
    assert tower(video).shape == (1, 24, 6)


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 1, 3, 12, 16), "1, 12, 16"), ((1, 4, 3, 3, 16), "4, 3, 16"), ((1, 4, 3, 12, 3), "4, 12, 3")]
)
def test_an_axis_without_a_patch_is_named(shape: tuple[int, ...], axis: str) -> None:
    with pytest.raises(ConfigError, match=rf"video of size \({axis}\) has no whole patch of \(2, 4, 4\): enlarge the input"):
        video_tokens()(torch.zeros(shape))
    assert video_tokens("ceil")(torch.zeros(shape)).shape[1] >= 1, "padding makes a patch of it"


def test_a_wave_without_a_patch_is_named() -> None:
    with pytest.raises(ConfigError, match=r"audio of size \(7,\) has no whole patch of \(8,\): enlarge the input"):
        audio_tokens()(torch.zeros(1, 7))


@pytest.mark.parametrize("choice", ["per_sample", "shared"])
def test_the_choice_of_tokens_follows_the_drop_rate(choice: str) -> None:
    draws = Draws.at(4, 9, torch.tensor([5, 6]))
    rates = DropRateConfig(video=0.25, audio=0.6, choice=choice)
    for tower, grid, kept, stream in (
        (video_tokens(), (2, 3, 4), 18, Stream.KEEP_VIDEO),
        (audio_tokens(), (10,), 4, Stream.KEEP_AUDIO),
    ):
        index = tower.choose(grid, rates, draws)
        total = 24 if len(grid) == 3 else 10
        seed, step = torch.tensor(4), torch.tensor(9)
        assert index.equal(drop_tokens_reference(total, kept, seed, step, draws.sample_id, stream, shared=choice == "shared"))
    assert video_tokens().choose((2, 3, 4), DropRateConfig(video=0.0), draws) is None
    aligned = video_tokens().choose((2, 3, 4), DropRateConfig(video=0.5, align=8), draws)
    assert aligned.shape[1] == 15  # AGG + 15 = 16; 13 is 3 from 16 and 5 from 8


def test_aggregate_is_the_first_token_and_has_no_position() -> None:
    aggregate = torch.randn(6, requires_grad=True)
    tokens = torch.randn(3, 5, 6)
    out = prepend_aggregate(aggregate, tokens)
    assert out.shape == (3, 6, 6)
    assert out[:, 1:].equal(tokens)
    assert all(row.equal(aggregate) for row in out[:, 0])
    out[:, 0].sum().backward()
    assert aggregate.grad.equal(torch.full((6,), 3.0))
