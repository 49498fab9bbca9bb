"""One run, many layouts: 1, 2 and 4 ranks, ZeRO 1-3 and the PyTorch backend, dropout on.

Same sample ids; the losses of the first ten steps within 1e-5 relative in fp32 and 1e-3 in bf16; gradients within 1e-6 of
their norm in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "layout_ranks.py"
FAST = {1: ("torch-fp32",), 2: ("torch-fp32", "sharded-fp32", "zero1-fp32")}
NAMES = ("torch", "sharded", "zero1", "zero2", "zero3")
LAYOUTS = tuple(f"{name}-{precision}" for precision in ("fp32", "bf16") for name in NAMES)
ALL = {1: LAYOUTS, 2: LAYOUTS, 4: LAYOUTS}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}


def cases(layouts: dict[int, tuple[str, ...]]) -> list[tuple[str, int]]:
    return [(layout, ranks) for ranks, names in layouts.items() for layout in names]


def train(launch: Callable[..., list[str]], small_run: Path, out: Path, layouts: dict[int, tuple[str, ...]]) -> Path:
    for ranks, names in layouts.items():
        launch(SCRIPT, small_run, out, *names, ranks=ranks, seconds=900)
    return out


@pytest.fixture(scope="module")
def some(launch: Callable[..., list[str]], small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the layouts in FAST did."""
    return train(launch, small_run, tmp_path_factory.mktemp("some_layouts"), FAST)


@pytest.fixture(scope="module")
def every(launch: Callable[..., list[str]], small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what all layouts did."""
    return train(launch, small_run, tmp_path_factory.mktemp("layouts"), ALL)


def results(folder: Path, world_size: int, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{world_size}-{rank}.json").read_text())


def check_sample_ids(folder: Path, worlds: tuple[int, ...]) -> None:
    expected = results(folder, 1)["ids"]
    assert len({tuple(ids) for ids in expected}) == len(expected)
    for world_size in worlds:
        steps = zip(*(results(folder, world_size, rank)["ids"] for rank in range(world_size)), strict=True)
        assert [sum(step, []) for step in steps] == expected, world_size


def check_losses(folder: Path, layout: str, world_size: int) -> None:
    precision = layout.split("-")[1]
    expected = torch.tensor(results(folder, 1)[f"torch-{precision}"]["losses"])
    assert len({round(total, 4) for total in expected[:, 0].tolist()}) == len(expected), "no two steps are alike"
    if precision == "fp32":
        # Halves: dropout and the clips of a batch move a single loss by more than ten steps do.
        assert expected[5:, 0].mean() < expected[:5, 0].mean(), "ten steps of training lower the loss"
    for rank in range(world_size):
        result = results(folder, world_size, rank)[layout]
        assert result["skipped"] == 0
        relative = ((torch.tensor(result["losses"]) - expected) / expected).abs().max().item()
        assert relative <= LOSS_TOLERANCE[precision], f"rank {rank}: {relative:.1e}"


def check_gradients(folder: Path, layout: str, world_size: int) -> None:
    """fp32: equal to one rank's. bf16: from the fp32 gradient at most twice as far as one rank's bf16 gradient is."""
    precision = layout.split("-")[1]
    truth = torch.load(folder / "1-torch-fp32.pt", weights_only=True)
    ours = torch.load(folder / f"{world_size}-{layout}.pt", weights_only=True)
    alone = torch.load(folder / f"1-torch-{precision}.pt", weights_only=True)
    assert set(ours) == set(truth)
    total = torch.stack([g.norm() for g in truth.values()]).norm()
    for name, gradient in truth.items():
        error = (ours[name] - gradient).norm()
        rounding = 2 * (alone[name] - gradient).norm() if precision == "bf16" else 0.0
        bound = rounding + 1e-6 * max(gradient.norm(), total * 1e-2)
        assert error <= bound, f"{name}: {error / gradient.norm():.1e} of its norm, {bound / gradient.norm():.1e} allowed"


def test_two_ranks_load_the_same_samples(some: Path) -> None:
    check_sample_ids(some, (1, 2))


@pytest.mark.parametrize(("layout", "world_size"), cases(FAST))
def test_two_ranks_are_one_run(some: Path, layout: str, world_size: int) -> None:
    check_losses(some, layout, world_size)
    check_gradients(some, layout, world_size)


@pytest.mark.slow
def test_every_layout_loads_the_same_samples(every: Path) -> None:
    check_sample_ids(every, tuple(ALL))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world_size"), cases(ALL))
def test_losses(every: Path, layout: str, world_size: int) -> None:
    check_losses(every, layout, world_size)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world_size"), cases(ALL))
def test_gradients(every: Path, layout: str, world_size: int) -> None:
    check_gradients(every, layout, world_size)
