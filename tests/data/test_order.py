"""The order of samples: permutations, keyed by seed and epoch, readable anywhere."""

import numpy as np
import pytest

from vatt.engine.data.order import batch_samples, permute, sample_at


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 100, 1000, 1025, 40000])
def test_every_epoch_is_a_permutation(count):
    for epoch in (0, 1, 5):
        order = permute(np.arange(count), np.full(count, epoch), 3, count)
        assert np.array_equal(np.sort(order), np.arange(count))


def test_epochs_and_seeds_differ_and_nothing_else_matters():
    def order(epoch, seed):
        return permute(np.arange(1000), np.full(1000, epoch), seed, 1000)

    assert np.array_equal(order(0, 0), order(0, 0))
    for other in (order(1, 0), order(0, 1), order(0, 1 << 40), order(1 << 20, 0)):
        assert (order(0, 0) == other).mean() < 0.02


def test_the_order_is_shuffled():
    """Neighbours are as far apart as in a random order (a third of the count), and no sample stays where it was."""
    order = permute(np.arange(3000), np.zeros(3000, dtype=np.int64), 0, 3000)
    assert 900 < np.abs(np.diff(order)).mean() < 1100
    assert (order == np.arange(3000)).sum() < 8
    # Over many epochs each sample comes first about equally often.
    first = [sample_at(epoch * 8, 0, 8) for epoch in range(4000)]
    assert np.bincount(first, minlength=8).min() > 400


def test_stored_orders():
    """The order of a seed never changes: a run that is resumed with a later version still sees each clip once."""
    assert permute(np.arange(10), np.zeros(10, dtype=np.int64), 7, 10).tolist() == [2, 8, 3, 5, 7, 6, 1, 0, 4, 9]
    assert permute(np.arange(10), np.full(10, 3), 7, 10).tolist() == [3, 8, 1, 7, 6, 5, 2, 0, 4, 9]
    assert batch_samples(10**6, 4, 1 << 40 | 5, 10**7).tolist() == [9443914, 4130831, 7804848, 8480786]


def test_batches_are_consecutive_positions_of_one_stream():
    stream = [sample_at(position, 5, 37) for position in range(120)]
    assert sorted(stream[:37]) == sorted(stream[37:74]) == list(range(37))
    for step in range(12):
        batch = batch_samples(step, 10, 5, 37)
        assert batch.dtype == np.int64 and batch.tolist() == stream[step * 10 : (step + 1) * 10]


def test_far_positions_take_no_longer():
    far = 10**12
    assert sample_at(far, 0, 10**9) == batch_samples(far // 8, 8, 0, 10**9)[far % 8]


def test_a_batch_larger_than_the_catalogue():
    assert sorted(batch_samples(3, 9, 0, 9).tolist()) == list(range(9))
    with pytest.raises(ValueError, match="batch_size 10 is more than the 9 clips.*its own negative"):
        batch_samples(0, 10, 0, 9)
