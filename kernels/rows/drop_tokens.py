"""drop_tokens: once for each signal and step."""

from __future__ import annotations

import torch
from torch import Tensor

from vatt.kernels.contract import Arguments, Case, Kernel, Make, Shape, divisible
from vatt.kernels.counter import Stream
from vatt.kernels.drop_tokens import drop_tokens, drop_tokens_reference

SEED, STEP = 2**40 + 5, 123_456  # of a run's middle; the seed fills both words of its key


def _make(total: int, kept: int, samples: int, shared: bool = False) -> Make:
    def make(_: torch.dtype, device: torch.device) -> Arguments:
        return {
            "total": total,
            "kept": kept,
            "seed": torch.tensor(SEED, device=device),
            "step": torch.tensor(STEP, device=device),
            "sample_id": torch.arange(samples, device=device) * 1000 + 7,
            "stream": int(Stream.KEEP_VIDEO),
            "shared": shared,
        }

    return make


def _launches(total: int, kept: int, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int, shared: bool) -> None:
    from vatt.kernels.gpu.drop_tokens import forward

    forward(total, kept, seed, step, sample_id, stream, shared)


@divisible("samples")
def _shape(name: str, total: int, kept: int, samples: int, shared: bool = False) -> Shape:
    """Written: the indices; read: an id for each sample."""
    written = (1 if shared else samples) * kept * 8
    return Shape(name, _make(total, kept, samples, shared), forward_bytes=written + 8 * samples, backward_bytes=0)


ROW = Kernel(
    name="drop_tokens",
    op=drop_tokens,
    reference=drop_tokens_reference,
    eager=drop_tokens_reference,
    differentiable=(),
    cases=(
        Case("one_of_one", _make(1, 1, 3)),
        Case("one_kept", _make(50, 1, 4)),
        Case("all_kept", _make(16, 16, 2)),
        Case("all_but_one", _make(17, 16, 5)),
        Case("odd", _make(131, 37, 3)),
        Case("video_half", _make(1568, 784, 2)),
        Case("long", _make(4100, 1025, 1)),
        Case("shared", _make(131, 50, 3, shared=True)),
        Case("shared_all", _make(70, 70, 2, shared=True)),
    ),
    shapes=(
        _shape("video, 50 % drop", 1568, 784, 64),
        _shape("video, 75 % drop", 1568, 392, 64),
        _shape("audio, 50 % drop", 1200, 600, 64),
        _shape("video of 320 pixels, 50 % drop", 3200, 1600, 64),
        _shape("video, 50 % drop, shared", 1568, 784, 64, shared=True),
    ),
    launches=_launches,
)
