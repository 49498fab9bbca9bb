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

SCRIPT = Path(__file__).with_name("cached_ranks.py")
MEMORY = Path(__file__).with_name("step_memory.py")
# backend:stage:precision:chunk:recompute. Chunks of 3 leave an uneven rest of the 8 or 4 clips of a rank.
TRUTH, ALONE = "torch:0:fp32:0:0", "torch:0:bf16:0:0"
FAST = {
    1: [
        TRUTH,
        ALONE,
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
        "deepspeed:3:fp32:3:1",
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
CHUNKED_FAST = [(ranks, case) for ranks, cases in FAST.items() for case in cases if case not in (TRUTH, ALONE)]
CHUNKED_ALL = [(ranks, case) for ranks, cases in ALL.items() for case in cases if case not in (TRUTH, ALONE)]


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


@pytest.mark.parametrize(("ranks", "case"), CHUNKED_FAST)
def test_chunked_is_whole(some: Path, ranks: int, case: str) -> None:
    check(some, ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), CHUNKED_ALL)
def test_chunked_is_whole_everywhere(every: Path, ranks: int, case: str) -> None:
    check(every, ranks, case)


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
