"""Patches of a clip, read only where they are kept, and projected to tokens (paper, section 3.1).

B = samples, T frames of 3 x H x W, S audio samples, N = patches of the full grid, K = patches read, F = features of a
patch, D = features of a token. Patches are numbered row-major: time outermost, then rows, then columns. Features of a
video patch are ordered (frame, channel, row, column), so a row of a planar frame is read as one contiguous run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels.linear import linear


def read_video_patches(video_BTCHW: Tensor, patch: tuple[int, ...], grid: tuple[int, ...], index_BK: Tensor | None) -> Tensor:
    """(B, K, F) patches in [-1, 1]: float32 from uint8 frames, else in the frames' own dtype.

    patch: frames, rows and columns of one; grid: how many of them along time, rows and columns.

    Pixels beyond the grid are left out (remainder = floor); a grid larger than the frame pads with 0, the middle of
    the range (remainder = ceil). index_BK int64, or None for every patch in order.
    """
    frames, channels = patch[0], video_BTCHW.shape[2]
    (t, h, w), (pt, ph, pw) = grid, patch
    extent = (t * pt, h * ph, w * pw)
    if any(e > have for e, have in zip(extent, (video_BTCHW.shape[1], *video_BTCHW.shape[3:]), strict=True)):
        video_BTCHW = F.pad(to_unit_range(video_BTCHW), _missing(video_BTCHW, extent))
    video = video_BTCHW[:, : extent[0], :, : extent[1], : extent[2]]
    tiles = video.unflatten(1, (t, pt)).unflatten(4, (h, ph)).unflatten(6, (w, pw))  # B t pt C h ph w pw
    if index_BK is None:
        patches = tiles.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(1, 3)
    else:
        sample = torch.arange(len(video), device=video.device)[:, None]
        at_t, at_h, at_w = index_BK // (h * w), index_BK // w % h, index_BK % w
        patches = tiles[sample, at_t, :, :, at_h, :, at_w].flatten(2)
    assert patches.shape[-1] == frames * channels * ph * pw
    return to_unit_range(patches)


def read_audio_patches(audio_BS: Tensor, patch: int, grid: int, index_BK: Tensor | None) -> Tensor:
    """(B, K, F) waveform patches in the waveform's dtype; padding and index as for video."""
    if grid * patch > audio_BS.shape[1]:
        audio_BS = F.pad(audio_BS, (0, grid * patch - audio_BS.shape[1]))
    patches = audio_BS[:, : grid * patch].unflatten(1, (grid, patch))
    if index_BK is None:
        return patches
    return patches[torch.arange(len(patches), device=patches.device)[:, None], index_BK]


def patch_project_reference(
    patches_BKF: Tensor, weight_DF: Tensor, bias_D: Tensor, position_ND: Tensor | None, index_BK: Tensor | None
) -> Tensor:
    """(B, K, D) tokens: patches W^T + b, plus the position of each patch that was read."""
    tokens_BKD = linear(patches_BKF.to(weight_DF.dtype), weight_DF, bias_D)
    if position_ND is None:
        return tokens_BKD
    return tokens_BKD + (position_ND if index_BK is None else position_ND[index_BK])


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]; floats are taken to be in that range already."""
    return pixels.float().mul_(2.0 / 255.0).sub_(1.0) if pixels.dtype == torch.uint8 else pixels


def _missing(video_BTCHW: Tensor, extent: tuple[int, int, int]) -> tuple[int, ...]:
    """The F.pad argument that grows frames, rows and columns at their end to at least `extent`."""
    _, t, _, h, w = video_BTCHW.shape
    grow = [max(0, e - have) for e, have in zip(extent, (t, h, w), strict=True)]
    return 0, grow[2], 0, grow[1], 0, 0, 0, grow[0]
