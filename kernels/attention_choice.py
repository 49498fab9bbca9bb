"""Which attention is fastest on this GPU: measured once for each kind of call, remembered, and said.

A kind is (shape, dtype, device, with or without gradient, dropout, bias). The timing is forward and, where a gradient is
asked for, backward, on random numbers. Nothing is measured while a CUDA graph is captured or a compiler traces: then a
remembered choice is used, else the first candidate, and the log says so.

Ranks must not each decide for themselves, and a resumed run should not decide again: rank 0 sends `choices()` to the others
and the run directory keeps it; `use_choices()` takes it up.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vatt.kernels.dropout import DropoutMask

Run = Callable[[str, Tensor, Tensor | None, float, DropoutMask | None], Tensor]
WARM_UP, REPEATS = 3, 10
log = logging.getLogger("vatt")
_CHOICES: dict[str, str] = {}
_SAID: set[str] = set()


@dataclass(frozen=True)
class Call:
    """A kind of call, seen on meta tensors. bias: its shape, dtype and whether it wants a gradient, or None."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool
    bias: tuple[tuple[int, ...], torch.dtype, bool] | None
    scale: float
    dropout: float


_NOTED: list[list[Call]] = []


@contextmanager
def noted() -> Iterator[list[Call]]:
    """The kinds of call that `auto` gets on meta tensors inside: what a step will ask, found without a device."""
    calls: list[Call] = []
    _NOTED.append(calls)
    try:
        yield calls
    finally:
        _NOTED.pop()


def note(qkv: Tensor, bias: Tensor | None, scale: float, dropout: DropoutMask | None) -> None:
    """Remember a call on meta tensors, where somebody listens."""
    given = None if bias is None else (tuple(bias.shape), bias.dtype, bias.requires_grad)
    gradient = torch.is_grad_enabled() and qkv.requires_grad
    call = Call(tuple(qkv.shape), qkv.dtype, gradient, given, scale, 0.0 if dropout is None else dropout.rate)
    for calls in _NOTED:
        if call not in calls:
            calls.append(call)


def choices() -> dict[str, str]:
    """What has been chosen, by the words for the kind of call: plain strings, to be broadcast or kept as JSON."""
    return dict(_CHOICES)


def use_choices(found: Mapping[str, str]) -> None:
    """Take up choices made elsewhere; they replace what was chosen here for the same kind of call."""
    _CHOICES.update(found)


def forget_choices() -> None:
    """Measure everything again."""
    _CHOICES.clear()
    _SAID.clear()


def kind_of(qkv: Tensor, bias: Tensor | None, dropout: DropoutMask | None) -> str:
    """The words for a kind of call."""
    B, N, _, H, D = qkv.shape
    device = torch.cuda.get_device_name(qkv.device) if qkv.device.type == "cuda" else qkv.device.type
    words = [f"{B} x {N} tokens", f"{H} heads of {D}", str(qkv.dtype).removeprefix("torch."), device]
    if torch.is_grad_enabled() and (qkv.requires_grad or (bias is not None and bias.requires_grad)):
        words.append("with gradient")
    if dropout is not None:
        words.append("dropout")
    if bias is not None:
        words.append(f"bias {'x'.join(map(str, bias.shape))}{' with gradient' if bias.requires_grad else ''}")
    return ", ".join(words)


def choose(
    names: Sequence[str],
    refused: Sequence[str],
    run: Run,
    qkv: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: DropoutMask | None,
) -> str:
    """The remembered or else the fastest of the candidates `names`. A remembered one that cannot run here is measured anew."""
    if torch.are_deterministic_algorithms_enabled() and names[0] == "triton":
        return "triton"  # the libraries add up gradients in any order
    kind = kind_of(qkv, bias, dropout)
    if _CHOICES.get(kind) in names:
        return _CHOICES[kind]
    if _must_not_measure():
        if kind not in _SAID:
            _SAID.add(kind)
            log.warning("attention: auto: nothing is measured while a graph is captured; %s for %s", names[0], kind)
        return names[0]
    found: dict[str, float] = {}
    failed = list(refused)
    for name in names:
        try:
            found[name] = measure(name, run, qkv, bias, scale, dropout)
        except (RuntimeError, ValueError, TypeError) as error:
            failed.append(name)
            log.info("attention: auto: %s failed: %s", name, (str(error).splitlines() or [type(error).__name__])[0])
    if not found:
        raise RuntimeError(f"attention: auto: none of {', '.join(names)} ran for {kind}; name one to see its error")
    ordered = sorted(found, key=found.__getitem__)
    _CHOICES[kind] = ordered[0]
    times = ", ".join(f"{name} {found[name]:.3f} ms" for name in ordered)
    log.info("attention: auto: %s for %s (%s; not for these: %s)", ordered[0], kind, times, ", ".join(failed) or "none")
    return ordered[0]


def measure(name: str, run: Run, qkv: Tensor, bias: Tensor | None, scale: float, dropout: DropoutMask | None) -> float:
    """Median milliseconds of one call on random numbers, and of its backward pass where this call will have one."""
    backward = torch.is_grad_enabled() and (qkv.requires_grad or (bias is not None and bias.requires_grad))
    with torch.enable_grad() if backward else torch.no_grad():
        x = torch.randn_like(qkv).requires_grad_(qkv.requires_grad)
        b = None if bias is None else bias.detach().requires_grad_(bias.requires_grad)
        wanted = [t for t in (x, b) if t is not None and t.requires_grad]
        times = []
        for _ in range(WARM_UP + REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = run(name, x, b, scale, dropout)
            if backward:
                torch.autograd.grad(out, wanted, torch.ones_like(out))
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


def _must_not_measure() -> bool:
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
