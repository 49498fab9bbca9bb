"""A run from its first step to its report: what it logs, what it leaves behind, and what a bad number cannot do to it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vatt.engine import cli, train
from vatt.engine.checkpoint import load_checkpoint
from vatt.engine.config_file import load_run
from vatt.engine.data.batch import Batch
from vatt.engine.data.catalogue import Catalogue
from vatt.engine.data.loader import ClipLoader, evaluation_batches
from vatt.engine.data.words import Vocabulary
from vatt.engine.distributed import joined
from vatt.engine.evaluate.retrieval import embed_catalogue
from vatt.engine.model import VATT
from vatt.engine.pretrained import from_pretrained, load_trained
from vatt.engine.profile.flops import step_flops
from vatt.engine.run_directory import read_metrics

GOLDEN = Path(__file__).parent / "golden" / "small_run_losses.json"
RANK_SCRIPT = Path(__file__).parent / "pretrain_rank.py"
FIELDS = {
    "step", "loss", "loss_video_audio", "loss_video_text", "learning_rate", "gradient_norm", "skipped_steps",
    "samples_per_s", "tflops", "mfu", "data_wait", "memory_bytes", "counts",
}  # fmt: skip
EVERY_STEP = ["--checkpoint.every", "1", "--checkpoint.keep", "20"]


def pretrain(config: Path, output: Path, *overrides: object) -> int:
    return cli.main(["pretrain", str(config), "--output", str(output), *map(str, overrides)])


def lines_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def state(run: Path, step: int) -> dict[str, Tensor]:
    return load_checkpoint(run / "checkpoints" / f"step-{step}")[0]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not the same to the last bit."""
    assert set(before) == set(after)
    return {name for name in before if before[name].numpy().tobytes() != after[name].numpy().tobytes()}


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The small run, trained to its end and evaluated, and the seconds it took."""
    output = tmp_path_factory.mktemp("finished") / "run"
    began = time.perf_counter()
    assert pretrain(small_run, output, "--checkpoint.keep", 20) == 0
    return output, time.perf_counter() - began


def test_every_line_has_every_field(finished: tuple[Path, float]) -> None:
    lines = lines_of(finished[0])
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        assert set(line) == FIELDS
        numbers = [line[name] for name in FIELDS - {"mfu", "counts"}]
        assert all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers), line
        assert line["mfu"] is None, "a CPU's peak is not known"
        assert 0.0 <= line["data_wait"] <= 1.0 and line["gradient_norm"] > 0 and line["memory_bytes"] > 50e6
        assert line["loss"] == pytest.approx((line["loss_video_audio"] + line["loss_video_text"]) / 2, rel=1e-5)
        assert line["skipped_steps"] == 0
        assert line["counts"]["clips"] == 16 * line["step"]
    assert lines[-1]["counts"]["decoded"] == 24, "each file is decoded once"
    rates = [line["learning_rate"] for line in lines]
    assert rates[:11] == pytest.approx([5e-5 * step for step in range(11)]) and rates[10] == max(rates)
    assert rates[15] == pytest.approx(1e-4 + 4e-4 * math.cos(math.pi / 2 * 0.5))


def test_speeds_are_those_of_the_clock(finished: tuple[Path, float], small_run: Path) -> None:
    lines, seconds = lines_of(finished[0]), finished[1]
    spent = [16 / line["samples_per_s"] for line in lines]
    assert 0.2 * seconds < sum(spent) < seconds
    flops = step_flops(load_run(small_run))
    for line, each in zip(lines, spent, strict=True):
        assert line["tflops"] == pytest.approx(flops / each / 1e12, rel=1e-6)


def test_a_line_is_about_all_steps_since_the_last_and_mfu_about_the_peak(micro_run: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", 6, "--log.every", 3, "--log.peak_tflops", 0.5) == 0
    seconds = time.perf_counter() - began
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6]
    assert 0 < sum(3 * 4 / line["samples_per_s"] for line in lines) < seconds
    for line in lines:
        assert line["tflops"] == pytest.approx(step_flops(load_run(micro_run)) * line["samples_per_s"] / 4 / 1e12, rel=1e-6)
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5, rel=1e-6)


def test_the_loss_falls(micro_run: Path, tmp_path: Path) -> None:
    """Six clips, seen whole again and again, are told apart."""
    plain = "--model.dropout 0 --model.attention_dropout 0 --drop_rate.video 0 --drop_rate.audio 0 --augment.crop centre"
    more = "--steps 60 --stop_after 60 --optimizer.learning_rate 3e-3 --augment.jitter_probability 0"
    assert pretrain(micro_run, tmp_path / "run", *plain.split(), *more.split()) == 0
    losses = [line["loss"] for line in lines_of(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.65 * np.mean(losses[:10])


def test_a_run_ends_with_scores_a_report_and_weights(finished: tuple[Path, float], small_world: Path) -> None:
    run = finished[0]
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["step"] == 20 and scores["clips"] == {"expected": 8, "found": 8, "heard": 8, "read": 8}
    for direction in ("text_to_video", "audio_to_video", "video_to_audio"):
        assert scores[direction]["queries"] == scores[direction]["gallery"] == 8
        for who in (scores[direction], scores[direction]["chance"], scores[direction]["oracle"]):
            assert 0 <= who["R@1"] <= who["R@5"] <= who["R@10"] == 1.0 and 1 <= who["median_rank"] <= 8
        assert scores[direction]["chance"]["R@5"] == 5 / 8
    page = (run / "report.html").read_text()
    assert "Zero-shot retrieval" in page and page.count("data:image/png;base64,") >= 4
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']*|@import|url\((?!["']?data:)""", page)
    assert not outside, "the page needs nothing but itself"
    assert not re.search(r"<script[^>]+src", page)


def test_the_exported_weights_are_the_runs_model(finished: tuple[Path, float], small_world: Path) -> None:
    run = finished[0]
    exported, trained = from_pretrained(run / "weights"), load_trained(run)
    test, config = Catalogue.read(small_world / "test.jsonl"), load_run(run / "config.toml")
    assert exported.training is False and Vocabulary.read(run / "weights" / "words.txt").words == trained.vocabulary.words
    ours = embed_catalogue(exported, config, test, trained.vocabulary)
    expected = embed_catalogue(trained.model, config, test, trained.vocabulary)
    for name, array in vars(expected).items():
        assert np.array_equal(getattr(ours, name), array), name
    assert len(np.unique(expected.video_text, axis=0)) == 8
    weights = {name.removeprefix("model/"): t for name, t in state(run, 20).items() if name.startswith("model/")}
    assert not changed(weights, exported.state_dict())


def test_batch_norm_learnt_the_clips_statistics(finished: tuple[Path, float]) -> None:
    """Buffers are part of the model: they move in training, and are what evaluation uses."""
    weights = state(finished[0], 20)
    moved = [name for name in weights if "running" in name or name.endswith(("mean", "variance"))]
    assert moved, sorted(weights)
    fresh = {f"model/{name}": tensor for name, tensor in VATT(load_run(finished[0] / "config.toml")).state_dict().items()}
    assert set(moved) <= changed(fresh, {name: weights[name] for name in fresh})


def test_the_same_seed_is_the_same_run(finished: tuple[Path, float], small_run: Path, tmp_path: Path) -> None:
    assert pretrain(small_run, tmp_path / "again", "--stop_after", 5) == 0
    assert not changed(state(finished[0], 5), state(tmp_path / "again", 5))
    for ours, expected in zip(lines_of(tmp_path / "again"), lines_of(finished[0])[:5], strict=True):
        assert ours["loss"] == expected["loss"] and ours["gradient_norm"] == expected["gradient_norm"]
    assert pretrain(small_run, tmp_path / "other", "--stop_after", 2, "--seed", 4) == 0
    assert lines_of(tmp_path / "other")[0]["loss"] != lines_of(finished[0])[0]["loss"]
    assert {name for name in changed(state(tmp_path / "again", 5), state(tmp_path / "other", 2)) if name.endswith("weight")}


def test_no_test_catalogue_is_said(micro_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain(micro_run, tmp_path / "run", "--steps", 2, "--optimizer.warmup", 1, "--data.test=") == 0
    assert "data.test names no catalogue: no evaluation" in capfd.readouterr().err
    assert not (tmp_path / "run/evaluation.json").exists() and (tmp_path / "run/report.html").exists()


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def poison_sound(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The first clip's sound is NaN in these steps."""
    batches = ClipLoader.batches

    def poisoned(self: ClipLoader, first: int, last: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches(self, first, last), start=first):
            if step in steps:
                batch.audio[0] = float("nan")
            yield batch

    monkeypatch.setattr(ClipLoader, "batches", poisoned)


def poison_gradient(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The loss is finite, and one weight's gradient infinite."""
    train_step = train.train_step

    def poisoned(run: train.Run, batch: Batch, step: int) -> train.StepReport:
        if step not in steps:
            return train_step(run, batch, step)
        weight = next(p for name, p in run.backend.module.named_parameters() if name.startswith("heads"))
        hook = weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), math.inf))
        try:
            return train_step(run, batch, step)
        finally:
            hook.remove()

    monkeypatch.setattr(train, "train_step", poisoned)


def check_skipped(run: Path, bad: set[int], steps: int, *, loss_is_bad: bool) -> None:
    """After `steps` steps with a checkpoint of each: those in `bad` changed nothing, the others everything."""
    lines, skipped = lines_of(run), 0
    for step in range(steps):
        skipped += step in bad
        line = lines[step]
        assert line["step"] == step + 1 and line["skipped_steps"] == skipped
        assert (line["loss"] is None) == (step in bad and loss_is_bad)
        assert (line["gradient_norm"] is None) == (step in bad), "the norm of what was skipped is not a number"
        if step:
            before, after = state(run, step), state(run, step + 1)
            difference = changed(before, after)
            if step in bad:
                assert not difference
            else:
                assert len(difference) > 0.9 * len(after) and after["adam/step"] == before["adam/step"] + 1
        assert load_checkpoint(run / "checkpoints" / f"step-{step + 1}")[1]["skipped"] == skipped
    assert all(torch.isfinite(tensor).all() for tensor in state(run, steps).values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_changes_nothing(
    precision: str, micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_sound(monkeypatch, {2, 5, 6})
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", 9, *EVERY_STEP, "--backend.precision", precision) == 0
    check_skipped(tmp_path / "run", {2, 5, 6}, 9, loss_is_bad=True)


def test_a_gradient_that_is_not_finite_changes_nothing(
    micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_gradient(monkeypatch, {3})
    assert pretrain(micro_run, tmp_path / "run", "--stop_after", 5, *EVERY_STEP) == 0
    check_skipped(tmp_path / "run", {3}, 5, loss_is_bad=False)


def test_skipped_steps_are_still_counted_after_a_stop(micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_sound(monkeypatch, {1, 4})
    assert pretrain(micro_run, tmp_path / "calm", "--stop_after", 6) == 0
    for stop in (2, 4, 6):  # the first step after the second stop is a skipped one
        assert pretrain(micro_run, tmp_path / "run", "--stop_after", stop) == 0
    assert [line["skipped_steps"] for line in lines_of(tmp_path / "run")] == [0, 1, 1, 1, 2, 2]
    assert not changed(state(tmp_path / "run", 6), state(tmp_path / "calm", 6))


@pytest.mark.slow
def test_a_nan_on_one_rank_changes_nothing_on_any(launch: Callable[..., list[str]], micro_run: Path, tmp_path: Path) -> None:
    layouts = {
        f"{name}{stage}-{precision}": ["--backend.name", name, "--backend.zero_stage", stage, "--backend.precision", precision]
        for name, stage in (("torch", "1"), ("deepspeed", "1"), ("deepspeed", "2"), ("deepspeed", "3"))
        for precision in ("fp32", "bf16")
    }
    runs = [
        {
            "arguments": [str(micro_run), "--output", str(tmp_path / name), "--stop_after", "6", *EVERY_STEP, *overrides],
            "poison": [3, 1],
        }
        for name, overrides in layouts.items()
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    launch(RANK_SCRIPT, tmp_path / "runs.json", ranks=2)
    for name in layouts:
        check_skipped(tmp_path / name, {3}, 6, loss_is_bad=True)


# ---- known losses ----------------------------------------------------------------------------------------------------


def synthetic_batch(step: int, config: Any) -> Batch:
    """Made of integer arithmetic and NumPy's seeded generator, so the same on every machine."""
    generator, data, count = np.random.default_rng(step), config.data, config.batch_size
    text = generator.integers(2, config.model.text.vocabulary, (count, data.captions, data.words))
    text[:, :, 5:] = 0
    text[4, 1] = 0  # a candidate without words in a clip that has others; clip 3 has words that do not count
    audio = generator.integers(-100, 100, (count, data.audio_samples)).astype(np.float32) / 128
    video = generator.integers(0, 256, (count, data.frames, 3, data.size, data.size), dtype=np.uint8)
    has_audio = np.arange(count) != 5
    return Batch(
        video=torch.from_numpy(video),
        audio=torch.from_numpy(audio * has_audio[:, None]).float(),
        text=torch.from_numpy(text),
        has_text=torch.from_numpy(np.arange(count) != 3),
        has_audio=torch.from_numpy(has_audio),
        sample_id=torch.arange(step * count, (step + 1) * count),
    )


def golden_losses(small_run: Path, steps: int = 10) -> list[list[float]]:
    """Total, video-audio and video-text loss and gradient norm of the small run's model on synthetic batches."""
    config = load_run(small_run)
    # With dropout on: the model's draws are as much a part of a run as its arithmetic.
    config = replace(config, optimizer=replace(config.optimizer, warmup=2, learning_rate=1e-3)).with_buckets()
    losses = []
    with joined(config.backend) as process:
        model = VATT(config)
        backend = train.make_backend(model, config, rank=0, world_size=1, device=process.device)
        skipped = torch.zeros((), dtype=torch.int64)
        run = train.Run(config, process, backend, None, None, None, skipped)  # type: ignore[arg-type]  # a step loads nothing
        backend.module.train()
        for step in range(steps):
            report = train.train_step(run, synthetic_batch(step, config), step)
            found = report.losses
            norm = report.outcome.gradient_norm
            losses.append([x.item() for x in (found.total, found.video_audio, found.video_text, norm)])
    return losses


def test_the_first_ten_losses_are_the_known_ones(small_run: Path) -> None:
    """They were made by this code. If a change moves them on purpose, store what this prints, and say why in its message."""
    if not GOLDEN.is_file():
        pytest.fail(f"golden file missing: {GOLDEN}")
    losses = golden_losses(small_run)
    print(json.dumps({"losses": losses}))
    assert losses == [pytest.approx(known, rel=1e-4) for known in json.loads(GOLDEN.read_text())["losses"]]


def test_evaluation_sees_every_test_clip_once(finished: tuple[Path, float], small_world: Path) -> None:
    config, test = load_run(finished[0] / "config.toml"), Catalogue.read(small_world / "test.jsonl")
    seen = np.concatenate(
        [clips for clips, _, _ in evaluation_batches(config, test, Vocabulary.read(finished[0] / "words.txt"))]
    )
    assert seen.tolist() == list(range(8))
