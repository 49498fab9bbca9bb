"""Colour jitter with TensorFlow's definitions, on planar float frames.

Shape suffixes: T frames, C = 3 colours (red, green, blue), H rows, W columns.

Every function is homogeneous: scaling the pixels (and the brightness shift) scales the result. Frames may therefore be in
[0, 1], as in the released code, or in [0, 255], which saves two passes here. Nothing is clipped before the end: a brightness
shift may push values out of range, and TensorFlow's definitions are followed there too.

Saturation and contrast differ from torchvision's, which blend with the luma and with the mean luma of the frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Stands in for a zero range of colours: any finite quotient does, because a range of zero multiplies it again.
_TINY = np.float32(1e-12)


@dataclass(frozen=True)
class ColourDraw:
    """One draw, for all frames of a clip. The defaults change nothing."""

    brightness: float = 0.0  # added, as a fraction of the full range
    saturation: float = 1.0  # factor
    contrast: float = 1.0  # factor
    hue: float = 0.0  # added, in turns


def jitter(planes_TCHW: np.ndarray, draw: ColourDraw, full_range: float = 255.0) -> np.ndarray:
    """Brightness, saturation, contrast, hue, in the released order, then clipping to [0, full_range]; float32, in place.

    Steps that change nothing are skipped.
    """
    if draw.brightness != 0.0:
        adjust_brightness(planes_TCHW, draw.brightness * full_range)
    if draw.saturation != 1.0:
        adjust_saturation(planes_TCHW, draw.saturation)
    if draw.contrast != 1.0:
        adjust_contrast(planes_TCHW, draw.contrast)
    if draw.hue != 0.0:
        adjust_hue(planes_TCHW, draw.hue)
    return np.clip(planes_TCHW, 0.0, np.float32(full_range), out=planes_TCHW)


def adjust_brightness(planes_TCHW: np.ndarray, shift: float) -> None:
    """Add `shift`, in the units of the pixels; in place."""
    planes_TCHW += np.float32(shift)


def adjust_saturation(planes_TCHW: np.ndarray, factor: float) -> None:
    """Multiply the S of HSV by `factor`, limited to 1; in place.

    With V = max and S = (V - min) / V, keeping H and V moves every colour towards or away from V by the same ratio
    S' / S = min(factor, V / (V - min)). Where V <= 0 TensorFlow takes S = 0: the pixel becomes grey of value V.
    """
    value_T1HW, range_T1HW = _value_and_range(planes_TCHW)
    np.maximum(range_T1HW, _TINY, out=range_T1HW)
    ratio_T1HW = np.divide(value_T1HW, range_T1HW, out=range_T1HW)
    np.clip(ratio_T1HW, 0.0, np.float32(factor), out=ratio_T1HW)
    planes_TCHW -= value_T1HW
    planes_TCHW *= ratio_T1HW
    planes_TCHW += value_T1HW


def adjust_contrast(planes_TCHW: np.ndarray, factor: float) -> None:
    """Scale the distance from the mean of each frame and colour by `factor`; in place."""
    mean_TC11 = planes_TCHW.mean(axis=(2, 3), keepdims=True)
    planes_TCHW *= np.float32(factor)
    planes_TCHW += mean_TC11 * np.float32(1.0 - factor)


def adjust_hue(planes_TCHW: np.ndarray, turns: float) -> None:
    """Turn the H of HSV by `turns`, keeping the largest and the smallest colour of each pixel; in place.

    H runs over [0, 6): 0 red, 2 green, 4 blue. At H the colour whose own hue is c stands at min + range clip(2 - d, 0, 1),
    with d the distance from H to c around the circle.
    """
    red, green, blue = planes_TCHW[:, 0], planes_TCHW[:, 1], planes_TCHW[:, 2]
    value, spread = (plane[:, 0] for plane in _value_and_range(planes_TCHW))
    smallest = value - spread
    inverse = np.float32(1.0) / np.maximum(spread, _TINY)
    hue = (red - green) * inverse + np.float32(4.0)
    np.copyto(hue, (blue - red) * inverse + np.float32(2.0), where=green == value)
    np.copyto(hue, (green - blue) * inverse, where=red == value)
    hue += np.float32(6.0 * turns)
    hue -= np.float32(6.0) * np.floor(hue * np.float32(1.0 / 6.0))
    # Red's own hue lies on the seam, so its distance is taken as 3 minus the distance from the opposite hue.
    for plane, origin in ((red, 3.0), (green, 2.0), (blue, 4.0)):
        np.subtract(hue, np.float32(origin), out=plane)
        np.abs(plane, out=plane)
        if plane is red:
            plane -= np.float32(1.0)
        else:
            np.subtract(np.float32(2.0), plane, out=plane)
        np.clip(plane, 0.0, 1.0, out=plane)
        plane *= spread
        plane += smallest


def _value_and_range(planes_TCHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(largest colour, largest - smallest colour) of each pixel, (T, 1, H, W)."""
    red, green, blue = (planes_TCHW[:, c : c + 1] for c in range(3))
    largest = np.maximum(red, green)
    np.maximum(largest, blue, out=largest)
    smallest = np.minimum(red, green)
    np.minimum(smallest, blue, out=smallest)
    return largest, np.subtract(largest, smallest, out=smallest)
