"""Stop a run anywhere, by any means, and go on: it ends as the run that never stopped, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vatt.engine import cli, train
from vatt.engine.checkpoint import load_checkpoint, newest_checkpoint
from vatt.engine.data.order import batch_samples
from vatt.engine.run_directory import read_metrics

STEPS = 20
VATT = Path(sys.executable).parent / "vatt"
RANK_SCRIPT = Path(__file__).parent / "pretrain_rank.py"
# What a line of metrics says about the machine; `counts` aside, whose `decoded` is about the cache.
MEASURED = {"samples_per_s", "tflops", "mfu", "data_wait", "memory_bytes", "counts"}
DROPPED = ["--drop_rate.video", "0.5", "--drop_rate.audio", "0.3", "--model.dropout", "0.1", "--model.attention_dropout", "0.2"]


def learned(run: Path) -> list[dict[str, object]]:
    """What metrics.jsonl says of the run itself."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(run / "metrics.jsonl")]


def state(run: Path, step: int) -> dict[str, bytes]:
    """Weights, batch norm's buffers, moments and Adam's step, as the bytes of a checkpoint's files."""
    folder = run / "checkpoints" / f"step-{step}"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def assert_same_run(ours: Path, expected: Path, steps: int = STEPS) -> None:
    assert learned(ours) == learned(expected)
    assert [line["step"] for line in learned(ours)] == list(range(1, steps + 1))
    assert state(ours, steps) == state(expected, steps)


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """(step, sample ids) of every step taken in this process."""
    taken: list[tuple[int, list[int]]] = []
    train_step = train.train_step

    def noted(run, batch, step):  # type: ignore[no-untyped-def]
        taken.append((step, batch.sample_id.tolist()))
        return train_step(run, batch, step)

    monkeypatch.setattr(train, "train_step", noted)
    return taken


def pretrain(config: Path, output: Path, *overrides: object) -> int:
    return cli.main(["pretrain", str(config), "--output", str(output), *map(str, overrides)])


# ---- in this process, at every step ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calm(micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stops, with a checkpoint of every step."""
    output = tmp_path_factory.mktemp("calm") / "run"
    every_step = ["--checkpoint.every", 1, "--checkpoint.keep", STEPS]
    assert pretrain(micro_run, output, "--stop_after", STEPS, *every_step, *DROPPED) == 0
    assert len({json.dumps(line["loss"]) for line in learned(output)}) == STEPS
    return output


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_stopped_after_any_step(stop: int, calm: Path, micro_run: Path, tmp_path: Path, samples: list) -> None:
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", stop, *DROPPED) == 0
    assert state(tmp_path / "run", stop) == state(calm, stop)
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", STEPS, *DROPPED) == 0
    assert_same_run(tmp_path / "run", calm)
    assert samples == [(step, batch_samples(step, 4, 3, 6).tolist()) for step in range(STEPS)], "each step once, in order"


def test_the_seed_decides_and_nothing_else_does(calm: Path, micro_run: Path, tmp_path: Path) -> None:
    """How the clips are read is no part of the run: workers, cache, prefetch."""
    layout = ["--data.workers", 2, "--data.cache", "none", "--data.prefetch", 3]
    assert pretrain(micro_run, tmp_path / "again", "--stop_after", STEPS, *DROPPED, *layout) == 0
    assert_same_run(tmp_path / "again", calm)
    assert pretrain(micro_run, tmp_path / "other", "--stop_after", STEPS, "--seed", 4, *DROPPED) == 0
    assert state(tmp_path / "other", STEPS) != state(calm, STEPS)
    assert learned(tmp_path / "other")[0]["loss"] != learned(calm)[0]["loss"]


def test_other_workers_and_no_cache_after_the_stop(calm: Path, micro_run: Path, tmp_path: Path) -> None:
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", 9, *DROPPED, "--data.workers", 1) == 0
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", STEPS, *DROPPED, "--data.cache", "none") == 0
    assert_same_run(tmp_path / "run", calm)


def test_sparse_lines_and_the_counts_of_the_clips(micro_run: Path, tmp_path: Path) -> None:
    """Without a cache every count is the run's; a line that only the stop asked for is not left behind."""
    few = ["--log.every", 4, "--data.cache", "none"]
    assert pretrain(micro_run, tmp_path / "calm", "--stop_after", 12, *few) == 0
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", 6, *few) == 0
    assert [line["step"] for line in learned(tmp_path / "run")] == [4, 6]
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", 12, *few) == 0
    assert learned(tmp_path / "run") == learned(tmp_path / "calm")
    counts = [[line["counts"] for line in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("run", "calm")]
    assert counts[0] == counts[1]
    assert counts[0][-1] == {"clips": 48, "decoded": 48}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75(
    number: signal.Signals,
    calm: Path,
    micro_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    train_step = train.train_step
    before = signal.getsignal(number)

    def signalled(run, batch, step):  # type: ignore[no-untyped-def]
        report = train_step(run, batch, step)
        if step == 6:
            os.kill(os.getpid(), number)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        assert pretrain(micro_run, tmp_path / "run", "--stop_after", STEPS, *DROPPED) == 75
    assert f"{number.name} came: saved after step 7; the same command goes on" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoints/step-7"
    assert state(tmp_path / "run", 7) == state(calm, 7)
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", STEPS, *DROPPED) == 0
    assert "resumed after step 7 from" in capfd.readouterr().err
    assert_same_run(tmp_path / "run", calm)


def test_a_finished_run_is_only_evaluated_again(micro_run: Path, tmp_path: Path, samples: list) -> None:
    assert pretrain(micro_run, tmp_path / "run", "--steps", 3, "--optimizer.warmup", 1) == 0
    (tmp_path / "run/evaluation.json").rename(tmp_path / "first.json")
    del samples[:]
    assert pretrain(micro_run, tmp_path / "run", "--steps", 3, "--optimizer.warmup", 1) == 0
    assert samples == []
    assert (tmp_path / "run/evaluation.json").read_bytes() == (tmp_path / "first.json").read_bytes()


# ---- processes that are ended from outside ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calm_small(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, undisturbed."""
    output = tmp_path_factory.mktemp("calm_small") / "run"
    assert pretrain(small_run, output, "--steps", 30) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_ended_in_the_middle(
    number: signal.Signals, calm_small: Path, small_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [str(VATT), "pretrain", str(small_run), "--output", str(output), "--steps", "30", "--data.workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_metrics(output / "metrics.jsonl")) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 75 and f"{number.name} came: saved after step" in said
    checkpoint = newest_checkpoint(output)
    assert checkpoint is not None
    saved = load_checkpoint(checkpoint)[1]["step"]
    assert 5 <= saved < 30 and checkpoint.name == f"step-{saved}"
    if number != signal.SIGKILL:
        assert saved == read_metrics(output / "metrics.jsonl")[-1]["step"]
    assert subprocess.run(command, timeout=120).returncode == 0
    assert_same_run(output, calm_small, 30)
    assert json.loads((output / "evaluation.json").read_text()) == json.loads((calm_small / "evaluation.json").read_text())


# ---- several ranks, DeepSpeed, bf16 ----------------------------------------------------------------------------------


def on_ranks(launch: Callable[..., list[str]], ranks: int, folder: Path, runs: list[dict[str, object]]) -> list[str]:
    """Run `vatt pretrain` several times over on the same processes; what each rank said."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    return launch(RANK_SCRIPT, file, ranks=ranks, seconds=600)


def backend(name: str) -> list[str]:
    layout, precision = name.split("-")
    if layout == "torch":
        return ["--backend.name", "torch", "--backend.precision", precision]
    return ["--backend.name", "deepspeed", "--backend.zero_stage", layout[-1], "--backend.precision", precision]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_backend_goes_on_exactly(ranks: int, launch: Callable[..., list[str]], micro_run: Path, tmp_path: Path) -> None:
    """Each layout is stopped elsewhere: after a step on request, and by a signal that only the last rank gets."""
    steps = 12
    layouts = ["torch-bf16", "zero1-bf16", "zero3-fp32"]
    if ranks > 1:
        layouts += ["torch-fp32", "zero1-fp32", "zero2-fp32", "zero2-bf16", "zero3-bf16"]
    runs: list[dict[str, object]] = []
    for number, name in enumerate(layouts):

        def arguments(run: str, stop: int, name: str = name) -> list[str]:
            given = ["--output", str(tmp_path / f"{name}-{run}"), "--stop_after", str(stop)]
            return [str(micro_run), *given, *backend(name), *DROPPED]

        runs.append({"arguments": arguments("calm", steps)})
        runs.append({"arguments": arguments("stopped", 1 + number % 5)})
        runs.append({"arguments": arguments("stopped", steps), "signal": [6 + number % 4, ranks - 1], "code": 75})
        runs.append({"arguments": arguments("stopped", steps)})
    said = on_ranks(launch, ranks, tmp_path, runs)
    assert said[0].count("saved after step") == len(layouts)
    assert all("saved after step" not in text for text in said[1:])
    for name in layouts:
        assert_same_run(tmp_path / f"{name}-stopped", tmp_path / f"{name}-calm", steps)
        assert len(json.loads((tmp_path / f"{name}-stopped/environment.json").read_text())["starts"]) == 3


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_after_the_same_step(
    launch: Callable[..., list[str]], micro_run: Path, tmp_path: Path
) -> None:
    arguments = [str(micro_run), "--output", str(tmp_path / "run"), *DROPPED]
    signalled = {"arguments": arguments, "signal": [5, 1], "code": 75}
    calm = {"arguments": [*arguments[:2], str(tmp_path / "calm"), *DROPPED]}
    on_ranks(launch, 2, tmp_path, [signalled])
    # During step 5 (the 6th), so both have decided after the 7th.
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-7"]
    on_ranks(launch, 2, tmp_path, [{"arguments": arguments}, calm])
    assert_same_run(tmp_path / "run", tmp_path / "calm")
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.slow
def test_another_layout_goes_on(launch: Callable[..., list[str]], micro_run: Path, tmp_path: Path) -> None:
    """What two ranks of ZeRO-3 began goes on under PyTorch alone with the losses it would have had."""
    arguments = [str(micro_run), "--output", str(tmp_path / "run"), *backend("zero3-fp32"), *DROPPED]
    on_ranks(launch, 2, tmp_path, [{"arguments": [*arguments, "--stop_after", "8"]}])
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    on_ranks(launch, 2, tmp_path, [{"arguments": [*arguments, "--stop_after", "11"]}])
    assert pretrain(micro_run, tmp_path / "moved", "--stop_after", 11, *DROPPED) == 0
    ours, expected = ([line["loss"] for line in learned(tmp_path / run)] for run in ("moved", "run"))
    assert ours[:8] == expected[:8]
    assert ours[8] == pytest.approx(expected[8], rel=1e-5)
    # In batches of four, batch norm multiplies rounding errors with every step.
    assert ours[9:] == pytest.approx(expected[9:], rel=2e-3)
