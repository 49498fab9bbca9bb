"""dropout: where no other kernel fuses it."""

from __future__ import annotations

import torch
from torch import Tensor

from vatt.kernels.contract import Arguments, Case, Kernel, Make, Shape, divisible, drawn
from vatt.kernels.dropout import DropoutMask, dropout, dropout_eager, dropout_reference
from vatt.kernels.rows.bias_gelu import mask


def _make(*shape: int, samples: int, rate: float = 0.1, strided: bool = False) -> Make:
    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        x = drawn((*shape[:-1], 2 * shape[-1]), dtype, device)[..., ::2] if strided else drawn(shape, dtype, device)
        return {"x": x, **mask(samples, device, rate)._asdict()}

    return make


def _launches(x: Tensor, rate: float, seed: Tensor, step: Tensor, sample_id: Tensor, stream: int) -> None:
    from vatt.kernels.gpu.dropout import dropout

    dropout(dropout(x, DropoutMask(rate, seed, step, sample_id, stream)), DropoutMask(rate, seed, step, sample_id, stream))


@divisible("batch")
def _shape(name: str, batch: int, tokens: int, width: int) -> Shape:
    moved = 2 * 2 * batch * tokens * width
    return Shape(name, _make(batch, tokens, width, samples=batch), forward_bytes=moved, backward_bytes=moved)


ROW = Kernel(
    name="dropout",
    op=dropout,
    reference=dropout_reference,
    eager=dropout_eager,
    differentiable=("x",),
    cases=(
        Case("one_row", _make(1, 64, samples=1)),
        Case("one_column", _make(9, 1, samples=3)),
        Case("odd_columns", _make(6, 5, 123, samples=3, rate=0.5)),
        Case("longer_than_a_block", _make(2, 3, 1030, samples=2)),
        Case("rows_of_a_clip", _make(6, 3, 64, samples=2)),
        Case("strided", _make(4, 72, samples=4, strided=True)),
        Case("nearly_all_dropped", _make(4, 200, samples=4, rate=0.99)),
    ),
    shapes=(_shape("video large, tokens", 64, 785, 1024), _shape("audio base, tokens", 64, 601, 768)),
    launches=_launches,
)
