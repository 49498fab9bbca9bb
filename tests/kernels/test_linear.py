"""The affine map against float64, on processors with and without bf16 products."""

import pytest
import torch
import torch.nn.functional as F

from vatt.kernels import linear as linear_file
from vatt.kernels.capability import cpu_multiplies_bf16
from vatt.kernels.linear import Linear, linear, linear_reference


@pytest.fixture(params=[False, True], ids=["as the processor is", "widened"])
def widened(request, monkeypatch):
    """Both paths are tested on every machine."""
    if request.param:
        monkeypatch.setattr(linear_file, "widens", lambda x: x.dtype == torch.bfloat16)
    return request.param


def run(function, x, weight, bias, dtype):
    inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
    out = function(*inputs)
    assert out.dtype == dtype
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16().to(dtype)
    grads = torch.autograd.grad(out, inputs, cotangent)
    assert all(g.dtype == dtype for g in grads)
    return [t.detach().double() for t in (out, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(5,), (2, 37), (3, 1, 9)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_error_budget(widened, dtype, shape, with_bias):
    generator = torch.Generator().manual_seed(len(shape))
    x, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64).bfloat16().double() for s in ((*shape, 96), (130, 96), (130,))
    )
    bias = bias if with_bias else None
    truth = run(linear_reference, x, weight, bias, torch.float64)
    ours = run(linear, x, weight, bias, dtype)
    theirs = run(F.linear, x, weight, bias, dtype)
    for name, exact, mine, other in zip(("y", "dx", "dW", "db")[: len(truth)], truth, ours, theirs, strict=True):
        assert (mine - exact).norm() <= 2 * (other - exact).norm() + 1e-12 * exact.norm(), name


def test_reference_gradients():
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,))]
    assert torch.autograd.gradcheck(linear_reference, inputs)
    torch.testing.assert_close(linear_reference(*inputs), F.linear(*inputs))


def test_gradients_only_where_asked(widened):
    x = torch.randn(3, 8).bfloat16()
    weight = torch.randn(4, 8).bfloat16().requires_grad_()
    linear(x, weight).float().sum().backward()
    assert x.grad is None and weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_module_is_a_linear_with_the_same_parameters(widened):
    torch.manual_seed(0)
    ours = Linear(8, 4).bfloat16()
    torch.manual_seed(0)
    theirs = torch.nn.Linear(8, 4).bfloat16()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(ours(x), theirs(x))


def test_widening_is_for_bf16_on_a_cpu_only():
    assert not linear_file.widens(torch.zeros(1))
    assert linear_file.widens(torch.zeros(1, dtype=torch.bfloat16)) == (not cpu_multiplies_bf16())
