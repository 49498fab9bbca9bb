"""Nothing in a training step asks the device for a number: seen on a CPU by the operators that would have to.

On a GPU the same is shown by CUDA itself (`torch.cuda.set_sync_debug_mode`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from vatt.engine.backend.interface import make_backend
from vatt.engine.backend.sharded import ShardedBackend
from vatt.engine.config_file import load_run
from vatt.engine.data.batch import Batch
from vatt.engine.distributed import Process
from vatt.engine.model import VATT
from vatt.engine.train import Run, train_step

# Their results' values or shapes are known on the host only once the device is done.
WAITING = (
    "aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.masked_select", "aten.unique", "aten._unique2",
    "aten.repeat_interleave", "aten.equal", "aten.is_nonzero", "aten.bincount", "aten._assert_scalar",
)  # fmt: skip


class Watch(TorchDispatchMode):
    """Collects the operators that would wait, and indexing by a bool mask, which is `nonzero` in disguise."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().replace("::", ".")
        if name.startswith(WAITING):
            self.seen.append(name)
        indices = args[1] if name.startswith("aten.index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            self.seen.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def run_of(micro_run: Path, device: str, backend_class=None, **backend) -> tuple[Run, Batch]:
    config = load_run(micro_run)
    config = replace(config, backend=replace(config.backend, name="torch", zero_stage=0, **backend)).with_buckets()
    make = backend_class or make_backend
    made = make(VATT(config), config, rank=0, world_size=1, device=torch.device(device))
    made.module.train()
    count, data = config.batch_size, config.data
    batch = Batch(
        video=torch.zeros(count, data.frames, 3, data.size, data.size, dtype=torch.uint8),
        audio=torch.rand(count, data.audio_samples),
        text=torch.ones(count, data.captions, data.words, dtype=torch.int64),
        has_text=torch.arange(count) != 1,
        has_audio=torch.arange(count) != 2,
        sample_id=torch.arange(count),
    ).to(device)
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    return Run(config, Process(device=torch.device(device)), made, None, None, None, skipped), batch  # type: ignore[arg-type]


def watched(run: Run, batch: Batch) -> list[str]:
    train_step(run, batch, 0)
    with Watch() as watch:
        train_step(run, batch, 1)
    return watch.seen


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept tokens are checked by reading them where that costs nothing, on a CPU; on a GPU the device does it."""
    for module in ("read_patches", "patch_project"):
        monkeypatch.setattr(f"vatt.kernels.{module}.check_index", lambda *_: None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"chunk": 3}, {"recompute_layers": 1}], ids=["whole", "chunks", "recomputed"])
def test_a_step_never_waits(micro_run: Path, precision: str, settings: dict) -> None:
    assert watched(*run_of(micro_run, "cpu", precision=precision, **settings)) == []


@pytest.mark.usefixtures("unchecked")
def test_nor_does_one_with_adam_divided(micro_run: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert watched(*run_of(micro_run, "cpu", ShardedBackend, precision="bf16")) == []
    finally:
        dist.destroy_process_group()


def test_the_watch_sees_what_it_is_there_for() -> None:
    x = torch.arange(4.0)
    with Watch() as watch:
        float(x.sum())
        x[x > 1]
        torch.nonzero(x)
    assert watch.seen == ["aten._local_scalar_dense", "aten.index.Tensor by a mask", "aten.nonzero"]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"chunk": 3}, {"tower_streams": True}], ids=["whole", "chunks", "streams"])
def test_cuda_says_so_too(micro_run: Path, settings: dict) -> None:
    run, batch = run_of(micro_run, "cuda", precision="bf16", device="cuda", **settings)
    for step in range(2):
        train_step(run, batch, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(run, batch, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
