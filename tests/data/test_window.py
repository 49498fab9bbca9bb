"""Windows, loops and the choice of captions."""

import math

import numpy as np

from vatt.engine.data.catalogue import Caption
from vatt.engine.data.window import looped, nearest_captions, random_start, repeated, uniform_starts


def test_a_random_window_lies_inside():
    assert random_start(2.0, 10.0, 3.0, 0.0) == 2.0
    assert random_start(2.0, 10.0, 3.0, 0.5) == 4.5
    assert math.isclose(random_start(2.0, 10.0, 3.0, 1.0), 7.0)
    assert random_start(2.0, 4.0, 3.0, 0.7) == 2.0


def test_uniform_windows():
    assert uniform_starts(2.0, 10.0, 3.0, 1).tolist() == [4.5]
    assert uniform_starts(2.0, 10.0, 2.0, 4).tolist() == [2.0, 4.0, 6.0, 8.0]
    assert uniform_starts(2.0, 3.0, 2.0, 3).tolist() == [2.0, 2.0, 2.0]


def test_uniform_windows_are_the_released_ones(golden):
    """In frames, truncated: the first index of each of the four windows."""
    arrays = golden("data_processing")
    for length in (300, 250, 70, 40):
        expected = arrays[f"sample/linspace_L{length}_win4_n32_stride2"][::32]
        assert np.array_equal(uniform_starts(0, length, 64, 4).astype(int), expected)
        assert int(uniform_starts(0, length, 64, 1)[0]) == arrays[f"sample/middle_L{length}_n32_stride2"][0]
    audio = arrays["sample/linspace_audio_L480000_win4_n153600_first_index"]
    assert np.array_equal(np.round(uniform_starts(0, 480000, 153600, 4)), audio)


def test_short_clips_begin_again(golden):
    assert np.allclose(looped(np.array([0.0, 0.5, 0.9, 1.0, 1.25, 2.0, 2.5]), 1.0), [0, 0.5, 0.9, 0, 0.25, 0, 0.5])
    # 3 x 0.1 is a little more than 0.3 in floating point, and 0.7 + 0.2 a little less than 0.9: both are the beginning.
    assert np.allclose(looped(np.array([0.1 * 3, 0.7 + 0.2]), 0.3), [0, 0]) and looped(np.array([0.7 + 0.2]), 0.9)[0] == 0
    released = golden("data_processing")["sample/middle_L10_n32_stride2"]
    assert np.array_equal(looped(np.arange(32) * 2.0, 10.0).astype(int), released)


def test_captions_by_distance_then_centre_then_order():
    captions = [
        Caption(20, 21, "far"),
        Caption(0, 2, "before, gap 3"),
        Caption(11, 12, "after, gap 2"),
        Caption(5, 6, "inside, centre 1.5 away"),
        Caption(6, 8, "centre on centre"),
        Caption(9, 30, "overlaps, centre 12.5 away"),
        Caption(6, 8, "the same again"),
        Caption(-math.inf, math.inf, "all of the clip"),
    ]
    assert nearest_captions(captions, 5.0, 9.0) == [4, 6, 7, 3, 5, 2, 1, 0]
    assert nearest_captions(captions, 19.0, 23.0)[0] == 7 and nearest_captions(captions, 19.0, 23.0)[1] == 0


def test_fewer_are_repeated_nearest_first():
    assert repeated([4, 2, 7], 5) == [4, 2, 7, 4, 2]
    assert repeated([4, 2, 7], 2) == [4, 2]
    assert repeated([], 5) == []
