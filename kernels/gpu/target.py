"""The GPUs kernels are compiled for, and what each of them can do at most."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A compute capability, as 10 x major + minor, and the limits that a compiled kernel has to respect.

    shared_memory: bytes a block may have. registers: 32-bit registers of a multiprocessor. threads: of a multiprocessor.
    blocks: that a multiprocessor holds. multiprocessor_memory: shared memory of a multiprocessor, bytes. tensor_columns: of the
    tensor memory that tcgen05 accumulates in. (CUDA C++ Programming Guide, compute capabilities; PTX ISA, tcgen05.alloc.)
    multiprocessors: of the GPU it stands for (A100, H100 and H200, B200); kernels that divide their work by it are as right on
    another count, only less even.
    """

    capability: int
    multiprocessors: int
    shared_memory: int
    multiprocessor_memory: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    tensor_columns: int = 0

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"


# Bytes: 163 and 227 KiB a block, 164 and 228 KiB a multiprocessor.
TARGETS = {
    target.name: target
    for target in (
        Target(80, 108, 166912, 167936),
        Target(90, 132, 232448, 233472),
        Target(100, 148, 232448, 233472, tensor_columns=512),
    )
}

_FORCED: list[Target] = []


@contextmanager
def on_target(target: Target) -> Iterator[None]:
    """Take kernels to be for `target`, whatever GPU is here."""
    _FORCED.append(target)
    try:
        yield
    finally:
        _FORCED.pop()


def current_target() -> Target:
    """What kernels are tuned for now: the forced target, else this GPU's, else (the interpreter) sm_90."""
    return _FORCED[-1] if _FORCED else _found()


@functools.cache
def _found() -> Target:
    if not torch.cuda.is_available():
        return TARGETS["sm_90"]
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    fitting = [target for target in TARGETS.values() if target.capability <= capability]
    return fitting[-1] if fitting else TARGETS["sm_80"]
