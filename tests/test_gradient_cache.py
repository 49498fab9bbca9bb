"""A step in chunks is the step on the whole batch: losses, every gradient, batch norm, and what is not finite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vatt.engine.backend.gradient_sum import GradientSum
from vatt.engine.backend.plain import PlainBackend
from vatt.engine.config import (
    AudioConfig,
    BackendConfig,
    DataConfig,
    DropRateConfig,
    EncoderConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.data.batch import Batch
from vatt.engine.gradient_cache import backward_in_chunks
from vatt.engine.loss import contrastive_losses
from vatt.engine.model import VATT
from vatt.engine.randomness import Draws

SCRIPT = Path(__file__).with_name("cached_ranks.py")
MEMORY = Path(__file__).with_name("step_memory.py")
# backend:stage:precision:chunk:recompute. Chunks of 3 leave an uneven rest of the 8 or 4 clips of a rank.
TRUTH, ALONE = "torch:0:fp32:0:0", "torch:0:bf16:0:0"
ALL_TOKENS, AGG_ALONE, CHUNKED_AGG = "torch:0:fp32:0:0:all", "torch:0:fp32:0:0:agg", "deepspeed:3:fp32:3:1:agg"
FAST = {
    1: [
        TRUTH,
        ALONE,
        ALL_TOKENS,
        AGG_ALONE,
        "torch:0:fp32:3:0",
        "torch:0:bf16:3:0",
        "torch:0:fp32:8:0",
        "deepspeed:0:fp32:3:0",
        "deepspeed:1:bf16:1:0",
    ],
    2: [
        "torch:0:fp32:3:0",
        "torch:1:bf16:3:0",
        "deepspeed:1:fp32:3:0",
        "deepspeed:2:bf16:3:0",
        CHUNKED_AGG,
        "deepspeed:3:bf16:0:2",
    ],
}
BACKENDS = [f"torch:{stage}" for stage in (0, 1)] + [f"deepspeed:{stage}" for stage in (0, 1, 2, 3)]
EVERY = [
    f"{backend}:{precision}:{chunk}"
    for backend in BACKENDS
    for precision in ("fp32", "bf16")
    for chunk in ("3:0", "1:2", "0:1")
    if (backend, precision) != ("deepspeed:0", "bf16")
]
ALL = {ranks: [TRUTH, ALONE, *EVERY] for ranks in (1, 2)}
CHUNKED_FAST = [
    (ranks, case) for ranks, cases in FAST.items() for case in cases if case not in (TRUTH, ALONE) and len(case.split(":")) == 5
]
CHUNKED_ALL = [
    (ranks, case) for ranks, cases in ALL.items() for case in cases if case not in (TRUTH, ALONE) and len(case.split(":")) == 5
]


def run_all(launch: Callable[..., list[str]], config: Path, out: Path, cases: dict[int, list[str]]) -> Path:
    for ranks, names in cases.items():
        launch(SCRIPT, config, out, *names, ranks=ranks, seconds=600)
    return out


@pytest.fixture(scope="module")
def some(launch: Callable[..., list[str]], small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the cases in FAST left behind."""
    return run_all(launch, small_run, tmp_path_factory.mktemp("some_cached"), FAST)


@pytest.fixture(scope="module")
def every(launch: Callable[..., list[str]], small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what all cases left behind."""
    return run_all(launch, small_run, tmp_path_factory.mktemp("all_cached"), ALL)


def moments(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adam's first moments: the sum of both steps' averaged gradients, weighted."""
    return {name: tensor for name, tensor in state.items() if name.startswith("adam/m/")}


def check(folder: Path, ranks: int, case: str) -> None:
    """fp32: within 1e-6 of the whole batch on one rank. bf16: from that at most twice as far as bf16 on the whole batch is."""
    low = case.split(":")[2] == "bf16"
    truth, alone = torch.load(folder / f"1-{TRUTH}.pt"), torch.load(folder / f"1-{ALONE}.pt")
    ours = torch.load(folder / f"{ranks}-{case}.pt")
    reference, tolerance = (alone, 1e-3) if low else (truth, 1e-6)
    for own, whole in zip(ours["log"], reference["log"], strict=True):
        assert own[:3] == pytest.approx(whole[:3], rel=tolerance), "losses"
        assert low or own[3] == pytest.approx(whole[3], rel=tolerance), "the gradient's norm"
        assert own[4] is False
    expected = moments(truth["state"])
    total = torch.stack([m.norm() for m in expected.values()]).norm()
    assert set(ours["state"]) == set(truth["state"])
    for name, moment in expected.items():
        rounding = 2 * (alone["state"][name] - moment).norm() if low else 0.0
        bound = rounding + 1e-6 * max(moment.norm(), total * 1e-2)
        assert (ours["state"][name] - moment).norm() <= bound, name
    running = [name for name in truth["state"] if "running" in name]
    assert len(running) == 6
    for name in running:
        buffer = truth["state"][name]
        rounding = 2 * (alone["state"][name] - buffer).norm() if low else 0.0
        assert (ours["state"][name] - buffer).norm() <= rounding + 1e-6 * buffer.norm(), name
    check_skipped(ours)


def check_skipped(ours: dict) -> None:
    """A NaN on the last rank in the second step: that step is skipped, the first one taken, and nothing is left of it."""
    poisoned = ours["poisoned"]
    assert [entry[4] for entry in poisoned["log"]] == [False, True]
    assert poisoned["log"][0] == ours["log"][0]
    assert int(poisoned["state"]["adam/step"]) == 1 and int(ours["state"]["adam/step"]) == 2
    assert all(torch.isfinite(tensor).all() for tensor in poisoned["state"].values())


def test_agg_alone_in_chunks_under_zero3(some: Path) -> None:
    """From all tokens on the whole batch at most twice as far as AGG alone on the whole batch is: that is, rounding."""
    states = [torch.load(some / file)["state"] for file in (f"1-{ALL_TOKENS}.pt", f"1-{AGG_ALONE}.pt", f"2-{CHUNKED_AGG}.pt")]
    truth, whole, chunked = (torch.cat([m.flatten() for _, m in sorted(moments(state).items())]) for state in states)
    rounding = (whole - truth).norm()
    assert 0 < rounding < 1e-5 * truth.norm()
    assert (chunked - truth).norm() <= 2 * rounding


@pytest.mark.parametrize(("ranks", "case"), CHUNKED_FAST)
def test_chunked_is_whole(some: Path, ranks: int, case: str) -> None:
    check(some, ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), CHUNKED_ALL)
def test_chunked_is_whole_everywhere(every: Path, ranks: int, case: str) -> None:
    check(every, ranks, case)


@pytest.mark.parametrize(
    ("kind", "text", "last_block", "shared_draw"),
    [("specific", "t5", "all", False), ("specific", "linear", "agg", True), ("agnostic", "t5", "agg", False)],
)
def test_in_fp64_nothing_differs_but_rounding(kind: str, text: str, last_block: str, shared_draw: bool) -> None:
    shape = {"size": "custom", "layers": 2, "width": 16, "heads": 2, "hidden": 24}
    config = RunConfig(
        batch_size=7,
        data=DataConfig(frames=4, size=16, words=5, audio_samples=160, captions=2),
        drop_rate=DropRateConfig(video=0.25, audio=0.5, choice="shared" if shared_draw else "per_sample"),
        model=ModelConfig(
            kind=kind,  # type: ignore[arg-type]
            last_block=last_block,  # type: ignore[arg-type]
            video=VideoConfig(**shape, patch=(2, 8, 8)),
            audio=AudioConfig(**shape, patch=16),
            text=TextConfig(**shape, vocabulary=40, word_width=12, linear_width=20, tower=text),  # type: ignore[arg-type]
            shared=EncoderConfig(**shape),
            post_width=20,
            dropout=0.1,
            attention_dropout=0.0 if last_block == "agg" else 0.1,
        ),
        backend=BackendConfig(name="torch", zero_stage=0, precision="fp32"),  # PlainBackend then leaves fp64 as it is
    ).with_buckets()
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        video=torch.randint(0, 256, (7, 4, 3, 16, 16), generator=generator, dtype=torch.uint8),
        audio=torch.rand(7, 160, generator=generator, dtype=torch.float64) * 2 - 1,
        text=torch.randint(0, 40, (7, 2, 5), generator=generator),
        has_text=torch.arange(7) != 2,
        has_audio=torch.arange(7) != 4,
        sample_id=torch.arange(7),
    )
    draws = Draws.at(5, 3, batch.sample_id)
    found = []
    for chunk in (7, 1, 3):
        model = VATT(config).double().train()
        backend = PlainBackend(model, config, rank=0, world_size=1, device=torch.device("cpu"))
        losses = backward_in_chunks(backend, batch, draws, chunk, lambda space: contrastive_losses(space, config.loss))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": losses.total.detach(), **gradients, **dict(model.named_buffers())})
    model = VATT(config).double().train()
    losses = contrastive_losses(model(batch, draws), config.loss)
    losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {"loss": losses.total.detach(), **gradients, **dict(model.named_buffers())}
    for ours in found:
        assert ours.keys() == whole.keys()
        for name, tensor in whole.items():
            eps = 1e-12 if tensor.dtype == torch.float64 else 1e-6  # batch norm keeps its buffers in fp32
            assert (ours[name] - tensor).norm() <= eps * max(1.0, float(tensor.norm())), name


def test_many_small_gradients_add_up_in_bf16() -> None:
    """A thousand passes that leave 1/512 each beside one that left 1: in bf16, 1 + 1/512 is 1."""
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    gradients = GradientSum([weight])
    with gradients.over_passes():
        for step in range(1025):
            (weight * (1 / 512 if step else 1.0)).sum().backward()
            gradients.add()
    assert weight.grad is not None and weight.grad.tolist() == [3.0] * 3
    weight.grad = None
    weight.sum().backward()
    gradients.add()  # outside, a gradient is left as it is
    assert weight.grad.tolist() == [1.0] * 3


def test_a_failed_step_leaves_no_sums_behind() -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    gradients = GradientSum([weight])
    with pytest.raises(ValueError, match="broken"), gradients.over_passes():
        raise ValueError("broken")
    weight.sum().backward()
    gradients.add()
    assert weight.grad is not None and weight.grad.item() == 1.0


def peak(chunk: int, recompute_layers: int) -> int:
    """KiB that a step on 24 clips of 256 tokens adds to a process that has made one on 2."""
    command = [sys.executable, str(MEMORY), str(chunk), str(recompute_layers)]
    # glibc then gives back what is freed, instead of keeping it in fragments that count as resident.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_chunks_and_recomputed_blocks_need_less_memory() -> None:
    """Six blocks keep some 2 MB a clip each. A chunk keeps a twelfth of that; recomputed blocks one's, and all inputs."""
    whole, chunked, recomputed = peak(0, 0), peak(2, 0), peak(0, 6)
    print(f"added by the step: {whole} KiB whole, {chunked} in chunks of 2, {recomputed} recomputed")
    assert whole > 150_000, "too small to tell"
    assert chunked < 0.2 * whole
    assert recomputed < 0.5 * whole
