"""SIGTERM and SIGINT become a decision that every rank takes after the same step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, run the same command again to go on


class InterruptWatch:
    """Notes the signals while it is open.

    A signal may reach one rank a step earlier than another. Each step starts a one-byte all-reduce on the CPU group and
    reads the result of the step before, so ranks agree and nothing waits for a GPU.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.received: str | None = None
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending is not None:
            self._pending[1].wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """A second signal acts as it would without us: whoever repeats it wants no checkpoint."""
        self.received = signal.Signals(number).name
        signal.signal(number, self._previous[signal.Signals(number)])

    def stop_after_this_step(self) -> bool:
        """Whether any rank had a signal (one step ago where there are several ranks). Call once a step on every rank."""
        if self.world_size == 1:
            return self.received is not None
        agreed = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            agreed = bool(flag)
        flag = torch.tensor(int(self.received is not None), dtype=torch.uint8)
        self._pending = (flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True))
        return agreed
