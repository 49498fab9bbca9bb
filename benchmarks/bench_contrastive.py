"""The contrastive loss, forward + backward: tiles against the whole matrix, time and memory, and the sizes that choose.

    python benchmarks/bench_contrastive.py --out benchmarks/results [--threads 2] [--device cpu|cuda]

Time: by turns, medians. Memory: the peak of what is allocated beyond features and mask, from PyTorch's own record of
allocations, beside what the counting functions here say; and on a CPU the resident set of a process that does nothing else.
`counted` rows are the counting functions alone, for sizes whose whole matrix does not fit.

G clips, L candidates of a clip, R = G L, D features.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vatt.benchmarks.bench_anchors import folder, machine
from vatt.kernels import contrastive_tiles as tiles
from vatt.kernels.contrastive import contrastive, contrastive_eager
from vatt.kernels.rows.contrastive import mask

SHAPES = {
    "cpu": (
        *((64, 5, 256), (128, 5, 256), (512, 5, 256), (2048, 5, 256), (2048, 1, 512)),
        *((4096, 5, 256), (4096, 1, 512), (8192, 5, 256), (8192, 1, 512)),
    ),
    "cuda": ((2048, 5, 256), (2048, 1, 512), (16384, 5, 256), (16384, 1, 512), (32768, 5, 256)),
}
LARGE = ((8192, 5, 256), (16384, 5, 256), (16384, 1, 512), (32768, 5, 256))
GPU_CHUNK = 512  # `vatt.kernels.gpu.contrastive.CHUNK`, which cannot be read where Triton is missing
ROOM = 0.8  # of the free memory that a whole matrix may take


def pair(G: int, L: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """(video, other, valid) in fp32; one candidate in ten is not valid."""
    generator = torch.Generator().manual_seed(0)
    video, other = (torch.randn(n, D, generator=generator) for n in (G, G * L))
    return video, other, mask(G, L, "some", torch.device("cpu"))


def step(video: Tensor, other: Tensor, valid: Tensor, form: str, way: str) -> None:
    """Forward and backward. way: eager, or an implementation of the op."""
    inputs = video.detach().requires_grad_(), other.detach().requires_grad_()
    given = *inputs, valid, 0.07, form
    loss = contrastive_eager(*given) if way == "eager" else contrastive(*given, way)
    torch.autograd.grad(loss.mean(), inputs)


def bytes_held(G: int, L: int, D: int, form: str, way: str) -> int:
    """The most bytes that are held at a time beyond features and mask, in fp32; vectors are left out.

    eager: normalised features and five matrices of all logits (cosines and masked logits that are kept; in backward the sums of
    gradients and two being made), and all_pairs' mask. tiles, gpu: unit features, gradients, the last two steps of the
    candidates' gradient, and what is kept of logits: two tiles, or CHUNK rows of their gradients.
    """
    features = (G + G * L) * D
    if way == "eager":
        return 4 * (features + 5 * G * G * L) + (G * G if form == "all_pairs" else 0)
    tile = min(tiles.ROWS, G) * min(max(1, tiles.COLUMNS // L), G) * L
    logits = 2 * tile if way == "tiles" else min(GPU_CHUNK, G) * G * L
    return 4 * (2 * features + 2 * G * L * D + logits)


def held(video: Tensor, other: Tensor, valid: Tensor, form: str, way: str) -> int:
    """The same, measured."""
    if video.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(video, other, valid, form, way)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(video, other, valid, form, way)
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def resident(G: int, L: int, D: int, form: str, way: str) -> int:
    """Peak resident bytes of a process that computes one step, less those of one that only makes the features."""
    sizes = []
    for work in (way, "nothing"):
        argv = [sys.executable, "-m", "vatt.benchmarks.bench_contrastive", "--alone", work, form, str(G), str(L), str(D)]
        sizes.append(int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1]))
    return sizes[0] - sizes[1]


def alone(way: str, form: str, G: int, L: int, D: int) -> None:
    features = pair(G, L, D)
    if way != "nothing":
        step(*features, form, way)
    # Not ru_maxrss: a child starts with its parent's.
    print(1024 * kibibytes("/proc/self/status", "VmHWM"))


def measured(device: str, G: int, L: int, D: int, form: str, repeats: int) -> dict[str, object]:
    """One row: both ways by turns, and what they hold."""
    ours = "native" if device == "cuda" else "tiles"
    features = [x.to(device) for x in pair(G, L, D)]
    row: dict[str, object] = {"clips": G, "candidates": L, "features": D, "form": form}
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available()
    ways = [ours] + ["eager"] * (bytes_held(G, L, D, form, "eager") < ROOM * free)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            start = time.perf_counter()
            step(*features, form, way)
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[way].append((time.perf_counter() - start) * 1e3)
    for way in ("eager", ours):
        name, counted = ("eager", "eager") if way == "eager" else ("ours", "gpu" if device == "cuda" else "tiles")
        row[f"{name}_counted_bytes"] = bytes_held(G, L, D, form, counted)
        if way in times:
            row[f"{name}_ms"] = round(statistics.median(times[way]), 2)
            row[f"{name}_bytes"] = held(*features, form, way)
            if device == "cpu":
                row[f"{name}_resident_bytes"] = resident(G, L, D, form, way)
    row["counted_ratio"] = round(bytes_held(G, L, D, form, "eager") / int(str(row["ours_counted_bytes"])), 1)
    if "eager" in times:
        row["speedup"] = round(statistics.median(times["eager"]) / statistics.median(times[ours]), 3)
    return row


def available() -> int:
    """Bytes of memory that a process may still take."""
    return 1024 * kibibytes("/proc/meminfo", "MemAvailable")


def kibibytes(path: str, field: str) -> int:
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of results; a folder per machine is made in it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most-clips", type=int, default=1 << 30, help="leave out larger batches")
    parser.add_argument("--alone", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        way, form, *sizes = arguments.alone
        return alone(way, form, *map(int, sizes))
    if arguments.out is None:
        parser.error("--out is needed: the folder of results")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    for sizes in SHAPES[arguments.device]:
        if sizes[0] > arguments.most_clips:
            continue
        for form in ("row_column", "symmetric", "all_pairs") if sizes == (2048, 5, 256) else ("row_column",):
            rows.append(measured(arguments.device, *sizes, form, arguments.repeats))
            print(json.dumps(rows[-1]), flush=True)
    ways = ("eager", "tiles", "gpu")
    counted = [
        {"clips": G, "candidates": L, "features": D} | {way: bytes_held(G, L, D, "row_column", way) for way in ways}
        for G, L, D in LARGE
    ]
    record = machine(arguments.device)
    path = arguments.out / folder(record) / "contrastive.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"rows": rows, "counted": counted}, indent=1) + "\n")
    print(f"-> {path}")


if __name__ == "__main__":
    main()
