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
from vatt.engine.config import ConfigError, RunConfig
from vatt.engine.config_file import load_run
from vatt.engine.durable import replace_file
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
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    replace_file(folder / "report.html", page)
    return folder / "report.html"


def _header(
    folder: Path, config: RunConfig, step: int, lines: Sequence[dict[str, Any]], evaluation: dict[str, Any] | None
) -> str:
    missing = []
    if not lines:
        missing.append("No step has been logged yet.")
    elif step < config.steps:
        missing.append(f"Training is not finished: {step:,} of {config.steps:,} steps are logged.")
    if evaluation is None:
        why = "" if config.data.test else " (data.test names no catalogue)"
        missing.append(f"There is no evaluation{why}: scores, similarities and retrieved clips are missing below.")
    size = (
        config.model.kind
        if config.model.kind == "agnostic"
        else "-".join(getattr(config.model, name).size for name in ("video", "audio", "text"))
    )
    facts = (
        ("steps", f"{step:,} of {config.steps:,}"),
        ("clips a step", f"{config.batch_size:,}"),
        ("model", size),
        ("DropToken", f"video {config.drop_rate.video:.0%}, audio {config.drop_rate.audio:.0%}"),
        (
            "clip",
            f"{config.data.frames} frames of {config.data.size} px at {config.data.fps:g}/s, {config.data.seconds:.2f} s of sound",
        ),
        ("seed", str(config.seed)),
    )
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    notes = "".join(f'<p class="missing">{escape(text)}</p>' for text in missing)
    return f"<header><h1>{escape(folder.resolve().name)}</h1><dl>{listed}</dl>{notes}</header>"


def _scores(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return ""
    clips, cards = evaluation["clips"], []
    for name, (title, asks, answers) in DIRECTION_NAMES.items():
        row = evaluation[name]
        head = f"<h3>{title}</h3><p class='note'>{row['queries']:,} {asks} among {row['gallery']:,} {answers}</p>"
        meters = "".join(_meter(key, row[key], row["chance"][key], (row["oracle"] or {}).get(key)) for key in SCORES)
        oracle = row["oracle"]["median_rank"] if row["oracle"] else None
        median = "median rank <b>" + _place(row["median_rank"]) + "</b> · chance " + _place(row["chance"]["median_rank"])
        cards.append(
            f"<article>{head}{meters}<p class='note'>{median}{' · oracle ' + _place(oracle) if oracle else ''}</p></article>"
        )
    found = (
        f"{clips['found']:,} of {clips['expected']:,} clips found, {clips['heard']:,} with sound, {clips['read']:,} with a caption; "
        f"{evaluation['windows']} windows a clip. Chance is a random order; the oracle is a perfect reader that cannot tell apart "
        "clips with the same description."
    )
    return f"<section><h2>Zero-shot retrieval</h2><p class='note'>{escape(found)}</p><div class='cards'>{''.join(cards)}</div></section>"


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

    charts = [
        line_chart(
            "Loss",
            [("total", series("loss")), ("video-audio", series("loss_video_audio")), ("video-text", series("loss_video_text"))],
        ),
        line_chart("Learning rate", [("learning rate", series("learning_rate"))], zero=True),
        line_chart("Throughput", [("all ranks", series("samples_per_s"))], unit=" clips/s", zero=True),
        line_chart("Arithmetic", [("true FLOPs", series("tflops"))], unit=" TFLOP/s", zero=True),
        line_chart("Waiting for clips", [("share of time", series("data_wait", 100.0))], unit=" %", zero=True),
        line_chart("Gradient norm", [("norm", series("gradient_norm"))], zero=True),
    ]
    if any(line.get("mfu") is not None for line in lines):
        charts.append(line_chart("Model FLOPs utilisation", [("MFU", series("mfu", 100.0))], unit=" %", zero=True))
    return f"<section><h2>Training</h2><p class='note'>Over steps; the last value is in the legend.</p><div class='charts'>{''.join(charts)}</div></section>"


def _similarities(folder: Path, evaluation: dict[str, Any] | None) -> str:
    arrays = _arrays(folder)
    if evaluation is None or arrays is None:
        return ""
    charts = []
    for name, (title, asks, answers) in DIRECTION_NAMES.items():
        matrix = arrays[f"similarity/{name}"]
        same = np.eye(len(matrix), dtype=bool)
        note = f"Rows: {asks}; columns: their {answers}. A trained model has a dark diagonal."
        charts.append(heatmap(f"{title}: cosine similarity", matrix, note))
        charts.append(
            histogram(f"{title}: true pairs against the others", [("true pairs", matrix[same]), ("others", matrix[~same])])
        )
    shown = len(arrays[f"similarity/{next(iter(DIRECTION_NAMES))}"])
    note = f"<p class='note'>{shown} clips, evenly spread over the catalogue. Bars are shares of each group.</p>"
    return f"<section><h2>Similarities</h2>{note}<div class='charts'>{''.join(charts)}</div></section>"


def _strips(folder: Path, evaluation: dict[str, Any] | None) -> str:
    arrays = _arrays(folder)
    if evaluation is None or arrays is None or not evaluation["strips"]:
        return ""
    pictures = [png_uri(np.concatenate(list(frames), axis=1)) for frames in arrays["thumbnails"]]
    blocks = []
    for strip in evaluation["strips"]:
        cards = [
            _clip(pictures[hit["picture"]], str(place), hit["clip"], hit["similarity"], hit["is_true"])
            for place, hit in enumerate(strip["top"], 1)
        ]
        if not any(hit["is_true"] for hit in strip["top"]):
            cards.append(_clip(pictures[strip["true"]], str(strip["rank"]), strip["clip"], None, True))
        blocks.append(
            f"<article class='strip'><h3>“{escape(strip['text'])}”</h3><div class='clips'>{''.join(cards)}</div></article>"
        )
    note = "<p class='note'>Three frames of each clip; place, clip and similarity below. The clip the sentence belongs to is outlined.</p>"
    return f"<section><h2>Sentences and the videos they find</h2>{note}{''.join(blocks)}</section>"


def _clip(picture: str, place: str, name: str, similarity: float | None, is_true: bool) -> str:
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


STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --box: #ffffff; --ink: #16150f; --muted: #63625c; --grid: #e3e2dc;
  --series-1: #2a78d6; --series-2: #16875f; --series-3: #7a4fd0; --true: #16875f; --warn: #fdf3d7; --warn-ink: #5c4400; }
@media (prefers-color-scheme: dark) { :root { --page: #121211; --box: #1c1c1a; --ink: #f4f3ee; --muted: #a9a79e; --grid: #34332f;
  --series-1: #5b9ff0; --series-2: #35c08e; --series-3: #a98bf0; --true: #35c08e; --warn: #3a2f10; --warn-ink: #f3dfa4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 12px; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 0 0 2px; } p { margin: 4px 0; } .note { color: var(--muted); font-size: .9rem; }
.missing { background: var(--warn); color: var(--warn-ink); border-radius: 8px; padding: 8px 12px; margin: 8px 0; }
dl { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 0 0 12px; } dt { color: var(--muted); font-size: .8rem; } dd { margin: 0; }
.cards, .charts { display: grid; gap: 16px; margin-top: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
article, figure { background: var(--box); border: 1px solid var(--grid); border-radius: 12px; padding: 14px 16px; margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; } .grid { stroke: var(--grid); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .area { fill-opacity: .25; stroke-width: 1.5; }
.s1 { stroke: var(--series-1); } .s2 { stroke: var(--series-2); } .s3 { stroke: var(--series-3); }
.area.s1, .dot.s1 { fill: var(--series-1); } .area.s2, .dot.s2 { fill: var(--series-2); } .area.s3, .dot.s3 { fill: var(--series-3); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--muted); font-size: .85rem; margin: 6px 0 0; } .legend b { color: var(--ink); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.k1 { background: var(--series-1); } .k2 { background: var(--series-2); } .k3 { background: var(--series-3); }
.meter { display: grid; grid-template-columns: 3.2em 4.2em 1fr; align-items: baseline; margin: 10px 0; font-variant-numeric: tabular-nums; }
.beside { color: var(--muted); font-size: .8rem; text-align: right; }
.track { grid-column: 1 / -1; position: relative; height: 10px; border-radius: 5px; background: var(--grid); margin-top: 4px; }
.fill { height: 100%; border-radius: 5px; background: var(--series-1); min-width: 2px; }
.mark { position: absolute; top: -3px; height: 16px; width: 2px; margin-left: -1px; background: var(--ink); } .mark.chance { background: var(--muted); }
.matrix { display: block; width: 100%; max-width: 380px; aspect-ratio: 1; image-rendering: pixelated; border-radius: 4px; margin: 0 auto; }
.strip { margin-top: 12px; } .clips { display: grid; gap: 10px; margin-top: 8px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 170px), 1fr)); }
.clip { border: 2px solid transparent; border-radius: 8px; padding: 4px; min-width: 0; } .clip.true { border-color: var(--true); }
.clip img { display: block; width: 100%; border-radius: 4px; } .clip p { font-size: .8rem; overflow-wrap: anywhere; } .clip em { color: var(--true); font-style: normal; font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin-top: 8px; } th { text-align: left; font-weight: 400; color: var(--muted); }
th, td { padding: 4px 20px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
details { margin-top: 24px; } summary { cursor: pointer; font-weight: 600; } pre { overflow-x: auto; background: var(--box); border: 1px solid var(--grid);
  border-radius: 12px; padding: 14px 16px; font-size: .8rem; line-height: 1.45; }
@media print { :root { --page: #fff; --box: #fff; --ink: #000; --muted: #444; --grid: #ccc; --series-1: #2a78d6; --series-2: #16875f; --series-3: #7a4fd0;
  --true: #16875f; --warn: #f4f4f4; --warn-ink: #000; } body { font-size: 11px; } main { max-width: none; padding: 0; }
  article, figure { break-inside: avoid; } h2 { break-after: avoid; } .charts, .cards { grid-template-columns: repeat(2, 1fr); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } details::details-content { content-visibility: visible; display: block; }
  pre { white-space: pre-wrap; } }
"""
