"""What cannot be used, end to end through `vatt pretrain`: one line with file, row or key and the remedy, or a counted skip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest

from vatt.engine import cli, train
from vatt.engine.data.batch import Batch
from vatt.engine.run_directory import read_metrics

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test in a folder of its own: nothing may be written anywhere else."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that reaches a training step."""
    seen: list[Batch] = []
    train_step = train.train_step

    def noted(run: train.Run, batch: Batch, step: int) -> train.StepReport:
        seen.append(batch)
        return train_step(run, batch, step)

    monkeypatch.setattr(train, "train_step", noted)
    return seen


@pytest.fixture
def refused(micro_run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """refused(arguments..., config=...): the one line on stderr of a `vatt pretrain` that exits with 2 and leaves no run."""

    def run(*arguments: object, config: Path = micro_run, started: bool = False) -> str:
        output = [] if "--output" in arguments else ["--output", "run"]
        capfd.readouterr()
        code = cli.main(["pretrain", str(config), *output, "--stop_after", "3", *map(str, arguments)])
        said = capfd.readouterr()
        assert code == 2 and said.out == ""
        lines = said.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and errors[0] == lines[-1], said.err
        assert started or len(lines) == 1, said.err
        assert "Traceback" not in said.err
        assert not list(tmp_path.glob("run/checkpoints/*")) and not read_metrics(tmp_path / "run/metrics.jsonl")
        return errors[0]

    return run


@pytest.fixture
def rows(small_world: Path) -> list[Row]:
    """Six rows of the small world, with absolute paths."""
    found = [json.loads(line) for line in (small_world / "train.jsonl").read_text().splitlines()[:6]]
    return [row | {"video": str(small_world / row["video"])} for row in found]


def write(rows: list[Row], path: str = "clips.jsonl") -> Path:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def edited(small: Path, old: str, new: str) -> Path:
    """A copy of a configuration with one line changed."""
    text = small.read_text()
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    Path("edited.toml").write_text(text.replace(old, new))
    return Path("edited.toml")


# ---- settings --------------------------------------------------------------------------------------------------------


def test_an_unknown_key_names_the_nearest(refused: Callable[..., str], small_run: Path) -> None:
    message = refused("--optimizer.learning_rte", "1e-3")
    assert "--optimizer.learning_rte: unknown key; the nearest is optimizer.learning_rate" in message
    message = refused(config=edited(small_run, "word_width", "wrd_width"))
    assert "edited.toml: model.text.wrd_width: unknown key; the nearest is model.text.word_width" in message
    message = refused(config=edited(small_run, "[optimizer]", "[optimiser]"))
    assert "edited.toml: optimiser.learning_rate: unknown key; the nearest is optimizer.learning_rate" in message


def test_a_wrong_type_names_key_value_and_type(refused: Callable[..., str], small_run: Path) -> None:
    assert "--steps: expected an integer, got 'many'" in refused("--steps", "many")
    message = refused(config=edited(small_run, "batch_size = 16", 'batch_size = "16"'))
    assert 'edited.toml: batch_size: expected an integer, got string "16"' in message
    message = refused(config=edited(small_run, "patch = [2, 8, 8]", "patch = 8"))
    assert "edited.toml: model.video.patch: expected an array of 3 integers, got integer 8" in message
    assert 'expected one of "auto", "pyav", "dali"' in refused("--data.decoder", "ffmpeg")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.frames", 1, "data.frames: 1 is less than one patch of 2 (model.video.patch): no token on this axis"),
        ("data.size", 7, "data.size: 7 is less than one patch of 8 (model.video.patch): no token on this axis"),
        (
            "data.audio_samples",
            127,
            "data.audio_samples: 127 is less than one patch of 128 (model.audio.patch): no audio token",
        ),
    ],
)
def test_an_axis_without_a_patch(key: str, value: int, message: str, refused: Callable[..., str]) -> None:
    assert message in refused(f"--{key}", value)


def test_accumulation_is_refused_with_the_reason(refused: Callable[..., str], small_run: Path) -> None:
    for message in (
        refused("--backend.gradient_accumulation_steps", 4),
        refused("--gradient_accumulation_steps", 4),
        refused(config=edited(small_run, "[backend]", "[backend]\ngradient_accumulation_steps = 4")),
        refused(config=edited(small_run, "seed = 3", "seed = 3\ngradient_accumulation_steps = 4")),
    ):
        assert "gradient_accumulation_steps" in message and "micro-batch" in message
        assert "lower batch_size, or add ranks" in message


def test_dali_is_not_silently_something_else(refused: Callable[..., str]) -> None:
    assert 'data.decoder: "dali" does not decode anything yet; use "pyav" or "auto"' in refused("--data.decoder", "dali")


def test_a_batch_larger_than_the_catalogue_and_the_corrected_one(
    refused: Callable[..., str], micro_run: Path, tmp_path: Path
) -> None:
    message = refused("--batch_size", 8)
    assert "batch_size: 8 is more than the 6 clips of" in message and "few.jsonl" in message and "lower batch_size" in message
    # What was refused must not stand in the way of the corrected run in the same folder.
    assert cli.main(["pretrain", str(micro_run), "--output", "run", "--stop_after", "1"]) == 0


def test_a_batch_that_the_ranks_cannot_share(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vatt.engine.distributed import Process

    class Shared:
        def __enter__(self) -> Process:
            return Process(rank=0, world_size=3)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(train, "joined", lambda config: Shared())
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    message = refused()
    assert "batch_size: 4 does not divide among 3 ranks; use a multiple" in message


def test_no_catalogue_named_or_none_there(refused: Callable[..., str]) -> None:
    assert "data.train: no catalogue named; make one with `vatt data sample-world`" in refused("--data.train=")
    assert "absent.jsonl: cannot read the catalogue: No such file or directory; check the path" in refused(
        "--data.train", "absent.jsonl"
    )
    assert "absent.jsonl: cannot read the catalogue" in refused("--data.test", "absent.jsonl")
    assert not Path("run").exists(), "found out before anything is written"
    Path("empty.jsonl").write_text("\n")
    assert "empty.jsonl: no clips" in refused("--data.train", "empty.jsonl")


def test_a_folder_that_is_not_a_run(refused: Callable[..., str]) -> None:
    Path("thesis").mkdir()
    Path("thesis/thesis.tex").write_text("years of work")
    message = refused("--output", "thesis")
    assert "output: thesis holds files and no config.toml, so it is not a run; name another folder" in message
    assert [path.name for path in Path("thesis").iterdir()] == ["thesis.tex"]
    Path("file").write_text("")
    assert "output: file is a file; name a folder" in refused("--output", "file")


def test_other_settings_on_resume(micro_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = ["pretrain", str(micro_run), "--output", "run", "--stop_after", "2"]
    assert cli.main(start) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert cli.main([*start, "--optimizer.learning_rate", "1e-2", "--seed", "9"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: output: run is a run with other settings: ")
    assert (
        "seed was 3, is 9" in said and "optimizer.learning_rate was 0.0005, is 0.01" in said and "name another folder" in said
    )
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_model_is_refused_before_it_is_used(micro_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Somebody edited config.toml, or copied a checkpoint: names and shapes tell."""
    assert cli.main(["pretrain", str(micro_run), "--output", "run", "--stop_after", "2"]) == 0
    other = ["pretrain", str(micro_run), "--output", "other", "--stop_after", "2", "--model.heads.video_text", "4"]
    assert cli.main(other) == 0
    shutil.rmtree("other/checkpoints")
    shutil.copytree("run/checkpoints", "other/checkpoints")
    capfd.readouterr()
    assert cli.main([*other[:5], "3", *other[6:]]) != 0
    said = capfd.readouterr().err.splitlines()
    assert "heads" in said[-1] and "shape" in said[-1] and said[-1].startswith("error: "), said


# ---- catalogues ------------------------------------------------------------------------------------------------------


def changed(rows: list[Row], index: int, **fields: object) -> list[Row]:
    return [row | fields if i == index else row for i, row in enumerate(rows)]


BAD_ROWS: dict[str, tuple[Callable[[list[Row]], list[Row]], str]] = {
    "no id": (lambda rows: [rows[0], {k: v for k, v in rows[1].items() if k != "id"}, *rows[2:]], 'line 2: no "id"'),
    "an id twice": (
        lambda rows: changed(rows, 4, id=rows[1]["id"]),
        "line 5: duplicate id 'train-00001', first used on line 2; ids must be unique",
    ),
    "NaN": (lambda rows: changed(rows, 2, start=float("nan")), 'line 3: "start"'),
    "infinite": (lambda rows: changed(rows, 2, end=float("inf")), 'line 3: "end"'),
    "reversed": (lambda rows: changed(rows, 0, start=3.0, end=1.0), "line 1: "),
    "a reversed caption": (
        lambda rows: changed(rows, 3, captions=[{"start": 2.0, "end": 1.0, "text": "red"}]),
        "line 4: captions[0]: ",
    ),
    "an unknown field": (lambda rows: changed(rows, 5, lables=["a"]), "line 6: unknown field 'lables'; did you mean 'labels'?"),
    "a number for a path": (lambda rows: changed(rows, 5, video=7), 'line 6: "video" must be a path, not 7'),
}


@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bad_row_is_named_by_its_line(case: str, split: str, rows: list[Row], refused: Callable[..., str]) -> None:
    make, says = BAD_ROWS[case]
    message = refused(f"--data.{split}", write(make(rows)))
    assert f"clips.jsonl: {says}" in message
    assert not Path("run").exists()


def test_several_bad_rows_are_all_named(rows: list[Row], micro_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write([rows[0], rows[0], *rows[2:5], {"id": "x"}])
    assert cli.main(["pretrain", str(micro_run), "--output", "run", "--data.train", "clips.jsonl"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: clips.jsonl: 2 bad rows\n") and "line 2: duplicate id" in said and "line 6: neither" in said


# ---- files -----------------------------------------------------------------------------------------------------------


def make_absent(path: Path, source: Path) -> None:
    """Nothing there."""


def make_empty(path: Path, source: Path) -> None:
    path.write_bytes(b"")


def make_truncated(path: Path, source: Path) -> None:
    content = source.read_bytes()
    path.write_bytes(content[: len(content) // 3])


def make_text(path: Path, source: Path) -> None:
    path.write_text("this is no film\n" * 100)


def remux(path: Path, source: Path, *, sound_until: float | None, pictures: bool = True) -> None:
    """The streams of `source` without its sound (None), or with the first `sound_until` seconds of it."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        kept = [*(reader.streams.video if pictures else []), *(reader.streams.audio if sound_until is not None else [])]
        streams = {stream.index: writer.add_stream_from_template(stream) for stream in kept}
        for packet in reader.demux(kept):
            late = (
                packet.stream.type == "audio" and packet.pts is not None and float(packet.pts * packet.time_base) > sound_until
            )
            if packet.dts is not None and not late:
                packet.stream = streams[packet.stream.index]
                writer.mux(packet)


def make_sound_only(path: Path, source: Path) -> None:
    remux(path, source, sound_until=100.0, pictures=False)


UNREADABLE = {
    "absent": (make_absent, "no such file"),
    "zero-byte": (make_empty, ""),
    "truncated": (make_truncated, ""),
    "text": (make_text, ""),
    "sound only": (make_sound_only, "no video stream"),
}


def spoilt(rows: list[Row], make: Callable[[Path, Path], None], index: int = 2) -> Path:
    make(Path("spoilt.mp4"), Path(rows[index]["video"]))
    return write(changed(rows, index, video="spoilt.mp4"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_clip_is_replaced_and_counted(
    case: str, workers: int, rows: list[Row], micro_run: Path, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = spoilt(rows, UNREADABLE[case][0])
    overrides = ["--output", "run", "--stop_after", "5", "--data.train", str(catalogue), "--data.workers", str(workers)]
    assert cli.main(["pretrain", str(micro_run), *overrides]) == 0
    check_full(batches, 5)
    met = sum(batch.sample_id.tolist().count(2) for batch in batches)
    assert met >= 3
    counts = read_metrics(Path("run/metrics.jsonl"))[-1]["counts"]
    assert counts["substituted"] == met and counts["clips"] == 20
    said = [record.message for record in caplog.records if "another clip takes its place" in record.message]
    assert len(said) == 1 and "clips.jsonl: line 3: " in said[0] and "spoilt.mp4: " in said[0]
    # The substitute is a readable clip, whole: its pictures are in no row of silence.
    assert all(batch.video[batch.sample_id.tolist().index(2)].float().std() > 1 for batch in batches if 2 in batch.sample_id)


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_clip_ends_the_run_if_asked(case: str, rows: list[Row], refused: Callable[..., str]) -> None:
    make, reason = UNREADABLE[case]
    catalogue = spoilt(rows, make, index=train_first(rows))
    message = refused("--data.train", catalogue, "--data.on_bad_clip", "error")
    assert f"clips.jsonl: line {train_first(rows) + 1}: " in message and "spoilt.mp4" in message and reason in message
    assert (
        "paths are relative to the catalogue" in message if case == "absent" else 'data.on_bad_clip = "substitute"' in message
    )


def train_first(rows: list[Row]) -> int:
    """The clip the first step of the micro run begins with."""
    from vatt.engine.data.order import batch_samples

    return int(batch_samples(0, 4, 3, len(rows))[0])


def test_nothing_but_absent_files(rows: list[Row], micro_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write([row | {"video": "gone.mp4"} for row in rows])
    assert cli.main(["pretrain", str(micro_run), "--output", "run", "--data.train", "clips.jsonl"]) == 2
    said = capfd.readouterr().err
    assert "clips.jsonl: 6 bad rows" in said and "gone.mp4: no such file" in said and "relative to the catalogue" in said


def check_full(batches: list[Batch], steps: int) -> None:
    """Whatever was wrong with a clip, a batch is full and of the right shape."""
    assert len(batches) == steps
    for batch in batches:
        assert batch.video.shape == (4, 2, 3, 16, 16) and batch.audio.shape == (4, 1600) and batch.text.shape == (4, 2, 6)
        assert batch.audio.isfinite().all()


def test_a_video_without_sound_is_masked_and_counted_or_ends_the_run(
    rows: list[Row], micro_run: Path, batches: list[Batch], refused: Callable[..., str]
) -> None:
    catalogue = spoilt(rows, lambda path, source: remux(path, source, sound_until=None), index=train_first(rows))
    assert cli.main(["pretrain", str(micro_run), "--output", "run1", "--stop_after", "5", "--data.train", str(catalogue)]) == 0
    check_full(batches, 5)
    silent = train_first(rows)
    for batch in batches:
        for sample, heard, audio in zip(batch.sample_id.tolist(), batch.has_audio.tolist(), batch.audio, strict=True):
            assert heard == (sample != silent) == bool(audio.any())
    lines = read_metrics(Path("run1/metrics.jsonl"))
    assert lines[-1]["counts"]["no_audio"] == sum(batch.sample_id.tolist().count(silent) for batch in batches) > 0
    assert "substituted" not in lines[-1]["counts"] and lines[-1]["skipped_steps"] == 0
    message = refused("--data.train", catalogue, "--data.on_missing_audio", "error")
    assert "spoilt.mp4: clip" in message and "has no sound in its window" in message and "data.on_missing_audio" in message


def test_sound_shorter_than_the_video_is_padded_and_counted(rows: list[Row], micro_run: Path, batches: list[Batch]) -> None:
    catalogue = write([row | {"video": f"{i}.mp4"} for i, row in enumerate(rows)])
    for index, row in enumerate(rows):
        remux(Path(f"{index}.mp4"), Path(row["video"]), sound_until=2.0)
    assert cli.main(["pretrain", str(micro_run), "--output", "run", "--stop_after", "5", "--data.train", str(catalogue)]) == 0
    check_full(batches, 5)
    counts = read_metrics(Path("run/metrics.jsonl"))[-1]["counts"]
    silent = sum(int((~batch.has_audio).sum()) for batch in batches)
    ended = sum(
        bool(heard and not audio[-200:].any()) for b in batches for heard, audio in zip(b.has_audio, b.audio, strict=True)
    )
    assert counts["no_audio"] == silent > 0 and counts["short_audio"] >= ended > 0
    assert counts["clips"] == 20 and "substituted" not in counts


def test_clips_without_captions_are_left_out_of_the_text_loss(rows: list[Row], micro_run: Path, batches: list[Batch]) -> None:
    mute = [row | {"captions": []} if i % 2 else row for i, row in enumerate(rows)]
    mute[0] = rows[0] | {"captions": [{"text": "..."}]}
    catalogue = write(mute)
    assert cli.main(["pretrain", str(micro_run), "--output", "run", "--stop_after", "5", "--data.train", str(catalogue)]) == 0
    check_full(batches, 5)
    for batch in batches:
        for sample, read, text in zip(batch.sample_id.tolist(), batch.has_text.tolist(), batch.text, strict=True):
            assert read == (sample in (2, 4)) == bool(text.any())
    lines = read_metrics(Path("run/metrics.jsonl"))
    assert lines[-1]["counts"]["no_text"] == sum(int((~batch.has_text).sum()) for batch in batches)
    assert all(line["loss_video_text"] is not None for line in lines) and lines[-1]["skipped_steps"] == 0


def test_no_captions_at_all_trains_on_sound_alone(rows: list[Row], micro_run: Path, batches: list[Batch]) -> None:
    catalogue = write([row | {"captions": []} for row in rows])
    assert cli.main(["pretrain", str(micro_run), "--output", "run", "--stop_after", "3", "--data.train", str(catalogue)]) == 0
    lines = read_metrics(Path("run/metrics.jsonl"))
    assert [line["loss_video_text"] for line in lines] == [0.0] * 3 and lines[-1]["skipped_steps"] == 0
    assert all(line["loss_video_audio"] > 0 and line["gradient_norm"] > 0 for line in lines)
    assert not any(batch.has_text.any() for batch in batches)


def test_a_clip_shorter_than_the_window_loops_and_is_counted_or_ends_the_run(
    rows: list[Row], micro_run: Path, batches: list[Batch], refused: Callable[..., str]
) -> None:
    catalogue = write(changed(rows, train_first(rows), start=1.0, end=1.3))
    assert cli.main(["pretrain", str(micro_run), "--output", "run1", "--stop_after", "5", "--data.train", str(catalogue)]) == 0
    check_full(batches, 5)
    met = sum(batch.sample_id.tolist().count(train_first(rows)) for batch in batches)
    assert read_metrics(Path("run1/metrics.jsonl"))[-1]["counts"]["looped"] == met > 0
    message = refused("--data.train", catalogue, "--data.on_short_clip", "error")
    assert "is shorter than the window of 0.8 s" in message and "data.on_short_clip" in message


@pytest.mark.parametrize("policy", ["substitute", "error"])
def test_an_unreadable_test_clip(
    policy: str, rows: list[Row], micro_run: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing takes its place where clips are ranked: it is left out and counted, or ends the command."""
    write(changed(rows, 2, video="spoilt.mp4"), "test.jsonl")
    make_text(Path("spoilt.mp4"), Path("unused"))
    overrides = ["--output", "run", "--steps", "2", "--optimizer.warmup", "1", "--data.test", "test.jsonl"]
    code = cli.main(["pretrain", str(micro_run), *overrides, "--data.on_bad_clip", policy])
    said = capfd.readouterr().err
    if policy == "error":
        assert code == 2 and said.splitlines()[-1].startswith("error: test.jsonl: line 3: ") and "spoilt.mp4" in said
        return
    assert code == 0 and "test.jsonl: line 3: " in caplog.text and "left out of the evaluation" in caplog.text
    assert "5 of 6 clips found" in said
    scores = json.loads(Path("run/evaluation.json").read_text())
    assert scores["clips"]["expected"] == 6 and scores["clips"]["found"] == 5
    assert scores["text_to_video"]["gallery"] == 5
