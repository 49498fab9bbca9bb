"""Checkpoints that survive a crash at any instant, and are refused when a single bit of them has changed.

    RUN/checkpoints/
      step-1000/             one whole checkpoint
        model.safetensors      fp32 weights and buffers
        optimizer.safetensors  Adam's moments and step
        record.json            step, sample cursor, seeds, config, world size, versions
        manifest.json          length and SHA-256 of each file above, and of itself; written last
      latest                 the name of the newest one, for people and scripts; resuming trusts the manifests alone

A checkpoint is built under another name (`step-1000.HOST.PID.RANDOM.tmp`), made durable, and renamed. Only then does
`latest` move, and only after that are old checkpoints removed. Nothing is pickled: loading cannot run code.

One rank writes; `state` is consolidated and does not know how many ranks there were.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vatt.engine.durable import (
    Written,
    attempt_path,
    hash_file,
    remove_dead_attempts,
    rename,
    replace_file,
    sync_folder,
    write_file,
)

log = logging.getLogger("vatt.checkpoint")

FORMAT = 1
MANIFEST, RECORD, POINTER = "manifest.json", "record.json", "latest"
# First part of a tensor's name -> the file that holds it, under the rest of its name.
FILES = {"model": "model.safetensors", "adam": "optimizer.safetensors"}
# A checkpoint replaced by a new one of the same step is moved aside first; it still counts until it is deleted.
_CHECKPOINT = re.compile(r"step-(\d+)(\.replaced-\w+)?")
# Beyond the tensors: record, manifest, pointer and the folders themselves.
_MARGIN_BYTES = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names the file, what is wrong and the remedy, in one line."""


class CheckpointWriteError(CheckpointError):
    """The disk is full or refuses: the run failed, nothing that the user typed was wrong."""

    exit_code = 1


def save_checkpoint(
    run_directory: Path | str, step: int, state: Mapping[str, Tensor], record: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `checkpoints/step-N` of a run and return it; call it on one rank.

    state: tensors on any device, named "model/..." or "adam/...". record: whatever JSON can hold; `step` is added.
    keep: how many verified checkpoints stay, this one included. Damaged ones are never deleted, nor counted.

    Raises CheckpointWriteError when there is no room or the disk refuses. What was saved before is then untouched, `latest`
    included, and the attempt is removed.
    """
    folder = Path(run_directory) / "checkpoints"
    final = folder / f"step-{step}"
    groups = _by_file(state)
    record_bytes = _json_bytes({"step": step} | dict(record))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_room(folder, step, len(record_bytes) + sum(t.numel() * t.element_size() for t in state.values()))
        remove_dead_attempts(folder)
        attempt = attempt_path(final)
        try:
            attempt.mkdir()
            written = {name: write_tensors(attempt / name, tensors) for name, tensors in groups.items()}
            written[RECORD] = write_file(attempt / RECORD, [record_bytes])
            sync_folder(attempt)
            write_file(attempt / MANIFEST, [manifest_bytes(written)])
            sync_folder(attempt)
            _publish(attempt, final)
        finally:
            shutil.rmtree(attempt, ignore_errors=True)  # nothing is there after success
        replace_file(folder / POINTER, final.name + "\n")
    except OSError as problem:
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space, or lower checkpoint.keep" if full else "check the folder's permissions and its disk"
        reason = problem.strerror or str(problem)
        message = f"{final}: cannot be written: {reason}; {remedy}. Earlier checkpoints are intact"
        raise CheckpointWriteError(message) from problem
    try:
        _retire(folder, keep)
    except OSError as problem:  # the new one is safe, and training goes on; the disk will say so again when it is full
        log.warning("old checkpoints in %s could not be removed: %s", folder, problem)
    return final


def newest_checkpoint(run_directory: Path | str) -> Path | None:
    """The newest checkpoint of a run whose every file verifies, or None. Each one passed over is logged with the reason."""
    for path in _candidates(Path(run_directory) / "checkpoints"):
        problem = find_damage(path)
        if problem is None:
            return path
        log.warning("passed over %s: %s; it is left where it is", path, problem)
    return None


def load_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State (CPU tensors, named as they were saved) and record of a checkpoint folder, verified first.

    Raises CheckpointError if it is not a checkpoint or any file differs from what was written.
    """
    path = Path(path)
    problem = find_damage(path)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}; name another checkpoint, or the run directory to use its newest good one")
    files = json.loads((path / MANIFEST).read_bytes())["files"]
    state = {
        f"{part}/{name}": tensor
        for part, file in FILES.items()
        if file in files
        for name, tensor in read_tensors(path / file).items()
    }
    return state, load_record(path)


def load_record(path: Path | str) -> dict[str, Any]:
    """The record of a checkpoint alone; the tensors are neither read nor verified. Raises CheckpointError."""
    file = Path(path) / RECORD
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{file}: cannot be read: {problem}") from None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words naming the file, or None. Reads every byte of it."""
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError as problem:
        return f"{MANIFEST} cannot be read ({problem.strerror})"
    try:
        files = json.loads(content)["files"]
        expected = {name: Written(entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        intact = RECORD in expected and content == manifest_bytes(expected)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        return f"{MANIFEST} is damaged"
    for name, wanted in expected.items():
        try:
            size = (path / name).stat().st_size
            if size != wanted.bytes:
                return f"{name} has {size} bytes, {wanted.bytes} were written"
            if hash_file(path / name).sha256 != wanted.sha256:
                return f"{name} differs from what was written (SHA-256)"
        except OSError as problem:
            return f"{name} cannot be read ({problem.strerror})"
    return None


def manifest_bytes(written: Mapping[str, Written]) -> bytes:
    """The one text a manifest of these files can have. It ends in its own SHA-256, so that no bit of it can change unseen."""
    body: dict[str, Any] = {"format": FORMAT, "files": {name: asdict(written[name]) for name in sorted(written)}}
    return _json_bytes(body | {"sha256": sha256(_json_bytes(body)).hexdigest()})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write a safetensors file piece by piece: no second copy of the state in memory, and the hash on the way."""
    # Wide types first keeps every tensor aligned to its element, which readers that map the file want.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, offset = {}, 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _dtype_name(name, tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            if tensor.numel():
                flat = tensor.detach().to("cpu").contiguous().reshape(-1)
                yield flat.view(torch.uint8).numpy().data

    return write_file(path, pieces())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError if it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"{path}: not a usable safetensors file: {problem}") from None


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"{name}: tensors of {tensor.dtype} cannot be saved; convert it to float32 first")
    return _DTYPES[tensor.dtype]


def _by_file(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition("/")
        if part not in FILES or not rest:
            raise CheckpointError(f"{name}: a checkpoint holds tensors named {' or '.join(p + '/...' for p in FILES)}")
        groups.setdefault(FILES[part], {})[rest] = tensor
    return groups


def _require_room(folder: Path, step: int, needed: int) -> None:
    needed += _MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointWriteError(
            f"{folder}: the checkpoint of step {step} needs {needed:,} bytes and {free:,} are free; "
            "free some space, or lower checkpoint.keep. Earlier checkpoints are intact"
        )


def _publish(attempt: Path, final: Path) -> None:
    """Give a finished attempt its name. One of the same step makes way without ever leaving the run without it."""
    if not os.path.lexists(final):
        rename(attempt, final)
        return
    mark = attempt.name.split(".")[-2]
    if find_damage(final) is not None:
        rename(final, final.with_name(f"{final.name}.damaged-{mark}"))
        rename(attempt, final)
        return
    aside = final.with_name(f"{final.name}.replaced-{mark}")
    rename(final, aside)
    try:
        rename(attempt, final)
    except OSError:
        rename(aside, final)
        raise


def _retire(folder: Path, keep: int) -> None:
    """Delete verified checkpoints beyond the newest `keep`. What is damaged is evidence, and stays."""
    kept_steps: set[str] = set()
    for path in _candidates(folder):
        if find_damage(path) is not None:
            continue
        step = path.name.partition(".")[0]
        if len(kept_steps) < keep and step not in kept_steps:
            kept_steps.add(step)
            continue
        # Under an attempt's name first: a crash half-way must not leave something that looks like damage.
        doomed = attempt_path(path)
        rename(path, doomed)
        shutil.rmtree(doomed)


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first; of one step, the published before the replaced."""
    found = []
    for path in folder.glob("step-*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            found.append((-int(match[1]), match[2] or "", path))
    return [path for *_, path in sorted(found)]


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
