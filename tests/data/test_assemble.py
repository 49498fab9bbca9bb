"""One row of a batch: every draw is the sample's own, whichever clip stands in for it."""

from __future__ import annotations

import numpy as np
import pytest

from vatt.engine.config import AugmentConfig, DataConfig
from vatt.engine.data.assemble import AssemblySettings, ClipTask
from vatt.engine.data.catalogue import Catalogue
from vatt.engine.data.pool import InlinePool
from vatt.engine.data.slots import Arrays, SlotLayout
from vatt.engine.data.words import Vocabulary

# The window is longer than the 4 s of a clip, so that it begins at 0 whatever is drawn: only augmentation is left to differ.
LOOPED = DataConfig(frames=4, fps=0.8, size=32, audio_rate=8000, captions=2, words=4)
ROWS = 3


@pytest.fixture
def fill(studio, clips, tmp_path):
    catalogue = Catalogue.read(studio.write_catalogue(tmp_path / "clips.jsonl", clips.rows))

    def fill(*tasks: dict[str, int], data: DataConfig = LOOPED, seed: int = 3) -> Arrays:
        augment = AugmentConfig(area=(0.3, 0.6), audio_noise=0.01)
        vocabulary = Vocabulary(["number", "second", *"0123456789"])
        layout = SlotLayout(1, 0, ROWS, data.frames, data.size, data.captions, data.words, data.audio_samples)
        pool = InlinePool(AssemblySettings(data, augment, seed, vocabulary, 0, False), layout)
        for row, task in enumerate(tasks):
            pool.submit(0, [ClipTask(row, clip=catalogue[task["index"]], **task)])
            assert [outcome.error for outcome in pool.collect()] == [None]
        return pool.arrays(0)

    return fill


def test_samples_that_share_a_substitute_are_augmented_each_in_its_own_way(fill) -> None:
    got = fill({"sample_id": 7, "step": 0, "index": 1}, {"sample_id": 8, "step": 0, "index": 1})
    assert got.sample_id[:2].tolist() == [7, 8]
    assert not np.array_equal(got.video[0], got.video[1]) and not np.array_equal(got.audio[0], got.audio[1])
    np.testing.assert_allclose(got.audio[0], got.audio[1], atol=0.05)


def test_another_step_is_augmented_in_another_way_and_the_same_step_in_the_same(fill) -> None:
    got = fill(*({"sample_id": 7, "step": step, "index": 1} for step in (0, 1, 0)))
    assert not np.array_equal(got.video[0], got.video[1]) and not np.array_equal(got.audio[0], got.audio[1])
    assert np.array_equal(got.video[0], got.video[2]) and np.array_equal(got.audio[0], got.audio[2])


def test_the_window_is_the_samples_and_the_steps_own(fill) -> None:
    """The nearest caption tells the second at which the window is."""
    short = DataConfig(frames=2, fps=10.0, size=32, audio_rate=8000, captions=1, words=4)

    def seconds(*tasks: dict[str, int]) -> list[int]:
        texts = [fill(task, data=short).text[0, 0] for task in tasks]
        return [int(text[3]) for text in texts]

    assert len(set(seconds(*({"sample_id": 7, "step": step, "index": 1} for step in range(8))))) > 1
    assert len(set(seconds(*({"sample_id": sample, "step": 0, "index": 1} for sample in range(8))))) > 1
