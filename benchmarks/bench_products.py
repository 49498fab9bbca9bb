"""Matrix products at VATT's shapes, with what can be fused into them: bias, GELU, FP8 operands.

    python benchmarks/bench_products.py --out benchmarks/results [--batch 64]

Rows of one linear layer (M x K x N, forward): the bare product, with bias in the epilogue, followed by our bias_gelu, with the
library's GELU epilogue (the tanh form, which VATT's is not: its time is what the exact form gives up), and in FP8 (e4m3, one
scale a tensor) without and with the conversion of both operands from bf16. For FP8 also both products of backward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.benchmarks.bench_anchors import Timer, emulates, folder, machine
from vatt.kernels.bias_gelu import bias_gelu

# layer: (rows of a clip, K, N), video Large and audio Base at 50 % drop
LAYERS = {
    "video large qkv": (785, 1024, 3072),
    "video large out": (785, 1024, 1024),
    "video large up": (785, 1024, 4096),
    "video large down": (785, 4096, 1024),
    "audio base up": (601, 768, 3072),
    "audio base down": (601, 3072, 768),
}
Call = Callable[[], object]


def calls(M: int, K: int, N: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Call]]:
    """(what, call) for one layer."""
    x, weight, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (N, K), (N,)))
    grad = torch.randn(M, N, device=device).to(dtype)
    yield "product", lambda: F.linear(x, weight)
    yield "bias epilogue", lambda: F.linear(x, weight, bias)
    yield "product, then bias_gelu", lambda: bias_gelu(F.linear(x, weight), bias)
    yield "bias epilogue, then gelu", lambda: F.gelu(F.linear(x, weight, bias))
    yield "tanh gelu epilogue", lambda: torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)
    if device == "cuda":
        x8, wT8 = eight_bit(x), eight_bit(weight)
        yield "fp8 product", lambda: scaled(x8, wT8, dtype)
        yield "fp8 product and conversions", lambda: scaled(eight_bit(x), eight_bit(weight), dtype)
        yield "fp8 dx and conversions", lambda: scaled(eight_bit(grad), eight_bit(weight.t().contiguous()), dtype)
        yield (
            "fp8 dw and conversions",
            lambda: scaled(eight_bit(grad.t().contiguous()), eight_bit(x.t().contiguous()), dtype),
        )


def eight_bit(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 values, fp32 scale): x = values x scale, the largest magnitude at the end of the range."""
    scale = x.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


def scaled(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """a b^T from eight-bit operands."""
    return torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1], out_dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results; a folder per machine is made in it")
    parser.add_argument("--batch", type=int, default=0, help="clips; 0 = 64 on a GPU, 2 on a CPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = arguments.batch or (64 if device == "cuda" else 2)
    dtype = torch.float32 if emulates(device, torch.bfloat16) else torch.bfloat16
    timer = Timer(device, 0.05)
    rows = []
    for layer, (tokens, K, N) in LAYERS.items():
        M = batch * tokens // 16 * 16  # FP8 products need multiples of 16
        for what, call in calls(M, K, N, dtype, device):
            row: dict[str, object] = {"layer": layer, "shape": f"{M}x{K}x{N}", "dtype": str(dtype)[6:], "what": what}
            try:
                median, spread = timer(call)
                row |= {"ms_median": round(median, 4), "ms_spread": round(spread, 3)}
                row["tflops"] = round(2 * M * K * N / median / 1e9, 3)
            except RuntimeError as error:  # this device does not have it
                row["unavailable"] = str(error).splitlines()[0][:100]
            rows.append(row)
            print(f"{layer:18}{what:30}{row.get('ms_median', '-'):>10} ms{row.get('tflops', '-'):>10} TFLOP/s", flush=True)
    record = machine(device) | {"batch": batch, "rows": rows}
    path = arguments.out / folder(record) / "products.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"-> {path}")


if __name__ == "__main__":
    main()
