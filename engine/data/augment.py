"""What training does to a clip: crop, flip, colour jitter, audio noise. One draw for all frames of a clip.

Shape suffixes: T frames, H rows, W columns, C = 3 colours; S audio samples.

Two recipes. `inception` (paper, appendix A.2.1): a random box with relative area in [0.08, 1] and aspect ratio in [0.5, 2],
resized to the training size. `scale_jitter` (the released pre-training default): height and width scaled by independent
factors, shortest side to the training size, random square. Both then flip and jitter the colours.

Every number drawn is a function of (seed, step, sample id) alone; see `vatt.kernels.counter`.
"""

from __future__ import annotations

import math

import numpy as np

from vatt.engine.config import AugmentConfig
from vatt.engine.data.colour import ColourDraw, jitter
from vatt.engine.data.resize import Taps, bilinear_taps, centre_crop, chunks, resample, resize_frames, shortest_side_taps
from vatt.kernels import counter
from vatt.kernels.counter import Stream

__all__ = ["add_audio_noise", "augment_clip", "centre_crop", "draw_box", "draw_colour", "draw_flip", "draw_scale"]

BOX_ATTEMPTS = 100


def augment_clip(frames_THWC: np.ndarray, config: AugmentConfig, size: int, seed: int, step: int, sample_id: int) -> np.ndarray:
    """uint8 (T, H, W, 3) -> planar uint8 (T, 3, size, size), contiguous.

    Raises ValueError if the frames have another shape or dtype.
    """
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3 or 0 in frames_THWC.shape:
        raise ValueError(f"augment_clip: frames must be uint8 (T, H, W, 3), not {frames_THWC.dtype} {frames_THWC.shape}")
    draws = (seed, step, sample_id)
    if config.crop == "scale_jitter":
        height, width = frames_THWC.shape[1:3]
        frames_THWC = resize_frames(frames_THWC, *_scaled(height, width, *draw_scale(config, *draws)))
    rows, columns = _crop_taps(frames_THWC, config, size, *draws)
    if draw_flip(config, *draws):
        columns = columns[::-1]
    colour = draw_colour(config, *draws)
    # After the Inception box the released code keeps floats, here rounded once, at the end; after the other resizes it
    # truncates to uint8 before the colours.
    rounding = np.float32(0.5 if config.crop == "inception" else 0.0)

    out_TCHW = np.empty((len(frames_THWC), 3, size, size), np.uint8)
    for part in chunks(len(frames_THWC), size * size):
        planes_TCHW = resample(frames_THWC[part], rows, columns)
        if colour is not None:
            planes_TCHW = np.ascontiguousarray(planes_TCHW)
            if not rounding:
                np.floor(planes_TCHW, out=planes_TCHW)
            jitter(planes_TCHW, colour)
            planes_TCHW += np.float32(0.5)
        elif rounding:
            planes_TCHW += rounding
        out_TCHW[part] = planes_TCHW
    return out_TCHW


def _crop_taps(
    frames_THWC: np.ndarray, config: AugmentConfig, size: int, seed: int, step: int, sample_id: int
) -> tuple[Taps, Taps]:
    """Which source pixels the training crop reads: (rows, columns), `size` taps each."""
    height, width = frames_THWC.shape[1:3]
    if config.crop == "inception":
        top, left, box_height, box_width = draw_box(config, height, width, seed, step, sample_id)
        return bilinear_taps(box_height, size).moved(top), bilinear_taps(box_width, size).moved(left)
    rows, columns = shortest_side_taps(frames_THWC, size)
    spare = (len(rows) - size, len(columns) - size)
    if config.crop == "scale_jitter":
        _, _, *u = _four_uniforms(seed, Stream.CROP, step, sample_id, block=1)
        top, left = (int(x * (s + 1)) for x, s in zip(u, spare, strict=True))
    else:
        top, left = spare[0] // 2, spare[1] // 2
    return rows[top : top + size], columns[left : left + size]


def draw_box(config: AugmentConfig, height: int, width: int, seed: int, step: int, sample_id: int) -> tuple[int, int, int, int]:
    """Inception box (top, left, height, width) in pixels of a frame of (height, width).

    The relative area and the aspect ratio (width / height) are uniform in their ranges; a box that does not fit the frame is
    drawn again, and after 100 failures the whole frame is taken.
    """
    for attempt in range(BOX_ATTEMPTS):
        u = _four_uniforms(seed, Stream.CROP, step, sample_id, attempt)
        area = _between(config.area, u[0]) * height * width
        aspect = _between(config.aspect, u[1])
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            return int(u[2] * (height - box_height + 1)), int(u[3] * (width - box_width + 1)), box_height, box_width
    return 0, 0, height, width


def draw_scale(config: AugmentConfig, seed: int, step: int, sample_id: int) -> tuple[float, float]:
    """Scale jitter: factors for (height, width); (1, 1) when it is not applied."""
    gate, u_height, u_width, _ = _four_uniforms(seed, Stream.CROP, step, sample_id, block=0)
    if gate >= config.scale_jitter_probability:
        return 1.0, 1.0
    return _between(config.scale_jitter, u_height), _between(config.scale_jitter, u_width)


def _scaled(height: int, width: int, height_factor: float, width_factor: float) -> tuple[int, int]:
    return max(1, int(height * height_factor)), max(1, int(width * width_factor))


def draw_flip(config: AugmentConfig, seed: int, step: int, sample_id: int) -> bool:
    """Whether the clip is mirrored left to right."""
    return config.flip > 0.0 and _four_uniforms(seed, Stream.FLIP, step, sample_id, block=0)[0] < config.flip


def draw_colour(config: AugmentConfig, seed: int, step: int, sample_id: int) -> ColourDraw | None:
    """The clip's colour jitter; None when it is not applied or could not change anything."""
    if config.jitter_probability == 0.0 or config.brightness == config.saturation == config.contrast == config.hue == 0.0:
        return None
    gate, brightness, saturation, contrast = _four_uniforms(seed, Stream.COLOUR, step, sample_id, block=0)
    if gate >= config.jitter_probability:
        return None
    hue = _four_uniforms(seed, Stream.COLOUR, step, sample_id, block=1)[0]
    return ColourDraw(
        brightness=config.brightness * (2.0 * brightness - 1.0),
        saturation=1.0 + config.saturation * (2.0 * saturation - 1.0),
        contrast=1.0 + config.contrast * (2.0 * contrast - 1.0),
        hue=config.hue * (2.0 * hue - 1.0),
    )


def add_audio_noise(audio_S: np.ndarray, config: AugmentConfig, seed: int, step: int, sample_id: int) -> np.ndarray:
    """Add Gaussian noise whose standard deviation is `config.audio_noise` times the clip's peak; float32, within [-1, 1].

    Silence stays silence. The released code does not clip; only samples within the noise of full scale differ.
    """
    deviation = config.audio_noise * float(np.abs(audio_S).max(initial=0.0))
    if deviation == 0.0:
        return audio_S
    noise_S = counter.normal(seed, Stream.AUDIO_NOISE, step, sample_id, len(audio_S)).astype(np.float32)
    noise_S *= np.float32(deviation)
    noise_S += audio_S
    return np.clip(noise_S, -1.0, 1.0, out=noise_S)


def _between(limits: tuple[float, float], u: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * u


def _four_uniforms(seed: int, stream: Stream, step: int, sample_id: int, block: int) -> tuple[float, float, float, float]:
    """Numbers 4 block .. 4 block + 3 of `counter.uniform(seed, stream, step, sample_id, ...)`.

    On Python integers: for four numbers that is an order of magnitude quicker than on arrays.
    """
    mask = 0xFFFFFFFF
    words = counter.philox((block, sample_id & mask, step & mask, int(stream)), counter.seed_key(int(seed)))
    a, b, c, d = (word * 2.0**-32 for word in words)
    return a, b, c, d
