"""Patches of a clip, read only where they are kept, and projected to tokens (paper, section 3.1).

B = samples, T frames of 3 x H x W, S audio samples, N = patches of the full grid, K = patches read, F = features of a
patch, D = features of a token. Patches are numbered row-major: time outermost, then rows, then columns. Features of a
video patch are ordered (frame, channel, row, column), so a row of a planar frame is read as one contiguous run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels.dropout import DropoutMask, check_mask, dropped, mask_of
from vatt.kernels.implementation import gpu_module, require, resolve, same_device
from vatt.kernels.linear import linear, linear_reference
from vatt.kernels.read_patches import check_index, missing, read_audio_patches, read_patches, read_video_patches, to_unit_range


def patch_project_reference(
    signal: Tensor,
    weight_DF: Tensor,
    bias_D: Tensor,
    aggregate_D: Tensor | None,
    patch: tuple[int, ...],
    grid: tuple[int, ...],
    index_BK: Tensor | None = None,
    position_ND: Tensor | None = None,
    dropout: DropoutMask | None = None,
) -> Tensor:
    """The tokens in at least fp32, rounded once to the weights' dtype; arguments as for `patch_project`."""
    exact = torch.promote_types(weight_DF.dtype, torch.float32)
    wide = to_unit_range(signal, exact).to(exact)
    tokens_BKD = linear_reference(_read(wide, patch, grid, index_BK), weight_DF.to(exact), bias_D.to(exact))
    if position_ND is not None:
        tokens_BKD = tokens_BKD + _positions(position_ND.to(exact), index_BK)
    tokens_BKD = dropped(tokens_BKD, dropout)
    return _behind(None if aggregate_D is None else aggregate_D.to(exact), tokens_BKD).to(weight_DF.dtype)


def patch_project_eager(
    signal: Tensor,
    weight_DF: Tensor,
    bias_D: Tensor,
    aggregate_D: Tensor | None,
    patch: tuple[int, ...],
    grid: tuple[int, ...],
    index_BK: Tensor | None = None,
    position_ND: Tensor | None = None,
    dropout: DropoutMask | None = None,
) -> Tensor:
    """Project all, then gather, as in the released code and in most others: normalise and copy every patch, project it, add
    its position, and only then take the kept ones. What the kernel has to beat.
    """
    patches_BNF = _read(to_unit_range(signal), patch, grid, None).to(weight_DF.dtype)
    tokens_BND = F.linear(patches_BNF, weight_DF, bias_D)
    if position_ND is not None:
        tokens_BND = tokens_BND + position_ND
    if index_BK is not None:
        tokens_BND = tokens_BND.gather(1, index_BK[..., None].expand(-1, -1, tokens_BND.shape[2]))
    return _behind(aggregate_D, dropped(tokens_BND, dropout))


def patch_project(
    signal: Tensor,
    weight_DF: Tensor,
    bias_D: Tensor,
    aggregate_D: Tensor | None,
    patch: tuple[int, ...],
    grid: tuple[int, ...],
    index_BK: Tensor | None = None,
    position_ND: Tensor | None = None,
    dropout: DropoutMask | None = None,
    implementation: str = "native",
) -> Tensor:
    """(B, 1 + K, D): AGG, then Dropout(patch W^T + bias + position) of every kept patch, in the order of the index.

    signal: (B, T, 3, H, W) frames, uint8 or float in [-1, 1]; or (B, S) waveforms in [-1, 1]. On a GPU it is read where it
    lies, only where it is kept; frames whose rows and patches are multiples of 16 bytes 16 bytes at a time. weight: (D, F),
    bias, aggregate: (D,), position: (N, D), of one dtype, that of the result; a signal of floats is rounded to it.
    aggregate None: (B, K, D), without AGG. patch, grid: (frames, rows, columns) or (samples,), and how many of them; a grid
    beyond the signal pads it with 0 (remainder = ceil), which costs a copy on a GPU. index: int64 (B, K), distinct in a
    sample, or None for every patch in order. On a GPU nobody looks at its values on the host: one outside the grid gives a
    token of NaN, a repeated one a NaN in the position's gradient. dropout: of the tokens (B, K, D), AGG has none; drawn again
    in backward.

    Differentiable in weight, bias, aggregate and position, the same bits every time (no atomics); in a float signal too on a
    CPU. implementation: see `vatt.kernels.implementation`; "native" on a CPU reads the kept patches and multiplies by
    `linear`. Raises KernelError for what the kernels cannot take.
    """
    _check(signal, weight_DF, bias_D, aggregate_D, patch, grid, index_BK, position_ND, dropout)
    dropout = dropout if dropout is not None and dropout.rate > 0.0 else None
    how = resolve("patch_project", implementation, weight_DF)
    if how == "reference":
        return patch_project_reference(signal, weight_DF, bias_D, aggregate_D, patch, grid, index_BK, position_ND, dropout)
    if how == "native":
        read = "reference" if signal.requires_grad else "native"
        tokens_BKD = linear(read_patches(signal, index_BK, patch, grid, weight_DF.dtype, read), weight_DF, bias_D)
        if position_ND is not None:
            tokens_BKD = tokens_BKD + _positions(position_ND, index_BK)
        return _behind(aggregate_D, dropped(tokens_BKD, dropout))
    signal = _readable(signal, patch, grid)
    mask = dropout if dropout is not None else (0.0, None, None, None, 0)
    tokens: Tensor = torch.ops.vatt.patch_project(
        signal, index_BK, weight_DF, bias_D, position_ND, aggregate_D, patch, grid, *mask
    )
    return tokens


def _read(signal: Tensor, patch: tuple[int, ...], grid: tuple[int, ...], index_BK: Tensor | None) -> Tensor:
    if signal.dim() == 5:
        return read_video_patches(signal, patch, grid, index_BK)
    return read_audio_patches(signal, patch[0], grid[0], index_BK)


def _positions(position_ND: Tensor, index_BK: Tensor | None) -> Tensor:
    return position_ND if index_BK is None else position_ND[index_BK]


def _behind(aggregate_D: Tensor | None, tokens_BKD: Tensor) -> Tensor:
    if aggregate_D is None:
        return tokens_BKD
    return torch.cat([aggregate_D.expand(tokens_BKD.shape[0], 1, -1), tokens_BKD], dim=1)


def _readable(signal: Tensor, patch: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """The signal as a kernel reads it: as large as the grid, its rows contiguous."""
    op = "patch_project"
    require(not signal.requires_grad, op, "signal", "wants a gradient, and the kernel has none for pixels; use 'reference'")
    extent = [p * g for p, g in zip(patch, grid, strict=True)]
    frames = signal.dim() == 5
    grow = missing(signal, (extent[0], extent[1], extent[2])) if frames else (0, max(0, extent[0] - signal.shape[1]))
    if any(grow):
        signal = F.pad(to_unit_range(signal), grow)
    elements = signal[0].numel()
    require(elements < 2**31, op, "signal", f"{elements} elements a sample are too many for 32-bit offsets; use 'reference'")
    return signal if signal.stride(-1) == 1 else signal.contiguous()


def _check(
    signal: Tensor,
    weight: Tensor,
    bias: Tensor,
    aggregate: Tensor | None,
    patch: tuple[int, ...],
    grid: tuple[int, ...],
    index: Tensor | None,
    position: Tensor | None,
    dropout: DropoutMask | None,
) -> None:
    """Refuse what no implementation could take; on a CPU the values of the index too."""
    op, shape = "patch_project", tuple(signal.shape)
    require(signal.dim() in (2, 5), op, "signal", f"has shape {shape}; make it (B, T, 3, H, W) frames or (B, S) waveforms")
    require(signal.numel() > 0, op, "signal", f"has shape {shape}: nothing to read")
    fits = signal.is_floating_point() or (signal.dtype == torch.uint8 and signal.dim() == 5)
    require(fits, op, "signal", f"is {signal.dtype}; frames are uint8 or float in [-1, 1], waveforms float")
    axes = 3 if signal.dim() == 5 else 1
    for name, sizes in {"patch": patch, "grid": grid}.items():
        require(len(sizes) == axes and min(sizes) > 0, op, name, f"is {tuple(sizes)}; give {axes} sizes above 0")
    features, places = math.prod(patch) * (signal.shape[2] if axes == 3 else 1), math.prod(grid)
    require(weight.dim() == 2, op, "weight", f"has shape {tuple(weight.shape)}; make it (D, F)")
    require(weight.is_floating_point(), op, "weight", f"is {weight.dtype}; it must be floating point")
    require(weight.shape[1] == features, op, "weight", f"has {weight.shape[1]} columns; a patch has {features} features")
    width = weight.shape[0]
    same_device(op, weight, signal=signal, bias=bias, aggregate=aggregate, index=index, position=position)
    for name, tensor, want in (
        ("bias", bias, (width,)),
        ("aggregate", aggregate, (width,)),
        ("position", position, (places, width)),
    ):
        if tensor is not None:
            require(tuple(tensor.shape) == want, op, name, f"has shape {tuple(tensor.shape)}; make it {want}")
            require(tensor.dtype == weight.dtype, op, name, f"is {tensor.dtype}, weight is {weight.dtype}; cast it")
    kept = places
    if index is not None:
        kept = index.shape[-1]
        given = f"has shape {tuple(index.shape)}; make it (B, K), K above 0"
        require(index.dim() == 2 and len(index) == len(signal) and kept > 0, op, "index", given)
        require(index.dtype == torch.int64, op, "index", f"is {index.dtype}; make it int64")
        if index.device.type == "cpu":  # on a GPU a place outside the grid becomes a NaN token
            check_index(index, places, op)
    require(len(signal) * (kept + 1) < 2**31, op, "signal", "has more than 2^31 tokens; use a smaller batch")
    if dropout is not None:
        check_mask(op, dropout, len(signal), weight)


@torch.library.custom_op("vatt::patch_project", mutates_args=())
def _forward(
    signal: Tensor,
    index: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    aggregate: Tensor | None,
    patch: Sequence[int],
    grid: Sequence[int],
    rate: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_id: Tensor | None,
    stream: int,
) -> Tensor:
    dropout = mask_of(rate, seed, step, sample_id, stream)
    return gpu_module("patch_project").forward(signal, index, weight, bias, position, aggregate, patch, grid, dropout)


@_forward.register_fake
def _(signal, index, weight, bias, position, aggregate, patch, grid, *dropout):  # type: ignore[no-untyped-def]
    kept = math.prod(grid) if index is None else index.shape[1]
    return weight.new_empty(signal.shape[0], kept + (aggregate is not None), weight.shape[0])


@torch.library.custom_op("vatt::patch_project_backward", mutates_args=())
def _backward(
    grad: Tensor,
    signal: Tensor,
    index: Tensor | None,
    patch: Sequence[int],
    grid: Sequence[int],
    has_position: bool,
    has_aggregate: bool,
    rate: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_id: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dweight, dbias, dposition, daggregate); the last two are empty where there is none."""
    dropout = mask_of(rate, seed, step, sample_id, stream)
    return gpu_module("patch_project_backward").backward(grad, signal, index, patch, grid, has_position, has_aggregate, dropout)


@_backward.register_fake
def _(grad, signal, index, patch, grid, has_position, has_aggregate, *dropout):  # type: ignore[no-untyped-def]
    width, channels = grad.shape[2], signal.shape[2] if signal.dim() == 5 else 1
    return (
        grad.new_empty(width, math.prod(patch) * channels),
        grad.new_empty(width),
        grad.new_empty(math.prod(grid), width) if has_position else grad.new_empty(0),
        grad.new_empty(width if has_aggregate else 0),
    )


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    signal, index, _, _, position, aggregate, patch, grid, rate, seed, step, sample_id, stream = inputs
    ctx.save_for_backward(signal, index, seed, step, sample_id)
    ctx.patch, ctx.grid, ctx.has_position, ctx.has_aggregate = patch, grid, position is not None, aggregate is not None
    ctx.rate, ctx.stream = rate, stream


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    signal, index, seed, step, sample_id = ctx.saved_tensors
    mask = ctx.rate, seed, step, sample_id, ctx.stream
    dweight, dbias, dposition, daggregate = _backward(
        grad, signal, index, ctx.patch, ctx.grid, ctx.has_position, ctx.has_aggregate, *mask
    )
    return (
        None,
        None,
        dweight,
        dbias,
        dposition if ctx.has_position else None,
        daggregate if ctx.has_aggregate else None,
        *(None,) * 7,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
