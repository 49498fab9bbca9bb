"""Bilinear resizing and the fixed crops, as TensorFlow 2 computes them.

Shape suffixes: T frames, H rows, W columns, C = 3 colours; h, w rows and columns after resizing.

`tf.image.resize(method="bilinear", antialias=False)` puts the centre of output pixel i at (i + 0.5) extent / count - 0.5 and
mixes the two neighbours there, columns first and then rows, in float32. Doing the same in the same order makes the results
equal to the last bit, which matters because the released pipeline then *truncates* to uint8: one unit in the last place
below a whole number would be a whole grey level.

A crop is a choice of output pixels, so crops, and the horizontal flip, are made by picking taps before any pixel is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Pixels handled at once. Small enough for the temporaries to stay in cache, and below the size from which the C library
# hands freed memory back to the system: for small frames the page faults that causes cost more than the arithmetic.
_CHUNK_PIXELS = 1 << 13


@dataclass(frozen=True)
class Taps:
    """For each output pixel of one axis: its two source pixels (int64) and the weight (float32) of the second."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.low)

    def __getitem__(self, pixels: slice) -> Taps:
        return Taps(self.low[pixels], self.high[pixels], self.weight[pixels])

    def moved(self, offset: int) -> Taps:
        """The same taps, `offset` source pixels further on."""
        return Taps(self.low + offset, self.high + offset, self.weight)


def bilinear_taps(extent: int, count: int) -> Taps:
    """Taps that resize an axis of `extent` pixels to `count` (half-pixel centres, no antialiasing)."""
    scale = np.float32(extent) / np.float32(count)
    centre = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(centre)
    low = np.maximum(floor, 0).astype(np.int64)
    high = np.minimum(np.ceil(centre), extent - 1).astype(np.int64)
    return Taps(low, high, centre - floor)


def chunks(frames: int, pixels: int) -> Iterator[slice]:
    """Slices of a clip of frames of `pixels` pixels, each about _CHUNK_PIXELS or one frame."""
    step = max(1, _CHUNK_PIXELS // pixels)
    return (slice(first, first + step) for first in range(0, frames, step))


def resample(frames_THWC: np.ndarray, rows: Taps, columns: Taps) -> np.ndarray:
    """Bilinear samples as planar float32 (T, 3, h, w), in the units of `frames_THWC` (uint8 or float)."""
    if not rows.weight.any() and not columns.weight.any():  # a crop alone: every tap is a pixel
        return frames_THWC[:, _run(rows.low)][:, :, _run(columns.low)].transpose(0, 3, 1, 2).astype(np.float32)
    top, bottom = rows.low.min(), rows.high.max() + 1
    left, right = min(columns.low[0], columns.low[-1]), max(columns.high[0], columns.high[-1]) + 1
    source_THX = frames_THWC[:, top:bottom, left:right].astype(np.float32).reshape(len(frames_THWC), bottom - top, -1)
    # One gather moves from interleaved to planar: colour c of column x lies at 3 x + c.
    colour = np.arange(3)[:, None]
    low_Cw = (3 * (columns.low - left) + colour).reshape(-1)
    high_Cw = (3 * (columns.high - left) + colour).reshape(-1)
    wide_THX = _mix(source_THX[:, :, low_Cw], source_THX[:, :, high_Cw], np.tile(columns.weight, 3))
    planes = _mix(wide_THX[:, rows.low - top], wide_THX[:, rows.high - top], rows.weight[:, None])
    return planes.reshape(len(planes), len(rows), 3, len(columns)).transpose(0, 2, 1, 3)


def _run(pixels: np.ndarray) -> slice | np.ndarray:
    """The same pixels, as a slice if they follow one another: slices are not copied."""
    first = int(pixels[0])
    consecutive = np.array_equal(pixels, np.arange(first, first + len(pixels)))
    return slice(first, first + len(pixels)) if consecutive else pixels


def _mix(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """low + (high - low) weight, overwriting `high`. This form returns `low` exactly where both are equal."""
    high -= low
    high *= weight
    high += low
    return high


def resize_frames(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize to uint8 (T, height, width, 3), truncating as a TensorFlow cast does."""
    if frames_THWC.shape[1:3] == (height, width):
        return frames_THWC
    _, rows, columns, _ = frames_THWC.shape
    taps = bilinear_taps(rows, height), bilinear_taps(columns, width)
    out_THWC = np.empty((len(frames_THWC), height, width, 3), np.uint8)
    for part in chunks(len(frames_THWC), max(rows * columns, height * width)):
        out_THWC[part] = resample(frames_THWC[part], *taps).transpose(0, 2, 3, 1)
    return out_THWC


def shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) when the shorter becomes `size` and the other follows, rounded down (dmvr's `resize_smallest`)."""
    return max(size, height * size // width), max(size, width * size // height)


def crop_or_pad(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The central (height, width), padded with zeros where the frame is smaller (dmvr's `crop_image`)."""
    frames, rows, columns, colours = frames_THWC.shape
    out = np.zeros((frames, height, width, colours), frames_THWC.dtype)
    source = frames_THWC[:, max(rows - height, 0) // 2 :, max(columns - width, 0) // 2 :][:, :height, :width]
    top, left = max(height - rows, 0) // 2, max(width - columns, 0) // 2
    out[:, top : top + source.shape[1], left : left + source.shape[2]] = source
    return out


def centre_crop(frames_THWC: np.ndarray, size: int) -> np.ndarray:
    """Evaluation: shortest side to `size`, then the central square. uint8 (T, H, W, 3) -> planar uint8 (T, 3, size, size)."""
    rows, columns = shortest_side_taps(frames_THWC, size)
    top, left = (len(rows) - size) // 2, (len(columns) - size) // 2
    rows, columns = rows[top : top + size], columns[left : left + size]
    out_TCHW = np.empty((len(frames_THWC), 3, size, size), np.uint8)
    for part in chunks(len(frames_THWC), size * size):
        out_TCHW[part] = resample(frames_THWC[part], rows, columns)
    return out_TCHW


def shortest_side_taps(frames_THWC: np.ndarray, size: int) -> tuple[Taps, Taps]:
    """Taps (rows, columns) that bring the shortest side to `size`."""
    height, width = frames_THWC.shape[1:3]
    new_height, new_width = shortest_side(height, width, size)
    return bilinear_taps(height, new_height), bilinear_taps(width, new_width)


def three_crops(frames_THWC: np.ndarray, size: int) -> np.ndarray:
    """Three squares along the longer side, start, middle, end: uint8 (3 T, size, size, 3), crop by crop.

    The shortest side must already be `size`. Fine-tuned classifiers are evaluated on these.
    """
    _, height, width, _ = frames_THWC.shape
    if min(height, width) != size:
        raise ValueError(f"three_crops: shortest side is {min(height, width)}, not {size}; resize the frames first")
    slack = max(height, width) - size
    offsets = (0, slack // 2, slack)
    if height > width:
        return np.concatenate([frames_THWC[:, o : o + size] for o in offsets])
    return np.concatenate([frames_THWC[:, :, o : o + size] for o in offsets])
