"""Runs of the toy model on several ranks, shared by the tests of this folder: a start costs seconds, so few are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PLAIN = ["torch:0:fp32", "torch:0:bf16"]
SHARDED = ["torch:1:fp32", "torch:1:bf16"]
ZERO = [f"deepspeed:{stage}:{precision}" for precision in ("fp32", "bf16") for stage in (1, 2, 3)]
# What the fast tests run; the slow ones run everything everywhere.
FAST = {
    1: [*PLAIN, "deepspeed:0:fp32", "deepspeed:1:fp32", "deepspeed:1:bf16"],
    2: [*PLAIN, *SHARDED, "deepspeed:1:fp32", "deepspeed:2:bf16", "deepspeed:3:fp32", "deepspeed:3:bf16"],
    4: ["torch:0:fp32", "torch:1:fp32", "deepspeed:2:fp32"],
}
ALL = [*PLAIN, *SHARDED, "deepspeed:0:fp32", *ZERO]


def _runner(launch, folder: Path, cases: dict[int, list[str]]):
    def run(case: str, ranks: int) -> dict:
        file = folder / f"{case}-{ranks}.pt"
        if not file.exists():
            if ranks != 2:  # one rank, and four, also finish a run that two ranks of ZeRO-3 began
                torch.save(run("deepspeed:3:fp32", 2)["stopped"], folder / "start.pt")
            launch(HERE / "toy_run.py", folder, *cases[ranks], ranks=ranks)
        return torch.load(file)

    return run


@pytest.fixture(scope="session")
def runs(launch, tmp_path_factory):
    """runs(case, ranks): what toy_run.py recorded, for the cases in FAST."""
    return _runner(launch, tmp_path_factory.mktemp("toy"), FAST)


@pytest.fixture(scope="session")
def all_runs(launch, tmp_path_factory):
    """The same for every case on every number of ranks."""
    return _runner(launch, tmp_path_factory.mktemp("toy_all"), dict.fromkeys((1, 2, 4), ALL))
