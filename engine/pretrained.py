"""Trained networks as files: a folder to give away, and whatever a user names as RUN_OR_CHECKPOINT.

    FOLDER/
      config.json         the `model` and `data` settings of the run, resolved
      model.safetensors   fp32 weights and batch-norm statistics
      words.txt           the vocabulary

Nothing here executes what it reads: JSON, plain text and safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vatt.engine.checkpoint import (
    MANIFEST,
    CheckpointError,
    CheckpointWriteError,
    load_checkpoint,
    newest_checkpoint,
    read_tensors,
    write_tensors,
)
from vatt.engine.config import ConfigError, RunConfig
from vatt.engine.config_file import from_tree, load_run
from vatt.engine.data.words import Vocabulary
from vatt.engine.durable import attempt_path, rename, sync_folder, write_file

if TYPE_CHECKING:
    from vatt.engine.model import VATT

CONFIG, WEIGHTS, WORDS = "config.json", "model.safetensors", "words.txt"


@dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode, the run it comes from, and the words it knows."""

    model: VATT
    config: RunConfig
    vocabulary: Vocabulary


def export_weights(
    folder: Path | str, model: nn.Module | Mapping[str, Tensor], config: RunConfig, vocabulary: Vocabulary | None = None
) -> Path:
    """Write `config.json`, `model.safetensors` and `words.txt` into `folder`, all or none of them; returns it.

    model: the module, or its tensors by name; the names of a checkpoint's state ("model/...") will do. An earlier export
    in `folder` is replaced. Raises CheckpointError if the folder holds something else, its kind CheckpointWriteError if the
    disk refuses.
    """
    final = Path(folder)
    if final.exists() and not _is_export(final) and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{final}: holds something other than exported weights; name a new folder")
    tensors = _named(model.state_dict() if isinstance(model, nn.Module) else model)
    attempt = attempt_path(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            attempt.mkdir()
            write_tensors(attempt / WEIGHTS, tensors)
            write_file(attempt / CONFIG, [_config_bytes(config)])
            if vocabulary is not None:
                vocabulary.write(attempt / WORDS)
            sync_folder(attempt)
            _put_in_place(attempt, final)
        finally:
            shutil.rmtree(attempt, ignore_errors=True)  # nothing is there after success
    except OSError as problem:
        raise CheckpointWriteError(f"{final}: the weights cannot be written: {problem.strerror or problem}") from problem
    return final


def from_pretrained(folder: Path | str) -> VATT:
    """The model of an exported folder, in evaluation mode on the CPU; `Vocabulary.read(folder / "words.txt")` has its words.

    Raises CheckpointError naming the file, and the tensors that are missing, unknown or of another shape.
    """
    folder = Path(folder)
    if not _is_export(folder):
        absent = ", ".join(name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file())
        raise CheckpointError(f"{folder}: is not a folder of exported weights: {absent} is not there")
    return build_model(_read_config(folder / CONFIG), read_tensors(folder / WEIGHTS), folder / WEIGHTS)


def load_trained(path: Path | str) -> Trained:
    """What RUN_OR_CHECKPOINT names: a run directory (its newest good checkpoint), one checkpoint, or exported weights.

    Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run directory, one of its checkpoints, or exported weights")
    if (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise CheckpointError(f"{path}: this run has no checkpoint that can be used yet")
        return _load_from_checkpoint(checkpoint)
    if (path / MANIFEST).is_file():
        return _load_from_checkpoint(path)
    if (path / CONFIG).is_file():
        model = from_pretrained(path)
        return Trained(model, model.config, _read_words(path / WORDS))
    raise CheckpointError(
        f"{path}: neither a run directory (no checkpoints/), nor a checkpoint (no {MANIFEST}), nor an export (no {CONFIG})"
    )


def build_model(config: RunConfig, tensors: Mapping[str, Tensor], source: Path) -> VATT:
    """A model of `config` with the given weights, in evaluation mode. `source` is named in errors (CheckpointError)."""
    from vatt.engine.model import VATT

    # The table comes from the weights; the file it once was read from may be on another machine.
    text = replace(config.model.text, word_table="learned", word_table_file="")
    model = VATT(replace(config, model=replace(config.model, text=text)))
    check_tensors(_named(tensors), model.state_dict(), source)
    model.load_state_dict(_named(tensors))
    model.text.words.weight.requires_grad_(config.model.text.word_table == "learned")
    model.config = config.with_buckets()
    return model.eval()


def check_tensors(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Path) -> None:
    """Raise CheckpointError unless both have the same names and shapes."""
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    shaped = [
        f"{name} is {tuple(given[name].shape)}, the model's is {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shaped))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source}: does not fit the model its settings describe: {'; '.join(problems)}")


def _load_from_checkpoint(path: Path) -> Trained:
    state, record = load_checkpoint(path)
    run = path.resolve().parent.parent
    if (run / "config.toml").is_file():
        config = load_run(run / "config.toml")
    elif "config" in record:
        config = from_tree(record["config"])
    else:
        raise CheckpointError(
            f"{path}: its run's config.toml is not in {run}, and its record holds no settings; put it back there"
        )
    weights = {name: tensor for name, tensor in state.items() if name.startswith("model/")}
    return Trained(build_model(config, weights, path / WEIGHTS), config, _read_words(run / WORDS))


def _read_words(path: Path) -> Vocabulary:
    if not path.is_file():
        raise CheckpointError(f"{path}: the vocabulary is not there; copy words.txt from the run that made these weights")
    return Vocabulary.read(path)


def _is_export(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by their names in the module: Adam's are left out."""
    prefixed = any(name.startswith("model/") for name in tensors)
    return {n.removeprefix("model/"): t for n, t in tensors.items() if not prefixed or n.startswith("model/")}


def _config_bytes(config: RunConfig) -> bytes:
    config = config.with_buckets()
    # Where the clips were on the training machine is nobody's business.
    data = replace(config.data, train="", test="")
    tree: dict[str, Any] = {"format": 1, "model": asdict(config.model), "data": asdict(data)}
    return (json.dumps(tree, indent=1) + "\n").encode()


def _read_config(file: Path) -> RunConfig:
    try:
        tree = json.loads(file.read_bytes())
        return from_tree({"model": tree["model"], "data": tree["data"]})
    except (ValueError, KeyError, TypeError) as problem:
        kind = "" if isinstance(problem, ConfigError) else f"{type(problem).__name__}: "
        raise CheckpointError(f"{file}: not the settings of an exported model: {kind}{problem}") from None


def _put_in_place(attempt: Path, final: Path) -> None:
    if not _is_export(final):  # absent, or an empty folder, which a rename replaces
        rename(attempt, final)
        return
    aside = attempt_path(final)
    rename(final, aside)
    try:
        rename(attempt, final)
    except OSError:
        os.rename(aside, final)
        raise
    shutil.rmtree(aside)
