"""Activation checkpointing: a block keeps its inputs, and makes what its backward needs again when backward comes to it.

`torch.utils.checkpoint` does the same, but its first call imports torch's compiler (a second and more), and it saves the
state of random generators that nothing here draws from: dropout is a function of counters, so it replays by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments), whose backward calls `function` once more instead of keeping what it saved.

    The gradients are those of a plain call, bit for bit where `function` is deterministic; it must save the same tensors
    in the same order each time, which is checked. Without gradients to compute, it is a plain call. Parameters are read
    where they are when backward comes, so ZeRO-3 may take them away in between.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    replay = _Replay(function, arguments)
    with saved_tensors_hooks(replay.number, replay.tensor):
        return function(*arguments)


class _Replay:
    """What one call saved: numbers in its graph, and the tensors only once backward has asked for the first."""

    def __init__(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.count = 0
        self.saved: list[Tensor] = []

    def number(self, _: Tensor) -> int:
        """Stands in the graph for a tensor of the first call."""
        self.count += 1
        return self.count - 1

    def tensor(self, number: int) -> Tensor:
        """The tensor that was saved under `number`. The graph drops this object, and all of them, when it is through."""
        if not self.saved:
            self._call_again()
        return self.saved[number]

    def _call_again(self) -> None:
        made: list[Tensor] = []
        # Cut off from the graph, but asking for the same gradients: what is saved depends on that.
        arguments = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in self.arguments]
        with torch.enable_grad(), saved_tensors_hooks(lambda t: made.append(t.detach()), _never):
            self.function(*arguments)
        if len(made) != self.count:
            raise RuntimeError(f"a recomputed block saved {len(made)} tensors in backward and {self.count} in forward")
        self.saved = made


def _never(_: None) -> NoReturn:
    raise RuntimeError("nothing runs backward through the second call of a recomputed block")
