"""The losses: the released numbers and gradients, and every form by loops over pairs written from its equation.

G = clips, L = candidates of a clip, D = features.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.engine.config import LossConfig
from vatt.engine.loss import Losses, contrastive_loss, contrastive_losses, mean_over_valid
from vatt.engine.model import CommonSpace, l2_normalise

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz", allow_pickle=False)
FORMS = ["row_column", "symmetric", "all_pairs"]
RELEASED = {"asym": "row_column", "sym": "symmetric"}
CASES = ["all_valid", "two_text_invalid", "no_text", "aud_invalid", "no_mask"]


def space_of(va: Tensor, av: Tensor, vt: Tensor, tv: Tensor, audio_valid: Tensor, text_valid: Tensor) -> CommonSpace:
    nothing = torch.empty(0)
    return CommonSpace(va, av, vt, tv, nothing, nothing, nothing, audio_valid, text_valid)


def random_pairs(clips: int, candidates: int, features: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(clips, features, generator=generator, dtype=torch.float64)
    other = torch.randn(clips * candidates, features, generator=generator, dtype=torch.float64)
    return video.requires_grad_(), other.requires_grad_()


@pytest.mark.parametrize("form", RELEASED)
@pytest.mark.parametrize("case", CASES)
def test_released_losses_and_gradients(form: str, case: str) -> None:
    prefix = f"{form}/{case}/"
    inputs = [torch.from_numpy(GOLDEN[f"in/{k}"]).clone().requires_grad_() for k in ("v_va", "a_va", "v_vt", "t_vt")]
    if case == "no_mask":
        text, audio = torch.ones(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    else:
        text, audio = (torch.from_numpy(GOLDEN[f"{prefix}{k}_mask"].astype(bool)) for k in ("text", "audio"))
    losses = contrastive_losses(space_of(*inputs, audio, text[:, None].expand(6, 5)), LossConfig(form=RELEASED[form]))
    for ours, key in ((losses.total, "loss"), (losses.video_text, "vidtxt"), (losses.video_audio, "vidaud")):
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(float(GOLDEN[prefix + key]), rel=1e-5, abs=1e-6), key
    losses.total.backward()
    for x, key in zip(inputs, ("grad_v_va", "grad_a_va", "grad_v_vt", "grad_t_vt"), strict=True):
        torch.testing.assert_close(
            x.grad, torch.from_numpy(GOLDEN[prefix + key]), rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_perfect_alignment_costs_what_was_released() -> None:
    """Row and column both count the positive: ln 2 for row_column; the other forms tend to 0."""
    eye = torch.eye(6, dtype=torch.float64)
    valid = torch.ones(6, 1, dtype=torch.bool)
    stored = {"row_column": "asym/perfect_orthonormal_B6", "symmetric": "sym/perfect_orthonormal_B6"}
    for form, key in stored.items():
        assert contrastive_loss(eye, eye, valid, LossConfig(form=form)).item() == pytest.approx(
            float(GOLDEN[key]), rel=1e-5, abs=1e-6
        )
    sharp = contrastive_loss(eye, eye, valid, LossConfig(temperature=0.01))
    assert sharp.item() == pytest.approx(math.log(2), abs=1e-12)


def by_loops(video: Tensor, other: Tensor, valid: Tensor, form: str, temperature: float) -> list[Tensor]:
    """The loss of every clip with a valid candidate, one pair at a time.

    all_pairs is the paper's equations 4 and 5: log of the own pairs over own pairs plus all non-matching pairs of the
    batch. The other two are the released code's: the denominator is row i plus column block i, each holding the own pairs;
    or two terms with one of them each.
    """
    clips, candidates = valid.shape
    z = [v / v.norm() for v in video]
    t = [o / o.norm() for o in other]

    def pair(i: int, j: int, c: int) -> Tensor | float:
        if not valid[j, c]:
            return 0.0
        return torch.exp((z[i] * t[j * candidates + c]).sum() / temperature)

    losses = []
    for i in range(clips):
        if not valid[i].any():
            continue
        own = sum(pair(i, i, c) for c in range(candidates))
        row = sum(pair(i, j, c) for j in range(clips) for c in range(candidates))
        column = sum(pair(j, i, c) for j in range(clips) for c in range(candidates))
        if form == "all_pairs":
            others = sum(pair(a, b, c) for a in range(clips) for b in range(clips) if a != b for c in range(candidates))
            losses.append(-torch.log(own / (own + others)))
        elif form == "row_column":
            losses.append(-torch.log(own / (row + column)))
        else:
            losses.append(-torch.log(own / row) - torch.log(own / column))
    return losses


MASKS = {
    "all": [[1, 1, 1]] * 4,
    "one candidate out": [[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]],
    "ragged": [[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1]],
    "a clip out": [[1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]],
    "one clip left": [[0, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_every_form_pair_by_pair(form: str, mask: str, temperature: float) -> None:
    video, other = random_pairs(4, 3)
    valid = torch.tensor(MASKS[mask], dtype=torch.bool)
    expected = torch.stack(by_loops(video, other, valid, form, temperature)).mean()
    ours = contrastive_loss(video, other, valid, LossConfig(form=form, temperature=temperature))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(ours, (video, other)), torch.autograd.grad(expected, (video, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_one_candidate_pair_by_pair(form: str) -> None:
    """Video-audio: one sound per clip, one of them missing."""
    video, other = random_pairs(5, 1, seed=3)
    valid = torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool)[:, None]
    expected = torch.stack(by_loops(video, other, valid, form, 0.07)).mean()
    torch.testing.assert_close(contrastive_loss(video, other, valid, LossConfig(form=form)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    video, other = random_pairs(3, 2, features=4)
    valid = torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=torch.bool)
    config = LossConfig(form=form, temperature=0.3)
    assert torch.autograd.gradcheck(lambda v, o: contrastive_loss(v, o, valid, config), (video, other))


@pytest.mark.parametrize("form", FORMS)
def test_an_invalid_candidate_is_neither_positive_nor_negative(form: str) -> None:
    video, other = random_pairs(4, 3)
    valid = torch.tensor(MASKS["ragged"], dtype=torch.bool)
    config = LossConfig(form=form)
    before = contrastive_loss(video, other, valid, config)
    gradient = torch.autograd.grad(before, other)[0].unflatten(0, (4, 3))
    assert gradient[~valid].abs().max() == 0
    assert gradient[valid].abs().amax(-1).min() > 0
    changed = other.detach().unflatten(0, (4, 3)).clone()
    changed[~valid] = 100 * torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(contrastive_loss(video, changed.flatten(0, 1), valid, config), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_valid_costs_nothing(form: str, dtype: torch.dtype) -> None:
    video, other = (x.detach().to(dtype).requires_grad_() for x in random_pairs(4, 3))
    loss = contrastive_loss(video, other, torch.zeros(4, 3, dtype=torch.bool), LossConfig(form=form))
    loss.backward()
    assert loss.item() == 0
    for x in (video, other):
        assert x.grad.isfinite().all() and x.grad.abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_lengths_do_not_matter(form: str) -> None:
    video, other = random_pairs(4, 3)
    valid = torch.ones(4, 3, dtype=torch.bool)
    scale = torch.rand(4, 1, dtype=torch.float64) * 50 + 0.1
    config = LossConfig(form=form)
    torch.testing.assert_close(
        contrastive_loss(video * scale, other * 1e-2, valid, config), contrastive_loss(video, other, valid, config)
    )


def test_normalisation_is_the_released_one() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-8, 4e-8]], requires_grad=True)
    y = l2_normalise(x)
    torch.testing.assert_close(y.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.03, 0.04]]), rtol=1e-5, atol=1e-8)
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_shuffling_the_clips_or_a_clips_candidates_changes_nothing(form: str) -> None:
    video, other = random_pairs(5, 3)
    valid = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    config = LossConfig(form=form)
    before = contrastive_loss(video, other, valid, config)
    order = torch.tensor([3, 0, 4, 2, 1])
    grouped = other.unflatten(0, (5, 3))
    torch.testing.assert_close(contrastive_loss(video[order], grouped[order].flatten(0, 1), valid[order], config), before)
    turned = torch.tensor([2, 0, 1])
    torch.testing.assert_close(contrastive_loss(video, grouped[:, turned].flatten(0, 1), valid[:, turned], config), before)
    swapped = contrastive_loss(video[order], other, valid, config)
    assert abs(swapped.item() - before.item()) > 1e-3, "a clip must meet its own candidates"


def test_mean_over_replicas() -> None:
    """per_replica: the mean of each replica's own mean over its valid clips; one without any counts as 0."""
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    valid = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    assert mean_over_valid(loss, valid).item() == pytest.approx(7 / 3)
    assert mean_over_valid(loss, valid, 2).item() == pytest.approx((7 / 3 + 0) / 2)
    assert mean_over_valid(loss, valid, 3).item() == pytest.approx((1.5 + 4 + 0) / 3)
    assert mean_over_valid(loss, valid, 6).item() == pytest.approx((1 + 2 + 4) / 6)
    assert mean_over_valid(torch.full((2,), math.inf), torch.zeros(2, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_per_replica_only_when_asked(replicas: int) -> None:
    video, other = random_pairs(4, 3)
    valid = torch.tensor(MASKS["a clip out"], dtype=torch.bool)
    each = by_loops(video, other, valid, "row_column", 0.07)
    by_clip = iter(each)
    loss = [next(by_clip) if row.any() else None for row in valid]
    groups = [loss[i : i + 4 // replicas] for i in range(0, 4, 4 // replicas)]
    means = [
        torch.stack([x for x in g if x is not None]).mean() if any(x is not None for x in g) else torch.zeros(())
        for g in groups
    ]
    ours = contrastive_loss(video, other, valid, LossConfig(mean="per_replica"), replicas)
    torch.testing.assert_close(ours, sum(means) / replicas, check_dtype=False, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        contrastive_loss(video, other, valid, LossConfig(mean="global"), replicas), torch.stack(each).mean()
    )


def test_total_is_the_weighted_mean_of_the_two() -> None:
    va, av = random_pairs(4, 1, seed=1)
    vt, tv = random_pairs(4, 3, seed=2)
    audio, text = torch.tensor([1, 1, 0, 1], dtype=torch.bool), torch.tensor(MASKS["ragged"], dtype=torch.bool)
    space = space_of(va, av, vt, tv, audio, text)

    def losses(**config) -> Losses:
        return contrastive_losses(space, LossConfig(**config))

    plain = losses()
    torch.testing.assert_close(plain.video_audio, contrastive_loss(va, av, audio[:, None], LossConfig()))
    torch.testing.assert_close(plain.video_text, contrastive_loss(vt, tv, text, LossConfig()))
    assert abs(plain.video_audio.item() - plain.video_text.item()) > 0.1
    torch.testing.assert_close(plain.total, (plain.video_audio + plain.video_text) / 2)
    weighted = losses(video_audio_weight=3.0, video_text_weight=1.0)
    torch.testing.assert_close(weighted.total, (3 * plain.video_audio + plain.video_text) / 4)
    torch.testing.assert_close(losses(video_audio_weight=0.0).total, plain.video_text)
    torch.testing.assert_close(losses(video_text_weight=0.0).total, plain.video_audio)
    halves = contrastive_losses(space, LossConfig(mean="per_replica"), replicas=2)
    expected = contrastive_loss(vt, tv, text, LossConfig(mean="per_replica"), 2)
    torch.testing.assert_close(halves.video_text, expected)
    expected = contrastive_loss(va, av, audio[:, None], LossConfig(mean="per_replica"), 2)
    torch.testing.assert_close(halves.video_audio, expected)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_logits_stay_finite(form: str) -> None:
    """Opposite vectors at a small temperature: exp of the logits would overflow and underflow in fp32."""
    eye = torch.eye(4)
    video = eye.clone().requires_grad_()
    other = -eye.repeat_interleave(2, 0).clone().requires_grad_()
    valid = torch.ones(4, 2, dtype=torch.bool)
    for sign in (1, -1):
        loss = contrastive_loss(video, sign * other, valid, LossConfig(form=form, temperature=1e-3))
        loss.backward()
        assert loss.isfinite() and video.grad.isfinite().all()
        assert (loss > 900) if sign == 1 else (loss < 2)


@pytest.mark.parametrize("form", FORMS)
def test_a_lone_clip_has_nothing_to_be_told_from(form: str) -> None:
    video, other = random_pairs(1, 3)
    loss = contrastive_loss(video, other, torch.ones(1, 3, dtype=torch.bool), LossConfig(form=form))
    assert loss.item() == pytest.approx(math.log(2) if form == "row_column" else 0.0, abs=1e-12)


def test_training_on_the_loss_aligns_pairs() -> None:
    video, other = random_pairs(6, 1, features=16)
    for _ in range(60):
        loss = contrastive_loss(video, other, torch.ones(6, 1, dtype=torch.bool), LossConfig(temperature=0.2))
        gradients = torch.autograd.grad(loss, (video, other))
        with torch.no_grad():
            for x, g in zip((video, other), gradients, strict=True):
                x -= 5 * g
    cosine = F.normalize(video.detach(), dim=-1) @ F.normalize(other.detach(), dim=-1).T
    assert cosine.argmax(1).equal(torch.arange(6)) and cosine.argmax(0).equal(torch.arange(6))
