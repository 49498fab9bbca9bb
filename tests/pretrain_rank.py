"""`vatt pretrain` in one process, several times over, with accidents on the way; run by the tests, one process a rank.

    python pretrain_rank.py RUNS.json

RUNS.json is a list of {"arguments": [...], "code": 0, "poison": [step, rank], "signal": [step, rank]}: what follows
`vatt pretrain`, the exit code it must have, the step at which the sound of that rank's first clip turns to NaN, and the
step during which that rank gets a SIGTERM. Both accidents may be left out.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from vatt.engine import cli, train
from vatt.engine.config import BackendConfig
from vatt.engine.data.loader import ClipLoader
from vatt.engine.distributed import joined

RANK = int(os.environ.get("RANK", "0"))
train_step, batches = train.train_step, ClipLoader.batches


def arrange(poison: list[int] | None, kill: list[int] | None) -> None:
    """Let the accidents happen that concern this rank."""

    def poisoned(self, first, last):
        for step, batch in enumerate(batches(self, first, last), start=first):
            if [step, RANK] == poison:
                batch.audio[0] = float("nan")
            yield batch

    def signalled(run, batch, step):
        if [step, RANK] == kill:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, batch, step)

    ClipLoader.batches, train.train_step = poisoned, signalled


def main(runs: str) -> None:
    with joined(BackendConfig(threads=1)) as process:
        # DeepSpeed keeps the first group it met, so all runs share one.
        train.joined = lambda config: nullcontext(process)
        for run in json.loads(Path(runs).read_text()):
            arrange(run.get("poison"), run.get("signal"))
            code = cli.main(["pretrain", *run["arguments"]])
            assert code == run.get("code", 0), f"{run}: exit code {code}"


if __name__ == "__main__":
    main(*sys.argv[1:])
