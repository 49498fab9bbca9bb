"""Frame selection, labels, mixup and log-mel against the arrays the authors' code produced."""

from pathlib import Path

import numpy as np
import pytest

from vatt.engine.data import labels, mel, released_sampling

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "data_processing.npz")


@pytest.mark.parametrize("length", [300, 250, 70, 40, 10])
def test_video_windows(length):
    np.testing.assert_array_equal(
        released_sampling.linspace(length, 4, 32, 2), GOLDEN[f"sample/linspace_L{length}_win4_n32_stride2"]
    )
    np.testing.assert_array_equal(released_sampling.middle(length, 32, 2), GOLDEN[f"sample/middle_L{length}_n32_stride2"])


@pytest.mark.parametrize(("stride", "suffix"), [(1, ""), (2, "_stride2")])
def test_audio_windows(stride, suffix):
    starts = released_sampling.linspace(480000, 4, 153600, stride).reshape(4, -1)[:, 0]
    np.testing.assert_array_equal(starts, GOLDEN[f"sample/linspace_audio_L480000_win4_n153600{suffix}_first_index"])


@pytest.mark.parametrize("offset", [0, 17, 68])
def test_training_windows_in_sync(offset):
    name = f"sample/train_sync_off{offset}"
    np.testing.assert_array_equal(released_sampling.indices(100, 32, 1, offset), GOLDEN[f"{name}_video_idx"])
    start = released_sampling.synchronous_offset(offset, 100, 480000)
    audio = released_sampling.indices(480000, 153600, 1, start)
    np.testing.assert_array_equal(audio[[0, -1]], GOLDEN[f"{name}_audio_first_last"])
    assert int((np.diff(audio) != 1).sum()) == GOLDEN[f"{name}_audio_wraps"]


def test_random_offset_covers_exactly_the_windows_that_fit():
    offsets = {released_sampling.random_offset(100, 32, 2, u) for u in np.arange(0, 1, 1 / 512)}
    assert offsets == set(range(100 - 62))
    assert released_sampling.random_offset(10, 32, 2, 0.999) == 0


def test_label_smoothing():
    np.testing.assert_allclose(labels.smooth(GOLDEN["labels"], 0.1), GOLDEN["label_smoothing_0.1"], rtol=1e-6)


def test_mixup():
    audio, target = labels.mixup(GOLDEN["mixup/audio_in"], GOLDEN["labels"], GOLDEN["mixup/lambda"], GOLDEN["mixup/perm"])
    np.testing.assert_allclose(audio, GOLDEN["mixup/audio_out"], atol=1e-6)
    np.testing.assert_allclose(target, GOLDEN["mixup/labels_out"], atol=1e-6)
    assert audio.dtype == target.dtype == np.float32


def test_log_mel():
    spectrogram = mel.log_mel(GOLDEN["wave"])
    np.testing.assert_allclose(spectrogram, GOLDEN["mel_logmf_official"][0], atol=5e-5)
    np.testing.assert_allclose(mel.normalise(spectrogram), GOLDEN["mel_normalized"][0], atol=5e-6)


def test_silence_has_a_spectrogram():
    silence = mel.normalise(mel.log_mel(np.zeros(5000, np.float32)))
    assert silence.shape == (5, 80) and not silence.any()
