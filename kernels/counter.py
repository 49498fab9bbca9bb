"""Counter-based random numbers: what happens to sample i at step s is a function of (seed, s, i) alone.

Philox 4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 128-bit counter and a 64-bit
key into four 32-bit words. Here the key is the run's seed and the counter is

    (position, sample id, step, stream)

so neither rank, world size, worker nor restart can change a draw. The arithmetic is written with operators that mean
the same on NumPy int64 arrays (data workers, which never import torch) and on torch int64 tensors (the model), so there
is one definition of the hash. Seven rounds pass every test of BigCrush in the paper; we use those.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 7
_MASK = 0xFFFFFFFF
# Multipliers and key increments of Philox 4x32, as published.
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """What a draw is for. Values are part of every run's reproducibility: never renumber, only add."""

    ORDER = 0
    SUBSTITUTE = 1
    WINDOW = 2
    CROP = 3
    FLIP = 4
    COLOUR = 5
    AUDIO_NOISE = 6
    KEEP_VIDEO = 7
    KEEP_AUDIO = 8
    INITIALISATION = 9
    # The sample world (engine.data.sample_world): which combination, the scene, its texture, its sound, its noise, its words.
    WORLD_COMBINATION = 64
    WORLD_SCENE = 65
    WORLD_TEXTURE = 66
    WORLD_SOUND = 67
    WORLD_NOISE = 68
    WORLD_WORDS = 69
    WORLD_CONTROL = 70
    # Dropout sites take the values from here upwards, one per site and layer (see engine.transformer).
    DROPOUT = 1024


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any], rounds: int = ROUNDS) -> tuple[Any, Any, Any, Any]:
    """Four words in [0, 2^32) for each counter.

    counter: four int64 arrays or tensors of one broadcastable shape, values in [0, 2^32).
    key: two int64 scalars, arrays or tensors, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product of two 32-bit words wraps in int64, but its low 64 bits are exact; the masks undo the sign.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def seed_key(seed: Any) -> tuple[Any, Any]:
    """The key of a seed in [0, 2^63): low and high word."""
    return seed & _MASK, (seed >> 32) & _MASK


def words(seed: int, stream: int, step: int, sample_id: int, count: int) -> np.ndarray:
    """`count` words in [0, 2^32) as int64 (NumPy)."""
    position = np.arange(-(-count // 4), dtype=np.int64)
    sample, at, draw = (np.full_like(position, value & _MASK) for value in (sample_id, step, stream))
    low, high = (np.full_like(position, key) for key in seed_key(seed))
    return np.stack(philox((position, sample, at, draw), (low, high)), axis=-1).reshape(-1)[:count]


def words_tensor(seed: Tensor, step: Tensor, sample_id: Tensor, stream: int, count: int) -> Tensor:
    """int64 (B, count): the same words for a whole batch, on the device of its ids; in C++ on a CPU.

    seed, step: int64 scalars; sample_id: int64 (B,). Nothing waits for the host.
    """
    import torch  # data workers use this file without it

    from vatt.kernels import native

    if sample_id.device.type == "cpu" and native.loaded():
        drawn: Tensor = torch.ops.vatt_native.words(seed, step, sample_id.contiguous(), stream, count)
        return drawn
    position = torch.arange(-(-count // 4), device=sample_id.device)[None, :]
    counter = (position, sample_id[:, None], step, torch.full_like(step, stream))
    drawn = torch.stack(torch.broadcast_tensors(*philox(counter, seed_key(seed))), dim=-1)
    return drawn.reshape(len(sample_id), -1)[:, :count]


def uniform(seed: int, stream: int, step: int, sample_id: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) (NumPy)."""
    return words(seed, stream, step, sample_id, count) * 2.0**-32


def normal(seed: int, stream: int, step: int, sample_id: int, count: int) -> np.ndarray:
    """`count` standard normal float64 numbers (NumPy), by Box and Muller's transform."""
    u = uniform(seed, stream, step, sample_id, 2 * count).reshape(2, count)
    return np.sqrt(-2.0 * np.log(1.0 - u[0])) * np.cos(2.0 * np.pi * u[1])
