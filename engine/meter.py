"""What happened since the last logged step, as a line of metrics.jsonl."""

from __future__ import annotations

import os
import resource
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vatt.engine.config import RunConfig
from vatt.engine.data.loader import ClipLoader
from vatt.engine.distributed import Process
from vatt.engine.profile.flops import peak_tflops, step_flops

if TYPE_CHECKING:
    from vatt.engine.train import StepReport


class Meter:
    """Measures from one logged step to the next. Making a line is the only place where the host waits for the device."""

    def __init__(self, config: RunConfig, process: Process, first: int) -> None:
        self.config, self.process = config, process
        self.flops = step_flops(config)
        self.peak_tflops = config.log.peak_tflops or peak_tflops(device_name(process.device))
        self.done, self.since, self.waited = first, time.perf_counter(), 0.0

    def line(self, report: StepReport, loader: ClipLoader, skipped: Tensor) -> dict[str, Any]:
        """One line. Losses, norm and rate are the last step's; speeds are means since the line before.

        tflops counts true FLOPs over all ranks per second (see profile.flops); mfu divides it by the ranks' nominal peak,
        and is None on a device whose peak is unknown. data_wait is the share of time this rank waited for clips.
        """
        losses, outcome = report.losses, report.outcome
        values = torch.stack([losses.total, losses.video_audio, losses.video_text, outcome.gradient_norm, skipped]).tolist()
        now, done = time.perf_counter(), report.step + 1
        steps, seconds, waited = done - self.done, now - self.since, loader.wait_seconds - self.waited
        self.done, self.since, self.waited = done, now, loader.wait_seconds
        tflops = self.flops * steps / seconds / 1e12
        return {
            "step": done,
            "loss": values[0],
            "loss_video_audio": values[1],
            "loss_video_text": values[2],
            "learning_rate": report.learning_rate,
            "gradient_norm": values[3],
            "skipped_steps": int(values[4]),
            "samples_per_s": self.config.batch_size * steps / seconds,
            "tflops": tflops,
            "mfu": tflops / (self.peak_tflops * self.process.world_size) if self.peak_tflops else None,
            "data_wait": waited / seconds,
            "memory_bytes": memory_bytes(self.process.device),
            "counts": dict(loader.counts),
        }


def device_name(device: torch.device) -> str:
    """The device as its maker calls it; "cpu" for a processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
