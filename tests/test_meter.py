"""A line of metrics: means since the line before, and shares of what the devices could do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vatt.engine import meter
from vatt.engine.backend.interface import StepOutcome
from vatt.engine.config import LogConfig, RunConfig
from vatt.engine.distributed import Process
from vatt.engine.loss import Losses
from vatt.engine.profile.flops import step_flops
from vatt.engine.train import StepReport

RUN = RunConfig(batch_size=12)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def report(step: int) -> StepReport:
    losses = Losses(total=torch.tensor(3.0), video_audio=torch.tensor(2.0), video_text=torch.tensor(4.0))
    return StepReport(step, 1e-3, losses, StepOutcome(torch.tensor(0.5), torch.tensor(False)))


def test_a_line_is_about_the_steps_since_the_line_before(clock) -> None:
    loader = SimpleNamespace(wait_seconds=0.0, counts={"clips": 60})
    ours = meter.Meter(RUN, Process(), first=20)
    clock.seconds, loader.wait_seconds = 104.0, 1.0
    line = ours.line(report(step=24), loader, torch.tensor(2))
    told = {"step": 25, "loss": 3.0, "loss_video_audio": 2.0, "loss_video_text": 4.0, "learning_rate": 1e-3}
    assert {key: line[key] for key in told} == told
    assert line["gradient_norm"] == 0.5 and line["skipped_steps"] == 2 and line["counts"] == {"clips": 60}
    assert line["samples_per_s"] == pytest.approx(12 * 5 / 4) and line["data_wait"] == pytest.approx(0.25)
    assert line["tflops"] == pytest.approx(step_flops(RUN) * 5 / 4 / 1e12)
    clock.seconds, loader.wait_seconds = 105.0, 1.5
    line = ours.line(report(step=34), loader, torch.tensor(2))
    assert line["step"] == 35 and line["samples_per_s"] == pytest.approx(12 * 10 / 1)
    assert line["data_wait"] == pytest.approx(0.5) and line["tflops"] == pytest.approx(step_flops(RUN) * 10 / 1e12)


def test_mfu_is_a_share_of_all_devices_and_unknown_on_an_unknown_one(clock) -> None:
    loader = SimpleNamespace(wait_seconds=0.0, counts={})
    lines = []
    for config in (RUN, replace(RUN, log=LogConfig(peak_tflops=50.0))):
        ours = meter.Meter(config, Process(world_size=4), first=0)
        clock.seconds += 2.0
        lines.append(ours.line(report(step=0), loader, torch.tensor(0)))
    assert lines[0]["mfu"] is None, "the peak of a processor is not known"
    assert lines[1]["mfu"] == pytest.approx(step_flops(RUN) / 2 / 1e12 / (50 * 4))


def test_memory_is_in_bytes() -> None:
    """A process with torch in it holds some hundred megabytes; counted in another unit, it would be far off."""
    assert 50e6 < meter.memory_bytes(torch.device("cpu")) < 100e9
    assert meter.device_name(torch.device("cpu")) == "cpu"
