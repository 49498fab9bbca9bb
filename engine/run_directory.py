"""The folder of a run: what it was told, where it ran, and what it measured.

    RUN/
      config.toml        every setting, resolved
      environment.json   versions, machine, and each start of the run
      words.txt          the vocabulary
      metrics.jsonl      one JSON object a logged step
      tensorboard/       the same as TensorBoard events
      checkpoints/       see engine.checkpoint
      evaluation.json, evaluation.npz, report.html

Rank 0 alone opens it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vatt.engine.config import ConfigError, RunConfig
from vatt.engine.config_file import OPTIONS, load_run, to_toml
from vatt.engine.durable import ATTEMPT_SUFFIX, remove_dead_attempts, replace_file, sync_folder
from vatt.engine.progress import Progress

PACKAGES = ("vatt-engine", "torch", "numpy", "av", "safetensors", "deepspeed", "triton", "nvidia-dali-cuda120", "flash-attn")

# Settings that may change when a run goes on: they decide where and how fast it runs, what it says, or whether it stops
# at a bad clip, but not what any step computes. (`steps` is not among them: the schedule depends on it.)
HARMLESS_SECTIONS = ("log", "checkpoint", "evaluate")
HARMLESS_KEYS = (
    "output",
    "stop_after",
    "data.test",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.cache_bytes",
    "data.on_bad_clip",
    "data.on_short_clip",
    "data.on_missing_audio",
    "backend.name",
    "backend.zero_stage",
    "backend.device",
    "backend.threads",
)
_LISTED = 6


class RunDirectory:
    """A run's folder, created, or checked and continued.

    Opening it raises ConfigError if the folder holds something else, or a run whose settings would compute other steps
    than those it has already taken.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.output)
        self.words = self.path / "words.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.environment = self.path / "environment.json"
        self._sinks: list[TensorBoard | WeightsAndBiases] = []
        self._metrics_file: Any = None
        self.progress: Progress | None = None
        self.resumed = self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._has_results():
            self.words.unlink(missing_ok=True)  # of a start that failed, perhaps with another catalogue
        remove_dead_attempts(self.path)
        replace_file(self.path / "config.toml", to_toml(config))

    def start(self, step: int, *, world_size: int = 1, device: str = "cpu") -> None:
        """Begin logging after `step` finished steps; whatever an earlier start logged beyond them is dropped.

        device: its name, for the record.
        """
        self._record_start(step, world_size, device)
        # A run that never stopped has no line at a step where only this one's end asked for it.
        every = self.config.log.every
        trim_metrics(self.metrics, step if step % every == 0 or step == self.config.steps else step - 1)
        self._metrics_file = open(self.metrics, "ab", buffering=0)  # noqa: SIM115 - open for the whole run
        sync_folder(self.path)
        self.progress = Progress(self.config.stop_after or self.config.steps, first=step)
        if self.config.log.tensorboard:
            self._open_tensorboard(step)
        if self.config.log.wandb:
            self._sinks.append(WeightsAndBiases(self.config, self.path))

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line: `step` is the number of finished steps; numbers, 0-d tensors and records of them are accepted.

        What is not finite is written as null: JSON has no NaN.
        """
        plain = {key: _plain(value) for key, value in line.items()}
        self._metrics_file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        for sink in self._sinks:
            sink.log(plain)
        self.say_progress(plain)

    def say_progress(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics without writing it anywhere."""
        if self.progress:
            self.progress.report(line)

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        if self.progress:
            self.progress.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Wait until the logged lines are on the disk; called before a checkpoint, which promises them."""
        if self._metrics_file:
            os.fsync(self._metrics_file.fileno())

    def close(self) -> None:
        """Finish logging; calling it twice is harmless."""
        if self.progress:
            self.progress.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        if self._metrics_file:
            self.sync()
            self._metrics_file.close()
            self._metrics_file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check(self) -> bool:
        """Whether there is a run to continue."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output: {self.path} is a file; name a folder")
        if not self.path.exists() or all(p.name.endswith(ATTEMPT_SUFFIX) for p in self.path.iterdir()):
            return False
        written = self.path / "config.toml"
        if not written.is_file():
            raise ConfigError(f"output: {self.path} holds files and no config.toml, so it is not a run; name another folder")
        earlier = load_run(written)
        different = list(differences(earlier, self.config))
        if different and not self._has_results():
            return False  # it failed before its first step, perhaps for a setting that has now been corrected
        if different:
            more = f" and {len(different) - _LISTED} more" if len(different) > _LISTED else ""
            raise ConfigError(
                f"output: {self.path} is a run with other settings: {'; '.join(different[:_LISTED])}{more}. "
                "Set them as they were to continue it, or name another folder"
            )
        return True

    def _has_results(self) -> bool:
        """Whether an earlier start left a logged step or a checkpoint."""
        return bool(read_metrics(self.metrics)) or any((self.path / "checkpoints").glob("*"))

    def _record_start(self, step: int, world_size: int, device: str) -> None:
        starts = []
        if self.resumed and self.environment.exists():
            starts = read_json(self.environment).get("starts", [])
        now = datetime.now(UTC).isoformat(timespec="seconds")
        starts.append({"time": now, "step": step, "world_size": world_size, "device": device})
        replace_file(self.environment, json.dumps(describe_environment() | {"starts": starts}, indent=1) + "\n")

    def _open_tensorboard(self, step: int) -> None:
        try:
            self._sinks.append(TensorBoard(self.path / "tensorboard", step))
        except ImportError:
            self.say("no TensorBoard events: tensorboard is not installed; pip install it, or set log.tensorboard = false")


def differences(earlier: RunConfig, now: RunConfig) -> Iterator[str]:
    """'key was A, is B' for every setting that would make a continued run another run."""
    for key in OPTIONS:
        if key in HARMLESS_KEYS or key.partition(".")[0] in HARMLESS_SECTIONS:
            continue
        before, after = _value(earlier, key), _value(now, key)
        if before != after:
            hint = " (use stop_after to end early: the schedule depends on steps)" if key == "steps" else ""
            yield f"{key} was {before!r}, is {after!r}{hint}"


def trim_metrics(path: Path, step: int) -> None:
    """Keep the whole lines of at most `step` finished steps, in one replacement."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(raw for raw, line in _lines(content) if line["step"] <= step)
    if kept != content:
        replace_file(path, kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a line that a crash cut short is left out. A missing file has none."""
    return [line for _, line in _lines(path.read_bytes())] if path.exists() else []


def _lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for raw in content.splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if raw.endswith(b"\n") and isinstance(line, dict) and isinstance(line.get("step"), int):
            yield raw, line


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run's own file; ConfigError naming the file if it is not one."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{path}: not a JSON file that can be read: {problem}; delete it to go on without") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds no JSON object; delete it to go on without")
    return value


def describe_environment() -> dict[str, Any]:
    """What the numbers of a run depend on: versions and the machine. No variables, no user or host name."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            yield prefix + key, value


class TensorBoard:
    """The logged numbers as TensorBoard events. Raises ImportError if tensorboard is missing."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps an earlier start logged beyond its last checkpoint are about to be taken again.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write every number of the line."""
        for name, value in _numbers(line):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """The logged numbers as a Weights & Biases run, one for the life of the run directory; WANDB_MODE=offline is honoured."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"log.wandb: project {config.log.wandb!r} is named and wandb is not installed: pip install wandb"
            ) from None
        name = folder / "wandb_id.txt"
        if not name.exists():
            replace_file(name, secrets.token_hex(4) + "\n")
        settings = {key: _value(config, key) for key in OPTIONS}
        self._run = wandb.init(
            project=config.log.wandb, dir=str(folder), id=name.read_text().strip(), resume="allow", config=settings
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, line: Mapping[str, Any]) -> None:
        """Send every number of the line."""
        self._run.log(dict(_numbers(line)) | {"step": line["step"]})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
