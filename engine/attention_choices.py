"""Which attention a run uses on its GPUs: measured once by rank 0 before the first step, the same on every rank, and kept.

`auto` would otherwise measure on each rank as calls come, and again after a resume: ranks could differ, and so could the
parts of one run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from vatt.engine.config import RunConfig
from vatt.engine.distributed import Process
from vatt.engine.durable import replace_file
from vatt.engine.meta import shapes_only
from vatt.engine.randomness import Draws
from vatt.kernels.attention import attention
from vatt.kernels.attention_choice import Call, choices, noted, use_choices
from vatt.kernels.dropout import DropoutMask

FILE = "attention.json"


def settle_attention(config: RunConfig, process: Process) -> None:
    """Agree on what `auto` means for every call of a step; the run directory's file, where there is one, decides. Collective.

    On a CPU there is nothing to measure, and nothing is written.
    """
    if process.device.type != "cuda":
        return
    file = Path(config.output) / FILE
    found: list[dict[str, str] | None] = [None]
    if process.is_main:
        if file.exists():
            use_choices(json.loads(file.read_text()))
        for call in calls_of_a_step(config, process.world_size):
            _make(call, process.device)
        found = [choices()]
        replace_file(file, json.dumps(choices(), indent=1) + "\n")
    if process.world_size > 1:
        dist.broadcast_object_list(found)
    use_choices(found[0] or {})


def calls_of_a_step(config: RunConfig, world_size: int) -> list[Call]:
    """The kinds of attention one rank's step asks for, with gradient caching's passes without a gradient."""
    clips = config.batch_size // world_size
    chunk = config.backend.chunk
    sizes = {clips} if not 0 < chunk < clips else {chunk, clips % chunk or chunk}
    dtype = torch.bfloat16 if config.backend.precision == "bf16" else torch.float32
    with noted() as calls:
        for size in sorted(sizes, reverse=True):
            model, batch = shapes_only(replace(config, batch_size=size), dtype)
            draws = Draws.at(config.seed, 0, batch.sample_id)
            model.encode(batch, draws, None)
            if size != clips:
                with torch.no_grad():
                    model.encode(batch, draws, None)
    return calls


def _make(call: Call, device: torch.device) -> None:
    """One such call on random numbers, which has `auto` measure it unless it knows the answer."""
    qkv = torch.randn(call.shape, dtype=call.dtype, device=device).requires_grad_(call.gradient)
    bias = None
    if call.bias is not None:
        shape, dtype, gradient = call.bias
        bias = torch.randn(shape, dtype=dtype, device=device).requires_grad_(gradient)
    dropout = None
    if call.dropout > 0.0:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        dropout = DropoutMask(call.dropout, zero, zero, torch.arange(call.shape[0], device=device), 0)
    with torch.set_grad_enabled(call.gradient):
        attention(qkv, bias, call.scale, dropout)
