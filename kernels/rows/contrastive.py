"""contrastive: the losses of both common spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from vatt.kernels.contract import Arguments, Case, Kernel, Make, Shape, divisible, drawn
from vatt.kernels.contrastive import Form, Slopes, contrastive, contrastive_eager, contrastive_reference


def _make(
    clips: int,
    candidates: int,
    features: int,
    form: Form = "row_column",
    temperature: float = 0.07,
    valid: str = "all",
    strided: bool = False,
    of: torch.dtype | None = None,
) -> Make:
    """valid: all, some (nine in ten), ragged (clip 0 none, clip 1 one, the others all but their last), none.

    of: always this dtype, whatever is asked for.
    """

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        width = 2 * features if strided else features
        # Clips of one batch differ in length by far more than rounding; a pair has something in common.
        common = drawn((clips, 1, width), of or dtype, device, 3)
        other = drawn((clips, candidates, width), of or dtype, device, 2)
        video = drawn((clips, width), of or dtype, device, 1)
        if device.type != "meta":
            other, video = other + common, video * 4 + common[:, 0]
        other = other.flatten(0, 1)
        return {
            "video_GD": video[:, ::2] if strided else video,
            "other_RD": other[:, ::2] if strided else other,
            "valid_GL": mask(clips, candidates, valid, device),
            "temperature": temperature,
            "form": form,
        }

    return make


def mask(clips: int, candidates: int, kind: str, device: torch.device) -> Tensor:
    valid_GL = torch.ones(clips, candidates, dtype=torch.bool, device=device)
    if kind == "none":
        valid_GL[:] = False
    elif kind == "some":
        valid_GL = drawn((clips, candidates), torch.float64, device, 4) > -1.28
    elif kind == "ragged":
        valid_GL[2:, -1] = candidates == 1
        valid_GL[0] = False
        valid_GL[1:2, 1:] = False
    return valid_GL


def _launches(video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, temperature: float, form: Form) -> None:
    from vatt.kernels.gpu.contrastive import backward, forward

    positive, row, column = forward(video_GD, other_RD, valid_GL, temperature, form == "all_pairs")
    slopes = Slopes(row, row, column, column, row, positive)
    backward(slopes, video_GD, other_RD, valid_GL, temperature)


@divisible("clips")
def _shape(
    name: str,
    clips: int,
    candidates: int,
    features: int,
    form: Form = "row_column",
    dtype: torch.dtype = torch.float32,
    valid: str = "all",
) -> Shape:
    """The heads give fp32. Forward reads features and mask and writes four numbers a clip; backward reads them again and
    writes both gradients. One product of all pairs forward; three backward, as the logits are computed again.
    """
    rows = clips * candidates
    tensors, small = (clips + rows) * features * dtype.itemsize, 16 * clips
    product = 2 * clips * rows * features
    return Shape(
        name,
        _make(clips, candidates, features, form, of=dtype, valid=valid),
        forward_bytes=tensors + rows + small,
        backward_bytes=2 * tensors + rows + small,
        forward_flops=product,
        backward_flops=3 * product,
    )


ROW = Kernel(
    name="contrastive",
    op=contrastive,
    reference=contrastive_reference,
    eager=contrastive_eager,
    differentiable=("video_GD", "other_RD"),
    cases=(
        Case("three_clips", _make(3, 5, 40, form="symmetric")),
        Case("17_clips_one_candidate", _make(17, 1, 512)),
        Case("17_clips_ragged", _make(17, 5, 24, valid="ragged")),
        Case("64_clips", _make(64, 5, 256)),
        Case("64_clips_symmetric", _make(64, 1, 256, form="symmetric", valid="some")),
        Case("64_clips_all_pairs", _make(64, 5, 256, form="all_pairs", valid="some")),
        Case("130_clips", _make(130, 5, 24, valid="some")),
        Case("130_clips_all_pairs", _make(130, 1, 40, form="all_pairs", valid="ragged")),
        Case("130_clips_symmetric", _make(130, 5, 40, form="symmetric", valid="ragged")),
        Case("large_logits", _make(17, 5, 40, temperature=0.01)),
        Case("large_logits_symmetric", _make(17, 5, 40, form="symmetric", temperature=0.01, valid="some")),
        Case("large_logits_all_pairs", _make(17, 1, 40, form="all_pairs", temperature=0.01, valid="ragged")),
        Case("nothing_valid", _make(5, 3, 24, valid="none")),
        Case("nothing_valid_all_pairs", _make(5, 3, 24, form="all_pairs", valid="none")),
        Case("strided", _make(9, 3, 24, strided=True)),
    ),
    shapes=(
        _shape("video-text, 2048 clips", 2048, 5, 256),
        _shape("video-text, 16384 clips", 16384, 5, 256),
        _shape("video-text, 32768 clips", 32768, 5, 256),
        _shape("video-audio, 2048 clips", 2048, 1, 512),
        _shape("video-audio, 16384 clips", 16384, 1, 512),
        _shape("video-text, 16384 clips, all pairs", 16384, 5, 256, form="all_pairs"),
        _shape("video-text, 16384 clips, bf16", 16384, 5, 256, dtype=torch.bfloat16),
    ),
    launches=_launches,
)
