"""Worlds with one tie cut, for controls: a score that rests on the tie must fall to near chance.

Shapes: T frames, C channels, S samples.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import av
import numpy as np

from vatt.engine.config import ConfigError
from vatt.engine.data.sample_world.encode import write_clip
from vatt.kernels.counter import Stream, words

CONTROLS = ("still", "shuffled_audio", "permuted_captions")


def make_control(catalogue: Path, kind: str, out: Path, seed: int = 0) -> None:
    """Write the catalogue `out` (a .jsonl path): the clips of `catalogue` in their order, with one tie cut.

    still: every frame is the clip's middle frame, so no motion is visible; sound, captions and labels are kept. New
        files, in the source's container, in a folder beside `out` with its stem as name.
    shuffled_audio: each clip's `audio` names another clip's file; nothing is re-encoded.
    permuted_captions: each clip has another clip's captions; labels stay those of the picture.

    In both permutations no clip keeps its own; a clip may meet another of its own combination, by chance.
    `out` is written last, and whole. Raises ConfigError for an unknown kind, or too few clips to permute.
    """
    catalogue, out = Path(catalogue), Path(out)
    if kind not in CONTROLS:
        raise ConfigError(f"kind: {kind!r} is unknown; choose one of {', '.join(CONTROLS)}")
    if out.resolve() == catalogue.resolve():
        raise ConfigError(f"out: {out} is the catalogue itself; choose another name")
    rows = [json.loads(line) for line in catalogue.read_text(encoding="utf-8").splitlines() if line.strip()]
    if kind != "still" and len(rows) < 2:
        raise ConfigError(f"{catalogue}: {len(rows)} clips cannot be permuted; give a catalogue of at least 2")
    out.parent.mkdir(parents=True, exist_ok=True)
    sources = [(catalogue.parent / row["video"]).resolve() for row in rows]
    if kind == "still":
        folder = out.with_suffix("")
        folder.mkdir(exist_ok=True)
        changed = [row | {"video": _still(source, folder, out)} for row, source in zip(rows, sources, strict=True)]
    else:
        others = _others(len(rows), seed)
        changed = [row | {"video": _relative(source, out)} for row, source in zip(rows, sources, strict=True)]
        for row, other in zip(changed, others, strict=True):
            if kind == "shuffled_audio":
                row["audio"] = _relative(sources[other], out)
            else:
                row["captions"] = rows[other]["captions"]
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    os.replace(partial, out)


def _others(count: int, seed: int) -> list[int]:
    """For each of `count` clips another one, each used once: a step along one random cycle through all of them."""
    cycle = np.argsort(words(seed, Stream.WORLD_CONTROL, 0, 0, count), kind="stable")
    other = np.empty(count, dtype=np.int64)
    other[cycle] = np.roll(cycle, 1)
    return other.tolist()


def _relative(path: Path, out: Path) -> str:
    return Path(os.path.relpath(path, out.parent.resolve())).as_posix()


def _still(source: Path, folder: Path, out: Path) -> str:
    """Write the source with its middle frame throughout; returns the new file's path relative to `out`'s folder."""
    with av.open(str(source)) as media:
        average = media.streams.video[0].average_rate
        if average is None:
            raise ConfigError(f"{source}: states no frame rate; give a catalogue of a sample world")
        fps = int(average)
        frames = [frame.to_ndarray(format="rgb24") for frame in media.decode(video=0)]
    with av.open(str(source)) as media:
        rate = media.streams.audio[0].rate
        resampler = av.AudioResampler(format="fltp", rate=rate)
        pieces = [piece for frame in media.decode(audio=0) for piece in resampler.resample(frame)]
        audio = np.concatenate([piece.to_ndarray() for piece in pieces], axis=1)
    still = np.repeat(frames[len(frames) // 2][None], len(frames), axis=0)
    path = folder / source.name
    write_clip(path, source.suffix[1:], still, fps, audio, rate)
    return _relative(path.resolve(), out)
