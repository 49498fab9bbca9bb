"""Whole training steps of ours: against `baseline_plain`, by local batch, by drop rate, profiled, and their memory.

    python benchmarks/bench_step.py --out benchmarks/results                       # bbs, batch 2, against the baseline
    python benchmarks/bench_step.py memory --size lbs --out benchmarks/results     # one step and its peak memory
    python benchmarks/bench_step.py profile --size lbs --batch 64 --out …          # kernels, launches, idle gaps
    python benchmarks/bench_step.py batches --size lbs --batches 4,8,16,32,64 --out …
    python benchmarks/bench_step.py counted --size lbs --batch 64 --out …          # its roofline on an H200
    python benchmarks/bench_step.py rates --size lbs --batch 32 --rates 0,25,50,75 --out …
    python benchmarks/bench_step.py settings --set model.last_block=all --label all --out …   # with and without a setting

Both sides of a comparison have the same shapes, the same dropout (0) and synthetic clips; ours runs model, loss, plain
backend and Adam. The baseline is the fastest of what this device runs well (precisions, SDPA backends, compiled with
--compile), chosen by one timed step each. A ratio is baseline / ours within one pair of interleaved steps: above 1, ours is
faster. FLOPs are true counts, multiply-adds as 2; MFU is against the device's nominal bf16 peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from vatt.benchmarks.bench_anchors import folder, machine
from vatt.benchmarks.step_arguments import add_arguments
from vatt.benchmarks.steps import (
    baseline,
    check_same_shapes,
    interleaved,
    ours,
    out_of_memory_is_none,
    recipe,
    repeated,
    seconds,
    spread,
)
from vatt.engine.profile.counted_step import counted_step, totals
from vatt.engine.profile.flops import step_flops
from vatt.engine.profile.peak import peak_tflops
from vatt.engine.profile.roofline import CEILINGS


def against(a: argparse.Namespace, device: str) -> dict[str, Any]:
    """Interleaved pairs: forward + backward, and the whole step."""
    config = recipe(a.size, a.precision, a.batch, a.overrides)
    check_same_shapes(config)
    theirs, form = baseline(a.size, device, a.batch, a.compile)
    mine, _ = ours(config, device)
    sides = {"baseline": theirs, "ours": mine}
    mine()  # the baseline is warm already
    times = interleaved(sides, a.pairs, device, say)
    result: dict[str, Any] = {"baseline": form}
    for part, by_side in times.items():
        ratios = [b / o for b, o in zip(by_side["baseline"], by_side["ours"], strict=True)]
        result[part] = {f"{side}_s": spread(values) for side, values in by_side.items()} | {"ratio": spread(ratios)}
    return result


def settings(a: argparse.Namespace, device: str) -> dict[str, Any]:
    """Interleaved pairs of ours with the settings of --set and as shipped; the ratio is with / as shipped."""
    chosen, flops = {"with": a.overrides, "shipped": []}, {}
    sides = {}
    for name, overrides in chosen.items():
        sides[name], flops[name] = ours(recipe(a.size, a.precision, a.batch, overrides), device)
        sides[name]()
    times = interleaved(sides, a.pairs, device, say)
    result: dict[str, Any] = {"flops_ratio": round(flops["with"] / flops["shipped"], 4)}
    for part, by_side in times.items():
        ratios = [w / s for w, s in zip(by_side["with"], by_side["shipped"], strict=True)]
        result[part] = {f"{side}_s": spread(values) for side, values in by_side.items()} | {"ratio": spread(ratios)}
    return result


def batches(a: argparse.Namespace, device: str) -> dict[str, Any]:
    """Step time, samples/s and MFU at each local batch."""
    rows = []
    for batch in a.batches:
        row: dict[str, Any] = {"batch": batch}
        with out_of_memory_is_none(device):
            step, flops = ours(recipe(a.size, a.precision, batch, a.overrides), device)
            row |= speed(spread(repeated(step, a.steps, device)), batch, flops, device)
            del step
        rows.append(row)
        say(json.dumps(row))
    return {"rows": rows}


def rates(a: argparse.Namespace, device: str) -> dict[str, Any]:
    """Forward + backward at each drop rate, interleaved: the speed-up over no drop beside that of the FLOPs."""
    sides, flops = {}, {}
    for rate in a.rates:
        sides[str(rate)], flops[str(rate)] = ours(recipe(a.size, a.precision, a.batch, a.overrides, rate / 100), device)
        sides[str(rate)]()
    times = interleaved(sides, a.pairs, device, say)
    first = str(a.rates[0])
    rows = []
    for name in sides:
        row: dict[str, Any] = {"rate": int(name), "ideal": round(flops[first] / flops[name], 4)}
        for part in times:
            row[f"{part}_s"] = spread(times[part][name])
            row[f"{part}_speedup"] = spread(b / o for b, o in zip(times[part][first], times[part][name], strict=True))
        row["of_ideal"] = round(row["forward_backward_speedup"]["median"] / row["ideal"], 4)
        rows.append(row)
        say(json.dumps(row))
    return {"rows": rows}


def memory(a: argparse.Namespace, device: str) -> dict[str, Any]:
    """One step and the most memory it took, in GB (1e9 bytes): the process's on a CPU, the allocator's on a GPU."""
    step, _ = ours(recipe(a.size, a.precision, a.batch, a.overrides), device)
    loss = float(step())
    assert loss == loss, "the loss is not a number"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident
    return {"peak_gb": round(peak / 1e9, 2), "loss": round(loss, 4)}


def profile(a: argparse.Namespace, device: str) -> dict[str, Any]:
    """One step under torch's profiler: time by kernel, launches, and (on a GPU) how long it stood idle between kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    step, flops = ours(recipe(a.size, a.precision, a.batch, a.overrides), device)
    whole = spread(repeated(step, a.steps, device))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with record(activities=activities) as profiler:
        seconds(step, device)
    result: dict[str, Any] = speed(whole, a.batch, flops, device)
    if device == "cuda":
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        result |= {"launches": len(kernels)} | idle(sorted((e.time_range.start, e.time_range.end) for e in kernels))
        rows = [(e.key, e.self_device_time_total, e.count) for e in profiler.key_averages() if e.self_device_time_total]
    else:
        rows = [(e.key, e.self_cpu_time_total, e.count) for e in profiler.key_averages()]
    rows.sort(key=lambda row: -row[1])
    total = sum(row[1] for row in rows)
    result["kernels"] = [
        {"name": name[:120], "ms": round(time / 1e3, 3), "share": round(time / total, 4), "calls": calls}
        for name, time, calls in rows[:40]
    ]
    for row in result["kernels"][:20]:
        say(f"{row['ms']:10.2f} ms {row['share']:6.1%} {row['calls']:6} x {row['name']}")
    return result


def counted(a: argparse.Namespace, device: str) -> dict[str, Any]:
    """The roofline of one step on an H200, counted on meta tensors: a bound, not a prediction. Rows are under the measured
    ceilings (790 TFLOP/s, 4.3 TB/s); `nominal` and `measured` are the whole step under either."""
    config = recipe(a.size, a.precision, a.batch, a.overrides)
    result: dict[str, Any] = {}
    for name in ("h200", "h200_measured"):
        works = counted_step(config, CEILINGS[name])
        whole = totals(works)
        result["measured" if CEILINGS[name].measured else "nominal"] = {
            "step_ms": round(whole.seconds * 1e3, 3),
            "samples_per_s": round(a.batch / whole.seconds, 1),
            "mfu_of_nominal_peak": round(step_flops(config) / whole.seconds / CEILINGS["h200"].tflops / 1e12, 4),
            "tflop": round(whole.flops / 1e12, 4),
            "gb": round(whole.bytes / 1e9, 3),
            "launches": whole.launches,
        }
    result["rows"] = [
        {
            "operator": work.operator,
            "calls": work.calls,
            "launches": work.launches,
            "gflop": round(work.flops / 1e9, 3),
            "gb": round(work.bytes / 1e9, 4),
            "ms": round(work.seconds * 1e3, 4),
        }
        for work in works
    ]
    for row in result["rows"][:20]:
        say(f"{row['ms']:9.3f} ms {row['gflop']:11.1f} GFLOP {row['gb']:9.3f} GB {row['calls']:5} x {row['operator']}")
    return result


def idle(spans: list[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds from the first kernel's start to the last one's end, and the part of it in which none ran.

    spans: (start, end) in microseconds, by start; kernels of several streams may overlap.
    """
    reached, gaps = spans[0][0], 0.0
    for start, end in spans:
        gaps += max(0.0, start - reached)
        reached = max(reached, end)
    return {"gpu_ms": round((reached - spans[0][0]) / 1e3, 3), "idle_ms": round(gaps / 1e3, 3)}


def speed(step_s: dict[str, float], batch: int, flops: float, device: str) -> dict[str, Any]:
    """What a step's time means."""
    tflops = flops / step_s["median"] / 1e12
    peak = peak_tflops(torch.cuda.get_device_name()) if device == "cuda" else None
    return {
        "step_s": step_s,
        "samples_per_s": round(batch / step_s["median"], 2),
        "tflops": round(tflops, 3),
        "mfu": round(tflops / peak, 4) if peak else None,
    }


def say(line: str) -> None:
    print(line, flush=True)


MODES: dict[str, Callable[[argparse.Namespace, str], dict[str, Any]]] = {
    "against": against,
    "batches": batches,
    "rates": rates,
    "settings": settings,
    "memory": memory,
    "profile": profile,
    "counted": counted,
}


def run(a: argparse.Namespace) -> int:
    """One mode; writes its JSON file and returns the exit code."""
    overrides = [f"--{override}" for override in a.set]
    a = argparse.Namespace(**vars(a) | {"overrides": overrides})
    if a.threads:
        torch.set_num_threads(a.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record: dict[str, Any] = machine(device)
    record |= {"size": a.size, "batch": a.batch, "drop_rate": 0.5, "dropout": 0.0, "precision": a.precision, "set": overrides}
    record |= MODES[a.mode](a, device)
    words = ["step" if a.mode == "against" else a.mode, a.size, *(["fp32"] if a.precision == "fp32" else []), a.label]
    path = a.out / folder(record) / ("_".join(word for word in words if word) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k not in ("kernels", "rows")}, indent=1))
    print(f"-> {path}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
