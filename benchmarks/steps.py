"""The two sides of every comparison of whole steps: ours and the baseline, on the same synthetic clips; and their timing."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend

from vatt.benchmarks.baseline_plain import SAMPLES, SIZE, VOCABULARY, Step, build, contestants
from vatt.engine.backend.interface import make_backend
from vatt.engine.config import RunConfig
from vatt.engine.config_file import load_run
from vatt.engine.data.batch import Batch
from vatt.engine.gradient_cache import backward_in_chunks
from vatt.engine.loss import contrastive_losses
from vatt.engine.model import VATT
from vatt.engine.optimizer import learning_rate
from vatt.engine.profile.flops import step_flops
from vatt.engine.randomness import Draws

RATE = 0.5  # share of tokens dropped, unless a measurement is about that


def recipe(size: str, precision: str, batch: int, overrides: Iterable[str] = (), drop_rate: float = RATE) -> RunConfig:
    """The shipped recipe `pretrain/<size>` under the plain backend."""
    fixed = [f"--batch_size={batch}", "--backend.name=torch", "--backend.zero_stage=0", f"--backend.precision={precision}"]
    run = load_run(f"pretrain/{size}", [*fixed, *overrides]).with_buckets()
    return replace(run, drop_rate=replace(run.drop_rate, video=drop_rate, audio=drop_rate))


def synthetic_batch(config: RunConfig) -> Batch:
    """Clips of the run's shape: random pixels, sounds and words, everything valid."""
    count, data = config.batch_size, config.data
    return Batch(
        video=torch.randint(0, 256, (count, data.frames, 3, data.size, data.size), dtype=torch.uint8),
        audio=torch.rand(count, data.audio_samples) * 2 - 1,
        text=torch.randint(2, config.model.text.vocabulary, (count, data.captions, data.words)),
        has_text=torch.ones(count, dtype=torch.bool),
        has_audio=torch.ones(count, dtype=torch.bool),
        sample_id=torch.arange(count),
    )


def ours(config: RunConfig, device: str) -> tuple[Step, float]:
    """(our step, its true FLOPs); the step number moves on with each call, so every step keeps other tokens."""
    backend = make_backend(VATT(config), config, rank=0, world_size=1, device=torch.device(device))
    backend.module.train()
    batch = synthetic_batch(config).to(device)
    number = 0

    def forward_backward() -> torch.Tensor:
        nonlocal number
        number += 1
        draws, chunk = Draws.at(config.seed, number, batch.sample_id), config.backend.chunk
        if 0 < chunk < len(batch):
            losses = backward_in_chunks(backend, batch, draws, chunk, lambda space: contrastive_losses(space, config.loss))
        else:
            losses = contrastive_losses(backend.module(batch, draws), config.loss)
            backend.backward(losses.total)
        return losses.total.detach()

    def update() -> None:
        backend.step(learning_rate(number, config.optimizer, config.steps))

    return Step(forward_backward, update), step_flops(config)


def baseline(size: str, device: str, batch: int, compiled: bool, drop_rate: float = RATE) -> tuple[Step, dict[str, object]]:
    """(the fastest of the baseline's forms on this device, by its second step; what each took). The others are freed."""
    backends: dict[str, list[SDPBackend] | None] = {"": None}
    if device == "cuda":
        flash, efficient = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
        backends = {" cudnn": [SDPBackend.CUDNN_ATTENTION, flash, efficient], " flash": [flash, efficient]}
    tried: dict[str, float] = {}
    best: tuple[float, Step] | None = None
    for precision in contestants(device):
        for name, order in backends.items():
            for compile_it in (False, True) if compiled else (False,):
                step, _ = build(size, device, precision, batch=batch, drop_rate=drop_rate, compiled=compile_it, backends=order)
                step()
                form = f"{precision}{name} {'compiled' if compile_it else 'eager'}"
                tried[form] = round(seconds(step, device), 3)
                if best is None or tried[form] < best[0]:
                    best = tried[form], step
                del step
    assert best is not None
    return best[1], {"chosen": min(tried, key=tried.__getitem__), "seconds": tried}


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call, everything it started included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    sides: dict[str, Step], pairs: int, device: str, say: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of `pairs` rounds, {"forward_backward": {side: [...]}, "step": {...}}; who goes first alternates."""
    times: dict[str, dict[str, list[float]]] = {part: {side: [] for side in sides} for part in ("forward_backward", "step")}
    for pair in range(pairs):
        for side in list(sides) if pair % 2 else list(sides)[::-1]:
            first = seconds(sides[side].forward_backward, device)
            second = seconds(sides[side].update, device)
            times["forward_backward"][side].append(first)
            times["step"][side].append(first + second)
        say(f"pair {pair}: " + ", ".join(f"{side} {times['step'][side][-1]:.3f} s" for side in sides))
    return times


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, extremes and interquartile range."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "median": round(statistics.median(ordered), 4),
        "low": round(ordered[0], 4),
        "high": round(ordered[-1], 4),
        "interquartile": round(ordered[(3 * len(ordered)) // 4] - ordered[quarter], 4),
    }


def repeated(step: Step, count: int, device: str) -> list[float]:
    """Seconds a step, over `count` steps after two that warm up; timed in groups, so that the host may run ahead."""
    for _ in range(2):
        step()
    groups = 5 if count >= 10 else 1
    each = count // groups

    def group() -> None:
        for _ in range(each):
            step()

    return [seconds(group, device) / each for _ in range(groups)]


@contextlib.contextmanager
def out_of_memory_is_none(device: str):  # type: ignore[no-untyped-def]
    """A batch that does not fit ends its row, not the run."""
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()


# The baseline's clips are of the shipped recipes' shape; if a recipe moved, the comparison would no longer be one.
def check_same_shapes(config: RunConfig) -> None:
    """Raise ValueError unless a recipe's clips are the baseline's."""
    have = config.data.size, config.data.audio_samples, config.model.text.vocabulary
    if have != (SIZE, SAMPLES, VOCABULARY):
        raise ValueError(f"the recipe's size, samples and vocabulary are {have}, the baseline's {(SIZE, SAMPLES, VOCABULARY)}")
