"""Batches: always full, of the right shape, and a function of seed and step alone."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from vatt.engine.config import AugmentConfig, ConfigError, DataConfig, EvaluateConfig, RunConfig
from vatt.engine.data.catalogue import Catalogue, CatalogueError
from vatt.engine.data.decode import DecodeError
from vatt.engine.data.loader import ClipLoader, evaluation_batches, substitute
from vatt.engine.data.order import batch_samples
from vatt.engine.data.words import Vocabulary

BATCH = 6
DATA = DataConfig(frames=4, fps=2.5, size=32, audio_rate=8000, captions=3, words=8, workers=0)
SEVEN_WORDS = Vocabulary(["number", "second", *"01234"])


def config(**data):
    augment = AugmentConfig(area=(0.3, 1.0), audio_noise=0.01)
    return RunConfig(
        batch_size=BATCH, seed=11, data=replace(DATA, **data), augment=augment, evaluate=EvaluateConfig(windows=3, batch_size=8)
    )


def catalogue(studio, folder, rows):
    return Catalogue.read(studio.write_catalogue(folder / "clips.jsonl", rows))


@pytest.fixture
def good(studio, clips, tmp_path):
    return catalogue(studio, tmp_path, clips.rows)


def contents(batches):
    """Every byte of every batch."""
    return [{name: field.numpy().tobytes() for name, field in vars(batch).items()} for batch in batches]


def load(run, clips, first, last, **ranks):
    with ClipLoader(run, clips, SEVEN_WORDS, **ranks) as loader:
        return list(loader.batches(first, last)), loader.counts


def test_shapes_dtypes_and_samples(good):
    batches, counts = load(config(), good, 3, 5)
    for step, batch in zip((3, 4), batches, strict=True):
        assert batch.video.shape == (BATCH, 4, 3, 32, 32) and batch.video.dtype == torch.uint8
        assert batch.audio.shape == (BATCH, 12800) and batch.audio.dtype == torch.float32 and batch.audio.abs().max() <= 1
        assert batch.text.shape == (BATCH, 3, 8) and batch.text.dtype == torch.int64
        assert batch.has_text.dtype == batch.has_audio.dtype == torch.bool and batch.has_text.all() and batch.has_audio.all()
        assert batch.sample_id.tolist() == batch_samples(step, BATCH, 11, len(good)).tolist()
    assert counts == {"clips": 12, "decoded": 12}


def test_workers_cache_and_layout_change_nothing(good):
    expected, _ = load(config(), good, 0, 5)
    for data in ({"workers": 1}, {"workers": 2, "prefetch": 3}, {"cache": "memory"}, {"workers": 2, "cache": "memory"}):
        batches, counts = load(config(**data), good, 0, 5)
        assert contents(batches) == contents(expected), data
        assert counts["decoded"] == (12 if "cache" in data else 30)


def test_a_full_cache_changes_nothing_and_says_so_once(good, caplog):
    expected, _ = load(config(), good, 0, 5)
    batches, counts = load(config(cache="memory", cache_bytes=600_000), good, 0, 5)
    assert contents(batches) == contents(expected) and 12 < counts["decoded"] < 30
    assert [record.message for record in caplog.records if "cache is full" in record.message] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_hold_the_slices_of_the_global_batch(good, world_size):
    whole, _ = load(config(), good, 0, 3)
    parts = [load(config(), good, 0, 3, rank=rank, world_size=world_size)[0] for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for name, field in vars(batch).items():
            assert torch.equal(torch.cat([getattr(part[step], name) for part in parts]), field), name


def test_starting_at_a_step_equals_getting_there(good):
    whole, _ = load(config(workers=1), good, 0, 6)
    for step in (1, 4):
        assert contents(load(config(), good, step, 6)[0]) == contents(whole[step:])
    with ClipLoader(config(workers=1), good, SEVEN_WORDS) as loader:
        abandoned = loader.batches(0, 6)
        next(abandoned)
        abandoned.close()
        assert contents(loader.batches(2, 4)) == contents(whole[2:4])


def test_batches_own_their_memory(good):
    with ClipLoader(config(workers=1, prefetch=1), good, SEVEN_WORDS) as loader:
        kept = []
        before = []
        for batch in loader.batches(0, 4):
            kept.append(batch)
            before += contents([batch])
    assert contents(kept) == before
    assert loader.wait_seconds > 0


def test_seed_and_step_decide_the_draws(studio, clips, tmp_path):
    """The same clip at another step, or with another seed, is another window, crop and noise."""
    rows = catalogue(studio, tmp_path, clips.rows[:6])
    first, _ = load(config(), rows, 0, 2)
    again = replace(config(), seed=12)
    other, _ = load(again, rows, 0, 1)
    for sample in range(6):
        views = [batch.video[batch.sample_id == sample] for batch in (*first, *other)]
        assert not torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_the_window_decides_sound_and_words_together(studio, tmp_path):
    """A clip whose sound and captions both tell the second: they agree in every batch."""
    times = [i / 10 for i in range(80)]
    studio.write_media(tmp_path / "a.mkv", times, sound=lambda t: np.floor(t) / 10, key_every=5)
    captions = [{"start": s + 0.3, "end": s + 0.7, "text": str(s)} for s in range(8)]
    rows = catalogue(
        studio, tmp_path, [{"id": str(i), "video": "a.mkv", "captions": captions, "start": 1, "end": 7} for i in range(6)]
    )
    run = config(frames=4, fps=4.0, audio_samples=8000, captions=1)
    run = replace(run, augment=AugmentConfig(crop="centre", flip=0, jitter_probability=0))
    seen = set()
    words = Vocabulary([str(s) for s in range(8)])
    with ClipLoader(run, rows, words) as loader:
        for batch in loader.batches(0, 6):
            for audio, text in zip(batch.audio, batch.text, strict=True):
                levels = (audio.numpy() * 10).round(1)
                step = int(np.argmax(levels > levels[0] + 0.5))  # where the second changes within the window
                second = levels[0] + (0 if step > 4000 or step == 0 else 1)
                assert levels[0] >= 1 and levels[-1] <= 7 and int(text[0, 0]) - 2 == second
                seen.add(int(second))
    assert len(seen) >= 4


def test_captions(studio, clips, tmp_path):
    """Nearest first, repeated in turn, those without a known word left out; none at all is no text."""
    video = clips.rows[0]["video"]

    def texts(captions, **changes):
        rows = [{"id": str(i), "video": video, "captions": captions} for i in range(6)]
        (batch,), counts = load(config(**changes), catalogue(studio, tmp_path, rows), 0, 1)
        return batch.text[0].tolist(), bool(batch.has_text[0]), counts["no_text"]

    known = [{"start": s, "end": s, "text": t} for s, t in ((50, "second 1"), (30, "zebra"), (40, "Number 0!"))]
    rows, has_text, missing = texts(known)
    assert rows == [[2, 4] + [0] * 6, [3, 5] + [0] * 6, [2, 4] + [0] * 6] and has_text and missing == 0
    for useless in ([], [{"text": "zebra ?!"}], [{"text": ""}]):
        assert texts(useless) == ([[0] * 8] * 3, False, 6)


def bad_rows(studio, clips, folder):
    """Twelve good rows, one repeated, and six kinds of bad ones: more than 30 % bad."""
    good = clips.rows[:11]
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a film\n" * 200)
    whole = (clips.folder / "0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    studio.write_sound(folder / "sound.wav", rate=16000)
    bad = ["empty.mp4", "text.mp4", "cut.mp4", "absent.mp4", "sound.wav", "http://x/y.mp4"]
    return [*good[:5], *({"id": name, "video": name} for name in bad), *good[5:]]


def test_substitutes_are_the_other_clips_each_as_often():
    for index in (0, 2, 5):
        drawn = np.bincount([substitute(index, attempt, 11, 6) for attempt in range(1, 3001)], minlength=6)
        assert drawn[index] == 0 and len(drawn) == 6
        assert np.delete(drawn, index).min() > 500, drawn


def test_a_substitute_that_is_bad_too_gives_way_to_the_next_of_the_same_list(studio, clips, tmp_path):
    """Of 17 clips, only three can be read: most first substitutes are bad themselves."""
    (tmp_path / "text.mp4").write_text("not a film")
    rows = catalogue(studio, tmp_path, [*clips.rows[:3], *({"id": f"b{i}", "video": "text.mp4"} for i in range(14))])
    with ClipLoader(config(), rows, SEVEN_WORDS) as loader:
        for batch in loader.batches(0, 3):
            for sample, text in zip(batch.sample_id.tolist(), batch.text, strict=True):
                attempt, shown = 0, sample
                while shown > 2:
                    attempt += 1
                    shown = substitute(sample, attempt, 11, 17)
                assert text[0, 1] == SEVEN_WORDS.encode(rows[shown].id.removeprefix("clip-"), 1)[0]
        assert loader.counts["substituted"] == sum(s > 2 for step in range(3) for s in batch_samples(step, BATCH, 11, 17))


@pytest.mark.parametrize("data", [{}, {"workers": 2, "cache": "memory"}])
def test_bad_clips_are_replaced_and_counted(studio, clips, tmp_path, caplog, data):
    rows = catalogue(studio, tmp_path, bad_rows(studio, clips, tmp_path))
    bad = set(range(5, 11))
    with ClipLoader(config(**data), rows, SEVEN_WORDS) as loader:
        batches = list(loader.batches(0, 17))  # six epochs of 17
        counts = loader.counts
    assert all(len(batch) == BATCH and batch.video.flatten(1).any(1).all() and batch.has_audio.all() for batch in batches)
    samples = np.concatenate([batch.sample_id for batch in batches])
    assert np.bincount(samples, minlength=17).tolist() == [6] * 17
    assert counts["substituted"] == 6 * len(bad) and counts["clips"] == 17 * BATCH
    # A substitute is a function of the seed and the clip: its words tell which it is, at every step the same.
    for sample in bad:
        attempt = 1
        while (other := substitute(sample, attempt, 11, 17)) in bad:
            attempt += 1
        number = int(rows[other].id.removeprefix("clip-"))
        texts = torch.cat([batch.text[batch.sample_id == sample] for batch in batches])
        expected = SEVEN_WORDS.encode(str(number), 1)[0]
        assert (texts[:, 0, 1] == expected).all()
    told = [record.message for record in caplog.records if "another clip takes its place" in record.message]
    assert len(told) == len(bad), told
    for row in sorted(bad):
        name = rows[row].video
        assert sum(f"line {row + 1}: {name}: " in message for message in told) == 1
    assert any("absent.mp4: no such file" in record.message for record in caplog.records)


def test_a_bad_clip_may_end_the_run(studio, clips, tmp_path):
    (tmp_path / "text.mp4").write_text("not a film")
    rows = [*clips.rows[:8], {"id": "bad", "video": "text.mp4"}]
    for workers in (0, 1):
        loaded = catalogue(studio, tmp_path, rows)
        with ClipLoader(config(on_bad_clip="error", workers=workers), loaded, SEVEN_WORDS) as loader:
            before = next(step for step in range(9) if 8 in batch_samples(step, BATCH, 11, 9))
            assert len(list(loader.batches(0, before))) == before
            with pytest.raises(DecodeError, match=r"clips\.jsonl: line 9: .*text\.mp4: not readable.*on_bad_clip"):
                list(loader.batches(before, before + 1))
    (tmp_path / "text.mp4").unlink()
    with pytest.raises(CatalogueError, match=r"clips\.jsonl: line 9: .*text\.mp4: no such file"):
        ClipLoader(config(on_bad_clip="error"), catalogue(studio, tmp_path, rows), SEVEN_WORDS)


def test_nothing_but_bad_clips(studio, tmp_path):
    (tmp_path / "text.mp4").write_text("not a film")
    rows = catalogue(studio, tmp_path, [{"id": str(i), "video": "text.mp4"} for i in range(6)])
    with (
        ClipLoader(config(), rows, SEVEN_WORDS) as loader,
        pytest.raises(CatalogueError, match="64 clips in a row cannot be read"),
    ):
        next(loader.batches(0, 1))
    absent = catalogue(studio, tmp_path, [{"id": str(i), "video": f"{i}.mp4"} for i in range(6)])
    with pytest.raises(CatalogueError, match="6 bad rows"):
        ClipLoader(config(), absent, SEVEN_WORDS)


def test_short_and_silent_clips_are_counted_or_refused(studio, clips, tmp_path):
    studio.write_media(tmp_path / "silent.mp4", sound=None)
    studio.write_media(tmp_path / "quiet.mkv", seconds=1.0)
    rows = [{"id": f"short{i}", "video": clips.rows[0]["video"], "end": 1.0} for i in range(2)]
    rows += [{"id": f"silent{i}", "video": "silent.mp4"} for i in range(2)]
    rows += [{"id": f"quiet{i}", "video": "quiet.mkv", "end": 1.7} for i in range(2)]
    loaded = catalogue(studio, tmp_path, rows)
    (batch,), counts = load(config(), loaded, 0, 1)
    assert counts == {"clips": 6, "decoded": 6, "looped": 2, "no_audio": 2, "short_audio": 2, "no_text": 6}
    for sample, has_audio, audio in zip(batch.sample_id.tolist(), batch.has_audio.tolist(), batch.audio, strict=True):
        assert has_audio == (sample not in (2, 3)) and bool(audio.any()) == has_audio
    with pytest.raises(DecodeError, match=r"clip 'short.' is shorter than the window of 1.6 s.*data\.on_short_clip"):
        load(config(on_short_clip="error"), loaded, 0, 1)
    with pytest.raises(DecodeError, match=r"clip 'silent.' has no sound in its window.*data\.on_missing_audio"):
        load(config(on_missing_audio="error"), loaded, 0, 1)


def test_settings_that_cannot_work(good):
    with pytest.raises(ConfigError, match="batch_size: 14 is more than the 12 clips"):
        ClipLoader(replace(config(), batch_size=14), good, SEVEN_WORDS)
    with pytest.raises(ConfigError, match="batch_size: 6 does not divide among 4 ranks"):
        ClipLoader(config(), good, SEVEN_WORDS, world_size=4)
    run = config()
    small = replace(run.model, text=replace(run.model.text, vocabulary=8))
    with pytest.raises(ConfigError, match=r"model\.text\.vocabulary: 8 rows are too few for a vocabulary of 9"):
        ClipLoader(replace(run, model=small), good, SEVEN_WORDS)


def test_a_killed_worker_is_replaced(good, caplog):
    expected, _ = load(config(), good, 0, 8)
    with ClipLoader(config(workers=2), good, SEVEN_WORDS) as loader:
        batches = []
        for step, batch in enumerate(loader.batches(0, 8)):
            batches.append(batch)
            if step in (1, 4):
                os.kill(loader._pipeline.pool.process_ids[step % 2], signal.SIGKILL)
    assert contents(batches) == contents(expected)
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and all("was ended by signal 9" in text and "takes over" in text for text in told)


def alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_closing_leaves_no_process(good):
    loader = ClipLoader(config(workers=2), good, SEVEN_WORDS)
    ids = loader._pipeline.pool.process_ids
    next(loader.batches(0, 4))
    loader.close()
    loader.close()
    assert not any(alive(i) for i in ids)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(good, tmp_path, ending):
    """Also one that is not a guarded script: the workers must not run it again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from vatt.engine.config import DataConfig, RunConfig\n"
        "from vatt.engine.data.catalogue import Catalogue\n"
        "from vatt.engine.data.loader import ClipLoader\n"
        "from vatt.engine.data.words import Vocabulary\n"
        "run = RunConfig(batch_size=2, data=DataConfig(frames=4, fps=2.5, size=32, audio_rate=8000, workers=2))\n"
        f"loader = ClipLoader(run, Catalogue.read({str(good.path)!r}), Vocabulary(['a']))\n"
        "batches = loader.batches(0, 1000)\n"
        "next(batches)\n"
        "print(*loader._pipeline.pool.process_ids, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    ids = [int(word) for word in process.stdout.readline().split()]
    assert len(ids) == 2 and all(alive(i) for i in ids)
    process.send_signal(ending)
    process.wait(timeout=20)
    deadline = time.monotonic() + 20
    while any(alive(i) for i in ids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(i) for i in ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_windows(studio, clips, tmp_path, caplog, workers):
    (tmp_path / "text.mp4").write_text("not a film")
    rows = catalogue(studio, tmp_path, [*clips.rows[:4], {"id": "bad", "video": "text.mp4"}, *clips.rows[4:6]])
    run = config(workers=workers)
    found = list(evaluation_batches(run, rows, SEVEN_WORDS))
    indices = np.concatenate([clip for clip, _, _ in found]), np.concatenate([window for _, window, _ in found])
    expected = [(clip, window) for clip in (0, 1, 2, 3, 5, 6) for window in range(3)]
    assert list(zip(*(i.tolist() for i in indices), strict=True)) == expected
    assert all(len(batch) == len(clip) <= 8 for clip, _, batch in found)
    video, text = torch.cat([b.video for *_, b in found]), torch.cat([b.text for *_, b in found])
    # The same clip in every row, so windows differ and clips do not; windows start at 0, 1.2 and 2.4 s.
    assert torch.equal(video[0], video[3]) and not torch.equal(video[0], video[1])
    assert text[:3, 0, 3].tolist() == [SEVEN_WORDS.encode(second, 1)[0] for second in ("0", "1", "3")]
    assert sum("left out of the evaluation" in record.message for record in caplog.records) == 1
    with pytest.raises(DecodeError, match="line 5"):
        list(evaluation_batches(config(workers=workers, on_bad_clip="error"), rows, SEVEN_WORDS))


def test_the_centre_window_is_not_augmented(studio, tmp_path):
    """One window: the centre of the clip, the centre of the frame, the sound as it is."""
    studio.write_media(tmp_path / "a.mkv", [i / 10 for i in range(40)], size=(32, 32), rate=16000)
    rows = catalogue(studio, tmp_path, [{"id": "a", "video": "a.mkv", "end": 4.0}])
    run = replace(config(), evaluate=EvaluateConfig(windows=1))
    ((_, window, batch),) = evaluation_batches(run, rows, SEVEN_WORDS)
    assert window.tolist() == [0]
    assert [studio.number_of(frame) for frame in batch.video[0].permute(0, 2, 3, 1).numpy()] == [12, 16, 20, 24]
    expected = studio.chirp(1.2 + np.arange(12800) / 8000)
    assert np.abs(batch.audio[0].numpy() - expected).mean() < 2e-3


def test_workers_import_no_torch():
    code = "import sys, vatt.engine.data.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.WARNING, logger="vatt.data")
