"""`vatt bench kernels`: what is timed, what is refused, and where the figures go. On small shapes made here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vatt.benchmarks import bench_kernels, certificate
from vatt.engine import cli
from vatt.engine.profile.roofline import CEILINGS, ceilings_of, times_us
from vatt.kernels import contract
from vatt.kernels.contract import Kernel, Shape, divisible, row

CPU = torch.device("cpu")


@divisible("batch", "samples")
def shape(name: str, batch: int, width: int = 8, samples: int = 0) -> Shape:
    def make(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {"x": contract.drawn((batch, width), dtype, device)}

    return Shape(name, make, forward_bytes=batch * width * 4, backward_bytes=batch * width * 6, forward_flops=batch * width)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Kernel]:
    """`small(op=...)`: bias_gelu with one small shape takes the place of every row of the table."""
    monkeypatch.setattr(bench_kernels, "BUDGET", 0.01)

    def install(**changes: Any) -> Kernel:
        original = row("bias_gelu")
        kernel = replace(original, cases=original.cases[:2], shapes=(shape("64 clips", 64, samples=64),), **changes)
        monkeypatch.setattr(bench_kernels, "row", lambda name: kernel)
        return kernel

    return install


def run(*words: str) -> int:
    return cli.main(["bench", "kernels", *words])


def test_rows_of_a_green_kernel(small: Callable[..., Kernel], tmp_path: Path) -> None:
    small()
    out, table = tmp_path / "results", tmp_path / "rows.json"
    assert run("--kernel", "bias_gelu", "--no-compile", "--out", str(out), "--json", str(table)) == 0
    (path,) = out.glob("*/kernels_bias_gelu.json")
    record = json.loads(path.read_text())
    assert record["rows"] == json.loads(table.read_text())["rows"]
    assert record["versions"]["torch"] == torch.__version__ and "device" in record and record["dtype"] == "bfloat16"
    forward, backward = record["rows"]
    assert (forward["pass"], forward["clips_divided_by"], forward["bytes"], forward["flops"]) == ("forward", 32, 64, 16)
    assert (backward["pass"], backward["bytes"]) == ("backward", 96)
    for found in record["rows"]:
        assert found["ours_ms"] > 0 and found["eager_ms"] > 0 and found["turns"] >= 5
        assert found["eager_ratio_low"] <= found["eager_ratio"] <= found["eager_ratio_high"]
        assert "compiled_ms" not in found and "compiled_missing" not in found
    assert len(record["commit"].split()[0]) == 40


def test_a_wrong_kernel_is_reported_and_not_timed(
    small: Callable[..., Kernel], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = small(op=lambda x, bias_C=None, dropout=None, implementation="": x * 1.1)
    monkeypatch.setattr(bench_kernels, "timed", lambda *_: pytest.fail("a red kernel was timed"))
    assert run("--kernel", "bias_gelu", "--json", str(tmp_path / "rows.json")) == cli.FAILED
    (found,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    # A missing gradient of the bias raises; both kinds of wrong are one line a case.
    assert len(found["red"]) >= len(kernel.cases) and any("AssertionError" in line for line in found["red"])
    assert "bias_gelu: red, not timed" in capsys.readouterr().out


def test_an_error_out_of_budget_is_red(small: Callable[..., Kernel]) -> None:
    original = row("bias_gelu").op
    kernel = small(op=lambda x, bias_C, dropout, implementation: original(x, bias_C, dropout) * 1.05)
    (first, *_) = bench_kernels.red_cases(kernel, CPU)
    assert first.startswith("one_row: out is off by ") and ", budget " in first


def test_check_times_nothing(small: Callable[..., Kernel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small()
    monkeypatch.setattr(bench_kernels, "timed", lambda *_: pytest.fail("--check timed"))
    assert run("--check", "--kernel", "bias_gelu", "--out", str(tmp_path)) == 0
    (path,) = tmp_path.glob("*/correctness_bias_gelu.json")
    assert json.loads(path.read_text())["rows"] == [{"kernel": "bias_gelu", "green": 2}]


def test_a_rival_that_cannot_run_is_named_and_ours_is_timed(small: Callable[..., Kernel]) -> None:
    def broken(x: torch.Tensor, **_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("as large as B x 5B")

    kernel = small(eager=broken)
    found = list(bench_kernels.timed(kernel, CPU, compiled=False))
    assert [line["eager_missing"] for line in found] == ["OutOfMemoryError: as large as B x 5B"] * 2
    assert all(line["ours_ms"] > 0 and "eager_ms" not in line for line in found)
    assert "eager is missing: OutOfMemoryError" in bench_kernels.line_of(found[0])


def test_a_shape_that_cannot_be_divided_is_skipped_on_a_cpu(small: Callable[..., Kernel]) -> None:
    kernel = small()
    kernel = replace(kernel, shapes=(replace(kernel.shapes[0], divided=None),))
    (found,) = bench_kernels.timed(kernel, CPU, compiled=False)
    assert found["skipped"] == "has no smaller form for a CPU"


@pytest.mark.slow
def test_compiled_takes_part(small: Callable[..., Kernel]) -> None:
    found = list(bench_kernels.timed(small(), CPU, compiled=True))
    assert [line["pass"] for line in found] == ["forward", "backward"]
    assert all(line["compiled_ms"] > 0 and line["compiled_ratio"] > 0 for line in found)


def test_sides_take_turns_and_ratios_are_of_one_turn() -> None:
    calls: list[str] = []

    class Clock:
        budget = 0.0
        milliseconds = iter([0.0] * 4 + [10.0, 1.0, 2.0, 8.0, 12.0, 1.0, 2.0, 6.0, 10.0, 1.0])

        def once(self, call: Callable[[], object]) -> float:
            call()
            return next(self.milliseconds)

    sides = {"ours": lambda: calls.append("ours"), "eager": lambda: calls.append("eager")}
    times = bench_kernels.by_turns(sides, Clock())  # type: ignore[arg-type]
    assert calls[4:] == ["eager", "ours", "ours", "eager", "eager", "ours", "ours", "eager", "eager", "ours"]
    assert times == {"ours": [1, 2, 1, 2, 1], "eager": [10, 8, 12, 6, 10]}
    found = bench_kernels.rates(row("bias_gelu"), shape("s", 1_000_000), "forward", times, ["h200"])
    assert (found["eager_ratio"], found["eager_ratio_low"], found["eager_ratio_high"]) == (10, 3, 12)
    # 32 MB in 1 ms is 0.032 TB/s; an H200 would need 32e6 / 4.8e12 s = 6.67 us of that.
    assert (found["ours_ms"], found["tb_s"], found["of_h200"]) == (1, 0.032, 0.0067)


def test_backward_times_backward_alone() -> None:
    seen: list[str] = []

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append("forward")
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append("backward")
            time.sleep(0.001)
            return grad * 2

    kernel = replace(row("bias_gelu"), differentiable=("x",))
    calls = bench_kernels.passes(kernel, lambda x: Slow.apply(x), {"x": torch.ones(3)})
    del seen[:]
    calls["backward"]()
    calls["backward"]()
    assert seen == ["backward", "backward"]
    assert list(bench_kernels.passes(replace(kernel, differentiable=()), lambda x: x, {"x": torch.ones(3)})) == ["forward"]


# ---- the shapes, the ceilings ----------------------------------------------------------------------------------------


def test_a_shape_divided_keeps_its_kind() -> None:
    whole = shape("clips", 64, width=16, samples=64)
    assert whole.divided is not None
    part = whole.divided(32)
    assert part.make(torch.float32, CPU)["x"].shape == (2, 16) and part.forward_bytes * 32 == whole.forward_bytes
    assert part.divided is not None and part.divided(4).make(torch.float32, CPU)["x"].shape == (1, 16)


@pytest.mark.parametrize("name", contract.NAMES)
def test_every_kernel_can_be_timed_on_a_cpu(name: str) -> None:
    for found in row(name).shapes:
        assert found.divided is not None, f"{name}, {found.name}: decorate the function that makes it with @divisible"
        part = found.divided(bench_kernels.CLIPS_DIVIDED_BY)
        assert part.forward_bytes < found.forward_bytes and part.make(torch.bfloat16, torch.device("meta"))


def test_ceilings() -> None:
    figures = {key: (ceiling.tflops, ceiling.tb_s, ceiling.measured) for key, ceiling in CEILINGS.items()}
    assert figures == {
        "a100": (312.0, 2.04, False),
        "h100": (989.5, 3.35, False),
        "h200": (989.5, 4.8, False),
        "h200_measured": (790.0, 4.3, True),
        "b200": (2250.0, 8.0, False),
    }
    assert CEILINGS["h200"].label == "H200 nominal" and CEILINGS["h200_measured"].label == "H200 measured"
    # At the knee both ceilings take the same time; one byte more, or one FLOP more, and that one binds.
    h200 = CEILINGS["h200"]
    assert h200.seconds(4.8e12, 0) == 1.0 and h200.seconds(0, 989.5e12) == 1.0
    assert h200.seconds(1e6, 1e6 * h200.knee) == pytest.approx(h200.seconds(1e6, 0))
    assert h200.seconds(1e6, 2e6 * h200.knee) == pytest.approx(2 * h200.seconds(1e6, 0))
    assert times_us(4.3e6, 0)["h200_measured_us"] == 1.0


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("NVIDIA H200", ["h200", "h200_measured"]),
        ("NVIDIA H100 80GB HBM3", ["h100"]),
        ("NVIDIA A100-SXM4-80GB", ["a100"]),
        ("NVIDIA B200", ["b200"]),
        ("NVIDIA A100-SXM4-40GB", []),
        ("NVIDIA H100 PCIe", []),
        ("NVIDIA H200 NVL", []),
        ("NVIDIA GB200", []),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", []),
        ("cpu", []),
    ],
)
def test_only_the_boards_the_figures_are_of_have_ceilings(name: str, keys: list[str]) -> None:
    assert ceilings_of(name) == keys


# ---- offline ---------------------------------------------------------------------------------------------------------


def certified(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """`--offline` gets rows made here instead of compilations; returns what it was asked for."""
    job = certificate.Job("bias_gelu", "64 clips", "sm_90", "", "", 0, "k", False, "forward", "warps=4", True, False)
    facts = {"registers": 40, "stack": 0, "local": 0, "spills": 0, "shared_memory": 0, "resident_blocks": 12, "products": 0}
    facts |= {"mma": 0, "wgmma": 0, "tcgen05": 0, "loads_16B": 2, "loads_narrow": 0}
    found = certificate.make_row(job, shape("64 clips", 64), facts | changes)
    asked: dict[str, Any] = {}

    def certify(kernels: Any, targets: Any, report: Callable[[int, int], None]) -> tuple[str, list[dict[str, Any]]]:
        asked.update(kernels=list(kernels), targets=list(targets))
        report(1, 1)
        return "3.9.0", [found, found | {"pass": "backward", "launch": "backward"}]

    monkeypatch.setattr(certificate, "certify", certify)
    return asked


def test_offline_writes_table_json_and_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = certified(monkeypatch)
    words = ["--offline", "--kernel", "bias_gelu", "--target", "sm_90", "--target", "sm_100"]
    assert run(*words, "--out", str(tmp_path), "--json", str(tmp_path / "rows.json")) == 0
    assert asked == {"kernels": ["bias_gelu"], "targets": ["sm_90", "sm_100"]}
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    resources = "registers spills shared_memory resident_blocks mma wgmma tcgen05 loads_16B loads_narrow"
    assert {
        *resources.split(),
        "kernel",
        "target",
        "tuning",
        "shape",
        "bytes",
        "flops",
        "a100_us",
        "h100_us",
        "h200_us",
        "h200_measured_us",
        "b200_us",
    } <= rows[0].keys()
    record = json.loads((tmp_path / "offline" / "certificate.json").read_text())
    assert (record["triton"], record["rows"], record["violations"]) == ("3.9.0", rows, [])
    assert (tmp_path / "offline" / "certificate.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "bias_gelu, 64 clips" in said.out and "2 rows, 0 violations" in said.out and "compilation 1/1" in said.err


def test_offline_fails_on_a_violation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    certified(monkeypatch, spills=3)
    assert run("--offline") == cli.FAILED
    assert "bias_gelu forward sm_90 64 clips [warps=4]: spills: 3 instructions" in capsys.readouterr().out


def test_offline_says_that_there_is_no_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certified(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("--offline", "--out", str(tmp_path)) == 0
    assert "no picture: matplotlib is not installed; pip install 'vatt-engine[report]'" in capsys.readouterr().out
    assert not (tmp_path / "offline" / "certificate.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kernel", "gelu"], "'gelu' is not a kernel; there are bias_gelu"),
        (["--offline", "--kernel", "gelu"], "'gelu' is not a kernel; there are bias_gelu"),
        (["--offline", "--target", "sm_75"], "'sm_75' is not a target; there are here, sm_80, sm_90, sm_100"),
        (["--target", "sm_90"], "--target is for --offline"),
        (["--offline", "--check"], "--check and --no-compile run kernels"),
        (["--offline", "--no-compile"], "--check and --no-compile run kernels"),
    ],
)
def test_bad_usage_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
