"""A small model shaped like ours, trained by any backend on any number of ranks; run by the tests, one process a rank.

usage: toy_run.py OUT CASE...   with CASE = backend:stage:precision, for example deepspeed:3:bf16

For each case rank 0 writes OUT/<case>-<ranks>.pt: what the run did, and its states. A file OUT/start.pt, if there, is a
state from another run at step STOP: each case then also loads it and finishes that run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from vatt.engine.backend.interface import make_backend
from vatt.engine.config import BackendConfig, OptimizerConfig, RunConfig
from vatt.engine.distributed import all_gather_rows, joined

CLIPS, WORDS, WIDTH, STEPS, STOP, POISONED = 16, 2000, 64, 10, 5, 7


class BatchNorm(nn.Module):
    """Statistics and arithmetic in fp32 whatever the parameters' dtype; every rank sees all rows."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        assert self.mean.dtype == torch.float32, "a backend cast the buffers"
        x = x.float()
        mean, variance = x.mean(0), x.var(0, unbiased=False)
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
            self.steps += 1
        return (x - mean) * torch.rsqrt(variance + 1e-3) * self.weight.float() + self.bias.float()


@dataclass
class Space:
    """A record, as our model returns one."""

    video: Tensor
    text: Tensor


class Heads(nn.Module):
    """Owns parameters directly and returns a record: the case that ZeRO-3's hooks find hardest."""

    def __init__(self):
        super().__init__()
        self.norm = BatchNorm(WIDTH)
        # Larger than ZeRO-3's limit for parameters that it never takes apart (1e5 elements).
        self.weight = nn.Parameter(torch.randn(2048, WIDTH) / 8)

    def forward(self, video: Tensor, text: Tensor) -> Space:
        video, text = (self.norm(all_gather_rows(x)).to(self.weight.dtype) for x in (video, text))
        return Space(video @ self.weight.T, text @ self.weight.T)


class Toy(nn.Module):
    """Two towers (one over a word table, trained; one over a frozen table), a gather, shared heads, one global loss."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.frozen = nn.Parameter(torch.randn(WORDS, WIDTH), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))
        self.video = nn.Sequential(nn.Linear(WIDTH, 257), nn.GELU(), nn.Linear(257, WIDTH))
        self.text = nn.Linear(WIDTH, WIDTH)
        self.heads = Heads()

    def forward(self, video: Tensor, words: Tensor) -> Space:
        video = self.video(video.to(self.frozen.dtype)) * self.scale
        return self.heads(video, self.text(self.words(words).sum(1) + self.frozen[words].mean(1)))


def loss_of(space: Space) -> Tensor:
    video, text = F.normalize(space.video.float(), dim=-1), F.normalize(space.text.float(), dim=-1)
    return F.cross_entropy(video @ text.T / 0.1, torch.arange(len(video)))


def train(backend, rank: int, ranks: int, first: int, last: int, poison: tuple[int, int] | None = None) -> list[dict]:
    """Steps [first, last) on a batch that depends on the step alone; `poison` = (step, rank) whose loss is NaN there."""
    log = []
    mine = slice(rank * CLIPS // ranks, (rank + 1) * CLIPS // ranks)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        video = torch.randn(CLIPS, WIDTH, generator=generator)
        words = torch.randint(WORDS, (CLIPS, 4), generator=generator)
        loss = loss_of(backend.module(video[mine], words[mine]))
        backend.backward(loss * float("nan") if poison == (step, rank) else loss)
        outcome = backend.step(2e-5 * step)
        log.append({"loss": float(loss.detach()), "norm": float(outcome.gradient_norm), "skipped": bool(outcome.skipped)})
    return log


def ranks_agree(model: nn.Module) -> bool:
    """Whether every rank holds the same working weights, bit by bit."""
    for parameter in model.parameters():
        reference = parameter.detach().float().clone()
        dist.broadcast(reference, src=0)
        differs = torch.tensor(float(not torch.equal(reference, parameter.detach().float())))
        dist.all_reduce(differs)
        if differs:
            return False
    return True


def shared(state: dict | None) -> dict:
    """Rank 0's state on every rank."""
    box = [state]
    dist.broadcast_object_list(box)
    return box[0]


def run_case(case: str, process, start: dict | None) -> dict:
    name, stage, precision = case.split(":")
    config = RunConfig(
        batch_size=CLIPS,
        backend=BackendConfig(name=name, zero_stage=int(stage), precision=precision),
        optimizer=OptimizerConfig(epsilon_form="tensorflow"),
    )
    rank, ranks = process.rank, process.world_size

    def fresh(seed: int):
        torch.manual_seed(seed)
        return make_backend(Toy(), config, rank=rank, world_size=ranks, device=process.device)

    torch.manual_seed(0)
    exact = {name: tensor.clone() for name, tensor in Toy().state_dict().items()}
    backend = fresh(0)
    result = {"initial": backend.gather_state(), "exact": exact}
    result["log"] = train(backend, rank, ranks, 0, 1)
    result["first"] = backend.gather_state()
    result["log"] += train(backend, rank, ranks, 1, STOP)
    result["stopped"] = backend.gather_state()
    result["log"] += train(backend, rank, ranks, STOP, STEPS)
    result["final"] = backend.gather_state()
    result["agree"] = int(stage) == 3 or ranks_agree(backend.module)

    # A NaN on the last rank only: nothing changes anywhere; and the run goes on.
    poisoned = train(backend, rank, ranks, POISONED, POISONED + 1, poison=(POISONED, ranks - 1))
    result["poisoned"], result["after_poison"] = poisoned, backend.gather_state()
    result["recovered"] = train(backend, rank, ranks, STEPS, STEPS + 1)
    result["agree_after"] = int(stage) == 3 or ranks_agree(backend.module)

    # Another model, another seed: all of it must come from the state.
    resumed = fresh(1)
    resumed.load_state(shared(result["stopped"]))
    result["loaded"] = resumed.gather_state()
    result["resumed_log"] = train(resumed, rank, ranks, STOP, STEPS)
    result["resumed_final"] = resumed.gather_state()

    if start is not None:
        other = fresh(2)
        other.load_state(start)
        result["other_loaded"] = other.gather_state()
        result["other_log"] = train(other, rank, ranks, STOP, STEPS)
        result["other_final"] = other.gather_state()
    return result


def main() -> None:
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    start_file = out / "start.pt"
    start = torch.load(start_file) if start_file.exists() else None
    with joined(BackendConfig()) as process:
        for case in cases:
            result = run_case(case, process, start)
            if process.is_main:
                torch.save(result, out / f"{case}-{process.world_size}.pt")


if __name__ == "__main__":
    main()
