"""Make a sample world: real audio-video files with captions and labels, from nothing but a seed.

Everything about a clip but its combination is a function of (seed, split, index). Its combination also depends on how
many are held out, min(test, 200): two worlds of one seed, container and that number agree on every clip they share, bytes
included (on one machine with one PyAV; elsewhere the scenes agree and the encoders may round differently).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vatt.engine.config import ConfigError
from vatt.engine.data.sample_world.captions import draw_captions
from vatt.engine.data.sample_world.encode import require_encoders, write_clip
from vatt.engine.data.sample_world.scene import FPS, FRAMES, draw_scene, render
from vatt.engine.data.sample_world.sound import RATE, draw_sound
from vatt.engine.data.sample_world.world import Combination, plan

VERSION = 1
"""Counts changes to what a seed means; a folder made by another version is refused, never mixed."""
SPLITS = ("train", "test")
_CLIPS_PER_WORKER = 16
"""Below this many a further process costs more to start than it saves."""


@dataclass(frozen=True)
class Job:
    """One clip to make; small, as it is sent to a worker process."""

    path: Path
    container: str
    combination: Combination
    seed: int
    split: int
    index: int


def make_clip(job: Job) -> Path:
    """Render, sound and encode one clip; returns its path."""
    frames = render(draw_scene(job.combination, job.seed, job.split, job.index))
    audio = draw_sound(job.combination, job.seed, job.split, job.index)
    write_clip(job.path, job.container, frames, FPS, audio, RATE)
    return job.path


class ProgressLine:
    """Tells on stderr how far the making is: one living line on a terminal, a line every tenth in a log."""

    def __init__(self, what: str):
        self.what = what
        self.told = -1

    def __call__(self, done: int, total: int) -> None:
        terminal = sys.stderr.isatty()
        if self.told < 0 and done == total:
            print(f"{self.what}: all {total} clips are already there", file=sys.stderr)
        elif terminal:
            print(f"\r{self.what}: {done}/{total} clips", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done * 10 // total > self.told:
            print(f"{self.what}: {done}/{total} clips", file=sys.stderr, flush=True)
        self.told = -1 if done == total else done * 10 // total


TELL_STDERR = ProgressLine("sample world")


def make_sample_world(
    out: Path,
    train: int,
    test: int,
    seed: int = 0,
    container: str = "mp4",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = TELL_STDERR,
) -> None:
    """Write OUT/train.jsonl, OUT/test.jsonl, OUT/world.json and the clips they name (OUT/train/00000.mp4, ...).

    A clip is 4 s long: 40 frames of 64 x 64 pixels at 10 per second, 48 kHz sound. No combination of shape, colour and
    motion of the test split occurs in training. Catalogues are written last; an interrupted making is taken up by the
    same call, and a finished one is checked for missing files only.

    out: folder, made if it is not there; must be empty or hold the same world.
    train, test: clips of each split; not negative, and not both 0.
    seed: in [0, 2^63).
    container: "mp4" (H.264, AAC) or "webm" (VP9, Opus).
    workers: processes; None = one a CPU core. Started by spawn: a script must call this under `if __name__ == "__main__"`.
    progress: called with (clips there, clips in all); None = silent.

    Raises ConfigError for an argument that cannot be used, a folder that holds something else or cannot be written.
    """
    out = Path(out)
    _check_arguments(train, test, seed, workers)
    require_encoders(container)
    parameters: dict[str, int | str] = {"version": VERSION, "train": train, "test": test, "seed": seed, "container": container}
    combinations = plan(seed, train, test)
    jobs = [
        Job(out / split / f"{index:05d}.{container}", container, what, seed, number, index)
        for number, split in enumerate(SPLITS)
        for index, what in enumerate(combinations[split])
    ]
    try:
        _claim(out, parameters)
        missing = [job for job in jobs if not (job.path.is_file() and job.path.stat().st_size)]
        tell = progress or (lambda done, total: None)
        tell(len(jobs) - len(missing), len(jobs))
        for done, _ in enumerate(_made(missing, workers), start=len(jobs) - len(missing) + 1):
            tell(done, len(jobs))
        for split in SPLITS:
            rows = (_row(job, out) for job in jobs if SPLITS[job.split] == split)
            _write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        remedy = "free some space or choose another folder"
        raise ConfigError(f"{error.filename or out}: cannot write ({error.strerror}); {remedy}") from error


def _check_arguments(train: int, test: int, seed: int, workers: int | None) -> None:
    for name, value in (("train", train), ("test", test)):
        if value < 0:
            raise ConfigError(f"{name}: {value} clips cannot be made; give 0 or more")
    if train + test == 0:
        raise ConfigError("train, test: both are 0; a world needs at least one clip")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed: {seed} is outside [0, 2^63)")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: {workers} processes cannot work; give 1 or more")


def _claim(out: Path, parameters: dict[str, int | str]) -> None:
    """Make the folder and note in world.json what it is for; refuse one that was made for something else."""
    note = out / "world.json"
    if note.is_file():
        try:
            found = json.loads(note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{note}: not readable as JSON ({error}); choose another folder, or remove this one") from None
        if found != parameters:
            there = found if isinstance(found, dict) else {}
            differs = [f"{key} {there.get(key)}, not {asked}" for key, asked in parameters.items() if there.get(key) != asked]
            remedy = "choose another folder, or remove this one"
            raise ConfigError(f"{out}: holds another sample world ({'; '.join(differs) or 'unknown keys'}); {remedy}")
    else:
        for split in SPLITS:
            if (out / f"{split}.jsonl").exists():
                raise ConfigError(f"{out}: holds a {split}.jsonl that is not a sample world's; choose another folder")
    for split in SPLITS:
        (out / split).mkdir(parents=True, exist_ok=True)
    if not note.is_file():
        _write_text(note, json.dumps(parameters) + "\n")


def _made(jobs: list[Job], workers: int | None) -> Iterator[Path]:
    """Make the clips, in order of completion within small groups; in this process if that is as quick."""
    workers = min(workers or len(os.sched_getaffinity(0)), -(-len(jobs) // _CLIPS_PER_WORKER))
    if workers <= 1:
        yield from map(make_clip, jobs)
        return
    # spawn, as a fork of a process that has started threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent) as pool:
        try:
            yield from pool.map(make_clip, jobs, chunksize=4)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _follow_parent() -> None:
    """In a worker: Ctrl-C is the parent's to handle, and a parent that was killed takes its workers with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "only called in a worker process"

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _row(job: Job, out: Path) -> dict[str, object]:
    """The clip's line of the catalogue."""
    return {
        "id": f"{SPLITS[job.split]}-{job.index:05d}",
        "video": job.path.relative_to(out).as_posix(),
        "start": 0.0,
        "end": FRAMES / FPS,
        "captions": draw_captions(job.combination, job.seed, job.split, job.index),
        "labels": job.combination.labels,
        "source": "sample-world",
    }


def _write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
