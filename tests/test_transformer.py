"""Blocks joined through their norms: the same function however the passes over memory are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vatt.engine import transformer
from vatt.engine.config import EncoderConfig
from vatt.engine.randomness import Draws
from vatt.engine.transformer import Encoder, LinearGelu
from vatt.kernels.dropout import DropoutMask

CONFIG = EncoderConfig(size="custom", layers=3, width=32, heads=2, hidden=48)


def encoder(dtype: torch.dtype = torch.float64, dropout: float = 0.2, recompute_layers: int = 0) -> Encoder:
    torch.manual_seed(0)
    built = Encoder(CONFIG, dropout, 0.0, recompute_layers).to(dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return built.train()


def run(built: Encoder, x: Tensor, draws: Draws | None) -> list[Tensor]:
    """Output and every gradient of one cotangent."""
    x = x.clone().requires_grad_()
    y = built(x, draws)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *built.parameters()], weights)]


def stream(samples: int = 4, device: str = "cpu") -> tuple[Tensor, Draws]:
    x = torch.randn(samples, 7, CONFIG.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(device), Draws.at(3, 5, torch.arange(samples, device=device) * 7)


def test_blocks_one_by_one_are_the_encoder() -> None:
    """Each block called alone returns the stream alone; its next norm is then somebody else's pass."""
    built, (x, draws) = encoder(), stream()
    alone = x
    for block in built.blocks:
        alone = block(alone, draws)
    torch.testing.assert_close(built(x, draws), built.dropout(built.norm(alone), draws), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_recomputed_layers_change_nothing(layers: int) -> None:
    x, draws = stream()
    for ours, plain in zip(run(encoder(recompute_layers=layers), x, draws), run(encoder(), x, draws), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_bias_left_to_the_gelu_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, draws = stream()
    plain = run(encoder(), x, draws)
    monkeypatch.setattr(transformer, "takes_bias", lambda x: True)
    for ours, other in zip(run(encoder(), x, draws), plain, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


def test_linear_gelu_is_a_linear_layer_by_name() -> None:
    """Checkpoints and the initialiser see `weight` and `bias` where they were."""
    layer = LinearGelu(6, 4)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"] and isinstance(layer, torch.nn.Linear)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), torch.nn.functional.gelu(x @ layer.weight.T + layer.bias))
    scalars = torch.tensor(1), torch.tensor(2)
    dropped = layer(x, DropoutMask(0.5, *scalars, torch.arange(3), 1030))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * layer(x)[kept])


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_encoder_on_a_gpu(dropout: float) -> None:
    """fp32 through the Triton kernels, against fp64 on the CPU; the budget is twice what the CPU's fp32 is off by."""
    x, draws = stream()
    truth, plain = run(encoder(dropout=dropout), x, draws), run(encoder(torch.float32, dropout), x.float(), draws)
    x, draws = stream(device="cuda")
    ours = run(encoder(torch.float32, dropout).cuda(), x.float(), draws)
    for mine, other, true in zip(ours, plain, truth, strict=True):
        rounding = torch.finfo(torch.float32).eps * true.norm()
        assert (mine.cpu().double() - true).norm() <= 2 * (other.double() - true).norm() + rounding
