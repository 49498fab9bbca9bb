"""Every kernel of the table, timed at VATT's shapes against PyTorch: eager, and eager compiled.

    vatt bench kernels --out benchmarks/results [--kernel NAME] [--check] [--no-compile]
    python benchmarks/bench_kernels.py --out benchmarks/results                        # the same

First the kernel's cases are checked against their error budgets, in bf16; a kernel that is wrong is reported and not timed.
Then forward and backward are timed apart (backward over a graph that is kept), all sides by turns, in bf16: CUDA events after
a write that empties the L2 cache on a GPU, wall clock on a CPU. Times are medians; a ratio is PyTorch's time over ours within
one turn, above 1 where ours is faster, with its spread. TB/s and TFLOP/s count the bytes and FLOPs that the pass has to move
and compute, and `of_<GPU>` is the roofline time under that ceiling over the time taken.

A CPU gets CLIPS_DIVIDED_BY times fewer clips (batch 64 -> 2); every row says by how many its shape was divided. Where the
eager side draws dropout from our counter, it does so in PyTorch's integers: `counter_dropout` marks those rows.

Writes <device>/kernels.json (kernels_NAME.json for one kernel, correctness.json with --check) after every kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vatt.benchmarks.bench_anchors import Timer, folder, machine
from vatt.benchmarks.steps import spread
from vatt.engine.profile.roofline import CEILINGS, ceilings_of
from vatt.kernels.contract import NAMES, Arguments, Kernel, Shape, errors, row

CLIPS_DIVIDED_BY = 32
TURNS = 5, 100  # fewest and most
BUDGET = 1.0  # seconds of turns that a pass aims at

Call = Callable[[], object]


class BenchError(Exception):
    """What was asked cannot be measured; one line with the remedy."""


def red_cases(kernel: Kernel, device: torch.device) -> list[str]:
    """Every case of a kernel that is out of its budget on this device, one line each; also one that raises."""
    wrong = []
    for case in kernel.cases:
        try:
            found = errors(kernel, case, torch.bfloat16, device, "native")
        except Exception as error:  # a kernel that crashes is red, and the next one still runs
            wrong.append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        wrong += [f"{case.name}: {e.output} is off by {e.kernel:.3g}, budget {e.budget:.3g}" for e in found if not e.within]
    return wrong


def passes(kernel: Kernel, function: Callable[..., Any], arguments: Arguments) -> dict[str, Call]:
    """{"forward": call, "backward": call} of one side, in training: forward keeps what backward needs, backward may be called
    again and again. No backward where nothing is differentiable.
    """
    inputs = {
        name: value.detach().requires_grad_() if name in kernel.differentiable and isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    leaves = [value for name, value in inputs.items() if name in kernel.differentiable and isinstance(value, Tensor)]

    def forward() -> Any:
        return function(**inputs)

    output = forward()
    outputs = [o for o in ([output] if isinstance(output, Tensor) else output) if isinstance(o, Tensor) and o.requires_grad]
    if not leaves or not outputs:
        return {"forward": forward}
    cotangents = [torch.randn_like(o) for o in outputs]

    def backward() -> object:
        return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, allow_unused=True)

    return {"forward": forward, "backward": backward}


def sides(kernel: Kernel, arguments: Arguments, compiled: bool) -> tuple[dict[str, dict[str, Call]], dict[str, str]]:
    """({side: its passes}, {side that was wanted: why it cannot run})."""

    def ours(**inputs: Any) -> Any:
        return kernel.op(**inputs, implementation="native")

    found = {"ours": passes(kernel, ours, arguments)}
    missing: dict[str, str] = {}
    torch._dynamo.reset()
    rivals = {"eager": kernel.eager} | ({"compiled": torch.compile(kernel.eager, dynamic=False)} if compiled else {})
    for side, rival in rivals.items():
        # A compiled backward would otherwise reuse the saved tensors' memory, and could run only once.
        with torch._functorch.config.patch(donated_buffer=False):
            try:
                calls = passes(kernel, rival, arguments)
                for call in calls.values():
                    call()
                found[side] = calls
            except Exception as error:  # no compiler, an op it cannot trace, no memory for what we never store: the row says so
                missing[side] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found, missing


def by_turns(calls: dict[str, Call], timer: Timer) -> dict[str, list[float]]:
    """Milliseconds of every side, as many turns as the budget allows; who goes first alternates."""
    for call in calls.values():
        timer.once(call)
    once = sum(timer.once(call) for call in calls.values())
    turns = max(TURNS[0], min(TURNS[1], int(timer.budget * 1e3 / max(once, 1e-3))))
    times: dict[str, list[float]] = {side: [] for side in calls}
    for turn in range(turns):
        for side in list(calls) if turn % 2 else list(calls)[::-1]:
            times[side].append(timer.once(calls[side]))
    return times


def rates(kernel: Kernel, shape: Shape, way: str, times: dict[str, list[float]], ceilings: Sequence[str]) -> dict[str, Any]:
    """The figures of one row: medians in ms, ratios, what was achieved, and the share of the roofline."""
    backward = way == "backward"
    bytes_moved = shape.backward_bytes if backward else shape.forward_bytes
    flops = shape.backward_flops if backward else shape.forward_flops
    ours = statistics.median(times["ours"])
    found: dict[str, Any] = {"kernel": kernel.name, "shape": shape.name, "pass": way, "bytes": bytes_moved, "flops": flops}
    found |= {f"{side}_ms": round(statistics.median(values), 4) for side, values in times.items()}
    found["turns"] = len(times["ours"])
    for side in times.keys() - {"ours"}:
        ratios = [theirs / mine for theirs, mine in zip(times[side], times["ours"], strict=True)]
        found |= {f"{side}_ratio{'' if name == 'median' else '_' + name}": value for name, value in spread(ratios).items()}
    found |= {"tb_s": round(bytes_moved / ours / 1e9, 5), "tflops": round(flops / ours / 1e9, 3)}
    return found | {f"of_{name}": round(CEILINGS[name].seconds(bytes_moved, flops) * 1e3 / ours, 4) for name in ceilings}


def timed(kernel: Kernel, device: torch.device, compiled: bool) -> Iterator[dict[str, Any]]:
    """A row for every pass of every shape."""
    timer = Timer(device.type, BUDGET)
    ceilings = ceilings_of(torch.cuda.get_device_name()) if device.type == "cuda" else []
    for shape in kernel.shapes:
        factor = 1
        if device.type == "cpu":
            if shape.divided is None:
                yield {"kernel": kernel.name, "shape": shape.name, "skipped": "has no smaller form for a CPU"}
                continue
            factor = CLIPS_DIVIDED_BY
            shape = shape.divided(factor)
        try:
            arguments = shape.make(torch.bfloat16, device)
            contest, missing = sides(kernel, arguments, compiled)
            for way in contest["ours"]:
                times = by_turns({side: calls[way] for side, calls in contest.items() if way in calls}, timer)
                found = rates(kernel, shape, way, times, ceilings) | {"clips_divided_by": factor}
                found |= {"counter_dropout": arguments.get("dropout") is not None}
                yield found | {f"{side}_missing": reason for side, reason in missing.items()}
        except torch.OutOfMemoryError as error:
            yield {"kernel": kernel.name, "shape": shape.name, "skipped": f"out of memory: {str(error).splitlines()[0][:120]}"}
            torch.cuda.empty_cache()


def measure(
    kernels: Sequence[str] = (),
    out: Path | None = None,
    *,
    check_only: bool = False,
    compiled: bool = True,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, names of the kernels that are wrong). Results are on disk after every kernel.

    Raises BenchError for a kernel that is not there.
    """
    for name in kernels:
        if name not in NAMES:
            raise BenchError(f"{name!r} is not a kernel; there are {', '.join(NAMES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = machine(device.type) | {"commit": commit(), "dtype": "bfloat16"}
    path = out / folder(record) / _file(kernels, check_only) if out else None
    rows: list[dict[str, Any]] = []
    red: list[str] = []
    for name in kernels or NAMES:
        kernel = row(name)
        wrong = red_cases(kernel, device)
        if wrong:
            red.append(name)
            rows.append({"kernel": name, "red": wrong})
            say(f"{name}: red, not timed\n" + "\n".join(f"  {line}" for line in wrong))
        elif check_only:
            rows.append({"kernel": name, "green": len(kernel.cases)})
            say(f"{name}: {len(kernel.cases)} cases within budget")
        else:
            for found in timed(kernel, device, compiled):
                rows.append(found)
                say(line_of(found))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    if path is not None:
        say(f"-> {path}")
    return rows, red


def line_of(found: dict[str, Any]) -> str:
    """One row as it is printed."""
    place = f"{found['kernel']:16} {found['shape']:28}"
    if "skipped" in found:
        return f"{place} skipped: {found['skipped']}"
    text = f"{place} {found['pass']:9}{found['ours_ms']:10.3f} ms  {found['tb_s']:8.3g} TB/s"
    text += f"  {found['tflops']:8.2f} TFLOP/s" if found["flops"] else " " * 18
    for side in ("eager", "compiled"):
        if f"{side}_ratio" in found:
            text += (
                f"  x{found[f'{side}_ratio']:.2f} {side} ({found[f'{side}_ratio_low']:.2f}-{found[f'{side}_ratio_high']:.2f})"
            )
    text += "".join(f"  {value:.0%} of {key[3:]}" for key, value in found.items() if key.startswith("of_"))
    text += f"  (clips / {found['clips_divided_by']})" if found["clips_divided_by"] > 1 else ""
    return text + "".join(f"\n  {key[:-8]} is missing: {value}" for key, value in found.items() if key.endswith("_missing"))


def commit() -> str | None:
    """The commit of this source, "+ changes" where it was edited since; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return f"{head} + changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def _file(kernels: Sequence[str], check_only: bool) -> str:
    return "_".join(["correctness" if check_only else "kernels", *kernels]) + ".json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results; a folder per machine is made in it")
    parser.add_argument("--check", action="store_true", help="only whether every case is within its error budget")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    try:
        _, red = measure(given.kernel, given.out, check_only=given.check, compiled=not given.no_compile)
    except BenchError as error:
        parser.error(str(error))
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
