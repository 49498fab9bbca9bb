"""Batch norm over the global batch, and the hierarchy of heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt.engine.common_space import BatchNorm, CommonSpaceHeads
from vatt.engine.config import HeadsConfig


def random_norm(features: int = 5) -> BatchNorm:
    norm = BatchNorm(features)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in (*norm.parameters(), *norm.buffers()):
            t.copy_(torch.rand(features, generator=generator) + 0.5)
    return norm


def rows(count: int = 7, features: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)) * 3 + 2


def test_training_uses_the_batch_with_its_biased_variance() -> None:
    norm, x = random_norm(), rows()
    y = norm.train()(x)
    for f in range(5):
        column = x[:, f]
        mean = sum(column) / 7
        variance = sum((v - mean) ** 2 for v in column) / 7
        expected = (column - mean) / (variance + 1e-5).sqrt() * norm.weight[f] + norm.bias[f]
        torch.testing.assert_close(y[:, f], expected)


def test_epsilon_is_the_released_one() -> None:
    norm = BatchNorm(1).train()
    x = torch.tensor([[1e-3], [-1e-3]])
    assert norm(x)[0].item() == pytest.approx(1e-3 / (1e-6 + 1e-5) ** 0.5, rel=1e-4)


def test_statistics_of_bf16_rows_are_taken_in_fp32() -> None:
    x = rows(64).bfloat16()
    ours, exact = random_norm().train(), random_norm().train()
    assert ours(x).equal(exact(x.float()))
    assert ours.running_mean.equal(exact.running_mean)


def test_working_copies_in_bf16_round_scale_and_shift_and_nothing_else() -> None:
    """What a backend makes of the parameters in bf16 training (backend.interface)."""
    ours, exact, x = random_norm().train(), random_norm().train(), rows(64)
    for p, rounded in zip(ours.parameters(), exact.parameters(), strict=True):
        p.data = p.data.bfloat16()
        rounded.data = rounded.data.bfloat16().float()
    assert ours(x).equal(exact(x)) and ours(x).dtype == torch.float32
    ours(x).square().sum().backward()
    assert ours.weight.grad.dtype == torch.bfloat16 and ours.running_mean.dtype == torch.float32


def test_buffers_move_a_tenth_of_the_way_to_the_biased_statistics() -> None:
    norm, x = random_norm(), rows()
    before = norm.running_mean.clone(), norm.running_variance.clone()
    norm.train()(x)
    torch.testing.assert_close(norm.running_mean, 0.9 * before[0] + 0.1 * x.mean(0))
    torch.testing.assert_close(norm.running_variance, 0.9 * before[1] + 0.1 * x.var(0, unbiased=False))
    assert not norm.running_mean.requires_grad


def test_evaluation_uses_the_buffers_and_leaves_them() -> None:
    norm, x = random_norm().eval(), rows()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    expected = (x - norm.running_mean) / (norm.running_variance + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x[:1]), expected[:1])
    assert all(norm.state_dict()[k].equal(v) for k, v in before.items())


def test_gradient_runs_through_the_statistics() -> None:
    norm = random_norm().train()
    for store in (norm._parameters, norm._buffers):
        store.update({name: t.detach().double() for name, t in store.items()})
    assert torch.autograd.gradcheck(norm, (rows(4).double().requires_grad_(),))
    x = rows().double().requires_grad_()
    (norm(x) * torch.randn(5, dtype=torch.float64)).sum().backward()
    assert x.grad.abs().max() < 1e-12, "a batch-normalised column sums to a constant"


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_non_finite_batch_leaves_the_buffers(poison: float) -> None:
    """1e30 has a finite mean and an infinite variance in fp32."""
    norm, x = random_norm().train(), rows()
    before = {k: v.clone() for k, v in norm.named_buffers()}
    x[3, 2] = poison
    norm(x)
    for name, value in norm.named_buffers():
        assert value.equal(before[name]), name
    norm(rows())
    assert not norm.running_mean.equal(before["running_mean"]), "and the next good batch counts again"


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_cast_leaves_batch_norm_in_fp32_to_the_bit(cast: str) -> None:
    model = nn.Sequential(nn.Linear(5, 5), random_norm())
    before = {k: v.clone() for k, v in model[1].state_dict().items()}
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    for name, value in model[1].state_dict().items():
        assert value.dtype == torch.float32 and value.equal(before[name]), name
    model.to(torch.bfloat16)
    assert all(value.equal(before[name]) for name, value in model[1].state_dict().items())
    assert model[1](rows().bfloat16()).dtype == torch.float32
    assert isinstance(model[1].weight, nn.Parameter) and model[1].weight.requires_grad


def test_it_follows_to_another_device() -> None:
    norm = random_norm().to("meta")
    assert {t.device.type for t in (*norm.parameters(), *norm.buffers())} == {"meta"}
    both = random_norm().to("meta", torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in (*both.parameters(), *both.buffers())} == {("meta", torch.float32)}
    back = norm.to_empty(device="cpu")
    assert back.running_mean.device.type == "cpu" and back.running_mean.shape == (5,)


def random_heads() -> CommonSpaceHeads:
    heads = CommonSpaceHeads(HeadsConfig(video_audio=8, video_text=6), video=10, audio=9, text=7)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for t in (*heads.parameters(), *heads.buffers()):
            t.copy_(torch.randn(t.shape, generator=generator))
        for norm in (heads.video_hidden_norm, heads.video_audio_norm, heads.video_text_norm):
            norm.running_variance.abs_().add_(0.5)
    return heads


def normed(x: Tensor, norm: BatchNorm, training: bool) -> Tensor:
    mean, variance = (x.mean(0), x.var(0, unbiased=False)) if training else (norm.running_mean, norm.running_variance)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("training", [True, False])
def test_video_path_written_out(training: bool) -> None:
    """Linear, BN, ReLU, linear, BN is the video-audio vector; ReLU of that, linear, BN is the video-text one."""
    heads = random_heads().train(training)
    x = rows(12, 10)
    hidden = normed(x @ heads.video_hidden.weight.T, heads.video_hidden_norm, training).clamp(min=0)
    video_audio = normed(hidden @ heads.video_audio.weight.T, heads.video_audio_norm, training)
    video_text = normed(video_audio.clamp(min=0) @ heads.video_text.weight.T, heads.video_text_norm, training)
    ours = heads.project_video(x)
    torch.testing.assert_close(ours[0], video_audio, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], video_text, rtol=1e-4, atol=1e-4)
    assert (ours[0] < 0).any(), "the video-audio vector itself is not rectified"


def test_video_text_starts_from_the_vector_as_batch_norm_left_it() -> None:
    """Scaling one row of the video-audio vector must show in the video-text vector: nothing L2-normalises between them."""
    heads = random_heads().eval()
    x = rows(4, 10)
    before = heads.project_video(x)[1]
    with torch.no_grad():
        heads.video_audio_norm.weight.mul_(3)
        heads.video_audio_norm.bias.mul_(3)
        heads.video_text_norm.running_mean.mul_(3)
    after = heads.project_video(x)[1]
    bias = heads.video_text_norm.bias
    torch.testing.assert_close(after - bias, 3 * (before - bias), rtol=1e-4, atol=1e-4)


def test_audio_and_text_are_one_linear_each_and_rows_stand_alone() -> None:
    heads = random_heads().train()
    audio, text = rows(5, 9), rows(6, 7)
    torch.testing.assert_close(heads.project_audio(audio), F.linear(audio, heads.audio.weight, heads.audio.bias))
    torch.testing.assert_close(heads.project_text(text), F.linear(text, heads.text.weight, heads.text.bias))
    torch.testing.assert_close(heads.project_audio(audio[:1]), heads.project_audio(audio)[:1])
    assert sorted(n for n, m in heads.named_modules() if isinstance(m, BatchNorm)) == [
        "video_audio_norm",
        "video_hidden_norm",
        "video_text_norm",
    ]


def test_video_rows_share_their_statistics() -> None:
    heads, x = random_heads().train(), rows(8, 10)
    halves = torch.cat([heads.project_video(x[:4])[0], heads.project_video(x[4:])[0]])
    assert (halves - heads.project_video(x)[0]).abs().max() > 0.1


def test_outputs_are_fp32_whatever_the_towers_are() -> None:
    heads = random_heads().bfloat16().train()
    outputs = (*heads.project_video(rows(6, 10).bfloat16()), heads.project_audio(rows(6, 9).bfloat16()))
    assert {y.dtype for y in (*outputs, heads.project_text(rows(6, 7).bfloat16()))} == {torch.float32}
    exact = random_heads().train().project_video(rows(6, 10))
    for ours, expected in zip(outputs, exact, strict=False):
        assert (ours - expected).norm() < 0.05 * expected.norm()
