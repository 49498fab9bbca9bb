"""One clip -> one row of a batch: window, frames, sound, words. Runs in the decoding workers; never imports torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from vatt.engine.config import AugmentConfig, DataConfig
from vatt.engine.data.augment import add_audio_noise, augment_clip
from vatt.engine.data.cache import ClipCache
from vatt.engine.data.catalogue import Clip
from vatt.engine.data.decode import (
    DecodedClip,
    MissingAudioError,
    ShortClipError,
    Span,
    WindowShape,
    open_clip,
    short_side_for,
)
from vatt.engine.data.resize import centre_crop
from vatt.engine.data.slots import Arrays
from vatt.engine.data.window import nearest_captions, random_start, repeated, uniform_starts
from vatt.engine.data.words import Vocabulary, has_known_word
from vatt.kernels import counter
from vatt.kernels.counter import Stream


@dataclass(frozen=True)
class ClipTask:
    """What to put in a row. `clip` is the catalogue's `index`-th, which differs from `sample_id` for a substitute.

    Every draw is made for (seed, step, sample_id). `windows` = 0 asks for training's random window and augmentation,
    otherwise evaluation's `window`-th of `windows`.
    """

    row: int
    sample_id: int
    step: int
    index: int
    clip: Clip
    window: int = 0
    windows: int = 0
    attempt: int = 0


@dataclass(frozen=True)
class AssemblySettings:
    """All that decides the bytes of a row, and how much may be kept in memory."""

    data: DataConfig
    augment: AugmentConfig
    seed: int
    vocabulary: Vocabulary
    cache_bytes: int
    keep_latest: bool

    @property
    def shape(self) -> WindowShape:
        """The window that is asked for."""
        data = self.data
        return WindowShape(data.frames, data.fps, data.audio_rate, data.audio_samples, short_side_for(data.size))


class Assembler:
    """Fills rows. Keeps whole clips in memory as far as its settings allow."""

    def __init__(self, settings: AssemblySettings):
        self.settings = settings
        self.shape = settings.shape
        self.cache = ClipCache(settings.cache_bytes, keep_latest=settings.keep_latest)

    def fill(self, arrays: Arrays, task: ClipTask) -> Counter[str]:
        """Write row `task.row` of every array; returns what is worth counting. Raises DecodeError."""
        counts: Counter[str] = Counter()
        start, decoded = self._decode(task, counts)
        self._check(task.clip, decoded)
        data, row = self.settings.data, task.row
        draw = (self.settings.seed, task.step, task.sample_id)
        if task.windows:
            arrays.video[row] = centre_crop(decoded.frames, data.size)
            arrays.audio[row] = decoded.audio
        else:
            arrays.video[row] = augment_clip(decoded.frames, self.settings.augment, data.size, *draw)
            arrays.audio[row] = add_audio_noise(decoded.audio, self.settings.augment, *draw)
        arrays.text[row] = self._text(task.clip, start)
        arrays.has_text[row] = has_known_word(arrays.text[row])
        arrays.has_audio[row] = decoded.has_audio
        arrays.sample_id[row] = task.sample_id
        counts["clips"] += 1
        counts["looped"] += decoded.looped
        counts["short_audio"] += decoded.short_audio
        counts["no_audio"] += not decoded.has_audio
        counts["no_text"] += not arrays.has_text[row]
        return +counts

    def _decode(self, task: ClipTask, counts: Counter[str]) -> tuple[float, DecodedClip]:
        """(where the window begins, its frames and sound)."""
        whole = self.cache.get(task.index)
        if whole is None:
            counts["decoded"] += 1
            with open_clip(task.clip) as opened:
                whole = self.cache.fetch(task.index, opened, self.shape)
                if whole is None:
                    start = self._start(task, opened.span)
                    return start, opened.window(start, self.shape)
        start = self._start(task, whole.span)
        return start, whole.window(start, self.shape)

    def _start(self, task: ClipTask, span: Span) -> float:
        seconds = self.shape.seconds
        if task.windows:
            return float(uniform_starts(span.start, span.end, seconds, task.windows)[task.window])
        uniform = counter.uniform(self.settings.seed, Stream.WINDOW, task.step, task.sample_id, 1)[0]
        return random_start(span.start, span.end, seconds, float(uniform))

    def _text(self, clip: Clip, start: float) -> np.ndarray:
        """Ids of the caption candidates nearest to the window, int64 (P, L); all padding if none has a known word.

        Candidates without a known word are passed over before any is repeated.
        """
        data = self.settings.data
        known: list[np.ndarray] = []
        for index in nearest_captions(clip.captions, start, start + self.shape.seconds):
            ids = self.settings.vocabulary.encode(clip.captions[index].text, data.words)
            if has_known_word(ids):
                known.append(ids)
            if len(known) == data.captions:
                break
        text = np.zeros((data.captions, data.words), dtype=np.int64)
        for candidate, index in enumerate(repeated(range(len(known)), data.captions)):
            text[candidate] = known[index]
        return text

    def _check(self, clip: Clip, decoded: DecodedClip) -> None:
        data = self.settings.data
        if decoded.looped and data.on_short_clip == "error":
            raise ShortClipError(
                f"{clip.video}: clip {clip.id!r} is shorter than the window of {data.seconds:g} s; "
                'lower data.frames, raise data.fps or set data.on_short_clip = "loop"'
            )
        if not decoded.has_audio and data.on_missing_audio == "error":
            raise MissingAudioError(
                f"{clip.audio or clip.video}: clip {clip.id!r} has no sound in its window; "
                'remove the row or set data.on_missing_audio = "mask"'
            )
