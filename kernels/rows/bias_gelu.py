"""bias_gelu: the middle of every feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor

from vatt.kernels.bias_gelu import bias_gelu, bias_gelu_eager, bias_gelu_reference
from vatt.kernels.contract import Arguments, Case, Kernel, Make, Shape, divisible, drawn
from vatt.kernels.dropout import DropoutMask


def _make(*shape: int, bias: bool = True, samples: int = 0, strided: bool = False, spread: float = 1.0) -> Make:
    """samples: 0 for no dropout. spread: of x."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        whole = (*shape[:-1], 2 * shape[-1]) if strided else shape
        x = drawn(whole, dtype, device, spread=spread)
        return {
            "x": x[..., ::2] if strided else x,
            "bias_C": drawn(shape[-1:], dtype, device, 1) if bias else None,
            "dropout": mask(samples, device) if samples else None,
        }

    return make


def mask(samples: int, device: torch.device, rate: float = 0.1, stream: int = 1030) -> DropoutMask:
    """A dropout of a training step in the middle of a run."""
    seed, step = (torch.tensor(value, device=device) for value in (2**40 + 5, 123_456))
    return DropoutMask(rate, seed, step, torch.arange(samples, device=device) * 1000 + 7, stream)


def _launches(x: Tensor, bias_C: Tensor | None, dropout: DropoutMask | None) -> None:
    from vatt.kernels.gpu.bias_gelu import backward, forward

    backward(forward(x, bias_C, dropout), x, bias_C, dropout)


@divisible("batch", "samples")
def _shape(name: str, batch: int, tokens: int, hidden: int, samples: int = 0, bias: bool = True) -> Shape:
    """Forward reads x and writes y; backward reads x and the gradient of y and writes that of x."""
    elements = batch * tokens * hidden
    return Shape(
        name,
        _make(batch, tokens, hidden, samples=samples, bias=bias),
        forward_bytes=2 * elements * 2,
        backward_bytes=3 * elements * 2,
    )


ROW = Kernel(
    name="bias_gelu",
    op=bias_gelu,
    reference=bias_gelu_reference,
    eager=bias_gelu_eager,
    differentiable=("x", "bias_C"),
    cases=(
        Case("one_row", _make(1, 64)),
        Case("odd_rows", _make(3, 5, 96)),
        Case("odd_columns", _make(7, 123)),
        Case("one_column", _make(9, 1)),
        Case("wider_than_a_block", _make(2, 70, 1030)),
        Case("no_bias", _make(4, 6, 40, bias=False)),
        Case("strided", _make(5, 72, strided=True)),
        Case("dropout", _make(4, 9, 130, samples=4)),
        Case("dropout_rows_of_a_clip", _make(6, 3, 64, samples=2)),
        Case("tails", _make(3, 200, spread=4.0)),
        Case("dropout_without_bias", _make(3, 33, bias=False, samples=3)),
    ),
    shapes=(
        _shape("video large, 50 % drop", 64, 785, 4096),
        _shape("video base, 50 % drop", 64, 785, 3072),
        _shape("audio base, 50 % drop", 64, 601, 3072),
        _shape("video large, no drop", 32, 1569, 4096),
        # No linear layer of the text tower has a bias.
        _shape("text small", 320, 17, 2048, bias=False),
        _shape("video large, dropout", 64, 785, 4096, samples=64),
        _shape("audio base, dropout", 64, 601, 3072, samples=64),
        _shape("text small, dropout", 320, 17, 2048, samples=64, bias=False),
    ),
    launches=_launches,
)
