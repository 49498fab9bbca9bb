"""One process of tests/test_gradient_cache.py: what a step on 24 clips of 256 tokens adds to the process's peak memory, in KiB.

python step_memory.py CHUNK RECOMPUTE_LAYERS
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vatt.engine.backend.interface import make_backend
from vatt.engine.config import (
    AudioConfig,
    BackendConfig,
    DataConfig,
    DropRateConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.data.batch import Batch
from vatt.engine.distributed import Process
from vatt.engine.model import VATT
from vatt.engine.train import Run, train_step

LARGE = {"size": "custom", "layers": 6, "width": 128, "heads": 2, "hidden": 512}
SMALL = {"size": "custom", "layers": 1, "width": 32, "heads": 2, "hidden": 64}


def peak() -> int:
    # Not ru_maxrss, which a child takes over from its parent.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main(chunk: int, recompute_layers: int) -> None:
    torch.set_num_threads(1)
    config = RunConfig(
        batch_size=24,
        data=DataConfig(frames=8, size=128, words=4, audio_samples=320, captions=1),
        drop_rate=DropRateConfig(video=0.0, audio=0.0),
        model=ModelConfig(
            video=VideoConfig(**LARGE, patch=(2, 16, 16)),
            audio=AudioConfig(**SMALL, patch=32),
            text=TextConfig(**SMALL, vocabulary=64, word_width=16),
        ),
        backend=BackendConfig(name="torch", zero_stage=0, precision="fp32", chunk=chunk, recompute_layers=recompute_layers),
    ).with_buckets()
    backend = make_backend(VATT(config), config, rank=0, world_size=1, device=torch.device("cpu"))
    run = Run(config, Process(), backend, None, None, None, torch.zeros((), dtype=torch.int64))  # type: ignore[arg-type]
    backend.module.train()
    clips = Batch(
        video=torch.randint(0, 256, (24, 8, 3, 128, 128), dtype=torch.uint8),
        audio=torch.rand(24, 320),
        text=torch.ones(24, 1, 4, dtype=torch.int64),
        has_text=torch.ones(24, dtype=torch.bool),
        has_audio=torch.ones(24, dtype=torch.bool),
        sample_id=torch.arange(24),
    )
    train_step(run, clips.rows(slice(0, 2)), 0)  # Adam's moments, and whatever else a process has once
    before = peak()
    train_step(run, clips, 1)
    print(peak() - before)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
