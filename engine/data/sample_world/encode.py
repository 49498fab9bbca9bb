"""Frames and sound into a file, with the encoders that come inside PyAV.

Shapes: T frames, H rows, W columns, C channels, S samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np

from vatt.engine.config import ConfigError


@dataclass(frozen=True)
class Container:
    """What goes into a container. One thread and bit-exact flags: the same input gives the same bytes."""

    video: str
    video_options: dict[str, str]
    audio: str
    audio_options: dict[str, str]
    audio_bits_per_s: int


# A key frame a second and no B-frames: a random window is cheap to reach. The quality is high for the size, because
# what a lossy encoder leaves behind a moving edge would let a single frame tell the motion.
CONTAINERS = {
    "mp4": Container(
        video="libx264",
        video_options={"preset": "veryfast", "tune": "fastdecode", "crf": "17", "g": "10", "bf": "0"},
        audio="aac",
        # The other search, FFmpeg's default, takes several times as long and sounds the same at this rate.
        audio_options={"aac_coder": "fast"},
        audio_bits_per_s=96000,
    ),
    "webm": Container(
        video="libvpx-vp9",
        video_options={"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0", "g": "10", "lag-in-frames": "0"},
        audio="libopus",
        audio_options={},
        audio_bits_per_s=64000,
    ),
}


def require_encoders(container: str) -> Container:
    """The container of that name; ConfigError if there is none, or if this PyAV lacks one of its encoders."""
    if container not in CONTAINERS:
        raise ConfigError(f"container: {container!r} is unknown; choose one of {', '.join(CONTAINERS)}")
    chosen = CONTAINERS[container]
    for name in (chosen.video, chosen.audio):
        try:
            av.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            raise ConfigError(
                f"container: {container} needs the encoder {name}, which this PyAV {av.__version__} lacks; "
                "install PyAV's own wheel (pip install --force-reinstall --only-binary av av)"
            ) from None
    return chosen


def write_clip(path: Path, container: str, frames: np.ndarray, fps: int, audio: np.ndarray | None, rate: int) -> None:
    """Write uint8 RGB frames (T, H, W, 3) and float32 sound (C, S) in [-1, 1], C = 1 or 2, as one file.

    The file appears under its name only when it is whole. The frame rate is constant, the first frame is at 0 s.
    """
    codecs = require_encoders(container)

    def fill(output: av.container.OutputContainer) -> None:
        options = {**codecs.video_options, "flags": "+bitexact"}
        video = cast(av.VideoStream, output.add_stream(codecs.video, rate=fps, options=options))
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        video.codec_context.thread_count = 1
        sound = None
        if audio is not None:
            layout = "mono" if audio.shape[0] == 1 else "stereo"
            options = {**codecs.audio_options, "flags": "+bitexact"}
            sound = cast(av.AudioStream, output.add_stream(codecs.audio, rate=rate, layout=layout, options=options))
            sound.bit_rate = codecs.audio_bits_per_s
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        if audio is not None and sound is not None:
            samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio), format="fltp", layout=layout)
            samples.sample_rate, samples.pts, samples.time_base = rate, 0, Fraction(1, rate)
            output.mux(sound.encode(samples))
            output.mux(sound.encode(None))

    write_whole(path, container, fill)


def write_whole(path: Path, container: str, fill: Callable[[av.container.OutputContainer], None]) -> None:
    """Let `fill` write a media file beside `path` and give it its name at the end: no half-written file is ever found."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format=container, options={"fflags": "+bitexact"}) as output:
            fill(output)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
