"""Linear layers with eight-bit operands: what is rounded, how far, and that all three products see the rounded numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vatt.kernels.fp8_linear import E4M3, E5M2, fp8_linear, fp8_linear_reference, quantised
from vatt.kernels.implementation import KernelError
from vatt.kernels.linear import Linear


def layer(rows: int = 19, K: int = 32, N: int = 48, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias, grad = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, rows, K), (N, K), (N,), (2, rows, N))
    )
    return x, weight, bias, grad


def back(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values, scale = quantised(x, dtype)
    return values.double() * scale.double()


@pytest.mark.parametrize(("dtype", "bits"), [(E4M3, 3), (E5M2, 2)])
@pytest.mark.parametrize("spread", [1e-20, 1.0, 1e20])
def test_rounding_is_half_a_unit_of_the_format(dtype: torch.dtype, bits: int, spread: float) -> None:
    x = (torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.1) * spread
    assert ((back(x, dtype) - x).abs() <= x.double() * 2.0 ** -(bits + 1) * 1.001).all()
    assert back(x, dtype).max() == pytest.approx(float(x.max()), rel=1e-6), "the range's end is used"


def test_zeros_stay_zeros() -> None:
    values, scale = quantised(torch.zeros(4, 16), E4M3)
    assert scale == 1 and not values.float().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_three_products(dtype: torch.dtype, with_bias: bool) -> None:
    """Against fp64 products of the same rounded operands, so only sums and the last rounding are left to differ."""
    x, weight, bias, grad = layer(dtype=dtype)
    inputs = [t.requires_grad_() for t in ((x, weight, bias) if with_bias else (x, weight))]
    y = fp8_linear(*inputs)
    found = torch.autograd.grad(y, inputs, grad)
    xq, wq, gq = back(x.detach(), E4M3), back(weight.detach(), E4M3), back(grad, E5M2)
    true = [F.linear(xq, wq, bias.detach().double() if with_bias else None), gq @ wq, torch.einsum("brn,brk->nk", gq, xq)]
    if with_bias:
        true.append(grad.double().sum((0, 1)))
    for ours, exact in zip((y, *found), true, strict=True):
        assert ours.dtype == dtype
        error = (ours.detach().double() - exact).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * exact.abs().max(), error
    torch.testing.assert_close(fp8_linear_reference(*(t.detach() for t in inputs)), y.detach(), rtol=0, atol=0)


def test_as_close_to_the_exact_product_as_eight_bits_can_be() -> None:
    x, weight, bias, _ = layer(K=512)
    exact = F.linear(x.double(), weight.double(), bias.double())
    relative = (fp8_linear(x, weight, bias).double() - exact).norm() / exact.norm()
    # Two operands, each off by up to 2^-4 and by 2^-4 / sqrt 3 on average or less.
    assert 1e-3 < relative < 2**-4 * (2 / 3) ** 0.5


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(KernelError, match="fp8_linear: weight: K = 20 is not a multiple of 16"):
        fp8_linear(torch.randn(2, 20), torch.randn(16, 20))
    with pytest.raises(KernelError, match="fp8_linear: weight: N = 8 is not a multiple of 16"):
        fp8_linear(torch.randn(2, 16), torch.randn(8, 16))


def test_opcheck() -> None:
    x, weight, bias, _ = (t.requires_grad_() for t in layer())
    for arguments in ((x, weight, bias), (x, weight, None)):
        torch.library.opcheck(torch.ops.vatt.fp8_linear.default, arguments)


def test_a_layer_asks_for_it() -> None:
    x, *_ = layer()
    plain = Linear(32, 48)
    exact = plain(x)
    plain.eight_bit = True
    assert torch.equal(plain(x), fp8_linear(x, plain.weight, plain.bias)) and not torch.equal(plain(x), exact)


@pytest.mark.gpu
def test_the_gpu_multiplies_the_same_numbers() -> None:
    x, weight, bias, grad = (t.cuda() for t in layer(rows=33, K=128, N=256, dtype=torch.bfloat16))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = fp8_linear(*inputs)
    ours = [y, *torch.autograd.grad(y, inputs, grad)]
    on_cpu = [t.detach().cpu().requires_grad_() for t in inputs]
    z = fp8_linear(*on_cpu)
    for here, there in zip(ours, [z, *torch.autograd.grad(z, on_cpu, grad.cpu())], strict=True):
        torch.testing.assert_close(here.cpu(), there, rtol=2e-2, atol=2e-2 * float(there.detach().abs().max()))
