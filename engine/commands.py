"""Every command of `vatt`: its words, its arguments, and the function it calls.

Handlers import what they need when they are called, so `vatt --help` never waits for torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

SUCCESS, FAILED, BAD_INPUT = 0, 1, 2

Row = dict[str, object]


class UsageError(Exception):
    """Arguments that do not go together; the message says which."""

    exit_code = BAD_INPUT


@dataclass(frozen=True)
class Command:
    """One row of the table of commands.

    name: words typed by the user, "data check". run: handler, returns an exit code. arguments: adds its arguments.
    overrides: `--section.key VALUE` pairs are taken out before argparse sees them, and arrive as `args.overrides`.
    """

    name: str
    help: str
    example: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    overrides: bool = False


# ---- handlers --------------------------------------------------------------------------------------------------------


def doctor(args: argparse.Namespace) -> int:
    from vatt.engine.doctor import examine, healthy, show

    rows = examine()
    print(show(rows))
    _write_rows(args.json, rows)
    return SUCCESS if healthy(rows) else FAILED


def config_show(args: argparse.Namespace) -> int:
    from vatt.engine.config_file import load_run, to_toml

    print(to_toml(load_run(args.config, args.overrides)), end="")
    return SUCCESS


def config_reference(args: argparse.Namespace) -> int:
    from vatt.engine.config_file import reference, reference_rows

    print(reference(), end="")
    _write_rows(args.json, reference_rows())
    return SUCCESS


def data_sample_world(args: argparse.Namespace) -> int:
    from vatt.engine.data.sample_world import make_sample_world

    make_sample_world(args.out, train=args.train, test=args.test, seed=args.seed, container=args.container)
    return SUCCESS


def data_check(args: argparse.Namespace) -> int:
    from vatt.engine.data.catalogue import Catalogue

    catalogue = Catalogue.read(args.catalogue)
    absent = [
        f"{args.catalogue}:{clip.row}: clip {clip.id!r}: a file is missing: {', '.join(clip.files)}"
        for clip in catalogue.absent()
    ]
    print(
        "\n".join([*absent, f"{args.catalogue}: {len(catalogue)} well-formed rows, {len(absent)} of them with a missing file"])
    )
    return BAD_INPUT if absent else SUCCESS


def pretrain(args: argparse.Namespace) -> int:
    from vatt.engine.config_file import load_run

    config = load_run(args.config, args.overrides)  # before torch: a typo answers at once
    from vatt.engine.train import pretrain

    return pretrain(config)


def evaluate_retrieval(args: argparse.Namespace) -> int:
    from vatt.engine.evaluate.retrieval import retrieval

    scores = retrieval(args.source, args.catalogue)
    directions = {name: found for name, found in scores.items() if isinstance(found, dict) and "queries" in found}
    _write_rows(args.json, [{"direction": name, **found} for name, found in directions.items()])
    print(json.dumps(scores))
    return SUCCESS


def report(args: argparse.Namespace) -> int:
    from vatt.engine.report import write_report

    print(write_report(args.run_directory))
    return SUCCESS


def bench_kernels(args: argparse.Namespace) -> int:
    if args.offline:
        if args.check or args.no_compile:
            raise UsageError(
                "--check and --no-compile run kernels, --offline compiles them for GPUs that are not here; drop one"
            )
        from vatt.benchmarks.certificate import offline

        rows, broken = offline(args.kernel, args.target, args.out)
    else:
        if args.target:
            raise UsageError("--target is for --offline; what is timed is this machine")
        from vatt.benchmarks.bench_kernels import measure

        rows, broken = measure(args.kernel, args.out, check_only=args.check, compiled=not args.no_compile)
    _write_rows(args.json, rows)
    return FAILED if broken else SUCCESS


def bench_step(args: argparse.Namespace) -> int:
    from vatt.benchmarks.bench_step import run

    return run(args)


def bench_all(args: argparse.Namespace) -> int:
    import torch

    from vatt.benchmarks.bench_all import choose, failed, run_all

    lines = run_all(choose("cuda" if torch.cuda.is_available() else "cpu", args.stage), args.out, args.budget)
    _write_rows(args.json, lines)
    return FAILED if failed(lines) else SUCCESS


def _write_rows(path: Path | None, rows: Iterable[Row]) -> None:
    if path is not None:
        path.write_text(json.dumps({"rows": list(rows)}, indent=1) + "\n", encoding="utf-8")


# ---- arguments -------------------------------------------------------------------------------------------------------


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a TOML file, or the name of a shipped recipe such as pretrain/tiny")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help='write the table as {"rows": [{field: value}]}')


def _sample_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to make: train.jsonl, test.jsonl and the files they name")
    parser.add_argument("--train", type=_count, default=1000, metavar="N", help="training clips (default: %(default)s)")
    parser.add_argument("--test", type=_count, default=200, metavar="M", help="test clips (default: %(default)s)")
    parser.add_argument("--seed", type=_count, default=0, metavar="S", help="same seed, same world (default: %(default)s)")
    parser.add_argument("--container", choices=("mp4", "webm"), default="mp4", help="H.264/AAC mp4 or VP9/Opus webm")


def _catalogue(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalogue", type=Path, help="JSON lines, one clip a line")


def _retrieval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="run directory, or one of its checkpoints")
    _catalogue(parser)
    _json(parser)


def _run_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="run directory")


def _bench_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="compile all of them for GPUs that are not here, and check that")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="TARGET",
        help="of --offline: sm_80, sm_90, sm_100 or here (default: all)",
    )
    parser.add_argument("--check", action="store_true", help="no timing: only whether every case is within its error budget")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the timing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results; a folder per machine is made in it")
    _json(parser)


def _bench_step(parser: argparse.ArgumentParser) -> None:
    from vatt.benchmarks.step_arguments import add_arguments

    add_arguments(parser)


def _bench_all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget", type=_seconds, default=540.0, metavar="TIME", help="for all stages: 540, 540s, 9m (default)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, as they come; all.tar.gz at the end")
    parser.add_argument("--stage", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    _json(parser)


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    value = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"not a positive time: {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {text}")
    return value


COMMANDS = (
    Command("doctor", "what this machine can run, and a remedy for what it cannot", "vatt doctor", doctor, _json),
    Command(
        "config show", "a configuration, resolved", "vatt config show pretrain/lbs --batch_size 512", config_show, _config, True
    ),
    Command("config reference", "every setting: key, type, default, meaning", "vatt config reference", config_reference, _json),
    Command(
        "data sample-world",
        "make real, small audio-video files with captions and labels",
        "vatt data sample-world runs/world --train 1000 --test 200 --seed 0 --container mp4",
        data_sample_world,
        _sample_world,
    ),
    Command(
        "data check", "every problem of a catalogue, by line", "vatt data check runs/world/train.jsonl", data_check, _catalogue
    ),
    Command(
        "pretrain",
        "pre-train; the same command works alone, under deepspeed and under torchrun",
        "vatt pretrain pretrain/tiny --output runs/mine --optimizer.learning_rate 3e-4",
        pretrain,
        _config,
        True,
    ),
    Command(
        "evaluate retrieval",
        "zero-shot retrieval; one JSON object on the last line",
        "vatt evaluate retrieval runs/demo runs/world/test.jsonl",
        evaluate_retrieval,
        _retrieval,
    ),
    Command(
        "bench kernels",
        "time every kernel against PyTorch, or compile all for GPUs that are not here",
        "vatt bench kernels --offline --target sm_90 --out benchmarks/results",
        bench_kernels,
        _bench_kernels,
    ),
    Command(
        "bench step",
        "time whole training steps: against plain PyTorch, by batch, by drop rate, profiled",
        "vatt bench step rates --size bbs --rates 0,25,50,75 --out benchmarks/results",
        bench_step,
        _bench_step,
    ),
    Command(
        "bench all",
        "every measurement in one go, within a budget of time",
        "vatt bench all --budget 9m --out results",
        bench_all,
        _bench_all,
    ),
    Command("report", "one self-contained HTML page about a run", "vatt report runs/demo", report, _run_directory),
)
GROUPS = {"config": "configurations", "data": "clips on disk", "evaluate": "downstream metrics", "bench": "measurements"}
