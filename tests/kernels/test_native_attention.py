"""The CPU's C++ attention beyond the shared cases: lengths in several pieces, threads, biases, other instruction sets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vatt.kernels import native, native_attention
from vatt.kernels.attention import attention, attention_eager, attention_reference
from vatt.kernels.contract import Arguments, Case, drawn, errors, gradients
from vatt.kernels.dropout import DropoutMask
from vatt.kernels.rows.attention import ROW, _make

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
    pytest.skip(f"no C++ compiler: {native.REMEDY}", allow_module_level=True)
native.loaded(required=True)  # with a compiler, a library that does not build is a failure


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised bytes are 255, so that a float read before it is written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def drop(samples: int, rate: float = 0.25) -> DropoutMask:
    return DropoutMask(rate, torch.tensor(2**35 + 9), torch.tensor(77), torch.arange(samples) * 3 + 1, 1042)


def within(make, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    wrong = [error for error in errors(ROW, Case("here", make), dtype, CPU, "native") if not error.within]
    assert not wrong


@DTYPES
@pytest.mark.parametrize("tokens", [2, 5, 6, 47, 48, 49, 96, 97, 383, 449, 785, 1025, 1090])
def test_lengths_around_strips_blocks_and_pieces(tokens: int, dtype: torch.dtype) -> None:
    """Strips of 6, blocks of 48 keys and 96 queries, pieces of 384 or 512 queries and of 1024 keys: one less, all, one more."""
    within(_make(1, tokens, 1, 32 if tokens > 1000 else 64), dtype)


@DTYPES
@pytest.mark.parametrize("tokens", [53, 541])
def test_a_bias_and_dropout_over_several_pieces(tokens: int, dtype: torch.dtype) -> None:
    within(_make(2, tokens, 1, 32, bias="scores", samples=1), dtype)
    within(_make(1, tokens, 2, 128, samples=1), dtype)


@DTYPES
@pytest.mark.parametrize("bias", ["", "heads"])
def test_same_bits_with_any_number_of_threads(bias: str, dtype: torch.dtype) -> None:
    arguments = _make(2, 203, 3, 64, bias=bias, samples=2)(dtype, CPU)  # type: ignore[arg-type]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(attention, arguments, ROW.differentiable, implementation="native"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())


@DTYPES
@pytest.mark.parametrize("value", [-1e9, float("-inf")])
def test_hidden_keys_leave_no_nan_and_no_gradient(value: float, dtype: torch.dtype) -> None:
    """The first keys are hidden from one row of the batch, all of them from the other: that one attends to everything."""
    qkv = drawn((2, 140, 3, 1, 32), dtype, CPU, 4)
    bias = torch.full((2, 1, 1, 140), value)
    bias[0, ..., 133:] = 0.0
    found = gradients(attention, {"qkv_BN3HD": qkv, "bias": bias}, ["qkv_BN3HD", "bias"], implementation="native")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert found["dqkv_BN3HD"][0, :133, 1:].abs().max() == 0 and found["dbias"][0, ..., :133].abs().max() == 0
    seen = attention_reference(qkv[:1].double(), bias[:1].double())
    torch.testing.assert_close(found["out"][:1].double(), seen, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert (found["out"][1].double() - attention_reference(qkv[1:].double())[0]).abs().max() < 0.02


@pytest.mark.parametrize("shape", [(5,), (5, 5), (5, 1), (2, 5, 5), (1, 1, 1, 5), (3, 1, 5, 1), (3, 2, 5, 5)])
def test_every_way_to_broadcast_a_bias(shape: tuple[int, ...]) -> None:
    bias, qkv = drawn(shape, torch.float32, CPU, 1), drawn((3, 5, 3, 2, 32), torch.float32, CPU, 2)
    arguments: Arguments = {"qkv_BN3HD": qkv.double(), "bias": bias.double()}
    truth = gradients(attention_reference, arguments, ["qkv_BN3HD", "bias"])
    ours = gradients(attention, {"qkv_BN3HD": qkv, "bias": bias}, ["qkv_BN3HD", "bias"], implementation="native")
    assert ours["dbias"].shape == shape
    for name, exact in truth.items():
        # A bias that is the same for all keys changes nothing: its true gradient is 0.
        assert (ours[name].double() - exact).abs().max() <= 16 * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max())


def test_layouts() -> None:
    """A cotangent that is a view, and features that do not lie side by side."""
    qkv = drawn((2, 33, 3, 2, 32), torch.bfloat16, CPU, 3)
    apart = qkv.movedim(-1, 0).contiguous().movedim(0, -1)
    assert apart.stride(-1) != 1
    cotangent = drawn((2, 33, 128), torch.bfloat16, CPU, 5)[..., 64:]

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = attention(x, implementation="native")
        return out, torch.autograd.grad(out, x, grad)[0]

    for ours, plain in zip(run(apart, cotangent), run(qkv, cotangent.contiguous()), strict=True):
        assert torch.equal(ours, plain)


def test_what_it_does_not_take_is_left_to_pytorch() -> None:
    for dtype, features in ((torch.float64, 64), (torch.float16, 64), (torch.float32, 48)):
        qkv = drawn((1, 9, 3, 2, features), dtype, CPU)
        assert not native_attention.takes(qkv)
        assert torch.equal(attention(qkv, implementation="native"), attention_eager(qkv))
    assert native_attention.takes(drawn((1, 9, 3, 2, 64), torch.bfloat16, CPU))


def test_no_scores_are_kept() -> None:
    """Scratch memory and results together are a small part of what one matrix of weights per head would be."""
    qkv = drawn((1, 2000, 3, 4, 32), torch.bfloat16, CPU).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attention(qkv, implementation="native").float().sum().backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert 0 < allocated < 4 * 2000 * 2000 * 4 / 2


OTHER = """
import json, sys, torch
from vatt.kernels import native
native.NATIVE, native.prebuilt = (f"-march={sys.argv[1]}",), lambda: None
from vatt.kernels.contract import errors
from vatt.kernels.rows.attention import ROW
assert native.loaded(required=True)
wrong = [(case.name, str(dtype), error.output, error.kernel, error.budget) for case in ROW.cases
         for dtype in (torch.float32, torch.bfloat16)
         for error in errors(ROW, case, dtype, torch.device("cpu"), "native") if not error.within]
print(json.dumps(wrong))
"""


@pytest.mark.slow
@pytest.mark.parametrize("march", ["x86-64-v4", "x86-64-v3"])
def test_other_instruction_sets(march: str, tmp_path: Path) -> None:
    """AVX-512 without bf16 products, and AVX2: the same sources, the same budgets.

    Code for older processors cannot be judged here: it rounds every product, and PyTorch, which the budget is taken from, does
    not on a processor that can do better.
    """
    needs = {"x86-64-v4": {"avx512f", "avx512bw", "avx512vl"}, "x86-64-v3": {"avx2", "fma"}}[march]
    if not needs <= native.features():
        pytest.skip(f"this processor has no {', '.join(sorted(needs - native.features()))}")
    environment = os.environ | {"VATT_NATIVE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", OTHER, march], capture_output=True, text=True, timeout=500, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert list(tmp_path.glob("*/*.so")), "no library was built: another one was tested"
    assert json.loads(run.stdout.splitlines()[-1]) == []
