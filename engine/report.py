"""The report of a run: one HTML page that needs nothing but itself, made from the files of the run directory alone.

Neither the model nor the clips are read again, so `vatt report RUN` works while a run trains, after it was killed, and
on a copy of the folder somewhere else. What is not there yet is named on the page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vatt.engine.charts import heatmap, histogram, line_chart, png_uri, short
from vatt.engine.config import ConfigError, EncoderConfig, RunConfig
from vatt.engine.config_file import load_run
from vatt.engine.durable import replace_file
from vatt.engine.report_style import STYLE
from vatt.engine.run_directory import read_json, read_metrics

DIRECTION_NAMES = {
    "text_to_video": ("Text → video", "sentences", "videos"),
    "audio_to_video": ("Audio → video", "sounds", "videos"),
    "video_to_audio": ("Video → audio", "videos", "sounds"),
}
SCORES = ("R@1", "R@5", "R@10")


def write_report(run_directory: Path | str) -> Path:
    """Write `report.html` into a run directory and return it. Raises ConfigError if the folder is no run."""
    folder = Path(run_directory)
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder}: is not a run directory: there is no config.toml in it")
    config = load_run(folder / "config.toml")
    lines = read_metrics(folder / "metrics.jsonl")
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else None
    environment = read_json(folder / "environment.json") if (folder / "environment.json").exists() else None
    step = lines[-1]["step"] if lines else 0
    parts = [
        _header(folder, config, step, lines, evaluation),
        _scores(evaluation),
        _training(lines),
        _similarities(folder, evaluation),
        _strips(folder, evaluation),
        _counts(lines, environment),
        _fold("Settings (config.toml)", (folder / "config.toml").read_text(encoding="utf-8")),
        _fold("Environment", json.dumps(environment, indent=1) if environment else "environment.json is not there."),
    ]
    title = escape(f"{folder.resolve().name}: VATT run")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    replace_file(folder / "report.html", page)
    return folder / "report.html"


def _header(
    folder: Path, config: RunConfig, step: int, lines: Sequence[dict[str, Any]], evaluation: dict[str, Any] | None
) -> str:
    data, missing = config.data, []
    if not lines:
        missing.append("No step has been logged yet.")
    elif step < config.steps:
        missing.append(f"Training is not finished: {step:,} of {config.steps:,} steps are logged.")
    if evaluation is None:
        why = "" if config.data.test else " (data.test names no catalogue)"
        missing.append(f"There is no evaluation{why}: scores, similarities and retrieved clips are missing below.")
    facts = (
        ("steps", f"{step:,} of {config.steps:,}"),
        ("clips a step", f"{config.batch_size:,}"),
        ("model", _model(config)),
        ("DropToken", f"video {config.drop_rate.video:.0%}, audio {config.drop_rate.audio:.0%}"),
        ("clip", f"{data.frames} frames of {data.size} px at {data.fps:g}/s, {data.seconds:.2f} s of sound"),
        ("seed", str(config.seed)),
    )
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    notes = "".join(f'<p class="missing">{escape(text)}</p>' for text in missing)
    return f"<header><h1>{escape(folder.resolve().name)}</h1><dl>{listed}</dl>{notes}</header>"


def _model(config: RunConfig) -> str:
    """'large-base-small' as the paper writes it, or layers x width where a shape has no name."""

    def shape(encoder: EncoderConfig) -> str:
        return f"{encoder.layers} x {encoder.width}" if encoder.size == "custom" else encoder.size

    model = config.model
    if model.kind == "agnostic":
        return f"modality-agnostic, {shape(model.shared)}"
    return " - ".join(map(shape, (model.video, model.audio, model.text)))


def _scores(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return ""
    clips, cards = evaluation["clips"], []
    for name, (title, asks, answers) in DIRECTION_NAMES.items():
        row = evaluation[name]
        head = f"<h3>{title}</h3><p class='note'>{row['queries']:,} {asks} among {row['gallery']:,} {answers}</p>"
        meters = "".join(_meter(key, row[key], row["chance"][key], (row["oracle"] or {}).get(key)) for key in SCORES)
        oracle = row["oracle"]["median_rank"] if row["oracle"] else None
        median = f"median rank <b>{_place(row['median_rank'])}</b> · chance {_place(row['chance']['median_rank'])}"
        median += f" · oracle {_place(oracle)}" if oracle else ""
        cards.append(f"<article>{head}{meters}<p class='note'>{median}</p></article>")
    found = (
        f"{clips['found']:,} of {clips['expected']:,} clips found, {clips['heard']:,} with sound, "
        f"{clips['read']:,} with a caption; {evaluation['windows']} windows a clip. Chance is a random order; "
        "the oracle is a perfect reader, which cannot tell apart clips of the same description."
    )
    return _section("Zero-shot retrieval", found, f"<div class='cards'>{''.join(cards)}</div>")


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class='note'>{escape(note)}</p>{body}</section>"


def _meter(name: str, own: float | None, chance: float | None, oracle: float | None) -> str:
    if own is None or chance is None:
        return f"<div class='meter'><span>{name}</span><span>no queries</span></div>"
    beside = f"chance {chance:.1%}" + (f" · oracle {oracle:.1%}" if oracle is not None else "")
    marks = f"<i class='mark chance' style='left:{100 * chance:.2f}%'></i>"
    if oracle is not None:
        marks += f"<i class='mark oracle' style='left:{100 * oracle:.2f}%'></i>"
    return (
        f"<div class='meter'><span>{name}</span><b>{own:.1%}</b><span class='beside'>{beside}</span>"
        f"<div class='track'><div class='fill' style='width:{100 * own:.2f}%'></div>{marks}</div></div>"
    )


def _training(lines: Sequence[dict[str, Any]]) -> str:
    if not lines:
        return ""

    def series(key: str, factor: float = 1.0) -> list[tuple[float, float | None]]:
        return [(line["step"], None if line.get(key) is None else line[key] * factor) for line in lines]

    losses = (("total", "loss"), ("video-audio", "loss_video_audio"), ("video-text", "loss_video_text"))
    charts = [
        line_chart("Loss", [(name, series(key)) for name, key in losses]),
        line_chart("Learning rate", [("learning rate", series("learning_rate"))], zero=True),
        line_chart("Throughput", [("all ranks", series("samples_per_s"))], unit=" clips/s", zero=True),
        line_chart("Arithmetic", [("true FLOPs", series("tflops"))], unit=" TFLOP/s", zero=True),
        line_chart("Waiting for clips", [("share of time", series("data_wait", 100.0))], unit=" %", zero=True),
        line_chart("Gradient norm", [("norm", series("gradient_norm"))], zero=True),
    ]
    if any(line.get("mfu") is not None for line in lines):
        charts.append(line_chart("Model FLOPs utilisation", [("MFU", series("mfu", 100.0))], unit=" %", zero=True))
    note = "Over steps; the last value is in the legend."
    return _section("Training", note, f"<div class='charts'>{''.join(charts)}</div>")


def _similarities(folder: Path, evaluation: dict[str, Any] | None) -> str:
    arrays = _arrays(folder)
    if evaluation is None or arrays is None:
        return ""
    charts, shown = [], 0
    for name in ("text_to_video", "audio_to_video"):  # video to audio is the second, transposed
        title, asks, answers = DIRECTION_NAMES[name]
        matrix = arrays[f"similarity/{name}"]
        shown = max(shown, len(matrix))
        same = np.eye(len(matrix), dtype=bool)
        note = f"Rows: {asks}; columns: their {answers}. A trained model has a dark diagonal."
        charts.append(heatmap(f"{title}: cosine similarity", matrix, note))
        groups = [("true pairs", matrix[same]), ("others", matrix[~same])]
        charts.append(histogram(f"{title}: true pairs against the others", groups))
    note = f"{shown} clips, evenly spread over the catalogue. Heights are shares of each group."
    return _section("Similarities", note, f"<div class='pairs'>{''.join(charts)}</div>")


def _strips(folder: Path, evaluation: dict[str, Any] | None) -> str:
    arrays = _arrays(folder)
    if evaluation is None or arrays is None or not evaluation["strips"]:
        return ""
    pictures = [png_uri(np.concatenate(list(frames), axis=1)) for frames in arrays["thumbnails"]]
    blocks = []
    for strip in evaluation["strips"]:
        cards = [
            _clip(pictures[hit["picture"]], place, hit["clip"], hit["similarity"], hit["is_true"])
            for place, hit in enumerate(strip["top"], start=1)
        ]
        if not any(hit["is_true"] for hit in strip["top"]):
            cards.append(_clip(pictures[strip["true"]], strip["rank"], strip["clip"], None, True))
        title = f"<h3>“{escape(strip['text'])}”</h3>"
        blocks.append(f"<article class='strip'>{title}<div class='clips'>{''.join(cards)}</div></article>")
    note = "Three frames of each clip; place, clip and similarity below. The clip the sentence belongs to is outlined."
    return _section("Sentences and the videos they find", note, "".join(blocks))


def _clip(picture: str, place: int, name: str, similarity: float | None, is_true: bool) -> str:
    value = "" if similarity is None else f" · {similarity:.2f}"
    mark = "<em>✓ true clip</em>" if is_true else ""
    return (
        f"<div class='clip{' true' if is_true else ''}'><img alt='frames of {escape(name)}' src='{picture}'>"
        f"<p><b>{place}.</b> {escape(name)}{value} {mark}</p></div>"
    )


def _counts(lines: Sequence[dict[str, Any]], environment: dict[str, Any] | None) -> str:
    rows: list[tuple[str, str]] = []
    if lines:
        last = lines[-1]
        rows += [("steps skipped (not finite)", short(last["skipped_steps"]))] if "skipped_steps" in last else []
        rows += [
            (f"clips: {name.replace('_', ' ')}", f"{count:,}") for name, count in sorted((last.get("counts") or {}).items())
        ]
        rows += [("peak memory of a rank", f"{last['memory_bytes'] / 2**30:.2f} GiB")] if last.get("memory_bytes") else []
    for number, start in enumerate((environment or {}).get("starts", []), start=1):
        where = f"{start['time']}, after step {start['step']:,}, {start['world_size']} x {start['device']}"
        rows.append((f"start {number}", where))
    if not rows:
        return ""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<section><h2>Counts</h2><div class='wide'><table>{body}</table></div></section>"


def _fold(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _place(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _arrays(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays of the last evaluation, or None; written before evaluation.json, so normally both are there."""
    file = folder / "evaluation.npz"
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
