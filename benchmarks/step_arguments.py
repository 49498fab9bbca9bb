"""The options of bench_step, apart from it so that `vatt --help` need not import torch."""

from __future__ import annotations

import argparse
from pathlib import Path

MODES = {
    "against": "interleaved pairs with the plain PyTorch baseline",
    "batches": "step time and MFU at each local batch",
    "rates": "step time at each drop rate",
    "settings": "interleaved pairs of ours with the settings of --set and without",
    "memory": "one step and its peak memory",
    "profile": "kernels, launches, idle gaps of one step",
    "counted": "FLOPs, bytes and least time of one step on an H200, operator by operator; needs no GPU",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modes = "; ".join(f"{name}: {what}" for name, what in MODES.items())
    parser.add_argument("mode", nargs="?", choices=MODES, default="against", help=modes)
    parser.add_argument("--out", type=Path, required=True, help="folder of results; a folder per machine is made in it")
    parser.add_argument("--size", choices=("bbs", "mbs", "lbs"), default="bbs", help="shipped recipe (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=2, help="clips (default: %(default)s)")
    parser.add_argument("--batches", type=numbers, default="4,8,16,32,64,128", help="local batches of `batches`")
    parser.add_argument(
        "--rates", type=numbers, default="0,25,50,75", help="percent dropped, of `rates`; the first is the base"
    )
    parser.add_argument("--pairs", type=positive, default=5, help="interleaved rounds of `against` and `rates`")
    parser.add_argument("--steps", type=positive, default=10, help="timed steps of `batches` and `profile`")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of our side")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's default")
    parser.add_argument("--compile", action="store_true", help="let torch.compile take part on the baseline's side")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of our side; may be repeated"
    )
    parser.add_argument("--label", default="", help="added to the file's name, for runs with --set")


def numbers(text: str) -> list[int]:
    values = [int(word) for word in text.split(",")]
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {text}")
    return values


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: {text}")
    return value
