"""The offline certificate: every kernel of the table, every shipped tuning, compiled at VATT's real shapes for GPUs that are
not here, with what each binary will use and the least time each GPU could need for the bytes and FLOPs.

    vatt bench kernels --offline [--kernel NAME] [--target sm_90] [--json FILE] [--out DIR]

One row a launch, shape, tuning and target. A pass (forward, backward) may take several launches; `bytes`, `flops` and the
roofline times are the pass's, on each of its rows, against the bf16 peak whatever dtype a product has. `shipped` marks the
tuning that the target uses. Everything is compiled in worker processes, one a core, which start without TRITON_INTERPRET;
launches that Triton would compile to the same binary are compiled once. `--target here` is the target of this machine's GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vatt.benchmarks import certificate_cuda
from vatt.engine.profile.roofline import times_us
from vatt.engine.progress import Progress
from vatt.kernels.contract import NAMES, Shape, row
from vatt.kernels.gpu.target import TARGETS, current_target

if TYPE_CHECKING:  # the rest of that folder imports Triton, which only the workers may
    from vatt.kernels.gpu.launch import Launch, Recording

Row = dict[str, Any]
EVERY = (*NAMES, *certificate_cuda.KERNELS)


class CertificateError(Exception):
    """What was asked cannot be compiled here; one line with the remedy."""


@dataclass(frozen=True)
class Job:
    """One launch of a kernel at a shape under a tuning, found again by recording: the `index`-th launch under `candidate`
    of tuning table `table` (both empty: under what ships). `key` is equal for equal binaries.
    """

    kernel: str
    shape: str
    target: str
    table: str
    candidate: str
    index: int
    key: str
    backward: bool
    launch: str
    tuning: str
    shipped: bool
    reads_bytes: bool


# ---- in the workers --------------------------------------------------------------------------------------------------


def without_interpreter() -> None:
    """Start of a worker, before Triton is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    # What 3.6 does and 3.9 does unless told otherwise, with a warning.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    torch.set_num_threads(1)


@functools.lru_cache(maxsize=64)
def recorded(kernel: str, shape: str, target: str, table: str, candidate: str) -> Recording:
    """The launches of forward and backward at a shape, from meta tensors in bf16."""
    from vatt.kernels.gpu.launch import TABLES, recording

    found = row(kernel)
    arguments = named(found.shapes, shape).make(torch.bfloat16, torch.device("meta"))
    with TABLES[table].forced(candidate) if table else nullcontext(), recording(TARGETS[target]) as launches:
        found.launches(**arguments)
    return launches


def plan(kernel: str, target: str, shapes: Sequence[str], shipped_only: bool) -> list[Job]:
    """Every launch of a kernel at these shapes: under what ships for the target, then under every other candidate of the
    tuning tables that were asked.
    """
    jobs: list[Job] = []
    for shape in shapes:
        launches = recorded(kernel, shape, target, "", "")
        seen: set[str] = set()
        choices = [("", "")]
        if not shipped_only:
            choices += [(name, candidate) for name, table in launches.tables.items() for candidate in table.offered(target)]
        for table, candidate in choices:
            for index, launch in enumerate(recorded(kernel, shape, target, table, candidate)):
                job = _job(kernel, shape, target, table, candidate, index, launch)
                if job.key not in seen:
                    seen.add(job.key)
                    jobs.append(job)
    return jobs


def _job(kernel: str, shape: str, target: str, table: str, candidate: str, index: int, launch: Launch) -> Job:
    from vatt.kernels.gpu.compiled import key, reads_bytes

    return Job(
        kernel,
        shape,
        target,
        table,
        candidate,
        index,
        key=key(launch, TARGETS[target]),
        backward="backward" in launch.wrapper,
        launch=launch.kernel.__name__.lstrip("_"),
        tuning=str(launch.tuning),
        shipped=not table,
        reads_bytes=reads_bytes(launch),
    )


def compiled(job: Job) -> Row:
    """What the binary of a job uses, as fields of its row; {"error": ...} where it does not compile."""
    from vatt.kernels.gpu.compiled import compile_launch

    launch = recorded(job.kernel, job.shape, job.target, job.table, job.candidate)[job.index]
    try:
        found = compile_launch(launch, TARGETS[job.target])
    except Exception as error:  # whatever a compiler raises is this row's result, not the end of the certificate
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    facts = asdict(found)
    return facts | facts.pop("usage") | facts.pop("counts") | {"shared_memory": found.shared_memory}


def triton_version() -> str:
    import triton

    return str(triton.__version__)


# ---- in the command --------------------------------------------------------------------------------------------------


def certify(
    kernels: Sequence[str] = EVERY,
    targets: Sequence[str] = tuple(TARGETS),
    *,
    shipped_only: bool = False,
    first_shape_only: bool = False,
    processes: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> tuple[str, list[Row]]:
    """(version of Triton, the rows). processes: 0 is one a core. report(done, of): called after each compilation.

    Raises CertificateError where Triton is missing, and for a kernel or target that is not there.
    """
    if importlib.util.find_spec("triton") is None:
        raise CertificateError("Triton is not installed, and compiles the kernels; pip install 'vatt-engine[triton]'")
    for name in kernels:
        if name not in EVERY:
            raise CertificateError(f"{name!r} is not a kernel; there are {', '.join(EVERY)}")
    table = [row(name) for name in kernels if name in NAMES]
    targets = [current_target().name if name == "here" else name for name in targets]
    for name in targets:
        if name not in TARGETS:
            raise CertificateError(f"{name!r} is not a target; there are here, {', '.join(TARGETS)}")
    with ProcessPoolExecutor(
        processes or len(os.sched_getaffinity(0)), mp_context=get_context("spawn"), initializer=without_interpreter
    ) as pool:
        try:
            version = pool.submit(triton_version).result()
            plans = []
            for kernel in table:
                shapes = [shape.name for shape in kernel.shapes][: 1 if first_shape_only else None]
                plans += [pool.submit(plan, kernel.name, target, shapes, shipped_only) for target in targets]
            cuda = {
                (name, target): pool.submit(certificate_cuda.compile_cuda, name, target)
                for name in kernels
                if name in certificate_cuda.KERNELS
                for target in targets
            }
            jobs = [job for planned in plans for job in planned.result()]
            facts = _compile_all(pool, jobs, report)
            cuda_rows = [
                _cuda_row(*place, shape, future.result())
                for place, future in cuda.items()
                for shape in certificate_cuda.KERNELS[place[0]].shapes
            ]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    real = {(kernel.name, shape.name): shape for kernel in table for shape in kernel.shapes}
    return version, [make_row(job, real[job.kernel, job.shape], facts[job.key]) for job in jobs] + cuda_rows


def _cuda_row(kernel: str, target: str, shape: Shape, facts: Row) -> Row:
    launch = certificate_cuda.KERNELS[kernel].launch
    job = Job(kernel, shape.name, target, "", "", 0, "", False, launch, "CUDA C++", shipped=True, reads_bytes=True)
    return make_row(job, shape, facts)


def _compile_all(pool: ProcessPoolExecutor, jobs: Sequence[Job], report: Callable[[int, int], None] | None) -> dict[str, Row]:
    """Facts by key, each key compiled once."""
    unique = {job.key: job for job in jobs}
    waiting: dict[Future[Row], str] = {pool.submit(compiled, job): key for key, job in unique.items()}
    facts = {}
    for done, future in enumerate(as_completed(waiting), start=1):
        facts[waiting[future]] = future.result()
        if report is not None:
            report(done, len(waiting))
    return facts


def make_row(job: Job, shape: Shape, facts: Row) -> Row:
    """One line of the table."""
    bytes_moved = shape.backward_bytes if job.backward else shape.forward_bytes
    flops = shape.backward_flops if job.backward else shape.forward_flops
    return {
        "kernel": job.kernel,
        "pass": "backward" if job.backward else "forward",
        "launch": job.launch,
        "target": job.target,
        "shape": job.shape,
        "tuning": job.tuning,
        "shipped": job.shipped,
        "reads_bytes": job.reads_bytes,
        **facts,
        "bytes": bytes_moved,
        "flops": flops,
        **times_us(bytes_moved, flops),
    }


def violations(rows: Sequence[Row]) -> list[str]:
    """What may not be shipped, one line each: a launch that spills, whose matrix products miss the tensor cores, that loads
    pixels byte by byte or needs more than a block may have; and a GEMM-like kernel with a pass that has no product.
    """
    lines = [f"{_place(found)}: {problem}" for found in rows for problem in _problems(found)]
    matrix = {name for name in NAMES if row(name).matrix}
    passes: dict[tuple[str, ...], int] = {}
    for found in rows:
        if found["kernel"] in matrix and found["shipped"]:
            place = tuple(found[field] for field in ("kernel", "pass", "target", "shape"))
            passes[place] = passes.get(place, 0) + found.get("products", 0)
    return lines + [f"{' '.join(place)}: no launch has a matrix product" for place, products in passes.items() if not products]


def _problems(found: Row) -> Iterator[str]:
    if "skipped" in found:  # said in the table; not compiled is not wrong
        return
    if "error" in found:
        yield f"does not compile: {found['error']}"
        return
    limit = TARGETS[found["target"]].shared_memory
    if found["spills"] or found["stack"] or found["local"]:
        yield f"spills: {found['spills']} instructions, {found['stack']} bytes of stack, {found['local']} of local memory"
    if found["shared_memory"] > limit:
        yield f"shared memory: {found['shared_memory']} bytes of at most {limit}"
    if found["products"] and not found["mma"] + found["wgmma"] + found["tcgen05"]:
        yield f"tensor cores: none in {found['products']} products"
    if found["reads_bytes"] and found["loads_narrow"]:
        yield f"narrow loads: {found['loads_narrow']} of one byte"
    if not found["resident_blocks"]:
        yield "occupancy: not one block fits a multiprocessor"


def _place(found: Row) -> str:
    return " ".join(found[field] for field in ("kernel", "launch", "target", "shape")) + f" [{found['tuning']}]"


def named(shapes: Sequence[Shape], name: str) -> Shape:
    return next(shape for shape in shapes if shape.name == name)


# ---- what is shown ---------------------------------------------------------------------------------------------------

COLUMNS = {
    "registers": "regs",
    "spills": "spills",
    "shared_memory": "shared",
    "resident_blocks": "blocks",
    "mma": "mma",
    "wgmma": "wgmma",
    "tcgen05": "tcgen05",
    "loads_16B": "ld16B",
    "loads_narrow": "ld1B",
}


def show(rows: Sequence[Row]) -> str:
    """The table: launches as they ship by kernel and shape, the other tunings counted."""
    lines = []
    for kernel, shape in dict.fromkeys((found["kernel"], found["shape"]) for found in rows):
        here = [found for found in rows if (found["kernel"], found["shape"]) == (kernel, shape)]
        lines.append(f"\n{kernel}, {shape}")
        for way, bytes_moved, flops in dict.fromkeys((found["pass"], found["bytes"], found["flops"]) for found in here):
            one = next(found for found in here if found["pass"] == way)
            floors = "  ".join(f"{name} {one[f'{name}_us']:.4g}" for name in ("a100", "h100", "h200", "b200"))
            lines.append(f"  {way}: {bytes_moved / 1e6:.1f} MB, {flops / 1e9:.1f} GFLOP; at least, in us: {floors}")
        lines.append(f"  {'launch':<24}{'target':<8}" + "".join(f"{title:>9}" for title in COLUMNS.values()) + "  tuning")
        for found in here:
            if missing := found.get("error") or found.get("skipped"):
                lines.append(f"  {found['launch']:<24}{found['target']:<8} {missing}  {found['tuning']}")
            elif found["shipped"]:
                figures = "".join(f"{found.get(field, '-'):>9}" for field in COLUMNS)
                lines.append(f"  {found['launch']:<24}{found['target']:<8}{figures}  {found['tuning']}")
        others = sum(not found["shipped"] and "error" not in found for found in here)
        if others:
            lines.append(f"  and {others} rows of other tunings (--json has them)")
    return "\n".join(lines).lstrip("\n")


def offline(kernels: Sequence[str], targets: Sequence[str], out: Path | None) -> tuple[list[Row], list[str]]:
    """The command: certify with progress, print the table and the violations, write DIR/offline/certificate.{json,png}.

    Returns (rows, violations).
    """
    progress = Progress(0, noun="compilation")

    def report(done: int, of: int) -> None:
        progress.steps = of
        progress.report({"step": done})

    try:
        version, rows = certify(kernels or EVERY, targets or tuple(TARGETS), report=report)
    finally:
        progress.close()
    broken = violations(rows)
    print(show(rows))
    print(f"\nTriton {version}: {len(rows)} rows, {len(broken)} violations")
    print("".join(f"  {line}\n" for line in broken), end="")
    if out is not None:
        folder = out / "offline"
        folder.mkdir(parents=True, exist_ok=True)
        record = {"triton": version, "torch": torch.__version__, "violations": broken, "rows": rows}
        (folder / "certificate.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"-> {folder / 'certificate.json'}")
        if importlib.util.find_spec("matplotlib") is None:
            print("no picture: matplotlib is not installed; pip install 'vatt-engine[report]'")
        else:
            from vatt.benchmarks.certificate_picture import draw

            draw(rows, folder / "certificate.png")
            print(f"-> {folder / 'certificate.png'}")
    return rows, broken
