"""patch_project: the first layer of the video and the audio tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vatt.kernels.contract import Arguments, Case, Kernel, Make, Shape, divisible, drawn
from vatt.kernels.drop_tokens import drop_tokens
from vatt.kernels.dropout import DropoutMask
from vatt.kernels.patch_project import patch_project, patch_project_eager, patch_project_reference
from vatt.kernels.rows.bias_gelu import mask

Signal = Literal["bytes", "floats", "strided"]


def _make(
    B: int,
    patch: tuple[int, ...],
    grid: tuple[int, ...],
    D: int,
    kept: int = 0,
    signal: Signal = "bytes",
    position: bool = True,
    aggregate: bool = True,
    samples: int = 0,
    ordered: bool = True,
    extra: int = 0,
) -> Make:
    """kept: 0 for no index. extra: rows, columns or wave samples beyond the grid. samples: 0 for no dropout."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        places, features = math.prod(grid), math.prod(patch) * (3 if len(patch) == 3 else 1)
        return {
            "signal": _signal(B, patch, grid, signal, extra, dtype, device),
            "weight_DF": drawn((D, features), dtype, device, 1, features**-0.5),
            "bias_D": drawn((D,), dtype, device, 2),
            "aggregate_D": drawn((D,), dtype, device, 3) if aggregate else None,
            "patch": patch,
            "grid": grid,
            "index_BK": _index(B, places, kept, ordered, device) if kept else None,
            "position_ND": drawn((places, D), dtype, device, 4) if position else None,
            "dropout": mask(samples, device, stream=1024) if samples else None,
        }

    return make


def _signal(
    B: int, patch: tuple[int, ...], grid: tuple[int, ...], kind: Signal, extra: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    extent = [p * g for p, g in zip(patch, grid, strict=True)]
    if len(extent) == 1:
        return drawn((B, extent[0] + extra), dtype, device, 5, 0.3)
    # strided: every other sample and frame of a longer clip, its channels between twice as many.
    step = 2 if kind == "strided" else 1
    shape = (B * step, extent[0] * step, 3 * step, extent[1] + extra, extent[2] + extra)
    if kind == "floats":
        return drawn(shape, dtype, device, 5, 0.3)
    if device.type == "meta":
        return torch.empty(shape, dtype=torch.uint8, device=device)
    frames = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(6), dtype=torch.uint8).to(device)
    return frames[::step, ::step, ::step]


def _index(B: int, places: int, kept: int, ordered: bool, device: torch.device) -> Tensor:
    if device.type == "meta":
        return torch.empty(B, kept, dtype=torch.int64, device=device)
    seed, step = torch.tensor(5), torch.tensor(3)
    index = drop_tokens(places, kept, seed, step, torch.arange(B), 7)
    return (index if ordered else index.flip(1).roll(1, 1)).to(device)


def _launches(
    signal: Tensor,
    weight_DF: Tensor,
    bias_D: Tensor,
    aggregate_D: Tensor | None,
    patch: Sequence[int],
    grid: Sequence[int],
    index_BK: Tensor | None,
    position_ND: Tensor | None,
    dropout: DropoutMask | None,
) -> None:
    from vatt.kernels.gpu.patch_project import forward
    from vatt.kernels.gpu.patch_project_backward import backward

    y = forward(signal, index_BK, weight_DF, bias_D, position_ND, aggregate_D, patch, grid, dropout)
    backward(y, signal, index_BK, patch, grid, position_ND is not None, aggregate_D is not None, dropout)


@divisible("B", "samples")
def _shape(name: str, B: int, patch: tuple[int, ...], grid: tuple[int, ...], D: int, kept: int = 0, samples: int = 0) -> Shape:
    """Forward reads the kept patches, weights, positions and indices once and writes every token; backward reads patches,
    indices and the tokens' gradient once and writes the gradients of weights and positions. Pixels are bytes, a waveform's
    samples bf16.
    """
    places, video = math.prod(grid), len(patch) == 3
    K, features = kept or places, math.prod(patch) * (3 if video else 1)
    pixels, weights, positions = B * K * features * (1 if video else 2), 2 * D * features, 2 * places * D
    tokens, indices = 2 * B * (K + 1) * D, 8 * B * kept
    return Shape(
        name,
        _make(B, patch, grid, D, kept, samples=samples),
        forward_bytes=pixels + weights + positions + indices + tokens,
        backward_bytes=pixels + tokens + weights + positions + indices,
        forward_flops=2 * B * K * features * D,
        backward_flops=2 * B * K * features * D,
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes of one forward pass over uint8 frames in bf16.

    least: kept pixels, weights, positions of kept patches and indices read once, tokens written once. l2: what all programs
    ask for together, re-reads by column and row tiles counted; beyond the first they are served by the L2 cache, since the
    programs of the same rows are neighbours and the weights fit. sectors: as `least`, in the 32-byte pieces that memory
    hands out: the 16-byte row of a kept patch brings its neighbour's along.
    """

    least: int
    l2: int
    sectors: int


def traffic(
    index_BK: Tensor, patch: tuple[int, int, int], grid: tuple[int, int, int], D: int, block_M: int, block_D: int
) -> Traffic:
    """Of frames that the grid covers, kept at `index_BK` (distinct in a sample, on a CPU), in tiles of block_M x block_D."""
    B, K = index_BK.shape
    features = 3 * math.prod(patch)
    weights, bias_aggregate, tokens = 2 * D * features, 4 * D, 2 * B * (K + 1) * D
    position, indices, pixels = 2 * D, 8 * B * K, B * K * features
    others = weights + bias_aggregate + index_BK.unique().numel() * position + indices + tokens
    tiles_M, tiles_D = -(-B * K // block_M), -(-D // block_D)
    padded_M, padded_D = tiles_M * block_M, tiles_D * block_D
    l2 = tiles_D * padded_M * (features + 8) + tiles_M * padded_D * features * 2
    with_aggregate = sum(-(-first // K) * K < first + block_M for first in range(0, padded_M, block_M))
    l2 += (tiles_M + with_aggregate) * 2 * D + padded_M * position + tokens
    sectors = sum(_sectors(index, patch, grid) for index in index_BK) * 32
    return Traffic(pixels + others, l2, sectors + others)


def _sectors(index_K: Tensor, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> int:
    """32-byte sectors of one sample's frames that hold a byte of a kept patch."""
    (pt, ph, pw), (_, h, w) = patch, grid
    frame, channel, row = torch.meshgrid(torch.arange(pt), torch.arange(3), torch.arange(ph), indexing="ij")
    runs = ((frame * 3 + channel) * h * ph + row) * w * pw
    starts = ((index_K // (h * w) * pt * 3 * h + index_K // w % h) * ph * w + index_K % w) * pw
    first = (starts[:, None] + runs.flatten()).flatten()
    touched = [(first + offset) // 32 for offset in (*range(0, pw, 32), pw - 1)]
    return int(torch.cat(touched).unique().numel())


TUBELET, VIDEO, AUDIO = (4, 16, 16), (8, 14, 14), (1200,)

ROW = Kernel(
    name="patch_project",
    op=patch_project,
    reference=patch_project_reference,
    eager=patch_project_eager,
    differentiable=("weight_DF", "bias_D", "aggregate_D", "position_ND"),
    matrix=True,
    cases=(
        Case("one_patch_of_one", _make(1, (2, 8, 8), (1, 1, 1), 24)),
        Case("one_kept", _make(3, (2, 8, 8), (2, 2, 2), 20, kept=1)),
        Case("every_patch", _make(2, (2, 8, 8), (2, 2, 3), 33)),
        Case("kept", _make(3, (4, 16, 16), (2, 2, 3), 40, kept=7)),
        Case("unsorted", _make(2, (2, 8, 8), (2, 3, 3), 32, kept=11, ordered=False)),
        Case("odd_patch", _make(2, (4, 5, 7), (2, 2, 3), 17, kept=5)),
        Case("beyond_the_grid", _make(2, (2, 8, 8), (1, 2, 3), 16, kept=3, extra=5)),
        Case("strided", _make(2, (2, 8, 8), (2, 2, 2), 36, kept=5, signal="strided")),
        Case("float_frames", _make(2, (2, 8, 8), (2, 2, 2), 24, kept=3, signal="floats")),
        Case("no_position", _make(2, (2, 8, 8), (2, 2, 2), 24, kept=5, position=False)),
        Case("no_position_every_patch", _make(2, (2, 8, 8), (1, 2, 2), 24, position=False)),
        Case("no_aggregate", _make(2, (2, 8, 8), (2, 2, 2), 24, kept=5, aggregate=False)),
        Case("wider_than_a_block", _make(2, (2, 8, 8), (5, 4, 4), 150, kept=77)),
        Case("wave", _make(3, (128,), (20,), 32, kept=9)),
        Case("wave_odd", _make(2, (25,), (9,), 21, kept=4, extra=3)),
        Case("wave_every_patch", _make(2, (32,), (7,), 32)),
        Case("dropout", _make(4, (2, 8, 8), (2, 2, 3), 70, kept=5, samples=4)),
        Case("dropout_every_patch", _make(2, (2, 8, 8), (2, 2, 2), 33, samples=2)),
        Case("dropout_without_position", _make(2, (32,), (9,), 40, kept=6, position=False, samples=2)),
    ),
    shapes=(
        _shape("video large, 50 % drop", 64, TUBELET, VIDEO, 1024, 784),
        _shape("video large, 75 % drop", 64, TUBELET, VIDEO, 1024, 392),
        _shape("video large, no drop", 64, TUBELET, VIDEO, 1024),
        _shape("audio base, 50 % drop", 64, (128,), AUDIO, 768, 600),
        _shape("video large, 50 % drop, dropout", 64, TUBELET, VIDEO, 1024, 784, samples=64),
    ),
    launches=_launches,
)
