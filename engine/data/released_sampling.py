"""Which frames and audio samples of a stored clip the released code reads, as integer indices.

The released pipeline counts frames, not seconds: `stride` stored frames lie between two that are used, and a clip that is
too short is repeated from its start. All functions return int64 indices into the stored sequence.
"""

from __future__ import annotations

import numpy as np


def indices(length: int, count: int, stride: int, offset: int) -> np.ndarray:
    """`count` indices from `offset`, `stride` apart, going round a sequence of `length`."""
    return (offset + stride * np.arange(count, dtype=np.int64)) % length


def middle(length: int, count: int, stride: int = 1) -> np.ndarray:
    """The central window (evaluation with one window)."""
    return indices(length, count, stride, max(0, (length - count * stride) // 2))


def linspace(length: int, windows: int, count: int, stride: int = 1) -> np.ndarray:
    """`windows` windows from the first to the last possible one, evenly spaced: (windows * count,), window by window.

    Offsets are computed in float32 and truncated, as TensorFlow does.
    """
    last = np.float32(max(0, length - count * stride))
    offsets = (np.arange(windows, dtype=np.float32) * (last / np.float32(max(1, windows - 1)))).astype(np.int64)
    return np.concatenate([indices(length, count, stride, int(offset)) for offset in offsets])


def random_offset(length: int, count: int, stride: int, u: float) -> int:
    """Offset of a training window, from a uniform number in [0, 1): below max(length - (count - 1) stride, 1)."""
    return int(u * max(length - (count - 1) * stride, 1))


def synchronous_offset(video_offset: int, video_length: int, audio_length: int) -> int:
    """The audio sample that lies as far into the audio as the first frame lies into the video."""
    return round(video_offset / video_length * audio_length)
