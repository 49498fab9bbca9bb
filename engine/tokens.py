"""Signals to tokens: tubelets, waveform patches and words; their positions; DropToken (paper, sections 3.1 and 3.4).

B = samples, N = patches of the full grid, K = patches kept, F = features of a patch, D = features of a token,
A = buckets of a position table, L = words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from vatt.engine.config import AudioConfig, ConfigError, DropRateConfig, VideoConfig, kept_tokens, patch_grid
from vatt.engine.randomness import Draws
from vatt.kernels.counter import Stream
from vatt.kernels.drop_tokens import drop_tokens
from vatt.kernels.dropout import DropoutMask, dropped
from vatt.kernels.patch_project import patch_project

LAYER_NORM_EPSILON = 1e-6


@lru_cache(maxsize=64)
def spline_matrix(knots: int, queries: int) -> Tensor:
    """float64 (queries, knots): resamples a bucket table of `knots` rows to `queries` rows.

    A natural cubic spline through knots at i / knots, read at j / queries and linear beyond the last knot. This is
    what the released code's polyharmonic spline of order 3 equals in exact arithmetic; the paper calls it bicubic.
    """
    at = torch.arange(queries, dtype=torch.float64) * knots / queries
    identity = torch.eye(knots, dtype=torch.float64)
    if knots == 1:
        return identity.expand(queries, 1).contiguous()
    # Second derivatives at the knots, as a matrix that acts on the knots' values; 0 at both ends (natural).
    bend = torch.zeros_like(identity)
    if knots > 2:
        system = torch.diag(torch.full((knots - 2,), 4.0, dtype=torch.float64))
        system += torch.diag(torch.ones(knots - 3, dtype=torch.float64), 1)
        system += torch.diag(torch.ones(knots - 3, dtype=torch.float64), -1)
        bend[1:-1] = torch.linalg.solve(system, 6 * (identity[:-2] - 2 * identity[1:-1] + identity[2:]))
    left = at.floor().long().clamp(max=knots - 2)
    t = (at - left)[:, None]
    inside = t.clamp(max=1)
    rows = identity[left] * (1 - inside) + identity[left + 1] * inside
    rows += bend[left] * ((1 - inside) ** 3 - (1 - inside)) / 6 + bend[left + 1] * (inside**3 - inside) / 6
    end_slope = identity[-1] - identity[-2] + bend[-2] / 6
    return rows + (t - inside) * end_slope


def resample_positions(table_AD: Tensor, count: int) -> Tensor:
    """(count, D) positions from a table of A buckets; differentiable, and the table itself when count = A."""
    if table_AD.shape[0] == count:
        return table_AD
    matrix = spline_matrix(table_AD.shape[0], count).to(table_AD.device)
    return (matrix @ table_AD.double()).to(table_AD.dtype)


class PositionBuckets(nn.Module):
    """One learned table per axis; a token's position is LayerNorm(sum of its buckets), as in the released code.

    (The paper adds the bare sum.) Called with the grid's size on each axis; a size other than the table's is resampled.
    """

    def __init__(self, buckets: Sequence[int], width: int) -> None:
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(count, width)) for count in buckets)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)

    def forward(self, grid: Sequence[int]) -> Tensor:
        """(N, D) for a grid of N = product(grid) tokens, row-major."""
        tables = [resample_positions(table, count) for table, count in zip(self.tables, grid, strict=True)]
        total = tables[0]
        for table in tables[1:]:
            total = total[..., None, :] + table
        return self.norm(total.reshape(-1, total.shape[-1]))


class PatchTokens(nn.Module):
    """Patches -> tokens with positions, reading and projecting only the kept ones. Subclasses say what a patch is.

    `pre_projection` is the modality-agnostic model's Dense + GELU, which comes between projection and position.
    """

    modality: str
    stream: Stream

    def __init__(self, patch: tuple[int, ...], features: int, buckets: Sequence[int], width: int, remainder: str) -> None:
        super().__init__()
        self.patch, self.remainder = patch, remainder
        self.weight = nn.Parameter(torch.empty(width, features))
        self.bias = nn.Parameter(torch.empty(width))
        self.positions = PositionBuckets(buckets, width)

    def grid(self, extent: Sequence[int]) -> tuple[int, ...]:
        """Patches on each axis of a signal of this extent. Raises ConfigError when an axis has none."""
        grid = patch_grid(tuple(extent), self.patch, self.remainder)
        if min(grid) < 1:
            raise ConfigError(f"{self.modality} of size {tuple(extent)} has no whole patch of {self.patch}: enlarge the input")
        return grid

    def choose(self, grid: Sequence[int], drop_rate: DropRateConfig, draws: Draws) -> Tensor | None:
        """int64 (B, K) kept indices of one training step, or None when the rate is 0."""
        rate = getattr(drop_rate, self.modality)
        if rate == 0.0:
            return None
        total = math.prod(grid)
        kept = kept_tokens(total, rate, drop_rate.align)
        shared = drop_rate.choice == "shared"
        return drop_tokens(total, kept, draws.seed, draws.step, draws.sample_id, self.stream, shared=shared)

    def forward(
        self,
        signal: Tensor,
        index_BK: Tensor | None = None,
        pre_projection: nn.Module | None = None,
        aggregate_D: Tensor | None = None,
        dropout: DropoutMask | None = None,
    ) -> Tensor:
        """(B, K, D) tokens of the signal's kept patches, in the order of index_BK; every patch if it is None.

        dropout: of the tokens. aggregate_D: (B, 1 + K, D) with the learned AGG token in front, which is never dropped.
        """
        grid = self.grid(self.extent(signal))
        projection = self.weight, self.bias
        if pre_projection is None:
            position = self.positions(grid)
            return patch_project(signal, *projection, aggregate_D, self.patch, grid, index_BK, position, dropout)
        tokens = pre_projection(patch_project(signal, *projection, None, self.patch, grid, index_BK))
        position = self.positions(grid)
        tokens = dropped(tokens + (position if index_BK is None else position[index_BK]), dropout)
        return tokens if aggregate_D is None else prepend_aggregate(aggregate_D, tokens)

    def extent(self, signal: Tensor) -> tuple[int, ...]:
        """Size of the signal on the axes that are cut into patches."""
        raise NotImplementedError


class VideoTokens(PatchTokens):
    """Tubelets of (B, T, 3, H, W) frames, uint8 or float in [-1, 1]."""

    modality, stream = "video", Stream.KEEP_VIDEO

    def __init__(self, config: VideoConfig, width: int, remainder: str) -> None:
        super().__init__(config.patch, 3 * math.prod(config.patch), config.buckets, width, remainder)

    def extent(self, signal: Tensor) -> tuple[int, ...]:
        return signal.shape[1], signal.shape[3], signal.shape[4]


class AudioTokens(PatchTokens):
    """Patches of (B, S) waveforms in [-1, 1]."""

    modality, stream = "audio", Stream.KEEP_AUDIO

    def __init__(self, config: AudioConfig, width: int, remainder: str) -> None:
        super().__init__((config.patch,), config.patch, (config.buckets,), width, remainder)

    def extent(self, signal: Tensor) -> tuple[int, ...]:
        return (signal.shape[1],)


def prepend_aggregate(aggregate_D: Tensor, tokens_BND: Tensor) -> Tensor:
    """(B, 1 + N, D): the learned AGG token in front of every sample; it has no position and is never dropped."""
    return torch.cat([aggregate_D.expand(tokens_BND.shape[0], 1, -1), tokens_BND], dim=1)
