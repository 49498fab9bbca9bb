"""The draws of the two recipes and what they do to a clip."""

from dataclasses import replace

import numpy as np
import pytest

from vatt.engine.config import AugmentConfig
from vatt.engine.data import augment, colour
from vatt.engine.data.augment import add_audio_noise, augment_clip, centre_crop
from vatt.engine.data.resize import resize_frames, shortest_side
from vatt.kernels import counter
from vatt.kernels.counter import Stream

PLAIN = AugmentConfig(flip=0.0, jitter_probability=0.0)
RECIPES = ["inception", "scale_jitter", "centre"]


def noise(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def gradient(height, width):
    """A frame whose red is the row and whose green is the column, in grey levels."""
    frame = np.zeros((1, height, width, 3), np.uint8)
    frame[..., 0] = np.arange(height)[:, None]
    frame[..., 1] = np.arange(width)
    return frame


@pytest.mark.parametrize("crop", RECIPES)
@pytest.mark.parametrize("jitter", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(4, 48, 64), (3, 97, 31), (1, 7, 5), (2, 1, 1), (2, 16, 16), (5, 200, 90)])
def test_shape_dtype_and_determinism(crop, jitter, shape):
    frames = noise(*shape)
    config = AugmentConfig(crop=crop, jitter_probability=jitter)
    before = frames.copy()
    out = augment_clip(frames, config, 16, seed=3, step=5, sample_id=7)
    assert out.shape == (shape[0], 3, 16, 16) and out.dtype == np.uint8 and out.flags.c_contiguous
    np.testing.assert_array_equal(frames, before)
    np.testing.assert_array_equal(out, augment_clip(frames, config, 16, seed=3, step=5, sample_id=7))


@pytest.mark.parametrize("crop", ["inception", "scale_jitter"])
@pytest.mark.parametrize("changed", ["seed", "step", "sample_id"])
def test_every_part_of_the_key_matters(crop, changed):
    key = {"seed": 3, "step": 5, "sample_id": 7}
    frames, config = noise(1, 40, 60), AugmentConfig(crop=crop)
    first = augment_clip(frames, config, 16, **key)
    assert (augment_clip(frames, config, 16, **(key | {changed: 8})) != first).any()


@pytest.mark.parametrize("crop", RECIPES)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_all_frames_are_treated_alike(crop, count):
    """Equal frames stay equal whatever the chunking: one box, one flip and one colour draw for the clip."""
    frame = noise(1, 50, 70)
    alone = augment_clip(frame, AugmentConfig(crop=crop), 64, 1, 2, 3)
    out = augment_clip(np.repeat(frame, count, axis=0), AugmentConfig(crop=crop), 64, 1, 2, 3)
    np.testing.assert_array_equal(out, np.repeat(alone, count, axis=0))


def test_wrong_frames_are_named():
    with pytest.raises(ValueError, match=r"frames must be uint8 \(T, H, W, 3\), not float32 \(1, 4, 4, 3\)"):
        augment_clip(np.zeros((1, 4, 4, 3), np.float32), PLAIN, 4, 0, 0, 0)
    with pytest.raises(ValueError, match=r"not uint8 \(1, 3, 4, 4\)"):
        augment_clip(np.zeros((1, 3, 4, 4), np.uint8), PLAIN, 4, 0, 0, 0)


def boxes(height, width, count=2000, config=PLAIN):
    return np.array([augment.draw_box(config, height, width, 1, 0, i) for i in range(count)])


def test_boxes_have_the_paper_ranges():
    top, left, height, width = boxes(240, 320).T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 240).all() and (left + width <= 320).all()
    area, aspect = height * width / (240 * 320), width / height
    assert area.min() > 0.075 and area.min() < 0.1 and area.max() > 0.9
    assert 0.49 < aspect.min() < 0.52 and 1.9 < aspect.max() < 2.05
    assert not (area < 0.08 * 0.97).any()
    # Both ends of the free room are reached.
    assert (top == 0).any() and (top + height == 240).any() and (left == 0).any() and (left + width == 320).any()
    # The position is uniform in the room a box leaves: mean of a uniform, 5 standard errors.
    room = 240 - height
    assert abs((top[room > 20] / room[room > 20]).mean() - 0.5) < 5 * 0.289 / np.sqrt((room > 20).sum())


def test_small_boxes_always_fit_so_their_area_and_aspect_are_uniform():
    config = replace(PLAIN, area=(0.1, 0.3))
    _, _, height, width = boxes(400, 400, 3000, config).T
    area, aspect = height * width / 160000, width / height
    for value, low, high in ((area, 0.1, 0.3), (aspect, 0.5, 2.0)):
        fraction = np.sort((value - low) / (high - low))
        distance = np.abs(fraction - (np.arange(3000) + 0.5) / 3000).max()
        assert distance < 1.95 / np.sqrt(3000) + 0.01  # Kolmogorov-Smirnov at 0.1 %, and rounding to pixels


def test_a_frame_no_box_fits_is_taken_whole():
    assert augment.draw_box(replace(PLAIN, area=(1.0, 1.0), aspect=(2.0, 2.0)), 40, 40, 0, 0, 0) == (0, 0, 40, 40)


def test_a_later_attempt_is_used_when_the_first_fails():
    """Half of these boxes are wider than the frame; the fallback must stay rare."""
    whole = (boxes(100, 100, 1000, replace(PLAIN, area=(0.9, 0.99))) == (0, 0, 100, 100)).all(axis=1)
    assert whole.mean() < 0.02


def test_the_box_is_the_part_of_the_frame_that_is_shown():
    frame = gradient(120, 200)
    for sample in range(20):
        top, left, height, width = augment.draw_box(PLAIN, 120, 200, 0, 0, sample)
        rows, columns, _ = augment_clip(frame, PLAIN, 64, 0, 0, sample)[0].astype(float)
        np.testing.assert_allclose(
            rows[:, 0], np.clip(top + (np.arange(64) + 0.5) * height / 64 - 0.5, top, top + height - 1), atol=1
        )
        expected = np.clip(left + (np.arange(64) + 0.5) * width / 64 - 0.5, left, left + width - 1)
        np.testing.assert_allclose(columns[0], expected, atol=1)
        assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all()


def test_rounding_is_to_nearest_after_the_box():
    """Released: floats until the end. 0, 0.25, 0.75, 1 and 0, 1, 3, 4 are not truncated."""
    frames = np.array([[0, 1], [0, 4]], np.uint8)[:, None, :, None].repeat(3, axis=3)
    config = replace(PLAIN, area=(1.0, 1.0), aspect=(2.0, 2.0))
    out = augment_clip(frames, config, 4, 0, 0, 0)[:, 0, 0]
    np.testing.assert_array_equal(out, [[0, 0, 1, 1], [0, 1, 3, 4]])


def test_flip_mirrors_and_has_its_probability():
    frames = noise(2, 30, 41)
    for crop in RECIPES:
        straight = augment_clip(frames, replace(PLAIN, crop=crop), 16, 0, 0, 1)
        mirrored = augment_clip(frames, replace(PLAIN, crop=crop, flip=1.0), 16, 0, 0, 1)
        np.testing.assert_array_equal(mirrored, straight[..., ::-1])
    flips = np.mean([augment.draw_flip(replace(PLAIN, flip=0.3), 0, 4, i) for i in range(4000)])
    assert abs(flips - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 4000)


def test_colour_draws_fill_the_paper_ranges():
    draws = [augment.draw_colour(AugmentConfig(), 0, 1, i) for i in range(2000)]
    for name, low, high in (
        ("brightness", -32 / 255, 32 / 255),
        ("saturation", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("hue", -0.2, 0.2),
    ):
        values = np.array([getattr(d, name) for d in draws])
        span = high - low
        assert low <= values.min() < low + 0.01 * span and high - 0.01 * span < values.max() <= high, name
        assert abs(values.mean() - (low + high) / 2) < 5 * span * 0.289 / np.sqrt(2000), name
    table = np.array([(d.brightness, d.saturation, d.contrast, d.hue) for d in draws])
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 5 / np.sqrt(2000)


def test_colour_jitter_has_its_probability():
    applied = np.mean([augment.draw_colour(AugmentConfig(jitter_probability=0.8), 0, 1, i) is not None for i in range(4000)])
    assert abs(applied - 0.8) < 5 * np.sqrt(0.8 * 0.2 / 4000)
    assert augment.draw_colour(AugmentConfig(brightness=0, saturation=0, contrast=0, hue=0), 0, 1, 1) is None


def test_colour_jitter_follows_the_crop():
    """The mean that contrast turns about is the mean of the crop, and the result is clipped, rounded uint8."""
    frames = noise(2, 64, 64)
    config = replace(PLAIN, jitter_probability=1.0)
    cropped = augment_clip(frames, PLAIN, 32, 0, 0, 5)
    expected = colour.jitter(cropped.astype(np.float32), augment.draw_colour(config, 0, 0, 5))
    difference = np.abs(augment_clip(frames, config, 32, 0, 0, 5).astype(float) - expected)
    assert difference.max() < 3 and difference.mean() < 0.6  # only the rounding before the colours differs


def test_grey_stays_grey_under_saturation_and_hue():
    planes = np.full((1, 3, 2, 2), 77.0, np.float32)
    colour.adjust_saturation(planes, 1.4)
    colour.adjust_hue(planes, 0.2)
    np.testing.assert_allclose(planes, 77.0, rtol=1e-6)


def test_hue_by_thirds_turns_red_to_green_to_blue():
    red = np.array([200.0, 50.0, 50.0], np.float32).reshape(1, 3, 1, 1)
    turned = red.copy()
    colour.adjust_hue(turned, 1 / 3)
    np.testing.assert_allclose(turned.ravel(), [50, 200, 50], atol=1e-3)
    colour.adjust_hue(turned, 1 / 3)
    np.testing.assert_allclose(turned.ravel(), [50, 50, 200], atol=1e-3)


def test_scale_jitter_draws():
    config = AugmentConfig(crop="scale_jitter")
    draws = np.array([augment.draw_scale(config, 0, 1, i) for i in range(4000)])
    untouched = (draws == 1.0).all(axis=1)
    assert abs(untouched.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 4000)
    height, width = draws[~untouched].T
    for factor in (height, width):
        assert 0.8 <= factor.min() < 0.805 and 1.195 < factor.max() <= 1.2
    assert abs(np.corrcoef(height, width)[0, 1]) < 5 / np.sqrt(len(height))


def test_scale_jitter_crops_everywhere():
    """Without the scaling itself, the crop is a square of the full height whose place is uniform in the width."""
    frame = gradient(20, 60)
    config = replace(PLAIN, crop="scale_jitter", scale_jitter_probability=0.0)
    left = np.array([augment_clip(frame, config, 20, 0, 0, i)[0, 1, 0, 0] for i in range(1500)])
    assert left.min() == 0 and left.max() == 40
    assert abs(left.mean() - 20) < 5 * 11.8 / np.sqrt(1500)


def test_scale_jitter_changes_the_aspect():
    """The square crop of a frame stretched by (height, width) shows that much less of the longer side."""
    frame = gradient(100, 100)
    config = replace(PLAIN, crop="scale_jitter", scale_jitter_probability=1.0)
    for sample in range(10):
        height, width = (int(100 * factor) for factor in augment.draw_scale(config, 0, 0, sample))
        rows, columns, _ = augment_clip(frame, config, 50, 0, 0, sample)[0].astype(float)
        shown_rows, shown_columns = rows.max() - rows.min(), columns.max() - columns.min()
        assert abs(shown_rows - 100 * min(1, width / height)) < 4
        assert abs(shown_columns - 100 * min(1, height / width)) < 4


def test_scale_jitter_is_two_truncating_resizes_and_a_crop():
    """As released: each resize goes back to uint8. The result is one window of the frame resized twice."""
    frames = noise(2, 37, 53)
    config = replace(PLAIN, crop="scale_jitter", scale_jitter_probability=1.0)
    windows = set()
    for sample in range(8):
        height, width = (int(side * f) for side, f in zip((37, 53), augment.draw_scale(config, 0, 0, sample), strict=True))
        twice = resize_frames(resize_frames(frames, height, width), *shortest_side(height, width, 24)).transpose(0, 3, 1, 2)
        out = augment_clip(frames, config, 24, 0, 0, sample)
        found = [
            (y, x)
            for y in range(twice.shape[2] - 23)
            for x in range(twice.shape[3] - 23)
            if np.array_equal(out, twice[:, :, y : y + 24, x : x + 24])
        ]
        assert len(found) == 1
        windows.update(found)
    assert len(windows) > 2


def test_centre_is_what_evaluation_sees():
    frames = noise(3, 30, 50)
    np.testing.assert_array_equal(augment_clip(frames, replace(PLAIN, crop="centre"), 16, 0, 0, 0), centre_crop(frames, 16))


@pytest.mark.parametrize("shape", [(1, 50, 30), (1, 30, 50), (1, 5, 9), (1, 31, 31)])
def test_centre_crop_is_symmetric(shape):
    frames = noise(*shape)
    frames = np.maximum(frames, frames[:, ::-1, ::-1])
    out = centre_crop(frames, 10).astype(int)
    assert out.shape == (1, 3, 10, 10)
    spare = [side - 10 for side in shortest_side(*shape[1:], 10)]
    if all(s % 2 == 0 for s in spare):
        assert np.abs(out - out[..., ::-1, ::-1]).max() <= 1


def test_audio_noise_is_relative_to_the_peak():
    audio = np.zeros(20000, np.float32)
    audio[7] = -0.5
    config = AugmentConfig(audio_noise=0.01)
    noisy = add_audio_noise(audio, config, 1, 2, 3)
    added = noisy - audio
    assert noisy.dtype == np.float32 and abs(added.std() / 0.005 - 1) < 0.03 and abs(added.mean()) < 5 * 0.005 / np.sqrt(20000)
    np.testing.assert_array_equal(noisy, add_audio_noise(audio, config, 1, 2, 3))
    assert (noisy != add_audio_noise(audio, config, 1, 3, 3)).mean() > 0.99


def test_audio_noise_leaves_silence_and_stays_in_range():
    config = AugmentConfig(audio_noise=0.5)
    silence = np.zeros(100, np.float32)
    np.testing.assert_array_equal(add_audio_noise(silence, config, 0, 0, 0), silence)
    assert np.abs(add_audio_noise(np.ones(1000, np.float32), config, 0, 0, 0)).max() == 1.0
    loud = np.ones(10, np.float32)
    assert add_audio_noise(loud, AugmentConfig(), 0, 0, 0) is loud


def test_quick_draws_are_the_counters_own():
    for block in (0, 3):
        expected = counter.uniform(9, Stream.CROP, 4, 2**33 + 5, 4 * block + 4)[4 * block :]
        np.testing.assert_array_equal(augment._four_uniforms(9, Stream.CROP, 4, 2**33 + 5, block), expected)
