"""The same command alone, under `deepspeed` and under `torchrun`: two processes, one run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vatt.engine import cli
from vatt.engine.run_directory import read_metrics

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
DEEPSPEED = ["--backend.name", "deepspeed", "--backend.zero_stage", "2"]
LAUNCHERS = {
    "deepspeed --no_python": (["deepspeed", "--master_port", "PORT", "--no_python", "vatt"], DEEPSPEED),
    "deepspeed --module": (["deepspeed", "--master_port", "PORT", "--module", "vatt.engine.cli"], DEEPSPEED),
    "torchrun": (["torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "--no-python", "vatt"], []),
}
SHORT = ["--steps", "3", "--optimizer.warmup", "1"]


def command(launcher: str) -> tuple[list[str], dict[str, str]]:
    """A launcher's words up to `vatt`, for two processes, and its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    # Without a GPU, DeepSpeed starts as many processes as LOCAL_SIZE says.
    environment = os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [word.replace("PORT", port) for word in LAUNCHERS[launcher][0]], environment


@pytest.fixture(scope="module")
def alone(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(["pretrain", str(small_run), "--output", str(output), *SHORT]) == 0
    return output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_are_one_run(launcher: str, alone: Path, small_run: Path, tmp_path: Path) -> None:
    words, environment = command(launcher)
    output = tmp_path / "run"
    arguments = ["pretrain", str(small_run), "--output", str(output), *SHORT, *LAUNCHERS[launcher][1]]
    done = subprocess.run(
        [*words, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "one run directory, and nothing beside it"
    starts = json.loads((output / "environment.json").read_text())["starts"]
    assert [(start["step"], start["world_size"]) for start in starts] == [(0, 2)]
    ours, expected = read_metrics(output / "metrics.jsonl"), read_metrics(alone / "metrics.jsonl")
    assert [line["step"] for line in ours] == [1, 2, 3]
    for name in ("loss", "loss_video_audio", "loss_video_text", "learning_rate", "gradient_norm"):
        tolerance = 1e-4 if name == "gradient_norm" else 1e-5
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in expected], rel=tolerance), name
    assert [line["counts"]["clips"] for line in ours] == [8, 16, 24], "each process loads its half"
    assert (output / "report.html").exists()
    assert json.loads((output / "evaluation.json").read_text())["clips"]["found"] == 8
    said = done.stdout + done.stderr
    assert said.count("report: ") == 1 and said.count("step 3/3") == 1, "one process talks"


def test_a_signal_to_torchrun_saves_the_run(small_run: Path, tmp_path: Path) -> None:
    """As a cluster's scheduler does it: the launcher is told, its processes save, and the same command goes on."""

    def start(output: Path) -> subprocess.Popen[str]:
        words, environment = command("torchrun")
        arguments = ["pretrain", str(small_run), "--output", str(output), "--steps", "30"]
        return subprocess.Popen([*words, *arguments], env=environment, stderr=subprocess.PIPE, text=True)

    process = start(tmp_path / "run")
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "run/metrics.jsonl")) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGTERM came: saved after step" in said, said[-3000:]
    saved = read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{saved}\n" and 6 <= saved < 30
    for output in (tmp_path / "run", tmp_path / "calm"):
        process = start(output)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, expected = (tmp_path / run / "checkpoints/step-30" / file for run in ("run", "calm"))
        assert ours.read_bytes() == expected.read_bytes(), file
    losses = [[line["loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("run", "calm")]
    assert losses[0] == losses[1] and len(losses[0]) == 30
