"""One rank of tests/test_gradient_cache.py: two steps of a small run in chunks, or whole, under each of the given layouts.

    python cached_ranks.py CONFIG OUT CASE...      with CASE = backend:stage:precision:chunk:recompute, as torch:0:fp32:3:0,
                                                   or that and :LAST_BLOCK, then without dropout on attention weights

The whole batch is the same on any number of ranks. Rank 0 writes what the steps left behind to OUT/WORLD_SIZE-CASE.pt.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vatt.engine.backend.interface import make_backend
from vatt.engine.config import RunConfig
from vatt.engine.config_file import load_run
from vatt.engine.data.batch import Batch
from vatt.engine.distributed import Process, joined
from vatt.engine.model import VATT
from vatt.engine.train import Run, train_step

STEPS = 2


def configured(base: RunConfig, case: str) -> RunConfig:
    name, stage, precision, chunk, recompute, *last_block = case.split(":")
    settings = {"name": name, "zero_stage": int(stage), "precision": precision}
    backend = replace(base.backend, **settings, chunk=int(chunk), recompute_layers=int(recompute))
    if last_block:
        base = replace(base, model=replace(base.model, attention_dropout=0.0, last_block=last_block[0]))
    return replace(base, batch_size=8, backend=backend).with_buckets()


def clips(config: RunConfig, step: int, process: Process) -> Batch:
    """This rank's part of a step's batch, which has a clip without sound, and a caption and a clip without words."""
    generator, data, count = torch.Generator().manual_seed(step), config.data, config.batch_size
    text = torch.randint(1, config.model.text.vocabulary, (count, data.captions, data.words), generator=generator)
    text[1, 0] = 0
    text[:, :, 6:] = 0
    own = count // process.world_size
    return Batch(
        video=torch.randint(0, 256, (count, data.frames, 3, data.size, data.size), generator=generator, dtype=torch.uint8),
        audio=torch.rand(count, data.audio_samples, generator=generator) * 2 - 1,
        text=text,
        has_text=torch.arange(count) != 2,
        has_audio=torch.arange(count) != 5,
        sample_id=torch.arange(count) + step * count,
    ).rows(slice(process.rank * own, (process.rank + 1) * own))


def two_steps(config: RunConfig, process: Process, poison: tuple[int, int] | None = None) -> dict[str, Any]:
    """Losses, norms and skips of the steps, and on rank 0 the state after them; `poison` = (step, rank) that hears a NaN.

    The rate of the first step is 0 (warm-up), so the second has the same weights everywhere, and Adam's first moment holds
    both gradients.
    """
    backend = make_backend(VATT(config), config, rank=process.rank, world_size=process.world_size, device=process.device)
    run = Run(config, process, backend, None, None, None, torch.zeros((), dtype=torch.int64))  # type: ignore[arg-type]
    backend.module.train()
    log = []
    for step in range(STEPS):
        batch = clips(config, step, process)
        if poison == (step, process.rank):
            batch.audio[-1, 0] = float("nan")
        report = train_step(run, batch, step)
        found, outcome = report.losses, report.outcome
        numbers = (found.total, found.video_audio, found.video_text, outcome.gradient_norm)
        log.append([number.item() for number in numbers] + [bool(outcome.skipped)])
    return {"log": log, "state": backend.gather_state()}


def main(config_path: str, out: str, *cases: str) -> None:
    base = load_run(config_path)
    with joined(base.backend) as process:
        for case in cases:
            config = configured(base, case)
            result = two_steps(config, process)
            result["poisoned"] = two_steps(config, process, poison=(1, process.world_size - 1))
            if process.is_main:
                torch.save(result, Path(out) / f"{process.world_size}-{case}.pt")
            # A DeepSpeed engine imports when it is collected; in the midst of an import of the next one's, Python 3.11 fails.
            gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
