"""Video tokens on a CPU: read the kept patches and project them, against projecting every patch and gathering.

    python benchmarks/bench_read_patches.py --out benchmarks/results [--threads 2]

Video Large: 32 frames of 224 x 224, patches of 4 x 16 x 16, 1024 features; forward, batch 1. Both sides run in fp32 and
in bf16, interleaved in one process, and each side's better dtype counts. Medians; the bytes are counted from addresses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vatt.benchmarks.bench_anchors import folder, machine
from vatt.kernels.linear import linear
from vatt.kernels.patch_project import patch_project_eager
from vatt.kernels.read_patches import read_patches, traffic

PATCH, GRID, WIDTH = (4, 16, 16), (8, 14, 14), 1024


def sides(dtype: torch.dtype, video: Tensor, index: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The two ways to the same tokens, without AGG."""
    generator = torch.Generator().manual_seed(1)
    features = 3 * PATCH[0] * PATCH[1] * PATCH[2]
    weight, bias, position = (
        (torch.randn(*shape, generator=generator) * 0.02).to(dtype) for shape in ((WIDTH, features), (WIDTH,), (1568, WIDTH))
    )

    def kept_only() -> Tensor:
        return linear(read_patches(video, index, PATCH, GRID, dtype), weight, bias) + position[index]

    def all_then_gather() -> Tensor:
        return patch_project_eager(video, weight, bias, None, PATCH, GRID, index, position)

    return {"kept only": kept_only, "all, then gather": all_then_gather}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results; a folder per machine is made in it")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (1, 32, 3, 224, 224), dtype=torch.uint8, generator=generator)
    rows = []
    for dropped in (0.5, 0.75):
        index = torch.randperm(1568, generator=generator)[None, : int(1568 * (1 - dropped))].sort().values
        contest = {
            (name, dtype): run for dtype in (torch.float32, torch.bfloat16) for name, run in sides(dtype, video, index).items()
        }
        contest |= {
            ("read_patches alone", dtype): lambda dtype=dtype, index=index: read_patches(video, index, PATCH, GRID, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
        times: dict[tuple[str, torch.dtype], list[float]] = {key: [] for key in contest}
        results: dict[tuple[str, torch.dtype], Tensor] = {}
        for repeat in range(arguments.repeats + 2):
            for key, run in contest.items():
                start = time.perf_counter()
                results[key] = run()
                if repeat >= 2:
                    times[key].append((time.perf_counter() - start) * 1e3)
        best: dict[str, float] = {}
        for (name, dtype), values in times.items():
            median = statistics.median(values)
            best[name] = min(best.get(name, median), median)
            rows.append(
                {
                    "dropped": dropped,
                    "name": name,
                    "dtype": str(dtype)[6:],
                    "ms_median": round(median, 3),
                    "ms_low": round(min(values), 3),
                }
            )
            print(f"{dropped:.0%} dropped  {name:20} {str(dtype)[6:]:9} {median:9.2f} ms", flush=True)
        wrong = (results["kept only", torch.float32] - results["all, then gather", torch.float32]).abs().max()
        moved = traffic(video, index, PATCH, GRID, torch.bfloat16)
        ratio = best["all, then gather"] / best["kept only"]
        rows.append(
            {
                "dropped": dropped,
                "speed_up": round(ratio, 2),
                "difference_fp32": float(f"{float(wrong):.2g}"),
                **moved._asdict(),
            }
        )
        print(
            f"{dropped:.0%} dropped: {ratio:.2f} times as fast; requested {moved.requested / moved.floor:.4f} of the floor, "
            f"sectors {moved.sectors / moved.floor:.3f}"
        )
    record = machine("cpu")
    path = arguments.out / folder(record) / "read_patches.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": record, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
