"""One rank of tests/test_layouts.py: ten steps of a small run under each of the given layouts, dropout on.

    python layout_ranks.py CONFIG OUT LAYOUT...      with LAYOUT = torch-fp32, sharded-fp32, zero1-bf16, ...

Writes OUT/WORLD_SIZE-RANK.json, and on rank 0 the first step's gradients as OUT/WORLD_SIZE-LAYOUT.pt.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vatt.engine.backend.interface import make_backend
from vatt.engine.config import OptimizerConfig, RunConfig
from vatt.engine.config_file import load_run
from vatt.engine.data.batch import Batch
from vatt.engine.data.catalogue import Catalogue
from vatt.engine.data.loader import ClipLoader
from vatt.engine.data.words import Vocabulary
from vatt.engine.distributed import Process, joined
from vatt.engine.model import VATT
from vatt.engine.train import Run, train_step

STEPS = 10


def main(config_path: str, out: str, *layouts: str) -> None:
    base = load_run(config_path)
    catalogue = Catalogue.read(base.data.train)
    vocabulary = Vocabulary.build([c.text for clip in catalogue for c in clip.captions], base.model.text.vocabulary)
    with (
        joined(base.backend) as process,
        ClipLoader(base, catalogue, vocabulary, rank=process.rank, world_size=process.world_size) as loader,
    ):
        batches = list(loader.batches(0, STEPS))
        results: dict[str, Any] = {"ids": [batch.sample_id.tolist() for batch in batches]}
        for layout in layouts:
            file = Path(out) / f"{process.world_size}-{layout}.pt"
            results[layout] = ten_steps(configured(base, layout), process, loader, vocabulary, batches, file)
    (Path(out) / f"{process.world_size}-{process.rank}.json").write_text(json.dumps(results))


def configured(base: RunConfig, layout: str) -> RunConfig:
    """`base` under a layout.

    In bf16 with the paper's optimizer, long warm-up included: a rank rounds its own part of a gradient to bf16, so masters
    differ by a thousandth of an update between layouts. Where updates are large, some weights then round to another bf16
    number, after which the losses differ by all of bf16's noise, several thousandths in a model as small as this.
    """
    name, precision = layout.split("-")
    backend = replace(base.backend, name="torch", zero_stage=int(name == "sharded"), precision=precision)
    if name.startswith("zero"):
        backend = replace(backend, name="deepspeed", zero_stage=int(name.removeprefix("zero")))
    optimizer = base.optimizer if precision == "fp32" else OptimizerConfig()
    return replace(base, backend=backend, optimizer=optimizer).with_buckets()


def ten_steps(
    config: RunConfig, process: Process, loader: ClipLoader, vocabulary: Vocabulary, batches: list[Batch], file: Path
) -> dict[str, Any]:
    """Losses of each step and the steps skipped; the first step's averaged gradient goes to `file`."""
    backend = make_backend(VATT(config), config, rank=process.rank, world_size=process.world_size, device=process.device)
    run = Run(config, process, backend, loader, vocabulary, None, torch.zeros((), dtype=torch.int64))
    backend.module.train()
    losses = []
    for step, batch in enumerate(batches):
        report = train_step(run, batch, step)
        losses.append([report.losses.total.item(), report.losses.video_audio.item(), report.losses.video_text.item()])
        if step == 0:
            state = backend.gather_state()
            if state is not None:
                # After one update the first moment is (1 - beta1) times the gradient.
                scale = 1 - config.optimizer.beta1
                gradients = {k.removeprefix("adam/m/"): v / scale for k, v in state.items() if k.startswith("adam/m/")}
                torch.save(gradients, file)
    return {"losses": losses, "skipped": int(run.skipped)}


if __name__ == "__main__":
    main(*sys.argv[1:])
