"""Who this process is among the ranks of the run, and the one differentiable collective the model needs.

`torchrun` and the `deepspeed` launcher tell a process its place through RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; a
process started alone is rank 0 of 1. Everything here works on CPU with gloo and on CUDA with NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vatt.engine.config import BackendConfig, ConfigError


@dataclass(frozen=True)
class Process:
    """This process's place: `rank` of `world_size` in the run, `local_rank` of `local_world_size` on this host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and talks."""
        return self.rank == 0


def find_process(config: BackendConfig, environment: Mapping[str, str] = os.environ) -> Process:
    """This process's place, from the launcher's variables; nothing is started.

    Raises ConfigError if a variable is not a number, is out of range, or asks for a CUDA device that is not there.
    """

    def number(default: int, *names: str) -> int:
        for name in names:
            if name in environment:
                try:
                    return int(environment[name])
                except ValueError:
                    raise ConfigError(f"{name}: {environment[name]!r} is not a whole number; the launcher sets it") from None
        return default

    world_size, rank = number(1, "WORLD_SIZE"), number(0, "RANK")
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"RANK: {rank} is not below WORLD_SIZE = {world_size}; start every rank with one launcher, or unset both"
        )
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE; without either, all ranks are taken to be here.
    local_rank, local_world_size = number(0, "LOCAL_RANK"), number(world_size, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    return Process(rank, world_size, local_rank, local_world_size, _device(config.device, local_rank))


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("backend.device: 'cuda' is asked for and torch sees no GPU; use 'cpu', or see `vatt doctor`")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"backend.device: local rank {local_rank} has no GPU of its own, this host shows {torch.cuda.device_count()}; "
            "start fewer ranks"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def joined(config: BackendConfig) -> Iterator[Process]:
    """Join the run's process group, yield this process's place, and leave the group.

    A process alone gets a group too (kept in memory, no port), because DeepSpeed needs one. Ranks leave together: without
    the barrier some ranks of a finished run abort while others still talk to them. After an error there is no barrier,
    since the other ranks may never come to it.
    """
    process = find_process(config)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.threads or max(1, cores // process.local_world_size))
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    backend = "gloo" if process.device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if process.world_size > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield process
        dist.barrier()
    finally:
        dist.destroy_process_group()


def group_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in `group`; 1 where no group was joined."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, group):  # type: ignore[no-untyped-def]
        ctx.rank, ctx.size, ctx.rows = dist.get_rank(group), dist.get_world_size(group), rows.shape[0]
        gathered = rows.new_empty((ctx.size * ctx.rows, *rows.shape[1:]))
        dist.all_gather(list(gathered.split(ctx.rows)), rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        own = gradient[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]
        return own * ctx.size, None


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of every rank, in rank order: (B, ...) -> (ranks B, ...). Every rank must hold the same number of rows.

    For a loss that every rank computes whole from the gathered rows: the incoming gradient is then the same on every
    rank, so backward returns this rank's own rows of it and no collective is needed. They are multiplied by the number
    of ranks because the backend averages parameter gradients over ranks, where the towers' contributions must add up.
    """
    if group_size(group) == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, group)
    return gathered
