"""Writing files so that a crash at any instant leaves either the old thing or the new one, never half of either.

Every byte goes through `os.write`, `os.fsync` and `os.rename`, called here and nowhere else in the run's bookkeeping: the
fault tests replace exactly these three and stop the process at each call in turn.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 16 << 20
ATTEMPT_SUFFIX = ".tmp"


@dataclass(frozen=True)
class Written:
    """What was handed to the disk: length, and SHA-256 of the bytes in memory (not of what was read back)."""

    bytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> Written:
    """Write a new file and wait until it is on the disk. The folder entry itself still needs `sync_folder`."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while len(rest):
                chunk = rest[:CHUNK_BYTES]
                count = os.write(descriptor, chunk)
                digest.update(chunk[:count])
                size += count
                rest = rest[count:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(size, digest.hexdigest())


def hash_file(path: Path) -> Written:
    """Length and SHA-256 of a file as it is on the disk."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return Written(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Rename, and wait until the new name is on the disk. An existing file `new` is replaced; a filled folder is not."""
    os.rename(old, new)
    sync_folder(new.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Give `path` new content in one step: readers see the old text or the new, and so does a machine that lost power."""
    attempt = attempt_path(path)
    try:
        write_file(attempt, [content.encode() if isinstance(content, str) else content])
        rename(attempt, path)
    except BaseException:
        attempt.unlink(missing_ok=True)
        raise


def attempt_path(path: Path) -> Path:
    """A name beside `path` that no other attempt has; it tells who is writing: `NAME.HOST.PID.RANDOM.tmp`."""
    host = socket.gethostname().replace(".", "-") or "host"
    return path.with_name(f"{path.name}.{host}.{os.getpid()}.{secrets.token_hex(4)}{ATTEMPT_SUFFIX}")


def remove_dead_attempts(folder: Path) -> list[str]:
    """Delete what attempts of this host's dead processes left in `folder`; returns their names.

    An attempt was never published, so nothing can depend on it. Attempts of other living processes are left alone, and
    those of other hosts, whose processes cannot be asked. Call it while this process has no attempt under way: one that
    bears its number is then an earlier process's (in a container every run may be process 1).
    """
    host = attempt_path(folder / "x").name.split(".")[1]
    removed = []
    for path in sorted(folder.glob(f"*{ATTEMPT_SUFFIX}")):
        parts = path.name.split(".")
        if len(parts) < 5 or parts[-4] != host or not parts[-3].isdigit() or _alive(int(parts[-3])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path.name)
    return removed


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to somebody else
        return True
    return True
