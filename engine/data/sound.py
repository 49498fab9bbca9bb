"""The sound of a span of a file, placed by timestamp: mono float32 in [-1, 1]. S samples."""

from __future__ import annotations

from typing import Any

import av
import av.error
import numpy as np

from vatt.engine.data.media import DecodeError, Media

# Decoders need a run-up after a seek: AAC one frame, Opus 80 ms, MP3 its bit reservoir.
RUN_UP = 0.3
# A frame stamped this far from the end of the one before it begins a new piece; less is rounding (Matroska: 1 ms).
GAP = 5e-3


def waveform(media: Media, begin: float, end: float, rate: int) -> tuple[np.ndarray, int, int]:
    """Samples of [begin, end) seconds at `rate`: (float32 (S,), first, stop), S = round((end - begin) rate).

    What the file does not cover is 0; [first, stop) is what it covers, empty if it covers nothing. Raises DecodeError.
    """
    samples = round((end - begin) * rate)
    result = np.zeros(samples, dtype=np.float32)
    first, stop = samples, 0
    for piece in _pieces(media, begin, end):
        resampled = piece.resampled(rate)
        offset = round((piece.begin - begin) * rate)
        low, high = max(0, offset), min(samples, offset + len(resampled))
        if low < high:
            result[low:high] = resampled[low - offset : high - offset]
            first, stop = min(first, low), max(stop, high)
    np.clip(result, -1.0, 1.0, out=result)
    return result, first, max(first, stop)


class _Piece:
    """Unbroken sound from `begin` seconds on, in one sample format, layout and rate."""

    def __init__(self, begin: float, kind: tuple[str, str, int]):
        self.begin, self.kind = begin, kind
        self._fifo = av.AudioFifo()

    def append(self, frame: Any) -> None:
        frame.pts = None  # the queue would insist on timestamps without rounding
        self._fifo.write(frame)

    def resampled(self, rate: int) -> np.ndarray:
        """Mono float32 at `rate`, once; libswresample keeps the first sample where it was."""
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        frame = self._fifo.read(0, partial=True)
        parts = [out.to_ndarray()[0] for out in (*resampler.resample(frame), *resampler.resample(None))]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _pieces(media: Media, begin: float, end: float) -> list[_Piece]:
    """What covers [begin, end), with some run-up."""
    stream = media.audio
    if stream.codec_context is None:
        raise DecodeError(f"{media.path}: no decoder for its audio stream")
    pieces: list[_Piece] = []
    due: float | None = None
    media.seek(max(0.0, begin - RUN_UP), stream)
    for packet in media.container.demux(stream):
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError as error:
            raise DecodeError(f"{media.path}: sound damaged around {begin if due is None else due:.2f} s") from error
        for frame in decoded:
            kind = (frame.format.name, frame.layout.name, frame.sample_rate)
            time = media.seconds(frame.pts, stream) if frame.pts is not None else due or 0.0
            if due is None or abs(time - due) > GAP or kind != pieces[-1].kind:
                pieces.append(_Piece(time, kind))
                due = time
            due += frame.samples / frame.sample_rate
            pieces[-1].append(frame)
        if due is not None and due >= end + RUN_UP:
            break
    return pieces
