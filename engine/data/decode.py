"""A clip's window as arrays: frames and the sound of exactly the same span. T frames, H rows, W columns, S samples.

A window may be decoded alone, or cut from a clip that was decoded whole and kept; both give the same bytes. Pictures do,
because a decoder gives the same picture wherever it was started. Sound need not (AAC's noise substitution, resampler
phase), so that of a clip of at most WHOLE_SECONDS is always decoded whole, and longer clips are never kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from vatt.engine.data.catalogue import Clip
from vatt.engine.data.media import DecodeError, Media, MediaInfo, MissingAudioError, ShortClipError, open_media, probe
from vatt.engine.data.sound import waveform
from vatt.engine.data.video import frames_at, frames_between, picture_index
from vatt.engine.data.window import EPSILON, looped

__all__ = [
    "DecodeError",
    "DecodedClip",
    "MediaInfo",
    "MissingAudioError",
    "OpenClip",
    "ShortClipError",
    "WholeClip",
    "WindowShape",
    "decode_window",
    "open_clip",
    "probe",
]

WHOLE_SECONDS = 30.0
SHORT_AUDIO = 0.05  # seconds of sound a window may lack before that is counted; an encoder's frame is about half of it


@dataclass(frozen=True)
class WindowShape:
    """What a window is made of. `short_side` bounds the frames' shorter side; smaller ones stay as they are."""

    frames: int
    fps: float
    audio_rate: int
    audio_samples: int
    short_side: int

    @property
    def seconds(self) -> float:
        """Length of the window."""
        return self.frames / self.fps

    @property
    def audio_seconds(self) -> float:
        """Length of the window's sound."""
        return self.audio_samples / self.audio_rate


def short_side_for(size: int) -> int:
    """Short side at which frames are kept for crops of `size`: 256 for 224, as in the released pipeline."""
    return -(-size * 256 // 224)


@dataclass
class DecodedClip:
    """frames uint8 (T, H, W, 3); audio float32 (S,) in [-1, 1], 0 where there is none.

    has_audio: any of the sound is there. looped: the clip was shorter than the window. short_audio: the sound is
    there, but ends before the window or begins after it.
    """

    frames: np.ndarray
    audio: np.ndarray
    has_audio: bool
    looped: bool
    short_audio: bool


@dataclass
class _Sound:
    """Samples from `begin` seconds on, of which [first, stop) are the file's."""

    begin: float
    samples: np.ndarray
    first: int
    stop: int


@dataclass(frozen=True)
class Span:
    """The part of a file that is the clip, in seconds."""

    start: float
    end: float

    def positions(self, start_s: float, shape: WindowShape) -> np.ndarray:
        """When the window's frames are shown: float64 (T,)."""
        times = start_s + np.arange(shape.frames) / shape.fps
        return self.start + looped(times - self.start, self.end - self.start) if self.loops(shape) else times

    def loops(self, shape: WindowShape) -> bool:
        """Whether the window's last frame lies behind the clip's end."""
        return (shape.frames - 1) / shape.fps >= self.end - self.start - EPSILON


class WholeClip:
    """Every picture and all sound of a clip, decoded once, for windows to be cut from."""

    def __init__(self, span: Span, times: np.ndarray, frames: np.ndarray, sound: _Sound | None):
        self.span, self.times, self.frames, self.sound = span, times, frames, sound

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.frames.nbytes + self.times.nbytes + (self.sound.samples.nbytes if self.sound else 0)

    def window(self, start_s: float, shape: WindowShape) -> DecodedClip:
        """The window that begins at `start_s`; the bytes of `OpenClip.window`."""
        frames = self.frames[picture_index(self.times, self.span.positions(start_s, shape))]
        return DecodedClip(frames, *_cut_sound(self.sound, self.span, start_s, shape))


class OpenClip:
    """A clip whose files are open. Use `open_clip`."""

    def __init__(self, clip: Clip, media: Media, sound: Media | None):
        self.clip, self.media, self.sound = clip, media, sound
        media_end = media.video_end()
        self.span = Span(clip.start or 0.0, min(clip.end or media_end, media_end))
        if self.span.start >= self.span.end:
            raise DecodeError(
                f"{media.path}: clip {clip.id!r} starts at {self.span.start:g} s, but the video ends at {media_end:.2f} s; "
                'correct "start"'
            )

    def window(self, start_s: float, shape: WindowShape) -> DecodedClip:
        """Decode the window that begins at `start_s` (seconds of the file). Raises DecodeError."""
        frames = frames_at(self.media, self.span.positions(start_s, shape), shape.short_side)
        if self.span.end - self.span.start <= WHOLE_SECONDS:
            sound = self._sound(self.span.start, self._sound_end(shape), shape)
        else:
            sound = self._sound(start_s, start_s + shape.audio_seconds, shape)
        return DecodedClip(frames, *_cut_sound(sound, self.span, start_s, shape))

    def whole(self, shape: WindowShape) -> WholeClip | None:
        """Decode all of the clip; None if it is longer than WHOLE_SECONDS. Raises DecodeError."""
        if self.span.end - self.span.start > WHOLE_SECONDS:
            return None
        times, frames = frames_between(self.media, self.span.start, self.span.end - EPSILON, shape.short_side)
        return WholeClip(self.span, times, frames, self._sound(self.span.start, self._sound_end(shape), shape))

    def _sound_end(self, shape: WindowShape) -> float:
        """The end of the clip, or of a window that is a fraction of a frame longer."""
        return max(self.span.end, self.span.start + shape.audio_seconds)

    def _sound(self, begin: float, end: float, shape: WindowShape) -> _Sound | None:
        if self.sound is None:
            return None
        return _Sound(begin, *waveform(self.sound, begin, end, shape.audio_rate))


@contextmanager
def open_clip(clip: Clip) -> Iterator[OpenClip]:
    """Open a clip's files. Raises DecodeError, also if there is no picture to be had."""
    if clip.video is None:
        raise DecodeError(f"{clip.audio}: clip {clip.id!r} has sound only; pre-training needs a video")
    with open_media(clip.video) as media:
        if media.video is None:
            raise DecodeError(f"{clip.video}: no video stream, sound only; pre-training needs a video")
        if clip.audio is None:
            yield OpenClip(clip, media, media if media.audio else None)
            return
        with open_media(clip.audio) as sound:
            if sound.audio is None:
                raise DecodeError(f'{clip.audio}: no audio stream, but the catalogue names it as "audio" of {clip.id!r}')
            yield OpenClip(clip, media, sound)


def decode_window(
    clip: Clip, start_s: float, *, frames: int, fps: float, audio_rate: int, audio_samples: int, short_side: int
) -> DecodedClip:
    """Open a clip and decode the window of frames / fps seconds that begins at `start_s`. Raises DecodeError."""
    with open_clip(clip) as opened:
        return opened.window(start_s, WindowShape(frames, fps, audio_rate, audio_samples, short_side))


def _cut_sound(sound: _Sound | None, span: Span, start_s: float, shape: WindowShape) -> tuple[np.ndarray, bool, bool, bool]:
    """(audio, has_audio, looped, short_audio) of a window."""
    loops = span.loops(shape)
    if sound is None:
        return np.zeros(shape.audio_samples, dtype=np.float32), False, loops, False
    if loops:
        period = max(1, round((span.end - span.start) * shape.audio_rate))
        offset = round((start_s - span.start) * shape.audio_rate)
        begin, stop = 0, period
        audio = sound.samples[(offset + np.arange(shape.audio_samples)) % period]
    else:
        begin = max(0, round((start_s - sound.begin) * shape.audio_rate))
        stop = begin + shape.audio_samples
        cut = sound.samples[begin:stop]
        audio = np.pad(cut, (0, shape.audio_samples - len(cut)))
    there = max(0, min(stop, sound.stop) - max(begin, sound.first))
    lacks = (stop - begin - there) / shape.audio_rate > SHORT_AUDIO
    return audio, there > 0, loops, there > 0 and lacks
