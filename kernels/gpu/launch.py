"""One launch of a Triton kernel: made in one place, whether it is then run, or compiled for a machine that is not here.

A wrapper in this folder builds a `Launch` from its tensors and calls it. On a GPU (or in Triton's interpreter) that runs
the kernel. Inside `recording()` nothing runs: the launch is kept, its tensors may be meta tensors of the real shapes, and
the offline certificate compiles exactly what training would have launched. So there is no second description of a kernel's
signature that could drift from the first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vatt.kernels.gpu.target import Target, on_target

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


@dataclass(frozen=True)
class Tuning:
    """How a kernel is cut to the machine: its block sizes (by the names of the kernel's constants), warps and stages.

    programs: of a kernel whose programs walk over many blocks, how many the grid has at most; the code does not know it.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2
    programs: int = 0

    def __str__(self) -> str:
        words = [*(f"{name}={size}" for name, size in self.blocks.items()), f"warps={self.warps}", f"stages={self.stages}"]
        return ",".join([*words, *([f"programs={self.programs}"] if self.programs else [])])


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its run-time arguments by parameter name, its compile-time constants, and its tuning.

    wrapper: the function of this folder that was called for it ("forward", "backward"); known once it is recorded.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any] = field(default_factory=dict)
    tuning: Tuning = field(default_factory=lambda: Tuning({}))
    wrapper: str = ""

    def __call__(self) -> None:
        if _RECORDS:
            _RECORDS[-1].append(replace(self, wrapper=_wrapper()))
            return
        options = {"num_warps": self.tuning.warps, "num_stages": self.tuning.stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **self.tuning.blocks, **options)

    def specialisation(self) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """(type of every parameter, value of every constant, parameters divisible by 16), as Triton's own launcher has them.

        It turns None and the integer 1 into constants, and takes tensors to start at multiples of 16 bytes.
        """
        types: dict[str, str] = {}
        constants: dict[str, Any] = {**self.constants, **self.tuning.blocks}
        aligned: list[str] = []
        for name, value in self.arguments.items():
            if value is None or (type(value) is int and value == 1):
                constants[name] = value
            elif isinstance(value, Tensor):
                types[name] = _TYPES[value.dtype]
                aligned.append(name)
            elif isinstance(value, int):
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(name)
            else:
                types[name] = "fp32"
        return types | dict.fromkeys(constants, "constexpr"), constants, aligned


class Tunings:
    """The shipped tunings of one kernel: named candidates, and which of them each target uses. There is no autotuning at run
    time: a sweep on a GPU (`vatt bench`) measures the candidates, and its winners are written here.

    withheld: by target, candidates that are not for it, because they spill there.
    """

    def __init__(
        self,
        kernel: str,
        candidates: Mapping[str, Tuning],
        default: Mapping[str, str],
        withheld: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.kernel, self.candidates, self.default = kernel, dict(candidates), dict(default)
        self.withheld = dict(withheld or {})
        self._forced: str | None = None
        TABLES[kernel] = self

    def offered(self, target: str) -> list[str]:
        """The candidates for a target."""
        return [name for name in self.candidates if name not in self.withheld.get(target, ())]

    def pick(self, target: Target) -> Tuning:
        """The tuning for a target: that of the newest one listed that is not newer than it."""
        if _RECORDS:
            _RECORDS[-1].tables[self.kernel] = self
        if self._forced is not None:
            return self.candidates[self._forced]
        known = sorted(self.default, key=lambda name: int(name.removeprefix("sm_")))
        fitting = [name for name in known if int(name.removeprefix("sm_")) <= target.capability]
        return self.candidates[self.default[(fitting or known)[-1 if fitting else 0]]]

    @contextmanager
    def forced(self, candidate: str) -> Iterator[None]:
        """Use one candidate whatever the target: for sweeps and for the certificate."""
        self._forced = candidate
        try:
            yield
        finally:
            self._forced = None


class Recording(list[Launch]):
    """Launches in their order; `tables`: the tuning tables that were asked for them, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, Tunings] = {}


TABLES: dict[str, Tunings] = {}
_RECORDS: list[Recording] = []


def _wrapper() -> str:
    """The outermost function of this folder among the callers."""
    name, frame = "", sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(f"{__package__}."):
        name, frame = frame.f_code.co_name, frame.f_back  # type: ignore[assignment]
    return name


@contextmanager
def recording(target: Target) -> Iterator[Recording]:
    """Keep launches instead of running them, tuned for `target`: any device, meta tensors included."""
    launches = Recording()
    _RECORDS.append(launches)
    try:
        with on_target(target):
            yield launches
    finally:
        _RECORDS.pop()


def is_recording() -> bool:
    """Whether launches are being kept instead of run."""
    return bool(_RECORDS)
