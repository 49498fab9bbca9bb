"""The ceilings of a machine, in torch and Triton alone: copies, matrix products at every VATT shape, attention.

    python benchmarks/bench_anchors.py --out benchmarks/results [--quick]

Writes <device>/anchors.json there and prints the same rows. It imports nothing of ours, so it also runs on a machine that
has only torch >= 2.11 and Triton >= 3.6. Times are medians of repeated calls: CUDA events
after a write that empties the L2 cache on a GPU, wall clock on a CPU. Products: 2 M N K FLOPs; attention: 4 B H N^2 D forward,
2.5 times that backward (five products against two), so a row's TFLOP/s counts useful work only.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl
except ImportError:  # recorded as null; its row is left out
    triton = None

# tower: (width, hidden, features of a patch or word, tokens of a clip without AGG, sequences per clip)
TOWERS = {
    "video base": (768, 3072, 3072, 1568, 1),
    "video medium": (1024, 4096, 3072, 1568, 1),
    "audio base": (768, 3072, 128, 1200, 1),
    "text small": (512, 2048, 300, 16, 5),
}  # Medium and Large share their shapes: Large is twice as deep.
SEQUENCES = (785, 601, 1569, 1201)  # AGG + tokens of video and audio at 50 % and 0 % drop
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
BACKENDS |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


class Timer:
    """Milliseconds of repeated calls, within a budget of seconds per row."""

    def __init__(self, device: str, budget: float):
        self.device, self.budget = device, budget
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        """(median, spread): spread is the interquartile range over the median."""
        if self.flush is not None:
            call()
        warm = self.once(call)
        if warm > 1e3:  # an emulated product: once is enough to see it
            return warm, 0.0
        count = max(3, min(100, int(self.budget * 1e3 / max(warm, 1e-3))))
        times = sorted(self.once(call) for _ in range(count))
        median = statistics.median(times)
        return median, (times[(3 * count) // 4] - times[count // 4]) / median

    def once(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call, from an empty cache on a GPU."""
        if self.flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)


if triton is not None:

    @triton.jit
    def copy_kernel(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target_ptr + offset, tl.load(source_ptr + offset, mask=offset < count), mask=offset < count)


# name, shape, dtype, pass, call, FLOPs, bytes
Row = tuple[str, str, str, str, Callable[[], object], float, float]


def copy_rows(device: str) -> Iterator[Row]:
    count = (512 << 20) if device == "cuda" else (64 << 20)
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    yield "copy torch", f"{count >> 20}Mi", "float32", "-", lambda: target.copy_(source), 0, 8 * count
    if device == "cuda" and triton is not None:
        grid = (triton.cdiv(count, 4096),)
        yield (
            "copy triton",
            f"{count >> 20}Mi",
            "float32",
            "-",
            lambda: copy_kernel[grid](source, target, count, BLOCK=4096),
            0,
            8 * count,
        )
        assert torch.equal(source, target), "the Triton copy is wrong"


def gemm_rows(device: str, batch: int, dtype: torch.dtype, quick: bool) -> Iterator[Row]:
    if device == "cuda":
        yield from products("ceiling", 8192, 8192, 8192, dtype, device, passes=("forward",))
    # Minutes per row where bf16 products are emulated: one tower tells how slow.
    towers = ["video base"] if emulates(device, dtype) else list(TOWERS)
    for tower in towers:
        width, hidden, features, tokens, sequences = TOWERS[tower]
        for drop in (0.5,) if tower.startswith("text") or quick or emulates(device, dtype) else (0.5, 0.0):
            kept = tokens if tower.startswith("text") else int(tokens * (1 - drop))
            rows = batch * sequences * (kept + 1)
            label = tower if tower.startswith("text") else f"{tower} drop {drop:.0%}"
            yield from products(f"{label} qkv", rows, width, 3 * width, dtype, device)
            yield from products(f"{label} out", rows, width, width, dtype, device)
            yield from products(f"{label} ffn in", rows, width, hidden, dtype, device)
            yield from products(f"{label} ffn out", rows, hidden, width, dtype, device)
            # Pixels and waves need no gradient; AGG is not projected.
            passes = ("forward", "dx", "dw") if tower.startswith("text") else ("forward", "dw")
            yield from products(f"{label} projection", rows - batch * sequences, features, width, dtype, device, passes)


def products(
    name: str, M: int, K: int, N: int, dtype: torch.dtype, device: str, passes: tuple[str, ...] = ("forward", "dx", "dw")
) -> Iterator[Row]:
    """The products of one linear layer, M rows, K inputs, N outputs, as autograd of F.linear asks for them."""
    x, weight, grad = (torch.randn(*s, device=device).to(dtype) for s in ((M, K), (N, K), (M, N)))
    calls = {"forward": lambda: F.linear(x, weight), "dx": lambda: grad @ weight, "dw": lambda: grad.t() @ x}
    size = dtype.itemsize * (M * K + N * K + M * N)
    for kind in passes:
        yield name, f"{M}x{K}x{N}", str(dtype)[6:], kind, calls[kind], 2 * M * K * N, size


def attention_rows(device: str, batch: int, dtype: torch.dtype, quick: bool) -> Iterator[Row]:
    heads, features = 12, 64
    for tokens in SEQUENCES[:2] if quick else SEQUENCES:
        inputs = [torch.randn(batch, tokens, heads, features, device=device).to(dtype).transpose(1, 2) for _ in range(3)]
        leaves = [t.detach().requires_grad_() for t in inputs]
        grad = torch.randn_like(inputs[0])
        flops = 4 * batch * heads * tokens**2 * features
        size = 4 * dtype.itemsize * inputs[0].numel()
        for backend in BACKENDS if device == "cuda" else ("flash", "math"):

            def forward(tensors=inputs, backend=backend):
                with sdpa_kernel(BACKENDS[backend]):
                    return F.scaled_dot_product_attention(*tensors, None, 0.0, False)

            def both(forward=forward, leaves=leaves, grad=grad):
                return torch.autograd.grad(forward(leaves), leaves, grad)

            shape = f"{batch}x{heads}x{tokens}x{features}"
            yield f"attention {backend}", shape, str(dtype)[6:], "forward", forward, flops, size
            yield f"attention {backend}", shape, str(dtype)[6:], "forward+backward", both, 3.5 * flops, 2 * size


def machine(device: str) -> dict[str, object]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions["triton"] = None if triton is None else triton.__version__
    if device == "cpu":
        name = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.machine())
        kind = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
        kind |= {"bf16_products": not emulates(device, torch.bfloat16)}
    else:
        name = torch.cuda.get_device_name()
        try:
            ctypes.CDLL("libnvcuvid.so.1")
            nvcuvid = "loads"
        except OSError as error:
            nvcuvid = f"does not load: {error}"
        properties = torch.cuda.get_device_properties(0)
        kind = {"capability": f"sm_{properties.major}{properties.minor}", "memory_gb": round(properties.total_memory / 1e9, 1)}
        kind |= {"processors": properties.multi_processor_count, "nvcuvid": nvcuvid}
    return {"device": name, **kind, "versions": versions}


def emulates(device: str, dtype: torch.dtype) -> bool:
    """Whether this processor has no fast products of this dtype."""
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device == "cpu" and dtype == torch.bfloat16 and not native


def folder(record: dict[str, object]) -> str:
    """A folder name for the machine: nvidia-h200, amd-epyc-avx2-2-threads."""
    words = (
        [record["device"], record["capability"], record["threads"], "threads"] if "threads" in record else [record["device"]]
    )
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower()).strip("-")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--quick", action="store_true", help="50 %% drop only, shorter timings")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, quick = arguments.device, arguments.quick
    record = machine(device)
    print(json.dumps(record, indent=1), flush=True)
    batch = 32 if device == "cuda" else 1 if quick else 2
    timer = Timer(device, 0.05 if quick or device == "cuda" else 0.2)
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]
    sources = [copy_rows(device)]
    for dtype in dtypes:
        sources += [attention_rows(device, batch, dtype, quick), gemm_rows(device, batch, dtype, quick)]
    rows = []
    start = time.perf_counter()
    for name, shape, dtype_name, kind, call, flops, size in itertools.chain(*sources):
        row: dict[str, object] = {"name": name, "shape": shape, "dtype": dtype_name, "pass": kind}
        try:
            median, spread = timer(call)
            row |= {"ms_median": round(median, 4), "ms_spread": round(spread, 3)}
            row |= {"tflops": round(flops / median / 1e9, 4)} if flops else {"gb_s": round(size / median / 1e6, 1)}
        except RuntimeError as error:  # a backend that this device does not have
            row["unavailable"] = str(error).splitlines()[0][:100]
        rows.append(row)
        speed = row.get("unavailable") or (f"{row['tflops']:8.3f} TFLOP/s" if flops else f"{row['gb_s']:8.1f} GB/s")
        print(f"{name:32} {shape:18} {dtype_name:9} {kind:17} {row.get('ms_median', '-'):>10} ms  {speed}", flush=True)
    path = arguments.out / folder(record) / "anchors.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"batch": batch, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s -> {path}")


if __name__ == "__main__":
    main()
