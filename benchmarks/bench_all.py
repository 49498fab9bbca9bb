"""Everything worth measuring on a GPU in one go, within a budget of time: what `vatt bench all` runs.

Each stage is a process of its own with a time cap, so a red kernel, a crash or a hang costs its stage and nothing else.
Results are on disk as they come: one line of JSON a stage in DIR/all.jsonl (status, seconds, the end of its output, the
result files it wrote), the stages' own files beside it, and at the end, or when interrupted, everything in DIR/all.tar.gz.

A stage that would start after the budget is spent is recorded as "no time left"; the order below is that of importance.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL = 4000  # characters of a stage's output that its line keeps


@dataclass(frozen=True)
class Stage:
    """One measurement: its name, the most seconds it may take, and its command (`{out}` is the results folder)."""

    name: str
    cap: int
    command: tuple[str, ...]

    def argv(self, out: Path) -> list[str]:
        return [sys.executable, "-m", *(word.replace("{out}", str(out)) for word in self.command)]


def stages(device: str) -> list[Stage]:
    """What is measured on a GPU; on a CPU, the same kinds at sizes a CPU can do."""
    gpu = device == "cuda"
    size, batch = ("lbs", "64") if gpu else ("bbs", "2")
    step = ("vatt.benchmarks.bench_step",)
    where = ("--out", "{out}")
    rows = [
        Stage("anchors", 60, ("vatt.benchmarks.bench_anchors", "--quick", *where)),
        Stage("compile", 120, ("vatt.engine.cli", "bench", "kernels", "--offline", "--target", "here", *where)),
        Stage("correctness", 60, ("vatt.benchmarks.bench_kernels", "--check", *where)),
        Stage("step_profile", 60, (*step, "profile", "--size", size, "--batch", batch, *where)),
        Stage("step_against_baseline", 90, (*step, "against", "--size", size, "--batch", batch, *where)),
        Stage("attention", 60, ("vatt.benchmarks.bench_kernels", "--kernel", "attention", *where)),
        Stage(
            "step_by_batch", 90, (*step, "batches", "--size", size, "--batches", "4,8,16,32,64,128" if gpu else "1,2,4", *where)
        ),
        Stage("products", 60, ("vatt.benchmarks.bench_products", *where)),
        Stage("droptoken", 60, (*step, "rates", "--size", size, "--batch", "32" if gpu else batch, *where)),
        Stage("kernels", 90, ("vatt.benchmarks.bench_kernels", *where)),
        Stage(
            "step_against_compiled",
            150,
            (*step, "against", "--compile", "--label", "compiled", "--size", size, "--batch", batch, *where),
        ),
    ]
    if gpu:
        graphs = ("--set", "backend.cuda_graph=true", "--label", "graph")
        rows.insert(
            7,
            Stage("step_by_batch_graph", 90, (*step, "batches", "--size", size, "--batches", "4,8,16,32,64", *graphs, *where)),
        )
    return rows


def run_all(chosen: Sequence[Stage], out: Path, budget: float, say: Callable[[str], None] = print) -> list[dict[str, object]]:
    """Run the stages in order; the lines of all.jsonl. Never raises for what a stage does."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    lines: list[dict[str, object]] = []
    try:
        for stage in chosen:
            line = run_stage(stage, out, end)
            lines.append(line)
            with (out / "all.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            say(f"{stage.name:24}{line['status']:18}{line['seconds']:8.1f} s  {line['said']}")
    finally:
        archive(out)
    return lines


def run_stage(stage: Stage, out: Path, end: float) -> dict[str, object]:
    """One stage, killed with everything it started when its cap or the budget's end comes."""
    line: dict[str, object] = {"stage": stage.name, "status": "ok", "seconds": 0.0, "said": "", "files": [], "output": ""}
    limit = min(stage.cap, end - time.monotonic())
    if limit < 5:
        return line | {"status": "no time left", "said": "raise --budget, or choose stages with --stage"}
    before = set(files(out))
    log = out / f"{stage.name}.log"
    start = time.monotonic()
    # The interpreter would be used instead of the compiler.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            stage.argv(out), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
            if code != 0:
                line["status"] = f"failed ({code})"
        except subprocess.TimeoutExpired:
            line["status"] = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    words = [row for row in text.splitlines() if row.strip()]
    line |= {"seconds": round(time.monotonic() - start, 1), "said": words[-1][:120] if words else "", "output": text[-TAIL:]}
    return line | {"files": sorted(str(path.relative_to(out)) for path in set(files(out)) - before)}


def files(out: Path) -> Iterator[Path]:
    return (path for path in out.rglob("*") if path.is_file() and path.suffix in (".json", ".png", ".log"))


def archive(out: Path) -> None:
    """Everything in one file, written whole or not at all."""
    partial = out / "all.tar.gz.partial"
    with tarfile.open(partial, "w:gz") as tar:
        for path in [*files(out), out / "all.jsonl"]:
            if path.exists():
                tar.add(path, arcname=path.relative_to(out))
    partial.replace(out / "all.tar.gz")


class UnknownStage(ValueError):
    """A --stage that is not in the list."""


def choose(device: str, names: Sequence[str]) -> list[Stage]:
    """All stages, or those named, in the usual order. Raises UnknownStage."""
    every = stages(device)
    known = [stage.name for stage in every]
    for name in names:
        if name not in known:
            raise UnknownStage(f"--stage {name}: there is {', '.join(known)}")
    return [stage for stage in every if not names or stage.name in names]


def failed(lines: Sequence[dict[str, object]]) -> list[str]:
    """Names of the stages that did not end well."""
    return [str(line["stage"]) for line in lines if line["status"] != "ok"]
