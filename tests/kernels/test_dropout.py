"""Dropout from the counter: its rate and scale, the same mask in backward, and what a mask depends on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vatt.kernels import native
from vatt.kernels.counter import words
from vatt.kernels.dropout import dropout, keep_mask
from vatt.kernels.implementation import KernelError

SEED, STEP = torch.tensor(5), torch.tensor(3)


def binomial_bound(count: int, rate: float) -> float:
    """Five standard deviations of a count, as a fraction."""
    return 5 * (rate * (1 - rate) / count) ** 0.5


def drop(x: Tensor, rate: float = 0.1, sample_id: Tensor | None = None, stream: int = 1030, step: Tensor = STEP) -> Tensor:
    sample_id = torch.arange(len(x)) if sample_id is None else sample_id
    return dropout(x, rate, SEED, step, sample_id, stream)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_rate_by_count_and_scale(rate: float) -> None:
    x = torch.randn(8, 50, 400, generator=torch.Generator().manual_seed(0)) + 3
    y = drop(x, rate)
    zero = y == 0
    assert abs(zero.double().mean().item() - rate) < binomial_bound(x.numel(), rate)
    for i in range(8):
        assert abs(zero[i].double().mean().item() - rate) < binomial_bound(x[i].numel(), rate), f"sample {i}"
    torch.testing.assert_close(y[~zero], x[~zero] / (1 - rate))


def test_zeros_are_spread_evenly_and_independently() -> None:
    kept = keep_mask(torch.Size((4000, 40)), 0.3, SEED, STEP, torch.arange(4000), 1024).double()
    assert (kept.mean(0) - 0.7).abs().max() < binomial_bound(4000, 0.3)
    correlation = torch.corrcoef(kept.T) - torch.eye(40)
    assert correlation.abs().max() < 5.5 * 4000**-0.5


def test_rate_zero_is_the_input_itself() -> None:
    x = torch.randn(3, 4)
    assert drop(x, 0.0) is x


def test_stored_masks() -> None:
    mask = keep_mask(torch.Size((2, 12)), 0.5, SEED, STEP, torch.tensor([7, 1000]), 1030)
    assert mask.int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0]]
    assert not keep_mask(torch.Size((1, 1000)), 0.5, SEED, STEP, torch.tensor([7]), 1030).all()


def test_an_element_is_kept_when_its_word_reaches_the_rate() -> None:
    mask = keep_mask(torch.Size((2, 3, 7)), 0.3, SEED, STEP, torch.tensor([8, 9]), 1100)
    for i, sample in enumerate((8, 9)):
        # Rows of 7 columns take two counters each; the second one's last word is nobody's.
        drawn = torch.from_numpy(words(5, 1100, 3, sample, 3 * 8)) >= int(0.3 * 2**32)
        assert mask[i].equal(drawn.view(3, 8)[:, :7])


def test_rows_of_a_sample_are_drawn_in_order() -> None:
    """(B R, ...) with R caption rows per sample takes the same numbers as (B, R ...)."""
    ids = torch.tensor([4, 9])
    rows = keep_mask(torch.Size((6, 5, 3)), 0.4, SEED, STEP, ids, 1024)
    whole = keep_mask(torch.Size((2, 3, 5, 3)), 0.4, SEED, STEP, ids, 1024)
    assert rows.equal(whole.flatten(0, 1))
    assert not rows[0].equal(rows[1]), "two rows of one sample share a mask"


def test_a_mask_follows_its_sample_not_its_neighbours() -> None:
    x = torch.ones(4, 100)
    whole = drop(x, 0.5, torch.tensor([11, 12, 13, 14]))
    some = drop(x[:2], 0.5, torch.tensor([14, 12]))
    assert some[0].equal(whole[3]) and some[1].equal(whole[1])
    same = drop(x[:2], 0.5, torch.tensor([3, 3]))
    assert same[0].equal(same[1])


@pytest.mark.parametrize("change", ["seed", "step", "sample", "stream"])
def test_each_of_seed_step_sample_and_stream_gives_another_mask(change: str) -> None:
    arguments = {"seed": 5, "step": 3, "sample": 7, "stream": 1030}

    def mask() -> Tensor:
        seed, step, sample = (torch.tensor(arguments[k]) for k in ("seed", "step", "sample"))
        return keep_mask(torch.Size((1, 10_000)), 0.5, seed, step, sample[None], arguments["stream"])

    first = mask()
    arguments[change] += 1
    agree = (mask() == first).double().mean().item()
    assert abs(agree - 0.5) < binomial_bound(10_000, 0.5)


def test_backward_applies_the_mask_of_forward() -> None:
    x = (torch.rand(3, 7, 11) + 1).requires_grad_()
    y = drop(x, 0.35)
    upstream = torch.rand_like(y) + 1
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert (gradient == 0).equal(y == 0)
    kept = y != 0
    torch.testing.assert_close(gradient[kept], upstream[kept] / 0.65)


def test_gradcheck() -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([3, 8])
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, SEED, STEP, ids, 1024), (x,))


def test_no_mask_is_stored_for_backward() -> None:
    saved: list[Tensor] = []
    x = torch.randn(8, 1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        drop(x, 0.5)
    assert saved, "backward needs the seed, the step and the ids"
    assert sum(t.numel() for t in saved) == 1 + 1 + 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    x = torch.ones(2, 300, dtype=dtype, requires_grad=True)
    y = drop(x, 0.1)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert (y == 0).equal(drop(torch.ones(2, 300), 0.1) == 0)


def test_rows_that_fit_no_sample_count_are_an_error() -> None:
    with pytest.raises(ValueError, match="dropout: sample_id: 7 rows are not a multiple of 3 samples"):
        drop(torch.ones(7, 2), 0.1, torch.arange(3))


SHAPES = [(1, 1), (3, 7), (6, 5, 3), (2, 3, 1030), (4, 2, 4096), (2, 1023), (2, 1025), (3, 4, 8)]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp_has_the_bits_of_pytorch(shape: tuple[int, ...], rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.loaded(required=True)
    samples = 3 if shape[0] % 3 == 0 else 1
    mask = rate, torch.tensor(2**62 + 2**33 + 5), torch.tensor(2**32 - 1), torch.arange(samples) * (2**31 - 1), 1030
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x.view(-1)[0] = float("nan")
    found = [keep_mask(x.shape, *mask), dropout(x, *mask), dropout(x.bfloat16(), *mask)]
    monkeypatch.setattr(native, "loaded", lambda: False)
    expected = [keep_mask(x.shape, *mask), dropout(x, *mask), dropout(x.bfloat16(), *mask)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_threads_change_nothing() -> None:
    before, x = torch.get_num_threads(), torch.ones(8, 301, 130)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(drop(x, 0.3))
    torch.set_num_threads(before)
    assert found[0].equal(found[1]) and found[0].equal(found[2])


def test_the_op_keeps_the_dispatchers_rules() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(4, 3, 10, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.vatt.dropout, (x, 0.3, SEED, STEP, torch.arange(4), 1030, "native"))
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: drop(x, 0.3), x) and torch.autograd.gradgradcheck(lambda x: drop(x, 0.3), x)


@pytest.mark.parametrize(
    ("x", "rate", "ids", "message"),
    [
        (torch.ones(2, 4, dtype=torch.int64), 0.1, 2, "x: is torch.int64"),
        (torch.tensor(1.0), 0.1, 1, "x: is a scalar"),
        (torch.ones(2, 4), 1.0, 2, r"rate: 1.0 is not in \[0, 1\)"),
        (torch.ones(3, 4), 0.1, 2, "sample_id: 3 rows are not a multiple of 2"),
    ],
)
def test_what_cannot_be_dropped_is_named(x: Tensor, rate: float, ids: int, message: str) -> None:
    with pytest.raises(KernelError, match=f"^dropout: {message}"):
        drop(x, rate, torch.arange(ids))
