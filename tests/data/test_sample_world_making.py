"""Making a sample world: the same bytes again, interruptions, folders that are taken, arguments that cannot be used."""

import json
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from vatt.engine.config import ConfigError
from vatt.engine.data.sample_world import make as making
from vatt.engine.data.sample_world import make_sample_world
from vatt.engine.data.sample_world.encode import write_clip


def read_rows(catalogue: Path) -> list[dict]:
    return [json.loads(line) for line in catalogue.read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training clips and 8 test clips, made in this process."""
    out = tmp_path_factory.mktemp("sample") / "world"
    make_sample_world(out, 16, 8, seed=3, workers=1, progress=None)
    return out


def test_same_seed_same_bytes_and_more_training_clips_change_none(tmp_path: Path) -> None:
    make_sample_world(tmp_path / "a", 3, 2, seed=5, workers=1, progress=None)
    make_sample_world(tmp_path / "b", 5, 2, seed=5, workers=1, progress=None)
    make_sample_world(tmp_path / "c", 3, 2, seed=6, workers=1, progress=None)
    rows = {name: read_rows(tmp_path / name / "train.jsonl") for name in "abc"}
    assert rows["a"] == rows["b"][:3] and rows["a"] != rows["c"]
    assert (tmp_path / "a/test.jsonl").read_bytes() == (tmp_path / "b/test.jsonl").read_bytes()
    for clip in ("train/00000.mp4", "train/00002.mp4", "test/00001.mp4"):
        assert (tmp_path / "a" / clip).read_bytes() == (tmp_path / "b" / clip).read_bytes()
        assert (tmp_path / "a" / clip).read_bytes() != (tmp_path / "c" / clip).read_bytes()


def test_webm_bytes_repeat(tmp_path: Path) -> None:
    for name in "ab":
        make_sample_world(tmp_path / name, 1, 0, container="webm", workers=1, progress=None)
    assert (tmp_path / "a/train/00000.webm").read_bytes() == (tmp_path / "b/train/00000.webm").read_bytes()


def test_worker_processes_make_the_same_clips(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_sample_world(tmp_path, 16, 8, seed=3, workers=2)
    assert "sample world: 24/24 clips" in capfd.readouterr().err
    for clip in ("train/00000.mp4", "train/00015.mp4", "test/00007.mp4"):
        assert (tmp_path / clip).read_bytes() == (world / clip).read_bytes()


def test_killed_making_leaves_no_process(tmp_path: Path) -> None:
    """SIGKILL of the parent while two workers are busy: soon nobody writes into the folder any more."""
    script = tmp_path / "script.py"
    script.write_text(
        "from vatt.engine.data.sample_world import make_sample_world\n"
        f"if __name__ == '__main__':\n    make_sample_world({str(tmp_path / 'world')!r}, 400, 0, workers=2, progress=None)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("world/train/*.mp4")):
        assert parent.poll() is None and time.monotonic() < deadline, "no clip was made"
        time.sleep(0.05)
    workers = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/stat") if parent_of(p) == parent.pid]
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    for clip in tmp_path.glob("world/train/[0-9]*.mp4"):
        with av.open(str(clip)) as media:
            assert sum(1 for _ in media.decode(video=0)) == 40


def parent_of(stat: Path) -> int:
    """Parent of a process by its /proc entry; -1 if it is gone by now."""
    try:
        return int(stat.read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return -1


def test_interrupted_making_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = making.make_clip
    made = []

    def interrupted(job: making.Job) -> Path:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job.path)
        return whole(job)

    monkeypatch.setattr(making, "make_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_sample_world(tmp_path, 3, 1, workers=1, progress=None)
    assert not (tmp_path / "train.jsonl").exists() and not (tmp_path / "test.jsonl").exists()
    first = made[0].stat().st_mtime_ns
    monkeypatch.setattr(making, "make_clip", whole)
    make_sample_world(tmp_path, 3, 1, workers=1, progress=None)
    assert made[0].stat().st_mtime_ns == first, "whole clips are kept"
    assert len(read_rows(tmp_path / "train.jsonl")) == 3 and len(list(tmp_path.glob("*/*.mp4"))) == 4


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    frames = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(ValueError):
        write_clip(tmp_path / "clip.mp4", "mp4", frames, 10, np.zeros((2, 3, 4), dtype=np.float32), 48000)
    assert list(tmp_path.iterdir()) == []


def test_finished_world_is_kept_and_lost_clips_are_made_again(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = world / "train/00001.mp4"
    before, kept = clip.read_bytes(), (world / "train/00000.mp4").stat().st_mtime_ns
    make_sample_world(world, 16, 8, seed=3, workers=1)
    assert "all 24 clips are already there" in capsys.readouterr().err
    clip.unlink()
    make_sample_world(world, 16, 8, seed=3, workers=1)
    assert "24/24" in capsys.readouterr().err
    assert clip.read_bytes() == before and (world / "train/00000.mp4").stat().st_mtime_ns == kept


def test_folder_of_another_world_is_refused(world: Path) -> None:
    before = (world / "train.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"world: holds another sample world \(train 16, not 17\); choose another folder"):
        make_sample_world(world, 17, 8, seed=3, progress=None)
    with pytest.raises(ConfigError, match=r"seed 3, not 4; container mp4, not webm"):
        make_sample_world(world, 16, 8, seed=4, container="webm", progress=None)
    assert (world / "train.jsonl").read_bytes() == before


def test_folder_with_someone_elses_catalogue_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"holds a train.jsonl that is not a sample world's; choose another folder"):
        make_sample_world(tmp_path, 1, 1, progress=None)
    assert (tmp_path / "train.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"container": "avi"}, r"container: 'avi' is unknown; choose one of mp4, webm"),
        ({"train": -1}, r"train: -1 clips cannot be made; give 0 or more"),
        ({"test": -5}, r"test: -5 clips cannot be made; give 0 or more"),
        ({"train": 0, "test": 0}, r"train, test: both are 0"),
        ({"seed": -1}, r"seed: -1 is outside"),
        ({"workers": 0}, r"workers: 0 processes cannot work"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_sample_world(tmp_path / "out", **({"train": 1, "test": 1, "progress": None} | arguments))
    assert not (tmp_path / "out").exists(), "nothing is made before the arguments are known to be good"


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"file.*: cannot write \(Not a directory\); free some space or choose"):
        make_sample_world(tmp_path / "file" / "out", 1, 1, progress=None)


def test_splits_may_be_empty(tmp_path: Path) -> None:
    make_sample_world(tmp_path, 0, 1, workers=1, progress=None)
    assert read_rows(tmp_path / "train.jsonl") == [] and len(read_rows(tmp_path / "test.jsonl")) == 1


def test_making_needs_no_torch() -> None:
    code = "import sys, vatt.engine.data.sample_world; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
