"""Attention on a CPU, forward + backward from a packed projection: what the kernel ships, and what it was chosen over.

    python benchmarks/bench_attention.py --out benchmarks/results [--threads 2]

Interleaved, medians; errors are the worst of output and gradients against fp64, relative. The candidates called `matmul`
are explicit batched products over `chunk` heads at a time; they keep the attention weights for backward in the named
dtype, or recompute them from the log-sum-exp; their products run in bf16 where named so, scores and softmax in fp32.
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

from vatt.benchmarks.bench_anchors import emulates, folder, machine
from vatt.kernels.attention import attention
from vatt.kernels.attention_libraries import heads_of, joined

Attend = Callable[[Tensor], Tensor]  # packed (B, N, 3, H, D) -> (B, N, H D)
BATCH, HEADS, FEATURES = 2, 12, 64


class Matmul(torch.autograd.Function):
    """dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = scale dS K, dK = scale dS^T Q; Z = B H matrices."""

    @staticmethod
    def forward(ctx, q, k, v, chunk, kept, work):  # type: ignore[no-untyped-def]
        B, H, N, D = q.shape
        q_ZND, k_ZND, v_ZND = flat(q, torch.float32), flat(k, torch.float32), flat(v, work)
        out = v_ZND.new_empty(B * H, N, D)
        weights = torch.empty(B * H, N, N, dtype=kept) if kept else torch.empty(0)
        log_sum = q_ZND.new_empty(B * H, N, 1)
        buffer = q_ZND.new_empty(chunk, N, N)
        for z in slices(B * H, chunk):
            scores = buffer[: z.stop - z.start]
            torch.baddbmm(scores, q_ZND[z], k_ZND[z].transpose(1, 2), beta=0, alpha=D**-0.5, out=scores)
            if kept:
                torch.softmax(scores, -1, out=scores)
                weights[z] = scores
            else:
                torch.logsumexp(scores, -1, keepdim=True, out=log_sum[z])
                scores.sub_(log_sum[z]).exp_()
            torch.bmm(scores.to(work), v_ZND[z], out=out[z])
        result = out.to(q.dtype).view(B, H, N, D)
        ctx.save_for_backward(q, k, v, result, weights, log_sum)
        ctx.options = chunk, kept, work
        return result

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, result, weights, log_sum = ctx.saved_tensors
        chunk, kept, work = ctx.options
        B, H, N, D = q.shape
        q_ZND, k_ZND, v_ZND, grad_ZND = (flat(t, work) for t in (q, k, v, grad))
        row = (flat(grad, torch.float32) * flat(result, torch.float32)).sum(-1, keepdim=True)
        dq, dk, dv = (torch.empty_like(q_ZND) for _ in range(3))
        buffer, dscores_buffer = q_ZND.new_empty(chunk, N, N), q_ZND.new_empty(chunk, N, N)
        for z in slices(B * H, chunk):
            p, dscores = buffer[: z.stop - z.start], dscores_buffer[: z.stop - z.start]
            if kept:
                p.copy_(weights[z])
            else:
                scores = torch.bmm(flat(q, torch.float32)[z] * D**-0.5, flat(k, torch.float32)[z].transpose(1, 2))
                p.copy_(scores.sub_(log_sum[z]).exp_())
            torch.bmm(p.transpose(1, 2), grad_ZND[z], out=dv[z])
            torch.bmm(grad_ZND[z], v_ZND[z].transpose(1, 2), out=dscores)
            dscores.sub_(row[z]).mul_(p)
            torch.baddbmm(dq[z], dscores, k_ZND[z], beta=0, alpha=D**-0.5, out=dq[z])
            torch.baddbmm(dk[z], dscores.transpose(1, 2), q_ZND[z], beta=0, alpha=D**-0.5, out=dk[z])
        return *(t.view(B, H, N, D).to(q.dtype) for t in (dq, dk, dv)), None, None, None


def flat(x_BHND: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BHND.to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def candidates(dtype: torch.dtype, chunk: int) -> dict[str, Attend]:
    def shipped(name: str) -> Attend:
        return lambda packed: attention(packed, implementation=name)

    def matmul(heads: int, kept: torch.dtype | None, work: torch.dtype) -> Attend:
        return lambda packed: joined(Matmul.apply(*heads_of(packed), heads, kept, work))

    found = {name: shipped(name) for name in ("native", "sdpa", "reference")}
    if dtype == torch.bfloat16:
        found["wide"] = shipped("wide")
        for heads in sorted({1, chunk, BATCH * HEADS}):
            found[f"matmul fp32, weights kept bf16, chunk {heads}"] = matmul(heads, torch.bfloat16, torch.float32)
        if not emulates("cpu", dtype):
            found[f"matmul bf16, weights kept bf16, chunk {chunk}"] = matmul(chunk, torch.bfloat16, torch.bfloat16)
    found[f"matmul fp32, weights kept fp32, chunk {chunk}"] = matmul(chunk, torch.float32, torch.float32)
    found[f"matmul fp32, recomputed, chunk {chunk}"] = matmul(chunk, None, torch.float32)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results; a folder per machine is made in it")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (785, 601):
            torch.manual_seed(0)
            packed = torch.randn(BATCH, tokens, 3 * HEADS * FEATURES).to(dtype).requires_grad_()
            cotangent = torch.randn(BATCH, tokens, HEADS * FEATURES).to(dtype)

            def both(attend: Attend, packed: Tensor = packed, cotangent: Tensor = cotangent) -> tuple[Tensor, Tensor]:
                out = attend(packed.unflatten(-1, (3, HEADS, FEATURES)))
                return out, torch.autograd.grad(out, packed, cotangent)[0]

            exact = packed.detach().double().requires_grad_()
            truth = both(lambda x: attention(x, implementation="reference"), exact, cotangent.double())
            contest = candidates(dtype, torch.get_num_threads())
            times: dict[str, list[float]] = {name: [] for name in contest}
            errors = {}
            for repeat in range(arguments.repeats + 1):
                for name, attend in contest.items():
                    start = time.perf_counter()
                    found = both(attend)
                    if repeat:
                        times[name].append((time.perf_counter() - start) * 1e3)
                    else:
                        errors[name] = max(float((f - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True))
            for name, values in times.items():
                row = {
                    "name": name,
                    "dtype": str(dtype)[6:],
                    "tokens": tokens,
                    "ms_median": round(statistics.median(values), 2),
                }
                row |= {"ms_low": round(min(values), 2), "error": float(f"{errors[name]:.3g}")}
                rows.append(row)
                print(f"{row['dtype']:9} {tokens:4} {name:42} {row['ms_median']:8.1f} ms  {row['error']:.2e}", flush=True)
    record = machine("cpu")
    path = arguments.out / folder(record) / "attention.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"batch": BATCH, "heads": HEADS, "features": FEATURES, "rows": rows}, indent=1) + "\n")
    print(f"-> {path}")


if __name__ == "__main__":
    main()
