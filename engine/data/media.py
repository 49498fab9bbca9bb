"""Opening a media file: streams, its timeline, and one-line errors instead of libav's.

Time 0 of a file is where a player starts: the container's start time (1.4 s in many transport streams). Sound that
begins a few milliseconds early, because its encoder needed a run-up, does not move it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import av.error
import av.logging

# libav's own messages go to stderr, one or more for every damaged file; ours say the same in one line.
av.logging.set_level(None)

CLOCK = 1_000_000  # ticks per second of container times
TAIL = 5.0  # seconds read from the end of a file whose duration nobody states


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
        self.video = pictures[0] if pictures else None
        self.audio = container.streams.audio[0] if container.streams.audio else None
        for stream in (self.video, self.audio):
            if stream is not None and stream.codec_context is not None:
                # Workers are processes; threads inside each would only fight over the cores.
                stream.codec_context.thread_type = "NONE"
                stream.codec_context.thread_count = 1
        self._tick: dict[int, float] = {}
        first = (container.start_time or 0) / CLOCK
        first_picture = float((self.video.start_time or 0) * self.video.time_base) if self.video else 0.0
        self.origin = max(first, min(0.0, first_picture))

    def _refuse_truncated(self) -> None:
        """An mp4 whose index points behind its last byte was cut, whichever window of it is asked for."""
        if "mp4" not in self.container.format.name:
            return
        last = [s.index_entries[len(s.index_entries) - 1] for s in self.container.streams if len(s.index_entries)]
        needed, there = max((entry.pos + entry.size for entry in last), default=0), self.container.size
        if needed > there:
            raise DecodeError(f"{self.path}: truncated: has {there} bytes, its index needs {needed}; fetch it again")

    def seconds(self, ticks: int, stream: Any) -> float:
        """A stream's timestamp on the file's timeline."""
        if stream.index not in self._tick:
            self._tick[stream.index] = float(stream.time_base)  # exact fractions are slow, and this is asked for every packet
        return ticks * self._tick[stream.index] - self.origin

    def end(self, stream: Any) -> float:
        """Where a stream ends. Read from the last packets if neither the stream nor its tags say so.

        A container's own duration is not used: it is that of its longest stream, and often missing or wrong.
        """
        begin = self.seconds(stream.start_time or 0, stream)
        if stream.duration:
            return begin + float(stream.duration * stream.time_base)
        for name, value in stream.metadata.items():
            if name.upper().startswith("DURATION"):  # Matroska: "00:00:05.040000000"; counted from time 0
                try:
                    hours, minutes, seconds = value.split(":")
                    return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - self.origin
                except ValueError:
                    break
        return self._end_of_packets(stream)

    def seek(self, seconds: float, stream: Any) -> None:
        """Go to the key frame at or before a time; to the beginning where the file cannot tell."""
        ticks = int((seconds + self.origin) / stream.time_base)
        try:
            self.container.seek(ticks, stream=stream, backward=True)
        except av.error.FFmpegError:
            self.container.seek(stream.start_time or 0, stream=stream, backward=True)

    def _end_of_packets(self, stream: Any) -> float:
        stated = (self.container.duration or 0) / CLOCK
        for begin in (stated - TAIL, 0.0):
            if begin < 0.0 or (begin == 0.0 and stated > TAIL):
                continue
            self.seek(begin, stream)
            ends = [
                self.seconds(packet.pts + (packet.duration or 0), stream)
                for packet in self.container.demux(stream)
                if packet.pts is not None
            ]
            if ends:
                self.seek(0.0, stream)
                return max(ends)
        return stated


@contextmanager
def open_media(path: str) -> Iterator[Media]:
    """Open a local file. Any error of libav inside the block becomes a DecodeError that names the file."""
    if "://" in path:
        raise DecodeError(f"{path}: is a URL; fetch it first, and name the local copy in the catalogue")
    try:
        # A playlist must not reach for the network or for other protocols.
        with av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="replace") as container:
            yield Media(path, container)
    except FileNotFoundError as error:
        raise DecodeError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise DecodeError(f"{path}: is a folder") from error
    except PermissionError as error:
        raise DecodeError(f"{path}: may not be read") from error
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DecodeError(f"{path}: not readable as audio or video ({reason}); empty, truncated or another format") from error


def probe(path: str) -> MediaInfo:
    """What a file holds, without decoding it. Raises DecodeError."""
    with open_media(path) as media:
        video, audio = media.video, media.audio
        return MediaInfo(
            video_end=media.end(video) if video else None,
            audio_end=media.end(audio) if audio else None,
            width=video.codec_context.width if video else 0,
            height=video.codec_context.height if video else 0,
            audio_rate=audio.codec_context.sample_rate if audio else 0,
        )
