"""The runner of `vatt bench all`: a stage that fails, hangs or finds no time costs itself alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tarfile
import time
from pathlib import Path

import pytest

from vatt.benchmarks.bench_all import Stage, choose, failed, run_all, stages
from vatt.benchmarks.step_arguments import add_arguments
from vatt.engine.cli import build_parser, main

WRITE = """
import pathlib, sys
box = pathlib.Path(sys.argv[1], "box")
box.mkdir(exist_ok=True)
(box / sys.argv[2]).write_text("{}")
print("figure 7")
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small modules that stages can run."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "good.py").write_text(WRITE)
    (folder / "bad.py").write_text("raise SystemExit('red kernel')")
    (folder / "stuck.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    (folder / "interpret.py").write_text("import os; print('TRITON_INTERPRET' in os.environ)")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return tmp_path / "out"


def test_a_bad_stage_is_reported_and_the_next_one_runs(made: Path) -> None:
    chosen = [Stage("red", 20, ("bad",)), Stage("green", 20, ("good", "{out}", "a.json"))]
    lines = run_all(chosen, made, 60, say=lambda line: None)
    assert [line["status"] for line in lines] == ["failed (1)", "ok"] and failed(lines) == ["red"]
    assert lines[0]["said"] == "red kernel" and lines[1]["said"] == "figure 7"
    assert lines[1]["files"] == ["box/a.json", "green.log"]
    assert [json.loads(line) for line in (made / "all.jsonl").read_text().splitlines()] == lines
    with tarfile.open(made / "all.tar.gz") as tar:
        assert set(tar.getnames()) == {"all.jsonl", "box/a.json", "green.log", "red.log"}


def test_a_hanging_stage_is_killed_with_its_children(made: Path) -> None:
    start = time.monotonic()
    (line,) = run_all([Stage("stuck", 6, ("stuck",))], made, 60, say=lambda line: None)
    assert line["status"] == "out of time" and time.monotonic() - start < 20
    assert gone(int(str(line["said"])))


def gone(process: int) -> bool:
    """Whether a killed process ends within seconds; one that nobody waits for stays as a zombie."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(100):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_no_stage_starts_after_the_budget(made: Path) -> None:
    lines = run_all([Stage("late", 20, ("good", "{out}", "a.json"))], made, 1, say=lambda line: None)
    assert lines[0]["status"] == "no time left" and not (made / "box").exists()
    assert (made / "all.tar.gz").exists()


def test_stages_do_not_interpret(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (line,) = run_all([Stage("look", 20, ("interpret",))], made, 60, say=lambda line: None)
    assert line["said"] == "False"


@pytest.mark.parametrize(("text", "value"), [("540", 540), ("540s", 540), ("9m", 540), ("0.5h", 1800)])
def test_budgets(text: str, value: float) -> None:
    assert build_parser().parse_args(["bench", "all", "--out", "x", "--budget", text]).budget == value


@pytest.mark.parametrize("text", ["", "m", "-3", "0s", "nan", "9 minutes"])
def test_budgets_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "all", "--out", "x", "--budget", text]) == 2
    assert "--budget" in capsys.readouterr().err


def test_stages_by_name() -> None:
    assert [stage.name for stage in choose("cuda", ["kernels", "anchors"])] == ["anchors", "kernels"]
    with pytest.raises(ValueError, match="--stage speed: there is anchors"):
        choose("cuda", ["speed"])
    for device in ("cpu", "cuda"):
        names = [stage.name for stage in stages(device)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stage_is_a_command_that_can_be_given(device: str) -> None:
    """Modules that exist, and options their parsers take."""
    parsers = {"vatt.benchmarks.bench_step": argparse.ArgumentParser()}
    add_arguments(parsers["vatt.benchmarks.bench_step"])
    parsers["vatt.engine.cli"] = build_parser()
    for stage in stages(device):
        module, *arguments = (word.replace("{out}", "x") for word in stage.command)
        assert importlib.util.find_spec(module), stage.name
        if module in parsers:
            parsers[module].parse_args(arguments)
