"""Independent work side by side on one GPU: what fills it only in part can overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)
_SIDES: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


def side_by_side(calls: Iterable[Callable[[], T]], device: torch.device) -> list[T]:
    """Each call's tensor: the first made on the current stream of a CUDA `device`, each other one on a stream of its own.

    The calls see what was done before; what comes after sees all of them. Autograd runs the backward of each on the stream
    of its forward and joins them likewise.
    """
    first, *others = calls
    current = torch.cuda.current_stream(device)
    results: list[T | None] = [None]
    sides = []
    for number, call in enumerate(others):
        side = _SIDES.setdefault((device, number), torch.cuda.Stream(device))
        side.wait_stream(current)
        with torch.cuda.stream(side):
            results.append(call())
        sides.append(side)
    results[0] = first()
    for side, result in zip(sides, results[1:], strict=True):
        current.wait_stream(side)
        assert result is not None
        result.record_stream(current)  # or its memory could go to new work of `side` while `current` still reads it
    return results  # type: ignore[return-value]
