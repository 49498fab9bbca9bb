"""Opening a media file: streams, its timeline, and one-line errors instead of libav's.

Time 0 of a file is where a player starts: the container's start time (1.4 s in many transport streams). Sound that
begins a few milliseconds early, because its encoder needed a run-up, does not move it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import av
import av.error
import av.logging

# libav's own messages go to stderr, one or more for every damaged file; ours say the same in one line.
av.logging.set_level(None)

CLOCK = 1_000_000  # ticks per second of container times
TAIL = 5.0  # seconds at the end of a file that are read to learn when its last picture goes
HOLD = 1.0  # seconds the last picture may stay where it does not say for how long


class DecodeError(Exception):
    """A file that cannot be decoded as asked; one line that names the file and the reason."""


class ShortClipError(DecodeError):
    """A clip shorter than the window, where the settings ask for an error."""


class MissingAudioError(DecodeError):
    """A clip without sound, where the settings ask for an error."""


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds. Times are seconds on the file's timeline; None where there is no such stream."""

    video_end: float | None
    audio_end: float | None
    width: int
    height: int
    audio_rate: int

    @property
    def has_video(self) -> bool:
        return self.video_end is not None

    @property
    def has_audio(self) -> bool:
        return self.audio_end is not None


class Media:
    """An open file. Use `open_media`."""

    def __init__(self, path: str, container: Any):
        self.path = path
        self.container = container
        self._refuse_truncated()
        # A cover picture is a video stream to libav, and not to us.
        pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        # `Any` because whoever reads a stream has asked for it first: `open_clip` makes sure there is one.
        self.video: Any = pictures[0] if pictures else None
        self.audio: Any = container.streams.audio[0] if container.streams.audio else None
        for stream in (self.video, self.audio):
            if stream is not None and stream.codec_context is not None:
                # Workers are processes; threads inside each would only fight over the cores.
                stream.codec_context.thread_type = "NONE"
                stream.codec_context.thread_count = 1
        # Exact fractions are slow, and times are asked for with every packet.
        self._tick = {stream.index: float(stream.time_base) for stream in container.streams if stream.time_base}
        first = (container.start_time or 0) / CLOCK
        first_picture = float((self.video.start_time or 0) * self.video.time_base) if self.video else 0.0
        self.origin = max(first, min(0.0, first_picture))

    def _refuse_truncated(self) -> None:
        """A file that says it is longer than it is was cut, whichever window of it is asked for."""
        last = [s.index_entries[len(s.index_entries) - 1] for s in self.container.streams if len(s.index_entries)]
        stated = max((entry.pos + entry.size for entry in last if entry.size > 0), default=0)
        if "matroska" in self.container.format.name:
            stated = _matroska_size(self.path)
        if stated > self.container.size:
            raise DecodeError(f"{self.path}: truncated: {self.container.size} bytes of {stated}; fetch it again")

    def seconds(self, ticks: int, stream: Any) -> float:
        """A stream's timestamp on the file's timeline."""
        return ticks * self._tick[stream.index] - self.origin

    def video_end(self) -> float:
        """When the last picture goes. Raises DecodeError if much less is there than the file states.

        Headers are wrong often enough (variable frame rates, edits), so the last packets have the last word. A last
        picture that does not say how long it stays is kept as long as stated, HOLD seconds at most.
        """
        stream = self.video
        stated = self._stated_end(stream)
        for begin in (max(0.0, (stated or self._container_end()) - TAIL), 0.0):
            self.seek(begin, stream)
            last = sorted(self._times_of_packets(stream))
            if last or begin == 0.0:
                break
        if not last:
            raise DecodeError(f"{self.path}: no video in it; truncated or damaged")
        time, stays = last[-1]
        gap = max((later - earlier for (earlier, _), (later, _) in pairwise(last)), default=0.0)
        if stated is not None and stated > time + max(stays, gap, HOLD) + HOLD:
            raise DecodeError(
                f"{self.path}: truncated: the last picture is at {time:.2f} s, its header says {stated:.2f} s; fetch it again"
            )
        return max(time + stays, min(stated or 0.0, time + HOLD))

    def audio_end(self) -> float:
        """When the sound ends, as stated, or as the container does."""
        return self._stated_end(self.audio) or self._container_end()

    def seek(self, seconds: float, stream: Any) -> None:
        """Go to the key frame at or before a time; to the beginning where the file cannot tell."""
        ticks = int((seconds + self.origin) / stream.time_base)
        try:
            self.container.seek(ticks, stream=stream, backward=True)
        except av.error.FFmpegError:
            self.container.seek(stream.start_time or 0, stream=stream, backward=True)

    def _stated_end(self, stream: Any) -> float | None:
        """Where a stream ends by its header or tags, if they say so."""
        if stream.duration:
            return self.seconds((stream.start_time or 0) + stream.duration, stream)
        for name, value in stream.metadata.items():
            if name.upper().startswith("DURATION"):  # Matroska: "00:00:05.040000000", counted from time 0
                with suppress(ValueError):
                    hours, minutes, seconds = value.split(":")
                    return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - self.origin
        return None

    def _container_end(self) -> float:
        return (self.container.duration or 0) / CLOCK

    def _times_of_packets(self, stream: Any) -> Iterator[tuple[float, float]]:
        """(time, how long it stays) of every packet from here to the end of the file."""
        for packet in self.container.demux(stream):
            ticks = packet.pts if packet.pts is not None else packet.dts
            if ticks is not None and packet.size:
                yield self.seconds(ticks, stream), (packet.duration or 0) * self._tick[stream.index]


@contextmanager
def open_media(path: str) -> Iterator[Media]:
    """Open a local file. Any error of libav inside the block becomes a DecodeError that names the file."""
    if "://" in path:
        raise DecodeError(f"{path}: is a URL; fetch it first, and name the local copy in the catalogue")
    try:
        # A playlist must not reach for the network or for other protocols.
        with av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="replace") as container:
            yield Media(path, container)
    except (av.error.FFmpegError, OSError) as error:
        raise DecodeError(f"{path}: {_reason(path, error)}") from error


def _reason(path: str, error: Exception) -> str:
    """Why a file cannot be read. What libav calls "not permitted" or "not found" may be damage, so the file is asked."""
    if not os.path.exists(path):
        return "no such file"
    if not os.path.isfile(path):
        return "is not a file"
    if not os.access(path, os.R_OK):
        return "its permissions do not let it be read"
    if os.path.getsize(path) == 0:
        return "empty (zero bytes); fetch it again"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"not readable as audio or video ({reason}); truncated, damaged or another format"


def _matroska_size(path: str) -> int:
    """Bytes a Matroska or WebM file says it has: its header and the segment after it; 0 if it does not say."""
    with open(path, "rb") as file:
        head = file.read(4096)
    end = 0
    for marker in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        begin = end + len(marker)
        if head[end:begin] != marker or begin >= len(head):
            return 0
        # A length is 1 to 8 bytes: as many as the first has leading zero bits, and one; all ones mean unknown.
        width = 9 - head[begin].bit_length()
        length = int.from_bytes(head[begin : begin + width]) & ((1 << 7 * width) - 1)
        if width > 8 or length == (1 << 7 * width) - 1:
            return 0
        end = begin + width + length
    return end


def probe(path: str) -> MediaInfo:
    """What a file holds, without decoding it. Raises DecodeError."""
    with open_media(path) as media:
        video, audio = media.video, media.audio
        return MediaInfo(
            video_end=media.video_end() if video else None,
            audio_end=media.audio_end() if audio else None,
            width=video.codec_context.width if video else 0,
            height=video.codec_context.height if video else 0,
            audio_rate=audio.codec_context.sample_rate if audio else 0,
        )
