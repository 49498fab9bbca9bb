"""Retrieval scores: the released code's numbers, hand-made cases, chance, the oracle, and a whole evaluation."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vatt.engine.config import (
    AudioConfig,
    DataConfig,
    EvaluateConfig,
    HeadsConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.data import loader
from vatt.engine.data.batch import Batch
from vatt.engine.data.catalogue import Caption, Catalogue, Clip
from vatt.engine.data.words import Vocabulary
from vatt.engine.evaluate import retrieval
from vatt.engine.evaluate.metrics import chance, cosine_similarity, oracle, ranks, retrieval_metrics

GOLDEN = __file__.replace("evaluate/test_retrieval.py", "golden/metrics.npz")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def assert_golden(golden, case: str, similarity: np.ndarray) -> None:
    scores = retrieval_metrics(ranks(similarity, np.arange(len(similarity))))
    for key, name in (("R@1", "R1"), ("R@5", "R5"), ("R@10", "R10"), ("median_rank", "MedianRank")):
        assert scores[key] == pytest.approx(float(golden[f"{case}/{name}"]), abs=1e-6), (case, key)


# ---- ranks and scores ------------------------------------------------------------------------------------------------


def test_released_scores_of_both_ways_to_average_windows(golden):
    assert_golden(golden, "embd", golden["sim_embd"])
    assert_golden(golden, "cosine", golden["sim_cosine"])


def test_released_similarity_averages_raw_windows_before_normalising(golden):
    videos = golden["video_embd_windows"].reshape(40, 4, 8).mean(axis=1)
    np.testing.assert_allclose(cosine_similarity(golden["text_embd"], videos), golden["sim_embd"], atol=2e-6)


def test_released_order_among_ties(golden):
    assert_golden(golden, "ties4x4", np.zeros((4, 4)))


def test_ranks_by_hand():
    similarity = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.5, 0.5, 0.1]])
    assert ranks(similarity, np.array([0, 1, 2, 1])).tolist() == [1, 3, 2, 2]


def test_scores_by_hand():
    assert retrieval_metrics(np.array([1, 5, 6, 11])) == {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75, "median_rank": 5.5}


def test_saying_the_same_of_everything_scores_like_chance():
    assert retrieval_metrics(ranks(np.ones((50, 50)), np.arange(50))) == pytest.approx(chance(50))


def test_an_embedding_that_is_not_a_number_is_an_error_and_not_a_hit():
    similarity = np.zeros((3, 3))
    similarity[1, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 3 queries.*NaN"):
        ranks(similarity, np.arange(3))


def test_zero_vectors_have_no_direction_and_no_nan():
    assert cosine_similarity(np.zeros((1, 3)), np.ones((2, 3))).tolist() == [[0.0, 0.0]]


def test_short_vectors_have_a_direction_down_to_the_released_floor():
    """1e-12 under the root: a length of 1e-6 is the shortest that still counts as 1."""
    queries = np.array([[3.0, 4.0], [3e-6, 4e-6], [3e-7, 4e-7]])
    np.testing.assert_allclose(cosine_similarity(queries, np.array([[6.0, 8.0]]))[:, 0], [1.0, 1.0, 0.5])


def test_chance_is_the_mean_of_random_orders():
    assert chance(200) == {"R@1": 1 / 200, "R@5": 5 / 200, "R@10": 10 / 200, "median_rank": 100.5}
    assert chance(4)["R@5"] == 1.0


def test_oracle_by_hand():
    # One clip alone, two that look alike: 1, 1/2, 1/2.
    assert oracle("abb", "abb") == {"R@1": pytest.approx(2 / 3), "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0}
    assert oracle("aaaa", "aaaa") == {"R@1": 0.25, "R@5": 1.0, "R@10": 1.0, "median_rank": 2.0}
    assert oracle("a", "a" * 20) == {"R@1": 0.05, "R@5": 0.25, "R@10": 0.5, "median_rank": 10.0}


def test_oracle_is_what_random_order_within_equal_keys_gets():
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 12, 60)
    perfect = (keys[:, None] == keys[None, :]).astype(float)
    scores = [retrieval_metrics(ranks(perfect + 0.1 * draw.random(perfect.shape), np.arange(60))) for _ in range(300)]
    expected = oracle(keys.tolist(), keys.tolist())
    for key in ("R@1", "R@5"):
        assert np.mean([score[key] for score in scores]) == pytest.approx(expected[key], abs=0.01)


# ---- a whole evaluation, through a model that reads the answer ---------------------------------------------------------


WORDS = ("red", "blue", "green", "square", "circle", "spins", "falls")
TINY = {"size": "custom", "layers": 1, "width": 16, "heads": 2, "hidden": 16}


def clip(index: int, text: str | None, labels: tuple[str, ...] = ()) -> Clip:
    captions = () if text is None else (Caption(0.0, 1.0, text), Caption(1.0, 2.0, "green"))
    return Clip(f"clip-{index}", f"/{index}.mp4", None, None, None, captions, labels, "", index + 1)


def run_config(windows: int = 2) -> RunConfig:
    return RunConfig(
        output="unused",
        data=DataConfig(frames=4, size=16, audio_samples=64, words=4),
        model=ModelConfig(
            video=VideoConfig(patch=(2, 8, 8), **TINY),
            audio=AudioConfig(patch=16, **TINY),
            text=TextConfig(vocabulary=9, word_width=8, **TINY),
            heads=HeadsConfig(video_audio=8, video_text=9),
        ),
        evaluate=EvaluateConfig(windows=windows, batch_size=3),
    )


class Reader(nn.Module):
    """A model that sees a clip's number in the brightness of its frames, in its sound, and in its words.

    Its heads scale each window by `1 + window`, so that averaging after normalising would give something else.
    """

    def __init__(self, colour_of_clip: list[int]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.colours = torch.tensor(colour_of_clip)
        self.heads = SimpleNamespace(
            project_video=self.project_video, project_audio=self.project_audio, project_text=lambda x: x
        )

    def encode_video(self, video):
        assert not self.training, "evaluation has to switch training off"
        return video[:, 0, 0, 0, 0].long()

    def encode_audio(self, audio):
        return audio[:, 0].round().long()

    def encode_text(self, ids):
        return nn.functional.one_hot(ids[:, 0], 9).float()

    def project_video(self, number):
        return nn.functional.one_hot(number, 8).float(), nn.functional.one_hot(self.colours[number], 9).float()

    def project_audio(self, number):
        return nn.functional.one_hot(number, 8).float()


def fake_batches(missing=(), silent=()):
    def batches(config, catalogue, vocabulary):
        for index in range(len(catalogue)):
            if index in missing:
                continue
            windows = config.evaluate.windows
            has_audio = torch.full((windows,), index not in silent)
            yield (
                np.full(windows, index),
                np.arange(windows),
                Batch(
                    video=torch.full((windows, 4, 3, 16, 16), index, dtype=torch.uint8),
                    audio=torch.full((windows, 64), float(index)),
                    text=torch.zeros(windows, 5, 4, dtype=torch.int64),
                    has_text=torch.ones(windows, dtype=torch.bool),
                    has_audio=has_audio,
                    sample_id=torch.full((windows,), index),
                ),
            )

    return batches


def evaluate(monkeypatch, tmp_path, clips, model, **faults):
    monkeypatch.setattr(loader, "evaluation_batches", fake_batches(**faults))
    catalogue = Catalogue(tmp_path / "test.jsonl", clips)
    return retrieval.evaluate_retrieval(model, run_config(), catalogue, Vocabulary(WORDS)), catalogue


def test_a_model_that_reads_everything_reaches_the_oracle(monkeypatch, tmp_path):
    texts = ["red", "blue", "green", "square"]
    clips = [clip(i, text) for i, text in enumerate(texts)]
    model = Reader([2, 3, 4, 5]).train()
    (scores, _), _ = evaluate(monkeypatch, tmp_path, clips, model)
    for name in ("text_to_video", "audio_to_video", "video_to_audio"):
        assert scores[name]["R@1"] == 1.0 and scores[name]["median_rank"] == 1.0
        assert scores[name]["queries"] == scores[name]["gallery"] == 4
        assert scores[name]["chance"]["R@1"] == 0.25
    assert scores["text_to_video"]["oracle"]["R@1"] == 1.0 and scores["audio_to_video"]["oracle"] is None
    assert model.training, "the model is given back as it was"


def test_each_direction_compares_the_spaces_it_is_named_for(monkeypatch, tmp_path):
    # Colours rotated by one: sentences find the wrong video, sounds still find the right one.
    clips = [clip(i, text) for i, text in enumerate(["red", "blue", "green"])]
    (scores, _), _ = evaluate(monkeypatch, tmp_path, clips, Reader([3, 4, 2]))
    assert scores["text_to_video"]["R@1"] == 0.0 and scores["audio_to_video"]["R@1"] == 1.0


def test_absent_silent_and_speechless_clips_take_no_part_and_are_counted(monkeypatch, tmp_path):
    clips = [clip(0, "red"), clip(1, "blue"), clip(2, None), clip(3, "zebra"), clip(4, "square")]
    (scores, embeddings), _ = evaluate(monkeypatch, tmp_path, clips, Reader([2, 3, 4, 5, 5]), missing=(1,), silent=(2,))
    assert scores["clips"] == {"expected": 5, "found": 4, "heard": 3, "read": 3}
    assert (scores["text_to_video"]["queries"], scores["text_to_video"]["gallery"]) == (2, 4)
    assert (scores["audio_to_video"]["queries"], scores["audio_to_video"]["gallery"]) == (3, 4)
    assert (scores["video_to_audio"]["queries"], scores["video_to_audio"]["gallery"]) == (3, 3)
    assert not embeddings.video_text[1].any() and not embeddings.audio_video[2].any()


def test_windows_are_averaged_raw(monkeypatch, tmp_path):
    class Loud(Reader):
        def project_video(self, number):
            rows = torch.zeros(len(number), 8)
            rows[0, 0], rows[1:, 1] = 3.0, 1.0  # first window three times as long as the second
            return rows, torch.ones(len(number), 9)

    (_, embeddings), _ = evaluate(monkeypatch, tmp_path, [clip(0, "red")], Loud([2]))
    assert embeddings.video_audio[0, :2].tolist() == [1.5, 0.5]


def test_nothing_to_ask_is_null_and_not_a_score(monkeypatch, tmp_path):
    (scores, _), _ = evaluate(monkeypatch, tmp_path, [clip(0, None), clip(1, None)], Reader([2, 3]))
    assert scores["text_to_video"]["R@1"] is None and scores["text_to_video"]["queries"] == 0
    assert "-" in retrieval.table(scores)


def test_the_oracle_hears_shape_and_motion_only():
    def world(shape, colour, motion):
        return (f"shape:{shape}", f"colour:{colour}", f"motion:{motion}")

    clips = [
        clip(0, "red", world("square", "red", "falls")),
        clip(1, "red", world("square", "blue", "falls")),
        clip(2, "red", world("circle", "red", "falls")),
        clip(3, "red", world("circle", "red", "spins")),
    ]
    keys = retrieval.oracle_keys("text_to_video", clips)
    assert len(set(keys)) == 4, "labels tell these clips apart, whatever the captions say"
    keys = retrieval.oracle_keys("audio_to_video", clips)
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert oracle(keys, keys)["R@1"] == 0.75
    plain = [replace(c, labels=()) for c in clips]
    assert len(set(retrieval.oracle_keys("text_to_video", plain))) == 1
    assert retrieval.oracle_keys("video_to_audio", plain) is None


def test_thumbnails_of_bytes_and_of_floats_are_alike():
    frames = torch.randint(0, 256, (5, 3, 100, 80), dtype=torch.uint8)
    small = retrieval.thumbnail(frames)
    assert small.shape == (3, 64, 51, 3) and small.dtype == np.uint8
    assert np.abs(small.astype(int) - retrieval.thumbnail(frames.float() / 127.5 - 1)).max() <= 1
    tiny = frames[..., :16, :16]
    assert np.array_equal(retrieval.thumbnail(tiny)[0], tiny[0].permute(1, 2, 0).numpy())


def test_what_asks_and_what_answers():
    draw = np.random.default_rng(1)
    spaces = {name: draw.standard_normal((30, 6)).astype(np.float32) for name in ("va", "av", "vt", "tv")}
    spaces["av"] += spaces["va"]
    spaces["tv"] += spaces["vt"]
    yes = np.ones(30, bool)
    embeddings = retrieval.Embeddings(spaces["va"], spaces["av"], spaces["vt"], spaces["tv"], yes, yes, yes, np.empty(0))
    clips = [clip(i, "red") for i in range(30)]
    asked = {"text_to_video": ("tv", "vt"), "audio_to_video": ("av", "va"), "video_to_audio": ("va", "av")}
    found = {}
    for direction in retrieval.DIRECTIONS:
        query, gallery = asked[direction.name]
        order = np.argsort(-cosine_similarity(spaces[query], spaces[gallery]), axis=1)
        place = [order[i].tolist().index(i) for i in range(30)]
        found[direction.name] = retrieval.score(direction, embeddings, Catalogue("x", clips))
        assert found[direction.name]["R@1"] == pytest.approx(np.mean([p < 1 for p in place]))
        assert found[direction.name]["R@5"] == pytest.approx(np.mean([p < 5 for p in place]))
    assert found["audio_to_video"] != found["video_to_audio"], "the case has to tell the two ways apart"
