"""The contrastive loss on a CPU: tiles of logits that stay in the cache, made by PyTorch's products into one buffer.

See `vatt.kernels.contrastive` for what is computed. Also the two ends of both paths, CPU and GPU: lengths of features, and the
gradient through the division by them.

G clips, L candidates of a clip, R = G L candidates, D features; m rows (videos) and n columns (candidates) of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vatt.kernels.contrastive import Slopes

ROWS, COLUMNS = 512, 1024  # of a tile, at most: with its slopes and features it fits the outer caches
LEAST_LENGTH = 1e-6


def lengths(x_RD: Tensor) -> Tensor:
    """(R,) in at least fp32: what each row is divided by."""
    exact = torch.promote_types(x_RD.dtype, torch.float32)
    return torch.linalg.vector_norm(x_RD, dim=-1, dtype=exact).clamp_(min=LEAST_LENGTH)


def through_length(dx_RD: Tensor, x_RD: Tensor, length_R: Tensor) -> Tensor:
    """The gradient of x from dx_RD, that of x / length with length held fixed; overwrites it. In the dtype of x.

    It loses its part along x, except where x is too short to be divided by its own length.
    """
    unit_RD = x_RD.to(dx_RD.dtype) / length_R[:, None]
    along_R = torch.linalg.vecdot(unit_RD, dx_RD).masked_fill_(length_R <= LEAST_LENGTH, 0.0)
    return dx_RD.sub_(unit_RD.mul_(along_R[:, None])).to(x_RD.dtype)


class _Features:
    """Unit rows in at least fp32, the video's divided by the temperature, and the tiles of their products."""

    def __init__(self, video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, temperature: float) -> None:
        self.lengths = lengths(video_GD), lengths(other_RD)
        exact = self.lengths[0].dtype
        self.video = (video_GD.to(exact) / self.lengths[0][:, None]).div_(temperature)
        self.other = other_RD.to(exact) / self.lengths[1][:, None]
        self.G, self.L = valid_GL.shape
        self.invalid = None if valid_GL.all() else ~valid_GL.flatten()
        clips = max(1, COLUMNS // self.L)
        self.step = min(ROWS, self.G), min(clips, self.G)
        self.buffer = self.video.new_empty(self.step[0] * self.step[1] * self.L)
        # |logit| <= 1 / temperature, so e^(l - 1 / temperature) needs no running maximum where it cannot underflow.
        self.bound = 1.0 / temperature
        self.bounded = 2.0 * self.bound < math.log(torch.finfo(exact).max) - 8.0

    def tiles(self) -> Iterator[tuple[Tensor, slice, slice, tuple[Tensor, Tensor, Tensor]]]:
        """(logits (m, n), rows, columns, own): -inf where not valid; own = clips whose own pairs are in the tile, and their
        places in logits.view(m, clips, L).
        """
        m, n = self.step
        for k in range(0, self.G, n):
            clips = slice(k, min(k + n, self.G))
            columns = slice(k * self.L, clips.stop * self.L)
            for i in range(0, self.G, m):
                rows = slice(i, min(i + m, self.G))
                shape = rows.stop - i, columns.stop - columns.start
                logits = torch.mm(self.video[rows], self.other[columns].T, out=self.buffer[: shape[0] * shape[1]].view(shape))
                if self.invalid is not None:
                    logits.masked_fill_(self.invalid[columns], -math.inf)
                both = torch.arange(max(i, k), max(i, k, min(rows.stop, clips.stop)))
                yield logits, rows, columns, (both, both - i, both - k)


def forward(
    video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, temperature: float, all_pairs: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-sum-exps (positive, row, column), (G,) each, -inf over nothing. all_pairs: rows without own pairs, column None."""
    features = _Features(video_GD, other_RD, valid_GL, temperature)
    own_GL = features.video.new_empty(valid_GL.shape)
    start = 0.0 if features.bounded else -math.inf
    row_G = features.video.new_full((features.G,), start)
    column_R = row_G.new_full((0 if all_pairs else valid_GL.numel(),), start)
    for logits, rows, columns, (own, i, k) in features.tiles():
        if len(own):
            logits_mnL = logits.view(len(logits), -1, features.L)
            own_GL[own] = logits_mnL[i, k]
            if all_pairs:
                logits_mnL[i, k] = -math.inf
        if features.bounded:
            logits.sub_(features.bound).exp_()
            row_G[rows] += logits.sum(1)
            if not all_pairs:
                column_R[columns] += logits.sum(0)
        else:
            row_G[rows] = torch.logaddexp(row_G[rows], logits.logsumexp(1))
            if not all_pairs:
                column_R[columns] = torch.logaddexp(column_R[columns], logits.logsumexp(0))
    if features.bounded:
        row_G, column_R = (x.log_().add_(features.bound) for x in (row_G, column_R))
    return own_GL.logsumexp(1), row_G, None if all_pairs else column_R.view_as(valid_GL).logsumexp(1)


def backward(slopes: Slopes, video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(dvideo, dother) in the dtype of the features."""
    features = _Features(video_GD, other_RD, valid_GL, temperature)
    dvideo, dother = torch.zeros_like(features.video), torch.zeros_like(features.other)
    second = torch.empty_like(features.buffer)
    row_G, column_R = slopes.row, None if slopes.column is None else slopes.column.repeat_interleave(features.L)
    column_sum_R = None if slopes.column_sum is None else slopes.column_sum.repeat_interleave(features.L)
    if features.bounded:
        # The exponent of a clip without valid candidates is meaningless, and its slope 0.
        row_G = row_G * (features.bound - slopes.row_sum).clamp(max=2.0 * features.bound).exp()
        if column_R is not None and column_sum_R is not None:
            column_R.mul_(column_sum_R.neg_().add_(features.bound).clamp_(max=2.0 * features.bound).exp_())
    for logits, rows, columns, (own, i, k) in features.tiles():
        other = second[: logits.numel()].view_as(logits)
        logits_mnL = logits.view(len(logits), -1, features.L)
        own_gradient = _own_gradients(slopes, logits_mnL[i, k], own) if len(own) else None
        if features.bounded:
            logits.sub_(features.bound).exp_()
            if column_R is None:
                logits.mul_(row_G[rows, None])
            else:
                logits.mul_(torch.add(row_G[rows, None], column_R[columns], out=other))
        else:
            if column_R is not None and column_sum_R is not None:
                torch.sub(logits, column_sum_R[columns], out=other).exp_().mul_(column_R[columns])
            logits.sub_(slopes.row_sum[rows, None]).exp_().mul_(row_G[rows, None])
            if column_R is not None:
                logits.add_(other)
        if own_gradient is not None:
            logits_mnL[i, k] = own_gradient
        dvideo[rows].addmm_(logits, features.other[columns])
        dother[columns].addmm_(logits.T, features.video[rows])
    # The video's rows were divided by the temperature; dvideo is that of cosines before it is scaled back.
    dvideo.div_(features.lengths[0][:, None] * temperature)
    dother.div_(features.lengths[1][:, None])
    return through_length(dvideo, video_GD, features.lengths[0]), through_length(dother, other_RD, features.lengths[1])


def _own_gradients(slopes: Slopes, logits_nL: Tensor, own_n: Tensor) -> Tensor:
    """dL/dlogit of the own pairs of clips own_n. From the same logits as the sums: their rounding errors cancel."""

    def term(slope: Tensor, log_sum: Tensor) -> Tensor:
        return (logits_nL - log_sum[own_n, None]).exp_().mul_(slope[own_n, None])

    found = term(slopes.own, slopes.own_sum)
    if slopes.column is not None and slopes.column_sum is not None:
        found += term(slopes.row, slopes.row_sum)
        found += term(slopes.column, slopes.column_sum)
    return found
