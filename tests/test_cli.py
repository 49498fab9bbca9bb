"""The `vatt` command: quick, honest exit codes, one-line errors, and the launchers' habits."""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vatt.engine import cli
from vatt.engine.config_file import OPTIONS, load_run, to_toml

VATT = Path(sys.executable).parent / "vatt"


def run(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(VATT), *arguments], capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))  # type: ignore[arg-type]


# ---- speed and help --------------------------------------------------------------------------------------------------


def test_help_answers_at_once():
    def seconds() -> float:
        # Processor time, which is the wall clock of an idle machine: the tests share theirs with others.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert statistics.median(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["config", "show", "pretrain/tiny"]])
def test_torch_is_not_imported_to_answer(arguments):
    code = f"""
import sys
from vatt.engine.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print({{'torch', 'numpy', 'av'}} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


def test_help_lists_every_command_once():
    text = run("--help").stdout
    for command in cli.COMMANDS:
        assert text.count(f"\n{command.name} ") + text.count(f"\n  {command.name} ") == 1, command.name
        assert command.help in text
    for code in ("0 success", "1 failed", "2 bad", "75 interrupted and saved", "130"):
        assert code in text


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda c: c.name)
def test_every_command_has_help_with_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.name.split(), "--help"])
    assert stopped.value.code == 0
    assert f"example:\n  {command.example}" in capsys.readouterr().out
    assert command.example.startswith(f"vatt {command.name}")
    plain, overrides = cli.take_overrides(command.example.split()[1:])
    assert cli.build_parser().parse_args(plain).run is command.run
    assert all(word[2:] in OPTIONS for word in overrides if word.startswith("--"))


# ---- errors and exit codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["config"], "the following arguments are required: COMMAND"),
        (["doctor", "--fast"], "unrecognized arguments: --fast"),
        (["report"], "the following arguments are required: RUN"),
        (["pretrain"], "the following arguments are required: config"),
        (["data", "sample-world", "x", "--train", "-3"], "argument --train: must not be negative: -3"),
        (["data", "sample-world", "x", "--container", "avi"], "invalid choice: 'avi'"),
        (["pretrain", "pretrain/tinny"], "pretrain/tinny: no such file or recipe. Did you mean pretrain/tiny?"),
        (
            ["pretrain", "pretrain/tiny", "--model.video.pacth", "3"],
            "--model.video.pacth: unknown key; the nearest is model.video.patch",
        ),
        (["pretrain", "pretrain/tiny", "--gradient_accumulation_steps=2"], "gradient accumulation is refused"),
        (["config", "show", "pretrain/tiny", "extra"], "unrecognized arguments: extra"),
        (["data", "check", "/no/such.jsonl"], "/no/such.jsonl: "),
    ],
)
def test_bad_usage_and_bad_input_are_one_line_and_exit_2(arguments, message, capsys):
    assert cli.main(arguments) == cli.BAD_INPUT
    assert message in one_line(capsys)


def failing(error: BaseException):
    def handler(*_: object, **__: object) -> int:
        raise error

    return handler


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("out of\nmemory"), 1, "error: RuntimeError: out of memory (--debug shows where)\n"),
        (FileNotFoundError(2, "No such file or directory", "a.jsonl"), 2, "error: a.jsonl: no such file or directory\n"),
        (PermissionError(13, "Permission denied", "runs/x"), 2, "error: runs/x: permission denied\n"),
        (OSError(28, "No space left on device", "runs/x"), 1, "error: runs/x: no space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failures_have_their_own_codes_and_no_traceback(error, code, message, capsys, monkeypatch):
    fake_module(monkeypatch, "vatt.engine.report", write_report=failing(error))
    assert cli.main(["report", "runs/x"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("arguments", [["--debug", "report", "runs/x"], ["report", "runs/x", "--debug"]])
def test_debug_adds_the_traceback(arguments, capsys, monkeypatch):
    fake_module(monkeypatch, "vatt.engine.report", write_report=failing(RuntimeError("no")))
    assert cli.main(arguments) == cli.FAILED
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error and error.endswith("error: RuntimeError: no (--debug shows where)\n")


def test_the_process_exits_with_the_code():
    assert run("config", "show", "pretrain/tiny").returncode == 0
    assert run("config", "show", "pretrain/tinny").returncode == 2
    module = subprocess.run(
        [sys.executable, "-m", "vatt.engine.cli", "config", "show", "nothing"], capture_output=True, text=True
    )
    assert (module.returncode, module.stderr.startswith("error: nothing: no such file or recipe")) == (2, True)


def test_a_reader_that_leaves_is_no_traceback():
    done = subprocess.run(f"{VATT} config reference | head -n 1", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_ctrl_c_is_no_traceback():
    code = """
import sys, time
import vatt.engine.config_file
from vatt.engine import cli

def wait():
    print("ready", flush=True)
    time.sleep(60)

vatt.engine.config_file.reference = wait
sys.exit(cli.main(["config", "reference"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "interrupted\n")


# ---- what reaches the handlers ---------------------------------------------------------------------------------------


def pretrained(monkeypatch: pytest.MonkeyPatch, *arguments: str, returns: int = 0) -> tuple[int, object]:
    seen: list[object] = []
    fake_module(monkeypatch, "vatt.engine.train", pretrain=lambda config: seen.append(config) or returns)
    code = cli.main(list(arguments))
    return code, seen[0] if seen else None


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "pretrain/tiny", "--seed", "7", "--log.tensorboard=false"],
        ["pretrain", "--seed", "7", "pretrain/tiny", "--log.tensorboard", "false"],
        ["--local_rank=0", "pretrain", "pretrain/tiny", "--seed=7", "--log.tensorboard", "false"],
        ["--local-rank", "1", "pretrain", "pretrain/tiny", "--seed=7", "--log.tensorboard", "false"],
        ["--debug", "pretrain", "pretrain/tiny", "--log.tensorboard", "false", "--seed", "7", "--debug"],
    ],
)
def test_pretrain_gets_the_run_with_its_overrides(arguments, monkeypatch):
    code, config = pretrained(monkeypatch, *arguments)
    assert code == 0
    assert config == load_run("pretrain/tiny", ["--seed", "7", "--log.tensorboard", "false"])


@pytest.mark.parametrize("code", [0, 1, 75])
def test_pretrains_exit_code_is_the_commands(code, monkeypatch):
    assert pretrained(monkeypatch, "pretrain", "pretrain/tiny", returns=code)[0] == code


def test_a_negative_override_is_a_value(monkeypatch):
    _, config = pretrained(monkeypatch, "pretrain", "pretrain/tiny", "--loss.video_text_weight", "-0.5")
    assert config.loss.video_text_weight == -0.5  # type: ignore[attr-defined]


def test_config_show_prints_what_would_run(capsys):
    assert cli.main(["config", "show", "pretrain/lbs", "--batch_size", "512"]) == 0
    assert capsys.readouterr().out == to_toml(load_run("pretrain/lbs", ["--batch_size", "512"]))


def test_config_reference_as_rows(tmp_path):
    assert cli.main(["config", "reference", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["key"] for row in rows] == list(OPTIONS)


def test_sample_world_passes_its_arguments_on(monkeypatch):
    seen: dict[str, object] = {}
    fake_module(
        monkeypatch, "vatt.engine.data.sample_world", make_sample_world=lambda out, **more: seen.update(out=out, **more)
    )
    arguments = ["w", "--train", "5", "--test", "3", "--seed", "9", "--container", "webm"]
    assert cli.main(["data", "sample-world", *arguments]) == 0
    assert seen == {"out": Path("w"), "train": 5, "test": 3, "seed": 9, "container": "webm"}


def test_retrieval_ends_with_one_json_object(monkeypatch, capsys, tmp_path):
    scores = {"catalogue": "test.jsonl", "clips": {"expected": 2}, "text_to_video": {"queries": 2, "R@1": 0.5}}
    fake_module(monkeypatch, "vatt.engine.evaluate.retrieval", retrieval=lambda source, catalogue: print("a table") or scores)
    assert cli.main(["evaluate", "retrieval", "runs/x", "test.jsonl", "--json", str(tmp_path / "rows.json")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == scores
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows == [{"direction": "text_to_video", "queries": 2, "R@1": 0.5}]


def test_data_check_names_rows_and_missing_files(tmp_path, capsys):
    catalogue = tmp_path / "clips.jsonl"
    catalogue.write_text('{"id": "a", "video": "here.mp4"}\n{"id": "b", "video": "gone.mp4"}\n')
    (tmp_path / "here.mp4").write_bytes(b"x")
    assert cli.main(["data", "check", str(catalogue)]) == cli.BAD_INPUT
    out = capsys.readouterr().out
    assert f"{catalogue}:2: clip 'b'" in out and "gone.mp4" in out and "here.mp4" not in out
    (tmp_path / "gone.mp4").write_bytes(b"x")
    assert cli.main(["data", "check", str(catalogue)]) == 0
    catalogue.write_text('{"id": "a", "video": "here.mp4"}\n{"id": "a", "video": "here.mp4"}\nnonsense\n')
    assert cli.main(["data", "check", str(catalogue)]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert all(part in error for part in (str(catalogue), "line 2", "line 3")), error


# ---- launchers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["deepspeed", "--no_python", "vatt"],
        ["deepspeed", "--module", "vatt.engine.cli"],
        ["torchrun", "--no-python", "--nproc-per-node", "1", "vatt"],
    ],
    ids=" ".join,
)
def test_the_launchers_start_the_command(launcher, tmp_path):
    path = os.pathsep.join([str(VATT.parent), os.environ["PATH"]])
    # Without a GPU, DeepSpeed counts sockets; one is enough to see its arguments arrive.
    environment = os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1", "MASTER_PORT": "29731"}
    arguments = ["config", "show", "pretrain/tiny", "--seed", "7"]
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "seed = 7\n" in done.stdout
