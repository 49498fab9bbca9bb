"""Whole decoded clips kept in memory, within a limit."""

from __future__ import annotations

from vatt.engine.data.decode import DecodeError, OpenClip, WholeClip, WindowShape


class ClipCache:
    """Keeps the first clips that fit into `limit` bytes for good; with `keep_latest`, only ever the last one.

    Keeping the first is best for shuffled epochs, where every clip is equally likely to come next. What is not kept is
    decoded window by window, to the same bytes.
    """

    def __init__(self, limit: int, *, keep_latest: bool = False):
        self.limit = limit
        self.keep_latest = keep_latest
        self.full = False
        self.too_long = 0
        self._bytes = 0
        self._clips: dict[int, WholeClip] = {}
        self._never: set[int] = set()

    def get(self, index: int) -> WholeClip | None:
        """The clip, if it is kept."""
        return self._clips.get(index)

    def fetch(self, index: int, opened: OpenClip, shape: WindowShape) -> WholeClip | None:
        """Decode the clip whole and keep it; None if it will not be kept, and should be decoded by windows."""
        if (self.limit == 0 and not self.keep_latest) or self.full or index in self._never:
            return None
        try:
            whole = opened.whole(shape)
        except DecodeError:
            # Damaged somewhere. The window may be sound: let it succeed or fail as it does without a cache.
            self._never.add(index)
            return None
        if whole is None:
            self.too_long += 1
            self._never.add(index)
            return None
        if self.keep_latest:
            self._clips = {index: whole}
            return whole
        if self._bytes + whole.nbytes > self.limit:
            self.full = True
            return whole
        self._bytes += whole.nbytes
        self._clips[index] = whole
        return whole

    def note(self) -> str | None:
        """A sentence for the log when clips are no longer kept, or cannot be."""
        if self.full:
            return (
                f"the cache is full with {len(self._clips)} clips ({self._bytes / 2**20:.0f} MiB in this worker); "
                "the others are decoded each time (data.cache_bytes)"
            )
        if self.too_long and not self.keep_latest:
            return "clips longer than 30 s are not kept in memory; they are decoded each time"
        return None
