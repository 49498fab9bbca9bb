"""The run directory: what may be continued, metrics that a resume trims, environment, progress, and exported weights."""

import io
import json
from dataclasses import replace

import pytest
import torch

from vatt.engine.checkpoint import CheckpointError, save_checkpoint
from vatt.engine.config import (
    AudioConfig,
    BackendConfig,
    ConfigError,
    DataConfig,
    HeadsConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.config_file import load_run
from vatt.engine.data.words import Vocabulary
from vatt.engine.durable import write_file
from vatt.engine.model import VATT
from vatt.engine.pretrained import export_weights, from_pretrained, load_trained
from vatt.engine.progress import Progress, duration
from vatt.engine.run_directory import RunDirectory, read_metrics

TINY = {"size": "custom", "layers": 1, "width": 16, "heads": 2, "hidden": 16}


@pytest.fixture
def config(tmp_path):
    return RunConfig(
        output=str(tmp_path / "run"),
        steps=100,
        data=DataConfig(train="/private/train.jsonl", frames=4, size=16, audio_samples=64, words=4),
        model=ModelConfig(
            video=VideoConfig(patch=(2, 8, 8), **TINY),
            audio=AudioConfig(patch=16, **TINY),
            text=TextConfig(vocabulary=9, word_width=8, **TINY),
            heads=HeadsConfig(video_audio=8, video_text=6),
        ),
        log=LogConfig(every=1, tensorboard=False),
    )


def log_steps(config, first, last, stop_at=None):
    with RunDirectory(config) as run:
        run.start(first)
        for step in range(first + 1, (stop_at or last) + 1):
            run.log({"step": step, "loss": torch.tensor(1.0 / step), "counts": {"decoded": 4 * step}})


# ---- create and continue ---------------------------------------------------------------------------------------------


def test_a_new_run_keeps_its_settings_and_says_where_it_ran(config):
    with RunDirectory(config) as run:
        assert not run.resumed
        run.start(0, world_size=2, device="cpu")
    assert load_run(run.path / "config.toml") == config
    environment = json.loads(run.environment.read_text())
    assert environment["versions"]["torch"] == torch.__version__
    with RunDirectory(config) as run:
        assert run.resumed
        run.start(5, world_size=1, device="cpu")
    starts = json.loads(run.environment.read_text())["starts"]
    assert [(s["step"], s["world_size"]) for s in starts] == [(0, 2), (5, 1)]


def test_other_settings_are_refused_and_named(config):
    log_steps(config, 0, 1)
    other = replace(config, seed=5, data=replace(config.data, fps=5.0))
    with pytest.raises(
        ConfigError, match=r"output: .*seed was 0, is 5; data\.fps was 10\.0, is 5\.0.*name another folder"
    ) as error:
        RunDirectory(other)
    assert "\n" not in str(error.value)
    assert load_run(config.output + "/config.toml") == config
    with pytest.raises(ConfigError, match="steps was 100, is 50.*stop_after"):
        RunDirectory(replace(config, steps=50))


def test_settings_that_change_no_step_may_change(config):
    RunDirectory(config).close()
    backend = BackendConfig(name="torch", zero_stage=0, threads=1)
    other = replace(
        config, stop_after=7, log=replace(config.log, every=3), data=replace(config.data, workers=0), backend=backend
    )
    assert RunDirectory(other).resumed
    assert load_run(config.output + "/config.toml") == other
    log_steps(other, 0, 1)
    with pytest.raises(ConfigError, match="backend.precision"):
        RunDirectory(replace(config, backend=BackendConfig(precision="fp32")))


def test_a_start_that_failed_before_its_first_step_binds_nobody(config):
    """As a batch does that was too large: the corrected setting must not be refused, nor the old vocabulary be used."""
    with RunDirectory(config) as run:
        run.start(0)
        VOCABULARY.write(run.words)
    other = replace(config, batch_size=4)
    with RunDirectory(other) as run:
        assert not run.resumed and not run.words.exists()
    assert load_run(config.output + "/config.toml") == other


def test_a_line_that_only_the_stop_asked_for_goes_when_the_run_goes_on(config):
    sparse = replace(config, log=replace(config.log, every=5))
    for first, stop in ((0, 5), (5, 7), (7, 10)):
        with RunDirectory(sparse) as run:
            run.start(first)
            run.log({"step": stop})
    assert [line["step"] for line in read_metrics(run.metrics)] == [5, 10]


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds files and no config.toml.*another folder"):
        RunDirectory(config)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory(replace(config, output=str(tmp_path / "run/thesis.tex")))


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_a_stopped_and_resumed_run_equal_those_of_one_that_never_stopped(config, tmp_path):
    log_steps(config, 0, 20)
    calm = (tmp_path / "run/metrics.jsonl").read_bytes()
    for saved, died in ((0, 3), (7, 12), (12, 12), (19, 20)):
        other = replace(config, output=str(tmp_path / f"run-{saved}"))
        log_steps(other, 0, 20, stop_at=died)
        path = tmp_path / f"run-{saved}/metrics.jsonl"
        path.write_bytes(path.read_bytes() + b'{"step": 13, "loss": 0.')  # torn by the crash
        log_steps(other, saved, 20)
        assert path.read_bytes() == calm, f"saved after {saved}, died after {died}"


def test_lines_are_json_whatever_is_logged(config):
    with RunDirectory(config) as run:
        run.start(0)
        run.log({"step": 1, "loss": float("nan"), "norm": torch.tensor(float("inf")), "counts": {"a": torch.tensor(3)}})
    text = run.metrics.read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "step": 1,
        "loss": None,
        "norm": None,
        "counts": {"a": 3},
    }
    assert read_metrics(run.metrics)[0]["step"] == 1


def test_tensorboard_gets_the_numbers(config):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunDirectory(replace(config, log=LogConfig(tensorboard=True))) as run:
        run.start(0)
        run.log({"step": 10, "loss": 2.5, "mfu": None, "counts": {"looped": 4}})
    read = events.EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(10, 2.5)]
    assert read.Scalars("counts/looped")[0].value == 4.0 and "mfu" not in read.Tags()["scalars"]


def test_what_is_not_installed_is_said(config, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with RunDirectory(replace(config, log=LogConfig(tensorboard=True))) as run:
        run.start(0)
    assert capsys.readouterr().err.count("pip install") == 1
    with (
        pytest.raises(ConfigError, match="log.wandb: project 'vatt'.*pip install wandb"),
        RunDirectory(replace(config, log=LogConfig(tensorboard=False, wandb="vatt"))) as run,
    ):
        run.start(0)


# ---- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_the_first_line_the_last_and_few_between():
    now, stream = [0.0], io.StringIO()
    progress = Progress(100, stream=stream, interval=10.0, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 1.0
        progress.report({"step": step, "loss": 3.0, "mfu": 0.4})
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", *(f"{n}/100" for n in range(11, 100, 10)), "100/100"]
    assert "loss 3.0000" in lines[0] and "MFU 40.0%" in lines[0] and "left 1:29" in lines[1]


def test_a_terminal_gets_one_line_redrawn(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = Progress(3, stream=stream)
    for step in (1, 2, 3):
        progress.report({"step": step, "loss": 3.0, "samples_per_s": 1e6, "tflops": 300.0})
    assert "\n" not in stream.getvalue() and stream.getvalue().count("\r") == 3
    assert all(len(part.removeprefix("\x1b[2K")) < 40 for part in stream.getvalue().split("\r"))
    progress.say("saved")
    progress.close()
    assert stream.getvalue().endswith("saved\n")


def test_durations():
    assert [duration(s) for s in (5, 65, 7384, 90000)] == ["0:05", "1:05", "2:03:04", "1 d 01:00"]


# ---- exported weights ------------------------------------------------------------------------------------------------


VOCABULARY = Vocabulary(["red", "blue"])


def test_exported_weights_come_back_in_a_process_that_knows_only_the_folder(config, tmp_path):
    model = VATT(config)
    export_weights(tmp_path / "w", model, config, VOCABULARY)
    again = load_trained(tmp_path / "w")
    assert again.vocabulary.words == ("red", "blue") and not again.model.training
    assert again.config.model == config.with_buckets().model
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert "private" not in (tmp_path / "w/config.json").read_text()


def test_a_run_a_checkpoint_and_an_export_are_told_apart(config, tmp_path):
    model = VATT(config)
    with RunDirectory(config) as run:
        VOCABULARY.write(run.words)
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    path = save_checkpoint(run.path, 3, state | {"adam/step": torch.tensor(3)}, {}, keep=1)
    export_weights(tmp_path / "w", state, config, VOCABULARY)
    for source in (run.path, path, tmp_path / "w"):
        loaded = load_trained(source).model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items()), source
    with pytest.raises(CheckpointError, match="neither a run directory.*nor a checkpoint.*nor an export"):
        load_trained(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_trained(tmp_path / "absent")


def test_a_frozen_word_table_needs_no_file_any_more(config, tmp_path):
    text = replace(config.model.text, word_table="frozen", word_table_file="/gone/word2vec.npy")
    frozen = replace(config, model=replace(config.model, text=text))
    export_weights(tmp_path / "w", VATT(config), frozen, VOCABULARY)
    model = from_pretrained(tmp_path / "w")
    assert not model.text.words.weight.requires_grad and model.config.model.text.word_table == "frozen"


def test_weights_that_do_not_fit_are_named_with_file_and_shapes(config, tmp_path):
    tensors = dict(VATT(config).state_dict())
    name = next(n for n in tensors if n.endswith("aggregate"))
    tensors[name] = torch.zeros(7)
    gone = next(n for n in tensors if n.startswith("heads"))
    tensors["stray"] = tensors.pop(gone)
    export_weights(tmp_path / "w", tensors, config, VOCABULARY)
    with pytest.raises(CheckpointError) as error:
        from_pretrained(tmp_path / "w")
    for part in ("model.safetensors", f"1 missing: {gone}", "1 unknown: stray", f"{name} is (7,), the model's is (16,)"):
        assert part in str(error.value)


def test_an_export_replaces_an_export_and_nothing_else(config, tmp_path):
    model = VATT(config)
    export_weights(tmp_path / "w", model, config, VOCABULARY)
    with torch.no_grad():
        next(model.parameters()).fill_(2.0)
    export_weights(tmp_path / "w", model, config, VOCABULARY)
    assert torch.equal(next(from_pretrained(tmp_path / "w").parameters()), next(model.parameters()))
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    (tmp_path / "thesis").mkdir()
    write_file(tmp_path / "thesis/thesis.tex", [b"x"])
    with pytest.raises(CheckpointError, match="something other than exported weights"):
        export_weights(tmp_path / "thesis", model, config)


def test_spoilt_exports_are_refused_in_one_line(config, tmp_path):
    folder = export_weights(tmp_path / "w", VATT(config), config, VOCABULARY)
    weights, settings = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()
    (folder / "model.safetensors").write_bytes(weights[:-5])
    with pytest.raises(CheckpointError, match="model.safetensors: not a usable safetensors file"):
        from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(settings.replace('"layers"', '"layerz"'))
    with pytest.raises(CheckpointError, match="config.json.*layerz.*layers"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is not there"):
        from_pretrained(folder)
