"""The demo over three seeds, and the controls that have to fall to chance.

    python benchmarks/bench_demo.py --out benchmarks/results/<machine> [--work runs/bench] [--at-once 2]

Each seed makes its own sample world and its own weights. Controls, all on the first seed's world:

    still            the trained model, asked about test clips that repeat one frame: which of the clips that share the
                     query's shape and colour is it? Without motion nothing tells (the "motion part" of retrieval)
    shuffled_audio   trained on clips with the sound of other clips: sound <-> video retrieval
    permuted_captions trained on clips with the captions of other clips: text -> video retrieval
    untrained        one step at learning rate 0

Scores do not depend on how many runs go on at once; the seconds do, so they are recorded with that number.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from vatt.engine.data.sample_world import make_sample_world
from vatt.engine.data.sample_world.controls import make_control

TRAIN, TEST, SEEDS = 1600, 200, (0, 1, 2)
DIRECTIONS = ("text_to_video", "audio_to_video", "video_to_audio")


def run(work: Path, name: str, train: Path, test: Path, seed: int, *overrides: str) -> dict[str, Any]:
    """Run `vatt pretrain pretrain/tiny` unless it has finished before; its scores and its seconds from process start."""
    output, record = work / name, work / f"{name}.json"
    if not record.exists():
        command = [sys.executable, "-m", "vatt.engine.cli", "pretrain", "pretrain/tiny", "--output", str(output)]
        command += ["--data.train", str(train), "--data.test", str(test), "--seed", str(seed), *overrides]
        began = time.perf_counter()
        with open(work / f"{name}.log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - began
        scores = json.loads((output / "evaluation.json").read_text())
        found = {d: {k: scores[d][k] for k in ("R@1", "R@5", "R@10", "median_rank")} for d in DIRECTIONS}
        record.write_text(json.dumps({"name": name, "seed": seed, "seconds": seconds, **found}))
    return json.loads(record.read_text())


def motion_part(similarity: np.ndarray, test: Path) -> dict[str, float]:
    """Of the test clips that share the query's shape and colour, how often the query's own clip comes first."""
    labels = [json.loads(line)["labels"] for line in test.read_text().splitlines()]
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for clip, names in enumerate(labels):
        groups[tuple(n for n in names if not n.startswith("motion:"))].append(clip)
    rivals = [group for group in groups.values() if len(group) > 1]
    hits = [similarity[q, group].argmax() == group.index(q) for group in rivals for q in group]
    return {
        "queries": len(hits),
        "first": float(np.mean(hits)),
        "chance": float(np.mean([1 / len(g) for g in rivals for _ in g])),
    }


def similarities(output: Path) -> np.ndarray:
    """Text x video similarities of a run's evaluation."""
    return np.load(output / "evaluation.npz")["similarity/text_to_video"]


def still_scores(work: Path, still_test: Path) -> np.ndarray:
    """Text x video similarities of the first seed's model on clips that do not move."""
    from vatt.engine.data.catalogue import Catalogue
    from vatt.engine.evaluate.metrics import cosine_similarity
    from vatt.engine.evaluate.retrieval import embed_catalogue
    from vatt.engine.pretrained import load_trained

    trained = load_trained(work / "seed-0")
    embeddings = embed_catalogue(trained.model, trained.config, Catalogue.read(still_test), trained.vocabulary)
    return cosine_similarity(embeddings.text_video, embeddings.video_text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for demo.json")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="worlds and runs; finished ones are kept")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    worlds = {seed: work / f"world-{seed}" for seed in SEEDS}
    for seed, world in worlds.items():
        make_sample_world(world, TRAIN, TEST, seed=seed)
    train, test = worlds[0] / "train.jsonl", worlds[0] / "test.jsonl"
    controls = {kind: work / f"{kind}.jsonl" for kind in ("shuffled_audio", "permuted_captions")}
    for kind, path in controls.items():
        if not path.exists():
            make_control(train, kind, path)
    still_test = work / "still-test.jsonl"
    if not still_test.exists():
        make_control(test, "still", still_test)

    with ThreadPoolExecutor(args.at_once) as pool:
        seeds = [pool.submit(run, work, f"seed-{s}", w / "train.jsonl", w / "test.jsonl", s) for s, w in worlds.items()]
        retrained = [pool.submit(run, work, kind, path, test, 0) for kind, path in controls.items()]
        untrained = pool.submit(run, work, "untrained", train, test, 0, "--steps", "1", "--optimizer.warmup", "1")
        rows = [future.result() for future in [*seeds, *retrained, untrained]]

    scores = [row for row in rows if row["name"].startswith("seed-")]
    summary = {
        direction: {
            key: {"mean": mean(s[direction][key] for s in scores), "spread": stdev(s[direction][key] for s in scores)}
            for key in ("R@1", "R@5", "R@10", "median_rank")
        }
        for direction in DIRECTIONS
    }
    motion = {
        "trained": motion_part(similarities(work / "seed-0"), test),
        "still": motion_part(still_scores(work, still_test), test),
    }
    result = {
        "command": f"python benchmarks/bench_demo.py --at-once {args.at_once}",
        "device": platform.processor() or platform.machine(),
        "train_clips": TRAIN,
        "test_clips": TEST,
        "at_once": args.at_once,
        "mean_of_seeds": summary,
        "motion_part": motion,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"mean_of_seeds": summary, "motion_part": motion}, indent=1))


if __name__ == "__main__":
    main()
