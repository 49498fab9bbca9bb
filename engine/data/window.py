"""Which part of a clip is seen: pure functions of times, metadata and uniform numbers.

All positions are in one unit of the caller's choice, seconds as a rule; a window's audio is exactly the same span as its
frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vatt.engine.data.catalogue import Caption

# Times are sums of rounded fractions: a position this close (in seconds) below a multiple of the length counts as on it.
EPSILON = 1e-6


def random_start(start: float, end: float, length: float, uniform: float) -> float:
    """Where a window of `length` begins, uniform in [start, end - length]; `start` if it does not fit."""
    return start + uniform * max(0.0, end - length - start)


def uniform_starts(start: float, end: float, length: float, windows: int) -> np.ndarray:
    """Where `windows` equally spaced windows begin, float64 (windows,): the first at the start, the last at the end.

    One window sits in the centre. In the released evaluation these are frame numbers, truncated to integers.
    """
    room = max(0.0, end - length - start)
    return start + room * (np.array([0.5]) if windows == 1 else np.linspace(0.0, 1.0, windows))


def looped(position: np.ndarray, length: float) -> np.ndarray:
    """Positions in [0, length): a clip that is too short begins again, picture and sound alike."""
    turns = np.floor((position + EPSILON) / length)
    return np.maximum(position - turns * length, 0.0)


def nearest_captions(captions: Sequence[Caption], start: float, end: float) -> list[int]:
    """Indices of all captions, nearest to the window [start, end] first.

    Nearness is the gap between the two intervals (0 where they touch or overlap), then the distance of their centres,
    then the order in the catalogue. A caption that covers the whole clip has distance 0 in both.
    """

    def distance(index: int) -> tuple[float, float, int]:
        caption = captions[index]
        gap = max(0.0, caption.start - end, start - caption.end)
        centre = abs(caption.start + caption.end - start - end) / 2
        return gap, centre if math.isfinite(centre) else 0.0, index

    return sorted(range(len(captions)), key=distance)


def repeated(nearest: Sequence[int], count: int) -> list[int]:
    """The first `count` of `nearest`; fewer are repeated, nearest first, in turn. Empty stays empty."""
    return [nearest[i % len(nearest)] for i in range(count)] if nearest else []
