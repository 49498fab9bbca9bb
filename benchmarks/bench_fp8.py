"""Whether eight-bit linear layers learn what the others learn: loss curves of `pretrain/tiny` with `backend.fp8` on and off.

    python benchmarks/bench_fp8.py --world runs/world --out benchmarks/results [--steps 180 --seeds 0,1,2]

A run a seed and side, on the sample world `make demo` makes. The judgement: the mean loss of the last fifth of the steps,
fp8 against not, seed by seed, beside how far the seeds are from one another. Where there are no eight-bit products the same
numbers are multiplied in fp32, so the curves hold for a GPU and the seconds do not. Writes fp8.json and fp8.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from vatt.benchmarks.bench_anchors import folder, machine


def curve(world: Path, work: Path, seed: int, fp8: bool, steps: int) -> list[float]:
    """The loss of every step of one run; a run that finished before is read, not repeated."""
    output = work / f"seed-{seed}-{'fp8' if fp8 else 'plain'}-{steps}"
    metrics = output / "metrics.jsonl"
    if not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        command = [sys.executable, "-m", "vatt.engine.cli", "pretrain", "pretrain/tiny", "--output", str(output)]
        command += ["--data.train", str(world / "train.jsonl"), "--data.test", "", "--seed", str(seed), "--steps", str(steps)]
        command += ["--backend.fp8", str(fp8).lower(), "--log.every", "1", "--optimizer.warmup", str(max(1, steps // 9))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]


def ending(losses: list[float]) -> float:
    """Mean of the last fifth."""
    return statistics.mean(losses[-max(1, len(losses) // 5) :])


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Both sides' curves, a line a seed, smoothed over nine steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for (side, runs), colour in zip(curves.items(), ("#1f4e79", "#d55e00"), strict=True):
        for seed, losses in enumerate(runs):
            smooth = [statistics.mean(losses[max(0, i - 4) : i + 5]) for i in range(len(losses))]
            axes.plot(range(1, len(smooth) + 1), smooth, color=colour, linewidth=1.3, label=side if seed == 0 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, mean of nine steps")
    axes.set_title("Eight-bit linear layers beside the recipe's own: pretrain/tiny", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("runs/world"), help="sample world, as `make demo` makes it")
    parser.add_argument("--out", type=Path, required=True, help="folder of results; a folder per machine is made in it")
    parser.add_argument("--work", type=Path, default=Path("runs/fp8"), help="run directories")
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    seeds = [int(word) for word in arguments.seeds.split(",")]
    sides = {"recipe (fp32)": False, "fp8": True}
    curves: dict[str, list[list[float]]] = {side: [] for side in sides}
    for seed in seeds:
        for side, fp8 in sides.items():
            curves[side].append(curve(arguments.world, arguments.work, seed, fp8, arguments.steps))
            print(f"seed {seed} {side:14} ends at {ending(curves[side][-1]):.4f}", flush=True)
    plain, eight = ([ending(losses) for losses in runs] for runs in curves.values())
    record: dict[str, Any] = machine("cpu") | {"recipe": "pretrain/tiny", "steps": arguments.steps, "seeds": seeds}
    record |= {
        "ending_plain": [round(value, 4) for value in plain],
        "ending_fp8": [round(value, 4) for value in eight],
        "difference": [round(b - a, 4) for a, b in zip(plain, eight, strict=True)],
        "spread_of_seeds": round(statistics.stdev(plain), 4) if len(plain) > 1 else None,
        "curves": {side: [[round(loss, 4) for loss in losses] for losses in runs] for side, runs in curves.items()},
    }
    path = arguments.out / folder(record) / "fp8.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
    draw(curves, path.with_suffix(".png"))
    print(json.dumps({key: value for key, value in record.items() if key != "curves"}, indent=1))


if __name__ == "__main__":
    main()
