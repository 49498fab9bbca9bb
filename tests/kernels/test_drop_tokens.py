"""DropToken's choice: which tokens are kept, how evenly, and what the choice depends on; and how many are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vatt.engine.config import kept_tokens
from vatt.kernels.counter import Stream, words
from vatt.kernels.drop_tokens import drop_tokens, drop_tokens_reference
from vatt.kernels.implementation import KernelError

SEED, STEP = torch.tensor(5), torch.tensor(3)


def choose(
    total: int, kept: int, ids: Tensor, *, stream: int = Stream.KEEP_VIDEO, step: int = 3, seed: int = 5, shared: bool = False
) -> Tensor:
    return drop_tokens_reference(total, kept, torch.tensor(seed), torch.tensor(step), ids, stream, shared=shared)


@pytest.mark.parametrize(("total", "kept"), [(1, 1), (16, 6), (16, 16), (17, 16), (1568, 784), (1200, 300)])
def test_sorted_unique_and_in_range(total: int, kept: int) -> None:
    index = choose(total, kept, torch.arange(50))
    assert index.shape == (50, kept) and index.dtype == torch.int64
    assert index.min() >= 0 and index.max() < total
    assert (index.diff(dim=1) > 0).all()
    if kept == total:
        assert index.equal(torch.arange(total).expand(50, total))


def test_stored_choices() -> None:
    ids = torch.tensor([7, 1000])
    assert choose(16, 6, ids).tolist() == [[4, 6, 8, 11, 12, 13], [0, 5, 10, 11, 14, 15]]
    assert choose(16, 6, ids, stream=Stream.KEEP_AUDIO, shared=True).tolist() == [[7, 2, 13, 0, 8, 6]] * 2


def test_the_smallest_words_are_kept() -> None:
    index = choose(40, 13, torch.tensor([9]))[0]
    drawn = torch.from_numpy(words(5, Stream.KEEP_VIDEO, 3, 9, 40))
    assert index.equal(drawn.argsort()[:13].sort().values)


def test_every_token_is_kept_equally_often_and_pairs_too() -> None:
    samples, total, kept = 20_000, 12, 5
    index = choose(total, kept, torch.arange(samples))
    chosen = torch.zeros(samples, total, dtype=torch.float64).scatter_(1, index, 1.0)
    p = kept / total
    assert (chosen.mean(0) - p).abs().max() < 5 * (p * (1 - p) / samples) ** 0.5
    together = chosen.T @ chosen / samples
    pair = p * (kept - 1) / (total - 1)
    off_diagonal = together[~torch.eye(total, dtype=torch.bool)]
    assert (off_diagonal - pair).abs().max() < 5 * (pair * (1 - pair) / samples) ** 0.5


def test_a_choice_follows_its_sample_whatever_the_batch() -> None:
    """Cut over ranks, reordered or alone, a sample keeps the same tokens."""
    ids = torch.tensor([40, 3, 77, 12, 5, 900])
    whole = choose(60, 20, ids)
    assert torch.cat([choose(60, 20, part) for part in ids.split(2)]).equal(whole)
    order = torch.tensor([4, 0, 5])
    assert choose(60, 20, ids[order]).equal(whole[order])
    assert len({tuple(row) for row in whole.tolist()}) == len(ids)
    twice = choose(60, 20, torch.tensor([3, 3]))
    assert twice[0].equal(twice[1])


@pytest.mark.parametrize("change", [{"seed": 6}, {"step": 4}, {"stream": Stream.KEEP_AUDIO}])
def test_seed_step_and_modality_give_another_choice(change: dict) -> None:
    ids = torch.arange(200)
    first, second = choose(30, 15, ids), choose(30, 15, ids, **change)
    overlap = (first[:, :, None] == second[:, None, :]).any(-1).double().mean().item()
    assert abs(overlap - 0.5) < 0.05


def test_shared_is_one_unsorted_draw_for_the_whole_batch() -> None:
    """As released: one permutation, whose first tokens are kept in drawn order."""
    one = choose(50, 20, torch.tensor([1, 2, 3]), shared=True)
    assert one.shape == (3, 20)
    assert one[0].equal(one[1]) and one[0].equal(one[2])
    assert len(set(one[0].tolist())) == 20
    assert choose(50, 20, torch.tensor([77]), shared=True)[0].equal(one[0]), "the draw must not depend on the samples"
    assert (one[0].diff() < 0).any(), "in drawn order, not sorted"
    assert choose(50, 10, torch.tensor([1]), shared=True)[0].equal(one[0, :10])
    steps = torch.stack([choose(50, 20, torch.tensor([1]), shared=True, step=s)[0] for s in range(400)])
    first = torch.bincount(steps[:, 0], minlength=50).double()
    assert ((first - 8).square() / 8).sum() < 49 + 5 * (2 * 49) ** 0.5  # chi-squared of the first token over 50 values


@pytest.mark.parametrize(("total", "kept"), [(10, 0), (10, 11), (10, -1)])
def test_impossible_counts(total: int, kept: int) -> None:
    with pytest.raises(ValueError, match=f"drop_tokens: kept: cannot keep {kept} of {total} tokens; keep 1 to {total}"):
        choose(total, kept, torch.arange(2))


@pytest.mark.parametrize(
    ("total", "rate", "kept"),
    [
        (1568, 0.5, 784),
        (1568, 0.75, 392),
        (1200, 0.5, 600),
        (1568, 0.0, 1568),
        (10, 0.9, 1),  # 10 (1 - 0.9) is 0.9999999999999998 in floating point
        (20, 0.9, 2),  # and 20 (1 - 0.9) is 1.9999999999999996
        (100, 0.99, 1),
        (1000, 0.7, 300),
        (7, 0.5, 3),
        (3, 0.9, 1),
        (1, 0.99, 1),
    ],
)
def test_kept_count(total: int, rate: float, kept: int) -> None:
    assert kept_tokens(total, rate) == kept


@pytest.mark.parametrize(
    ("total", "rate", "align", "kept"),
    [
        (1568, 0.5, 64, 767),  # AGG + 767 = 768 = 12 x 64
        (1568, 0.5, 128, 767),
        (1200, 0.5, 64, 575),  # 576 is nearer to 601 than 640 is
        (1200, 0.5, 128, 639),  # 640 is nearer than 512
        (1568, 0.75, 64, 383),
        (128, 0.5, 64, 63),
        (130, 0.1, 64, 127),
        (70, 0.5, 64, 63),  # 36 fits no multiple below; one above does
        (40, 0.5, 64, 20),  # no multiple fits 40 tokens: left as it is
        (63, 0.5, 64, 63),
        (1568, 0.0, 64, 1568),  # nothing is dropped, nothing is rounded
        (1200, 0.04, 128, 1151),  # 1152 is the last multiple of 128 that fits
    ],
)
def test_kept_count_aligned_to_attention_tiles(total: int, rate: float, align: int, kept: int) -> None:
    assert kept_tokens(total, rate, align) == kept
    if rate and kept_tokens(total, rate) != kept:
        assert (1 + kept) % align == 0


# ---- the op ----------------------------------------------------------------------------------------------------------

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU in this process")
# Found by search: of 4096 words these samples draw two that are equal (place among the sorted words, the two tokens).
TIES = [(807, 2705, 559, 1853), (1585, 235, 442, 2177)]


@INTERPRETED
@pytest.mark.parametrize(("sample", "place", "first", "second"), TIES)
def test_equal_words_go_by_their_index(sample: int, place: int, first: int, second: int) -> None:
    drawn = words(5, Stream.KEEP_VIDEO, 3, sample, 4096)
    assert drawn[first] == drawn[second]
    for kept, has_second in ((place, False), (place + 1, False), (place + 2, True)):
        expected = choose(4096, kept, torch.tensor([sample]))
        ids = torch.tensor([sample])
        ours = drop_tokens(4096, kept, SEED, STEP, ids, Stream.KEEP_VIDEO, implementation="interpreter")
        assert ours.equal(expected)
        assert (second in ours[0].tolist()) == has_second and (first in ours[0].tolist()) == (kept > place)


@INTERPRETED
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool) -> None:
    torch.library.opcheck(torch.ops.vatt.drop_tokens, (37, 9, SEED, STEP, torch.arange(3), 7, shared))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": 0}, "kept: cannot keep 0 of 10 tokens; keep 1 to 10"),
        ({"sample_id": torch.tensor(3)}, r"sample_id: has shape \(\); make it \(B,\)"),
        ({"sample_id": torch.tensor([1], dtype=torch.int32)}, "sample_id: is torch.int32; make it int64"),
        ({"step": torch.tensor([1, 2])}, "seed: and step are scalars"),
        ({"seed": torch.tensor(1, device="meta")}, "seed: is on meta, the rest on cpu; move it there"),
        ({"implementation": "fast"}, "implementation: 'fast' is not one of native, reference, interpreter"),
        ({"implementation": "interpreter", "total": 65537}, "total: 65537 tokens, the GPU kernel takes up to 65536"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"total": 10, "kept": 5, "seed": SEED, "step": STEP, "sample_id": torch.tensor([1]), "stream": 7}
    drop_tokens(**good)
    with pytest.raises(KernelError, match=f"^drop_tokens: {message}"):
        drop_tokens(**good | change)
