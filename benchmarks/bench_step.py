"""A whole training step of ours against `baseline_plain`, in one process, pairs interleaved.

    python benchmarks/bench_step.py --out benchmarks/results              # bbs, batch 2, 50 % drop: step_bbs.json
    python benchmarks/bench_step.py --size lbs --memory --out …           # one step alone and its peak memory

Both sides have the same shapes, the same dropout (0) and synthetic clips; ours runs model, loss, plain backend and Adam.
The baseline is the fastest of what this device runs well (precisions, eager, compiled with --compile), chosen by one
timed step each. A ratio is baseline / ours within one pair: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vatt.benchmarks.baseline_plain import CAPTIONS, SAMPLES, SIZE, VOCABULARY, WORDS, build, contestants
from vatt.benchmarks.bench_anchors import folder, machine
from vatt.engine.backend.interface import make_backend
from vatt.engine.config_file import load_run
from vatt.engine.data.batch import Batch
from vatt.engine.loss import contrastive_losses
from vatt.engine.model import VATT
from vatt.engine.optimizer import learning_rate
from vatt.engine.randomness import Draws

Step = Callable[[], object]


def build_ours(size: str, device: str, precision: str, batch_size: int) -> Step:
    """One whole step of the shipped recipe through the plain backend; the step number moves on with each call."""
    overrides = [f"--batch_size={batch_size}", "--backend.name=torch", f"--backend.precision={precision}"]
    config = load_run(f"pretrain/{size}", overrides).with_buckets()
    backend = make_backend(VATT(config), config, rank=0, world_size=1, device=torch.device(device))
    backend.module.train()
    batch = Batch(
        video=torch.randint(0, 256, (batch_size, config.data.frames, 3, SIZE, SIZE), dtype=torch.uint8),
        audio=torch.rand(batch_size, SAMPLES) * 2 - 1,
        text=torch.randint(2, VOCABULARY, (batch_size, CAPTIONS, WORDS)),
        has_text=torch.ones(batch_size, dtype=torch.bool),
        has_audio=torch.ones(batch_size, dtype=torch.bool),
        sample_id=torch.arange(batch_size),
    ).to(device)
    number = 0

    def step() -> torch.Tensor:
        nonlocal number
        number += 1
        space = backend.module(batch, Draws.at(config.seed, number, batch.sample_id))
        losses = contrastive_losses(space, config.loss)
        backend.backward(losses.total)
        backend.step(learning_rate(number, config.optimizer, config.steps))
        return losses.total.detach()

    return step


def seconds(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_baseline(size: str, device: str, batch: int, compiled: bool) -> tuple[Step, dict[str, object]]:
    """The fastest of the baseline's forms on this device, by its second step; the others are freed."""
    forms = [(precision, False) for precision in contestants(device)]
    forms += [(precision, True) for precision, _ in forms] if compiled else []
    tried: dict[str, float] = {}
    best: tuple[float, Step] | None = None
    for precision, compile_it in forms:
        step, _ = build(size, device, precision, batch=batch, compiled=compile_it)
        step()
        name = f"{precision} {'compiled' if compile_it else 'eager'}"
        tried[name] = round(seconds(step, device), 3)
        if best is None or tried[name] < best[0]:
            best = tried[name], step
    assert best is not None
    return best[1], {"chosen": min(tried, key=tried.__getitem__), "seconds": tried}


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 4),
        "low": round(ordered[0], 4),
        "high": round(ordered[-1], 4),
        "interquartile": round(ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4], 4),
    }


def compare(size: str, device: str, precision: str, batch: int, pairs: int, compiled: bool) -> dict[str, object]:
    """Times of `pairs` interleaved pairs; the side that goes first alternates."""
    baseline, form = best_baseline(size, device, batch, compiled)
    sides: dict[str, Step] = {"baseline": baseline, "ours": build_ours(size, device, precision, batch)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    sides["ours"]()  # the baseline is warm already
    for pair in range(pairs):
        for name in list(sides) if pair % 2 else list(sides)[::-1]:
            times[name].append(seconds(sides[name], device))
        ratio = times["baseline"][-1] / times["ours"][-1]
        print(
            f"pair {pair}: baseline {times['baseline'][-1]:.2f} s, ours {times['ours'][-1]:.2f} s, ratio {ratio:.3f}",
            flush=True,
        )
    ratios = [b / o for b, o in zip(times["baseline"], times["ours"], strict=True)]
    return {
        "baseline": form,
        "baseline_s": spread(times["baseline"]),
        "ours_s": spread(times["ours"]),
        "ratio": spread(ratios),
        "times": {name: [round(t, 4) for t in values] for name, values in times.items()},
    }


def memory(size: str, device: str, precision: str, batch: int) -> dict[str, object]:
    """One step and the most memory it took, in GB (1e9 bytes): the process's on a CPU, the allocator's on a GPU."""
    step = build_ours(size, device, precision, batch)
    loss = float(step())  # type: ignore[arg-type]
    assert loss == loss, "the loss is not a number"
    process_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else process_kib * 1024
    return {"peak_gb": round(peak / 1e9, 2), "loss": round(loss, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results; a folder per machine is made in it")
    parser.add_argument("--size", choices=("bbs", "mbs", "lbs"), default="bbs")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of our side")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's default")
    parser.add_argument("--compile", action="store_true", help="let torch.compile take part on the baseline's side")
    parser.add_argument("--memory", action="store_true", help="measure the memory of one step instead")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record: dict[str, object] = machine(device)
    record |= {
        "size": arguments.size,
        "batch": arguments.batch,
        "drop_rate": 0.5,
        "dropout": 0.0,
        "precision": arguments.precision,
    }
    if arguments.memory:
        record |= memory(arguments.size, device, arguments.precision, arguments.batch)
    else:
        record |= compare(arguments.size, device, arguments.precision, arguments.batch, arguments.pairs, arguments.compile)
    kind = "memory" if arguments.memory else "step"
    suffix = "" if arguments.precision == "bf16" else f"_{arguments.precision}"
    path = arguments.out / folder(record) / f"{kind}_{arguments.size}{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "times"}, indent=1))
    print(f"-> {path}")


if __name__ == "__main__":
    main()
