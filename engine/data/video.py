"""Frames of a file by timestamp. T frames, H rows, W columns.

The picture at time t is the last one whose timestamp is not after t: what a player shows. Nothing here counts frames or
trusts a frame rate, so variable frame rates, gaps and wrong headers do no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av.error
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from vatt.engine.data.media import HOLD, DecodeError, Media

# Matroska's clock ticks once a millisecond, so a frame due at t may be stamped half a tick later.
TOLERANCE = 1e-3
# How far before the wanted time to seek, if a seek landed after it (B-frames, poor indexes); then from the beginning.
STEPS_BACK = (0.0, 2.0, 10.0)
# Here every packet holds exactly one visible frame, so a packet without its frame is damage (VP8 has invisible ones).
ONE_FRAME_A_PACKET = ("h264", "hevc", "vp9", "av1", "mjpeg")


def frames_at(media: Media, times: np.ndarray, short_side: int) -> np.ndarray:
    """The pictures at `times` (seconds, any order): uint8 (T, H, W, 3) RGB, upright. Raises DecodeError."""
    wanted, where = np.unique(times, return_inverse=True)
    convert = _Converter(media, short_side)
    images: list[np.ndarray] = []
    shown = None
    for time, frame in pictures(media, wanted[0], wanted[-1]):
        while shown is not None and len(images) < len(wanted) and wanted[len(images)] + TOLERANCE < time:
            images.append(convert(shown))
        shown = frame
    while len(images) < len(wanted):
        images.append(convert(shown))
    return _stack(media, images)[where]


def frames_between(media: Media, begin: float, end: float, short_side: int) -> tuple[np.ndarray, np.ndarray]:
    """Every picture shown from `begin` to `end`: (times float64 (T,), uint8 (T, H, W, 3)). Raises DecodeError."""
    convert = _Converter(media, short_side)
    shown = [(time, convert(frame)) for time, frame in pictures(media, begin, end)]
    return np.array([time for time, _ in shown]), _stack(media, [image for _, image in shown])


def picture_index(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of the pictures of `frames_between` is shown at each wanted time: int64, the rule of `frames_at`."""
    return np.maximum(np.searchsorted(times, wanted + TOLERANCE, side="right") - 1, 0)


def pictures(media: Media, begin: float, last: float) -> Iterator[tuple[float, Any]]:
    """(time, frame) in order, from the picture shown at `begin` to that shown at `last`.

    Before the first picture of a file, the first is shown. Raises DecodeError if any picture between is missing: a
    damaged file must not come back quietly shorter.
    """
    for back in (*STEPS_BACK, None):
        from_beginning = back is None or begin - back <= 0.0
        media.seek(0.0 if from_beginning else begin - (back or 0.0), media.video)
        decoded = _decoded(media, last)
        try:
            first = next(decoded, None)
        except DecodeError:
            if from_beginning:
                raise
            continue
        if first is not None and (first[0] <= begin + TOLERANCE or from_beginning):
            break
        if from_beginning:
            raise DecodeError(f"{media.path}: no video frame can be decoded; truncated or damaged")
    assert first is not None  # the last round begins at the beginning, and raises without a frame
    time, frame = first
    for next_time, next_frame in decoded:
        if next_time > begin + TOLERANCE:
            yield time, frame
        time, frame = next_time, next_frame
    yield time, frame


def _decoded(media: Media, last: float) -> Iterator[tuple[float, Any]]:
    """(time, frame) from where the file was sought to, up to `last`; checks that no packet lost its frame."""
    stream = media.video
    if stream.codec_context is None:
        raise DecodeError(f"{media.path}: no decoder for its video stream")
    checked = stream.codec_context.codec.canonical_name in ONE_FRAME_A_PACKET
    packets: list[int] = []
    frames: list[int] = []
    stays = HOLD
    for packet in media.container.demux(stream):
        if packet.is_corrupt:
            raise DecodeError(f"{media.path}: damaged{_at(media, packet)}")
        if packet.pts is not None and packet.size and not packet.is_discard:
            packets.append(packet.pts)
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError as error:
            raise DecodeError(f"{media.path}: video damaged{_at(media, packet)}") from error
        for frame in decoded:
            ticks = frame.pts if frame.pts is not None else frame.dts
            if ticks is None or (frames and ticks <= frames[-1]):
                continue  # no place in time, or one already taken
            if frame.is_corrupt:
                raise DecodeError(f"{media.path}: video damaged at {media.seconds(ticks, stream):.2f} s")
            checked = checked and not frame.interlaced_frame  # two fields may come in two packets
            time = media.seconds(ticks, stream)
            if frames and checked:
                _check_complete(media, packets, frames, ticks)
            if time > last + TOLERANCE:
                return
            stays = max(HOLD, (frame.duration or 0) * float(stream.time_base))
            frames.append(ticks)
            yield time, frame
    if not frames:
        return
    if checked and packets:
        _check_complete(media, packets, frames, max(packets) + 1)
    shown_until = media.seconds(frames[-1], stream) + stays
    if last > shown_until + TOLERANCE:
        raise DecodeError(
            f"{media.path}: video stops at {shown_until:.2f} s, before the {last:.2f} s it should reach; truncated or damaged"
        )


def _check_complete(media: Media, packets: list[int], frames: list[int], ticks: int) -> None:
    """Packets between the last frame and `ticks` must not exist; forgets those that are done with."""
    lost = [p for p in packets if frames[-1] < p < ticks]
    if lost:
        at = media.seconds(lost[0], media.video)
        raise DecodeError(f"{media.path}: {len(lost)} video frames from {at:.2f} s on cannot be decoded; damaged")
    packets[:] = [p for p in packets if p >= ticks]


def _at(media: Media, packet: Any) -> str:
    return "" if packet.pts is None else f" at {media.seconds(packet.pts, media.video):.2f} s"


def _stack(media: Media, images: list[np.ndarray]) -> np.ndarray:
    if len({image.shape for image in images}) != 1:
        raise DecodeError(f"{media.path}: the size of the picture changes within the clip; re-encode it")
    return np.stack(images)


class _Converter:
    """Decoded frames to upright RGB whose short side is at most `short_side`, with square pixels."""

    def __init__(self, media: Media, short_side: int):
        self.short_side = short_side
        self.aspect = float(media.video.sample_aspect_ratio or 1)
        if not 0.1 < self.aspect < 10.0:
            self.aspect = 1.0  # nonsense in the header
        self.reformatter = VideoReformatter()
        self.done: tuple[Any, np.ndarray] | None = None

    def __call__(self, frame: Any) -> np.ndarray:
        if self.done is None or self.done[0] is not frame:
            self.done = (frame, self._convert(frame))
        return self.done[1]

    def _convert(self, frame: Any) -> np.ndarray:
        width, height = frame.width * self.aspect, float(frame.height)
        scale = min(1.0, self.short_side / min(width, height))
        rgb = self.reformatter.reformat(
            frame,
            width=max(1, round(width * scale)),
            height=max(1, round(height * scale)),
            format="rgb24",
            # Area averages what it shrinks; accurate rounding keeps all machines at the same bytes.
            interpolation=(Interpolation.AREA if scale < 1.0 else Interpolation.BILINEAR) | Interpolation.ACCURATE_RND,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        image = rgb.to_ndarray()
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
