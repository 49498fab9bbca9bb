"""add_layer_norm: between every two sub-layers of every tower."""

from __future__ import annotations

import torch
from torch import Tensor

from vatt.kernels.add_layer_norm import Form, add_layer_norm, add_layer_norm_eager, add_layer_norm_reference
from vatt.kernels.contract import Arguments, Case, Kernel, Make, Shape, divisible, drawn
from vatt.kernels.dropout import DropoutMask
from vatt.kernels.rows.bias_gelu import mask


def _make(
    *shape: int,
    form: Form = "layer",
    branch: bool = True,
    bias: bool = True,
    branch_bias: bool = False,
    samples: int = 0,
    strided: bool = False,
    mean: float = 0.0,
    spread: float = 1.0,
) -> Make:
    """samples: 0 for no dropout. mean, spread: of the residual stream."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        D = shape[-1]
        residual = (
            drawn((*shape[:-1], 2 * D), dtype, device, 1, spread)[..., ::2]
            if strided
            else drawn(shape, dtype, device, 1, spread)
        )
        return {
            "branch": drawn(shape, dtype, device, 2) if branch else None,
            "residual": residual + mean if mean else residual,
            "weight": drawn((D,), dtype, device, 3),
            "bias": drawn((D,), dtype, device, 4) if bias and form == "layer" else None,
            "form": form,
            "dropout": mask(samples, device, stream=1043) if samples else None,
            "branch_bias": drawn((D,), dtype, device, 5) if branch_bias else None,
        }

    return make


def _launches(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: Form,
    dropout: DropoutMask | None,
    branch_bias: Tensor | None,
) -> None:
    from vatt.kernels.gpu.add_layer_norm import backward, forward

    rms, biases = form == "rms", (bias is not None, branch_bias is not None)
    total, normed, mean, rstd = forward(branch, residual, weight, bias, branch_bias, 1e-6, rms, dropout)
    if branch is None:
        backward(None, normed, residual, mean, rstd, weight, *biases, rms, dropout)
    else:
        backward(total, normed, total, mean, rstd, weight, *biases, rms, dropout)


@divisible("batch", "samples")
def _shape(
    name: str, batch: int, tokens: int, width: int, form: Form = "layer", samples: int = 0, branch: bool = True
) -> Shape:
    """Forward reads branch and stream, writes sum and norm; backward reads the sum and two gradients and writes the stream's,
    and the branch's where a mask makes it another one. 8 bytes a row for the statistics (4 in the rms form), each way.
    """
    tensor, statistics = batch * tokens * width * 2, batch * tokens * (8 if form == "layer" else 4)
    return Shape(
        name,
        _make(batch, tokens, width, form=form, samples=samples, branch=branch),
        forward_bytes=(4 if branch else 2) * tensor + statistics,
        backward_bytes=(3 + branch + (samples > 0)) * tensor + statistics,
    )


ROW = Kernel(
    name="add_layer_norm",
    op=add_layer_norm,
    reference=add_layer_norm_reference,
    eager=add_layer_norm_eager,
    differentiable=("branch", "residual", "weight", "bias", "branch_bias"),
    cases=(
        Case("one_row", _make(1, 64)),
        Case("three_rows", _make(3, 33, branch_bias=True)),
        Case("one_column", _make(9, 1)),
        Case("width_96", _make(3, 5, 96)),
        Case("width_512", _make(2, 7, 512)),
        Case("width_768", _make(11, 768, branch_bias=True)),
        Case("width_1024", _make(3, 1024)),
        Case("width_1030", _make(5, 1030)),
        Case("width_8192", _make(2, 8192)),
        Case("strided", _make(5, 72, strided=True)),
        Case("no_bias", _make(4, 6, 40, bias=False)),
        Case("no_residual_add", _make(4, 6, 40, branch=False)),
        Case("dropout", _make(4, 9, 130, samples=4)),
        Case("dropout_rows_of_a_clip", _make(6, 3, 64, samples=2, branch_bias=True)),
        # fp16 and bf16 still resolve this spread at this offset.
        Case("far_from_zero", _make(6, 96, mean=1000.0, spread=30.0)),
        Case("rms", _make(3, 5, 96, form="rms")),
        Case("rms_one_row", _make(1, 33, form="rms")),
        Case("rms_width_768", _make(5, 768, form="rms", branch_bias=True)),
        Case("rms_no_residual_add", _make(4, 72, form="rms", branch=False, strided=True)),
        Case("rms_dropout", _make(6, 2, 66, form="rms", samples=3)),
    ),
    shapes=(
        _shape("video large, 50 % drop", 64, 785, 1024),
        _shape("video base, 50 % drop", 64, 785, 768),
        _shape("audio base, 50 % drop", 64, 601, 768),
        _shape("video large, no drop", 32, 1569, 1024),
        _shape("text small", 320, 17, 512, form="rms"),
        _shape("text small, LayerNorm", 320, 17, 512),
        _shape("video large, dropout", 64, 785, 1024, samples=64),
        _shape("audio base, dropout", 64, 601, 768, samples=64),
        _shape("text small, dropout", 320, 17, 512, form="rms", samples=64),
        _shape("video large, first norm", 64, 785, 1024, branch=False),
    ),
    launches=_launches,
)
