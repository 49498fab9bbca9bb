"""Tuning tables: what a target uses, what it is offered, and that a sweep can force any of it."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("triton", reason="the launches of Triton kernels")

from vatt.kernels.contract import table as kernels
from vatt.kernels.gpu.launch import TABLES, Tuning, Tunings
from vatt.kernels.gpu.target import TARGETS


@pytest.fixture
def table():
    made = Tunings(
        "a_kernel_of_this_test",
        {"small": Tuning({"BLOCK": 16}), "large": Tuning({"BLOCK": 128}, warps=8), "wide": Tuning({"BLOCK": 64}, programs=264)},
        {"sm_80": "small", "sm_90": "large"},
        withheld={"sm_80": ("large",)},
    )
    yield made
    del TABLES["a_kernel_of_this_test"]


def test_a_newer_target_uses_the_newest_listed(table: Tunings) -> None:
    picked = {name: table.pick(target).blocks["BLOCK"] for name, target in TARGETS.items()}
    assert picked == {"sm_80": 16, "sm_90": 128, "sm_100": 128}


def test_what_is_withheld_is_not_offered(table: Tunings) -> None:
    assert table.offered("sm_80") == ["small", "wide"]
    assert table.offered("sm_90") == ["small", "large", "wide"]


def test_a_forced_candidate_is_used_whatever_the_target(table: Tunings) -> None:
    with table.forced("wide"):
        assert {table.pick(target).programs for target in TARGETS.values()} == {264}
    assert table.pick(TARGETS["sm_80"]).blocks == {"BLOCK": 16}


def test_programs_are_no_constant_of_the_kernel(table: Tunings) -> None:
    assert str(table.candidates["wide"]) == "BLOCK=64,warps=4,stages=2,programs=264"
    assert str(table.candidates["small"]) == "BLOCK=16,warps=4,stages=2"


@pytest.mark.parametrize("target", TARGETS)
def test_no_shipped_default_is_withheld(target: str) -> None:
    for name in [kernel.name for kernel in kernels()]:
        importlib.import_module(f"vatt.kernels.gpu.{name}")
    assert len(TABLES) >= 10
    for name, shipped in TABLES.items():
        default = shipped.default.get(target)
        assert default is None or default in shipped.offered(target), name
