"""A training step recorded once as a CUDA graph, and replayed: one launch from the host instead of thousands.

What a step reads lives in tensors that stay where they are (its batch, seed, step number and learning rate); a replay first
copies the new step's values into them. So nothing of a step may depend on a number that the host knows, and nothing in it
may wait for the device: the same rules that keep the host out of an eager step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from vatt.engine.data.batch import Batch
from vatt.engine.randomness import Draws

# Losses of a step and what the optimizer did, or any other tuple of tensors.
Results = tuple[Tensor, ...]
Work = Callable[[Batch, Draws, Tensor], Results]
# Records a function, and returns what runs it again.
Capture = Callable[[Callable[[], Results]], tuple[Callable[[], None], Results]]

# Steps taken eagerly before the recording: libraries choose their kernels and allocate their workspaces in them.
WARM_STEPS = 3


def capture(work: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """Record `work` on the GPU without running it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph.replay, results


class Replayed:
    """work(batch, draws, rate), called WARM_STEPS times as it is, then recorded, then replayed.

    Every call is one real step, and takes a batch of the same shapes. Returned tensors are the caller's own.
    """

    def __init__(self, work: Work, record: Capture = capture) -> None:
        self.work, self.record = work, record
        self.calls = 0

    def __call__(self, batch: Batch, draws: Draws, rate: Tensor) -> Results:
        self.calls += 1
        if self.calls <= WARM_STEPS:
            return self.work(batch, draws, rate)
        if self.calls == WARM_STEPS + 1:
            self.batch = Batch(**{field.name: getattr(batch, field.name).clone() for field in fields(Batch)})
            self.draws = Draws(draws.seed.clone(), draws.step.clone(), self.batch.sample_id, draws.modality)
            self.rate = rate.clone()
            self.replay, self.results = self.record(lambda: self.work(self.batch, self.draws, self.rate))
        for field in fields(Batch):
            old, new = getattr(self.batch, field.name), getattr(batch, field.name)
            if old.shape != new.shape or old.dtype != new.dtype:
                raise ValueError(
                    f"a recorded step takes {field.name} of {tuple(old.shape)} {old.dtype}, got {tuple(new.shape)} {new.dtype}"
                )
            old.copy_(new, non_blocking=True)
        self.draws.seed.copy_(draws.seed)
        self.draws.step.copy_(draws.step)
        self.rate.copy_(rate)
        self.replay()
        # The next replay overwrites them.
        return tuple(result.clone() for result in self.results)
