"""Memory shared by the training process and its decoding workers: a few batches, written in place.

B rows, T frames, H = W = size, P caption candidates, L words, S samples. The memory is an anonymous file: it has no name
that could be left behind, whoever is killed, and it does not count against the size of /dev/shm (64 MiB in a container).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 64


@dataclass
class Arrays:
    """The fields of a Batch as NumPy arrays; see batch.py for shapes."""

    video: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    has_text: np.ndarray
    has_audio: np.ndarray
    sample_id: np.ndarray


@dataclass(frozen=True)
class SlotLayout:
    """Shapes of one batch, how many there are, and how many workers report what they are at."""

    slots: int
    workers: int
    rows: int
    frames: int
    size: int
    captions: int
    words: int
    audio_samples: int

    @property
    def _fields(self) -> dict[str, tuple[tuple[int, ...], type]]:
        rows = self.rows
        return {
            "video": ((rows, self.frames, 3, self.size, self.size), np.uint8),
            "audio": ((rows, self.audio_samples), np.float32),
            "text": ((rows, self.captions, self.words), np.int64),
            "has_text": ((rows,), np.bool_),
            "has_audio": ((rows,), np.bool_),
            "sample_id": ((rows,), np.int64),
        }

    @property
    def slot_bytes(self) -> int:
        """Bytes of one batch."""
        return sum(_aligned(int(np.prod(shape)) * np.dtype(kind).itemsize) for shape, kind in self._fields.values())

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return _aligned(8 * max(1, self.workers)) + self.slots * self.slot_bytes

    def at_work(self, buffer: mmap.mmap | bytearray) -> np.ndarray:
        """int64 (workers,): catalogue index of the clip each worker is decoding, or -1."""
        return np.frombuffer(buffer, np.int64, self.workers)

    def slot(self, buffer: mmap.mmap | bytearray, slot: int) -> Arrays:
        """The arrays of one batch; views of `buffer`."""
        offset = _aligned(8 * max(1, self.workers)) + slot * self.slot_bytes
        views: dict[str, np.ndarray] = {}
        for name, (shape, kind) in self._fields.items():
            count = int(np.prod(shape))
            views[name] = np.frombuffer(buffer, kind, count, offset).reshape(shape)
            offset += _aligned(count * np.dtype(kind).itemsize)
        return Arrays(**views)


def anonymous_file(nbytes: int) -> int:
    """A file descriptor of `nbytes` zeros that vanish with their last user."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("vatt-batches", os.MFD_CLOEXEC)
    else:
        descriptor, path = tempfile.mkstemp(prefix="vatt-batches-")
        os.unlink(path)
    os.ftruncate(descriptor, nbytes)
    return descriptor


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
