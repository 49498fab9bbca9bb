"""Frame processing against the arrays the authors' code produced."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vatt.engine.data import colour, resize
from vatt.kernels.patch_project import to_unit_range

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "data_processing.npz")
FRAMES = GOLDEN["frames_uint8"]
TALL = GOLDEN["frames_tall_uint8"]


def planar(frames):
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("size", [16, 28])
def test_shortest_side(size):
    height, width = resize.shortest_side(*FRAMES.shape[1:3], size)
    resized = resize.resize_frames(FRAMES, height, width)
    np.testing.assert_array_equal(resized, GOLDEN[f"resize_smallest_{size}"])


def test_scale_jitter():
    factors = 0.87, 1.13
    height, width = (int(extent * factor) for extent, factor in zip(FRAMES.shape[1:3], factors, strict=True))
    np.testing.assert_array_equal(resize.resize_frames(FRAMES, height, width), GOLDEN["scale_jitter_h0.87_w1.13_uint8"])


def test_central_crop_of_resized():
    expected = GOLDEN["central_crop_16x16_of_resize16"]
    np.testing.assert_array_equal(resize.crop_or_pad(GOLDEN["resize_smallest_16"], 16, 16), expected)
    np.testing.assert_array_equal(resize.centre_crop(FRAMES, 16), planar(expected))


def test_central_crop_pads_with_zeros():
    np.testing.assert_array_equal(resize.crop_or_pad(FRAMES, 24, 24), GOLDEN["central_crop_pad_24x24"])


@pytest.mark.parametrize(("frames", "suffix"), [(FRAMES, ""), (TALL, "_tall")])
def test_three_crops(frames, suffix):
    resized = resize.resize_frames(frames, *resize.shortest_side(*frames.shape[1:3], 16))
    np.testing.assert_array_equal(resize.three_crops(resized, 16), GOLDEN[f"three_crop_16_of_resize16{suffix}"])


def test_three_crops_need_a_resized_clip():
    with pytest.raises(ValueError, match="shortest side is 20, not 16; resize"):
        resize.three_crops(FRAMES, 16)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_inception_box(kind):
    frames = FRAMES if kind == "uint8" else GOLDEN["normalize_zero_center"]
    rows, columns = resize.bilinear_taps(11, 16).moved(4), resize.bilinear_taps(17, 16).moved(6)
    box = resize.resample(frames, rows, columns)
    expected = GOLDEN[f"inception_crop_y4_x6_h11_w17_resized16_{kind}"]
    np.testing.assert_array_equal(box.astype(expected.dtype), planar(expected))


def test_normalisations():
    unit = to_unit_range(torch.from_numpy(FRAMES)).numpy()
    np.testing.assert_allclose(unit, GOLDEN["normalize_zero_center"], atol=1e-6)
    np.testing.assert_allclose((unit + 1) / 2, GOLDEN["normalize_01"], atol=1e-6)


@pytest.mark.parametrize("full_range", [1.0, 255.0])
def test_colour_steps(full_range):
    planes = planar(GOLDEN["normalize_01"]) * np.float32(full_range)
    steps = [
        (colour.adjust_brightness, 0.08 * full_range, "1_brightness"),
        (colour.adjust_saturation, 1.3, "2_saturation"),
        (colour.adjust_contrast, 0.75, "3_contrast"),
        (colour.adjust_hue, -0.15, "4_hue"),
    ]
    for adjust, amount, name in steps:
        adjust(planes, amount)
        np.testing.assert_allclose(planes / full_range, planar(GOLDEN[f"color_step{name}_01"]), atol=3e-6, err_msg=name)


def test_colour_jitter_whole():
    planes = planar(FRAMES).astype(np.float32)
    draw = colour.ColourDraw(brightness=0.08, saturation=1.3, contrast=0.75, hue=-0.15)
    expected = planar(GOLDEN["color_jitter_b0.08_s1.3_c0.75_h-0.15_zero_centered"])
    np.testing.assert_allclose(colour.jitter(planes, draw) / 127.5 - 1.0, expected, atol=1e-5)
