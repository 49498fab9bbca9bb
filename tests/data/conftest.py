"""Small media files with known content: every frame shows its number, every instant of sound is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

BITS = 8
CODECS = {
    ".mp4": ("libx264", "aac"),
    ".webm": ("libvpx-vp9", "libopus"),
    ".mov": ("libx264", "aac"),
    ".mkv": ("libx264", "flac"),
}


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): BITS vertical bars, white where the bit is set, the highest bit on the left."""
    bars = np.array([255 * (number >> bit & 1) for bit in reversed(range(BITS))], dtype=np.uint8)
    row = bars[np.arange(width) * BITS // width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number_of(frame: np.ndarray) -> int:
    """The number a frame shows, read in the middle of every bar."""
    height, width = frame.shape[:2]
    centres = (np.arange(BITS) + 0.5) * width / BITS
    middle = frame[height // 3 : 2 * height // 3]
    bits = [middle[:, int(centre) - 1 : int(centre) + 2].mean() > 127 for centre in centres]
    return sum(bit << place for place, bit in enumerate(reversed(bits)))


def chirp(times: np.ndarray) -> np.ndarray:
    """A sound that resembles no shifted copy of itself: a slow sweep from 300 Hz up, 0.5 in amplitude."""
    return 0.5 * np.sin(2 * np.pi * (300 * times + 120 * times**2))


def write_media(
    path: Path,
    times: Sequence[float] = tuple(i / 10 for i in range(40)),
    *,
    size: tuple[int, int] = (48, 64),
    sound: Callable[[np.ndarray], np.ndarray] | None = chirp,
    seconds: float | None = None,
    sound_from: float = 0.0,
    rate: int = 48000,
    rotation: int = 0,
    b_frames: int = 0,
    pixels: str = "yuv420p",
    key_every: int = 12,
    codec: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A file whose i-th frame appears at times[i] and shows i; `sound` is a function of the time, for `seconds`."""
    height, width = size
    video_codec, audio_codec = CODECS[path.suffix]
    with av.open(str(path), "w", options=options or {}) as container:
        video: Any = container.add_stream(codec or video_codec, rate=10)
        video.width, video.height, video.pix_fmt = width, height, pixels
        video.time_base = video.codec_context.time_base = Fraction(1, 90000)
        video.codec_context.gop_size = key_every
        video.codec_context.max_b_frames = b_frames
        video.options = (
            {"crf": "10", "preset": "fast"} if video_codec == "libx264" else {"crf": "10", "b": "0", "cpu-used": "8"}
        )
        if rotation:
            video.set_display_rotation(rotation)
        audio: Any = container.add_stream(audio_codec, rate=rate, layout="mono") if sound else None
        last = times[-1] + (times[-1] - times[-2] if len(times) > 1 else 0.1)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, height, width), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = round(time * 90000), Fraction(1, 90000)
            following = times[number + 1] if number + 1 < len(times) else last
            frame.duration = round((following - time) * 90000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio:
            total = round((last if seconds is None else seconds) * rate)
            wave = sound(sound_from + np.arange(total) / rate).astype(np.float32)
            resampler = av.AudioResampler(
                format=audio.format.name, layout="mono", rate=rate, frame_size=audio.frame_size or 1024
            )
            frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, round(sound_from * rate), Fraction(1, rate)
            for piece in (*resampler.resample(frame), *resampler.resample(None)):
                container.mux(audio.encode(piece))
            container.mux(audio.encode())
    return path


def write_sound(
    path: Path, sound: Callable[[np.ndarray], np.ndarray] = chirp, *, seconds: float = 4.0, rate: int = 48000
) -> Path:
    """A file with sound only."""
    with av.open(str(path), "w") as container:
        codec = {".wav": "pcm_s16le", ".flac": "flac", ".m4a": "aac", ".mp3": "libmp3lame"}[path.suffix]
        audio: Any = container.add_stream(codec, rate=rate, layout="mono")
        wave = sound(np.arange(round(seconds * rate)) / rate).astype(np.float32)
        resampler = av.AudioResampler(format=audio.format.name, layout="mono", rate=rate, frame_size=audio.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(audio.encode(piece))
        container.mux(audio.encode())
    return path


def write_catalogue(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def studio() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(
        numbered_frame=numbered_frame,
        number_of=number_of,
        chirp=chirp,
        write_media=write_media,
        write_sound=write_sound,
        write_catalogue=write_catalogue,
    )


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Twelve clips of 4 s at 10 frames a second, 0.mp4 .. 11.mp4, and their rows; do not write into the folder."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for index in range(12):
        write_media(folder / f"{index}.mp4", rate=16000, b_frames=2, options={"movflags": "faststart"})
        captions = [{"start": s, "end": s + 1.0, "text": f"number {index} second {s}"} for s in range(4)]
        rows.append({"id": f"clip-{index}", "video": str(folder / f"{index}.mp4"), "captions": captions})
    return SimpleNamespace(folder=folder, rows=rows)
