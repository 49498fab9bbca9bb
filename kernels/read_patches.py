"""Patches of a clip, read only where they are kept (paper, section 3.1): a gather, with pixels brought to [-1, 1] on the way.

B = samples, T frames of C x H x W, S audio samples, N = patches of the full grid, K = patches read, F = features of a
patch. Patches are numbered row-major: time outermost, then rows, then columns. Features of a video patch are ordered
(frame, channel, row, column), so a row of a planar frame is read as one contiguous run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels import native
from vatt.kernels.implementation import require, same_device

OP = "read_patches"
READ = (torch.uint8, torch.float32, torch.bfloat16)  # what the C++ takes
WRITTEN = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


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
        video_BTCHW = F.pad(to_unit_range(video_BTCHW), missing(video_BTCHW, extent))
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


def to_unit_range(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [0, 255] -> [-1, 1] in `dtype`; floats are taken to be in that range already."""
    return pixels.to(dtype).mul_(2.0 / 255.0).sub_(1.0) if pixels.dtype == torch.uint8 else pixels


def missing(video_BTCHW: Tensor, extent: tuple[int, int, int]) -> tuple[int, ...]:
    """The F.pad argument that grows frames, rows and columns at their end to at least `extent`."""
    _, t, _, h, w = video_BTCHW.shape
    grow = [max(0, e - have) for e, have in zip(extent, (t, h, w), strict=True)]
    return 0, grow[2], 0, grow[1], 0, 0, 0, grow[0]


def read_patches_reference(
    signal: Tensor, index_BK: Tensor | None, patch: tuple[int, ...], grid: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """(B, K, F) in `dtype`: the two functions above in at least fp32, rounded once."""
    exact = torch.promote_types(dtype, torch.float32)
    signal = signal if signal.dtype == torch.uint8 else signal.to(exact)
    if signal.dim() == 2:
        return read_audio_patches(signal, patch[0], grid[0], index_BK).to(dtype)
    return read_video_patches(signal, patch, grid, index_BK).to(dtype)


def read_patches(
    signal: Tensor,
    index_BK: Tensor | None,
    patch: tuple[int, ...],
    grid: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    implementation: str = "native",
) -> Tensor:
    """(B, K, F) patches in [-1, 1], each value rounded to `dtype` once.

    signal: (B, T, C, H, W) frames, uint8 or float in [-1, 1], or (B, S) waveforms. patch, grid: (frames, rows, columns) or
    (samples,), and how many of them; what the grid reaches beyond the signal is 0, the middle of the range. index: int64
    (B, K) in [0, N), or None for every patch in order.

    implementation: "reference" is PyTorch, differentiable in a float signal. "native" has no gradient; on a CPU it is C++ from
    uint8, fp32 and bf16 to fp32 and bf16, and the reference for other dtypes; on a GPU CUDA C++ (also to fp16), 16 bytes a load
    where rows and patches are multiples of that. An index outside the grid raises KernelError on a CPU; on a GPU, where nobody
    waits for it, a device-side assertion. Raises KernelError for everything else that cannot be read.
    """
    _check(signal, index_BK, patch, grid, dtype)
    require(implementation in ("native", "reference"), OP, "implementation", f"{implementation!r} is not native or reference")
    if implementation == "reference":
        check_index(index_BK, math.prod(grid))
        return read_patches_reference(signal, index_BK, patch, grid, dtype)
    require(not signal.requires_grad, OP, "signal", "wants a gradient, which only 'reference' has")
    patches: Tensor = torch.ops.vatt.read_patches(signal, index_BK, patch, grid, dtype)
    return patches


@torch.library.custom_op("vatt::read_patches", mutates_args=())
def _forward(signal: Tensor, index: Tensor | None, patch: list[int], grid: list[int], dtype: torch.dtype) -> Tensor:
    check_index(index, math.prod(grid))
    device = signal.device.type
    offered = signal.dtype in READ and dtype in WRITTEN[device]
    if device == "cpu" and not (offered and native.loaded()):
        patches = read_patches_reference(signal, index, tuple(patch), tuple(grid), dtype)
        # Every patch of a waveform that needs no conversion is a view of it, which an op may not return.
        seen = patches.untyped_storage().data_ptr() == signal.untyped_storage().data_ptr()
        return patches.clone() if seen else patches.contiguous()
    if device == "cuda":
        require(offered, OP, "dtype", f"{signal.dtype} to {dtype} has no GPU kernel; cast the signal, or use 'reference'")
        native.loaded(required=True, kind="cuda")
    frames = signal if signal.dim() == 5 else signal[:, None, None, None, :]
    frames = frames if frames.stride(-1) == 1 or frames.shape[-1] == 1 else frames.contiguous()
    index = None if index is None else index.contiguous()
    ones = [1] * (3 - len(patch))
    read: Tensor = torch.ops.vatt_native.read_patches(frames, index, [*ones, *patch], [*ones, *grid], dtype)
    return read


@_forward.register_fake
def _(signal, index, patch, grid, dtype):  # type: ignore[no-untyped-def]
    channels = signal.shape[2] if signal.dim() == 5 else 1
    kept = math.prod(grid) if index is None else index.shape[1]
    return signal.new_empty(signal.shape[0], kept, channels * math.prod(patch), dtype=dtype)


def check_index(index: Tensor | None, count: int, op: str = OP) -> None:
    """Raise KernelError (CPU) or assert on the device (CUDA) unless every index is in [0, count)."""
    if index is None or index.numel() == 0:
        return
    if index.device.type == "cpu":
        least, most = (int(bound) for bound in index.aminmax())
        wrong = least if least < 0 else most
        require(least >= 0 and most < count, op, "index", f"{wrong} is outside the grid of {count} patches")
    else:
        torch._assert_async(((index >= 0) & (index < count)).all())


def _check(signal: Tensor, index: Tensor | None, patch: tuple[int, ...], grid: tuple[int, ...], dtype: torch.dtype) -> None:
    shape, axes = tuple(signal.shape), {5: 3, 2: 1}.get(signal.dim(), 0)
    require(axes > 0, OP, "signal", f"has shape {shape}; it is (B, T, C, H, W) or (B, S)")
    require(signal.numel() > 0, OP, "signal", f"has shape {shape}: nothing to read")
    known = signal.dtype == torch.uint8 or signal.is_floating_point()
    require(known, OP, "signal", f"is {signal.dtype}; make it uint8, or floats in [-1, 1]")
    require(signal.device.type in WRITTEN, OP, "signal", f"is on {signal.device}; move it to cpu or cuda")
    require(dtype.is_floating_point, OP, "dtype", f"{dtype} cannot hold values in [-1, 1]; use fp32 or bf16")
    for name, sizes in {"patch": patch, "grid": grid}.items():
        require(len(sizes) == axes, OP, name, f"{tuple(sizes)} has {len(sizes)} axes, the signal {axes}")
        require(all(size >= 1 for size in sizes), OP, name, f"{tuple(sizes)} has an axis without extent")
    if index is not None:
        require(index.dtype == torch.int64, OP, "index", f"is {index.dtype}; make it int64")
        fits = index.dim() == 2 and len(index) == len(signal)
        require(fits, OP, "index", f"has shape {tuple(index.shape)}; make it ({len(signal)}, K)")
        same_device(OP, signal, index=index)


class Traffic(NamedTuple):
    """Bytes that reading a set of patches costs. floor: of the pixels and the result themselves. requested: by the loads and
    stores, whole vectors and the index. sectors: of the 32-byte pieces in which memory is read, each counted once.
    """

    floor: int
    requested: int
    sectors: int


def traffic(
    signal: Tensor, index_BK: Tensor, patch: tuple[int, int, int], grid: tuple[int, int, int], dtype: torch.dtype
) -> Traffic:
    """Counted from the addresses of every run that is read: (B, T, C, H, W) frames, from a multiple of 32 bytes on."""
    _, height, width = grid
    at_t, at_h, at_w = index_BK // (height * width), index_BK // width % height, index_BK % width
    sizes = [torch.arange(n) for n in (patch[0], signal.shape[2], patch[1])]
    f, c, y = torch.meshgrid(*sizes, indexing="ij")
    at = [x.flatten()[:, None, None, None] for x in (at_t, at_h, at_w)]
    frame, row, column = at[0] * patch[0] + f, at[1] * patch[1] + y, (at[2] * patch[2]).expand(-1, *f.shape)
    sample = torch.arange(len(index_BK)).repeat_interleave(index_BK.shape[1])[:, None, None, None]
    exist = ((frame < signal.shape[1]) & (row < signal.shape[3])) * (signal.shape[4] - column).clamp(0, patch[2])
    strides = signal.stride()
    start = sample * strides[0] + frame * strides[1] + c * strides[2] + row * strides[3] + column
    size = signal.element_size()
    first, end = (start * size)[exist > 0], ((start + exist) * size)[exist > 0]
    written = index_BK.numel() * signal.shape[2] * math.prod(patch) * torch.empty(0, dtype=dtype).element_size()
    wide = bool(((first % 16 == 0) & (end % 16 == 0)).all())
    vectors = int((-(-end // 16) - first // 16).sum()) * 16 if wide else int((end - first).sum())
    longest = int((-(-end // 32) - first // 32).max()) if len(first) else 0
    pieces = torch.cat([torch.minimum(first // 32 + i, (end - 1) // 32) for i in range(longest)]) if longest else first
    sectors = len(pieces.unique()) * 32
    floor = int((end - first).sum()) + written
    return Traffic(floor, vectors + written + index_BK.numel() * 8, sectors + written)
