"""The order of samples: an endless stream of keyed permutations, any position of which is found in O(1).

Position p of the stream is in epoch p // N, and holds the (p mod N)-th entry of that epoch's permutation of 0..N-1. The
permutation is a Feistel network (Luby and Rackoff, 1988) over the smallest even number of bits that holds N, with the
counter-based hash as its round function; a value that falls outside 0..N-1 is sent through again until it falls inside
("cycle walking", Black and Rogaway, 2002), which keeps it a bijection. So the loader's whole state is one integer.
"""

from __future__ import annotations

import numpy as np

from vatt.kernels.counter import Stream, philox, seed_key

FEISTEL_ROUNDS = 6


def permute(index: np.ndarray, epoch: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Entry `index` of the permutation of 0..count-1 that belongs to (seed, epoch).

    index, epoch: int64 of one shape, index in [0, count). Returns int64 of that shape.
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    mask = (1 << half) - 1
    result = np.array(index, dtype=np.int64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        value, in_epoch = result[outside], epoch[outside]
        left, right = value >> half, value & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_round(right, in_epoch, number, seed) & mask)
        result[outside] = left << half | right
        outside = result >= count
    return result


def sample_at(position: int, seed: int, count: int) -> int:
    """The sample at `position` of the stream over `count` clips."""
    return int(_samples(np.array([position], dtype=np.int64), seed, count)[0])


def batch_samples(step: int, batch_size: int, seed: int, count: int) -> np.ndarray:
    """Samples of the global batch of `step`: int64 (batch_size,), positions step * batch_size onwards.

    A rank reads its contiguous slice. Raises ValueError if the batch holds more clips than there are.
    """
    if batch_size > count:
        raise ValueError(
            f"batch_size {batch_size} is more than the {count} clips there are: a clip would be its own negative; "
            "lower batch_size or add clips"
        )
    return _samples(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), seed, count)


def _samples(position: np.ndarray, seed: int, count: int) -> np.ndarray:
    return permute(position % count, position // count, seed, count)


def _round(value: np.ndarray, epoch: np.ndarray, number: int, seed: int) -> np.ndarray:
    """The round function: one word of hash for each value."""
    fixed = np.full_like(value, number), epoch & 0xFFFFFFFF, np.full_like(value, Stream.ORDER)
    return philox((value, *fixed), seed_key(seed))[0]
