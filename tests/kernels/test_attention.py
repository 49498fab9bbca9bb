"""Attention against float64, at most twice as wrong as PyTorch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F

from vatt.kernels.attention import attention, attention_reference

IMPLEMENTATIONS = ["auto", "reference", "sdpa", "wide"]


def heads(clips: int, tokens: int, spread: float = 1.0, count: int = 3, features: int = 64) -> torch.Tensor:
    """q, k, v as strided views of one packed projection, as the encoder makes them; float64 values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(tokens)
    packed = torch.randn(clips, tokens, 3 * count * features, generator=generator, dtype=torch.float64) * spread
    return packed.bfloat16().double().unflatten(-1, (3, count, features)).permute(2, 0, 3, 1, 4)


def by_definition(q, k, v, bias=None, scale=None):
    """One query at a time, from the formula."""
    out = torch.empty_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        score = (k[b, h] * q[b, h, i]).sum(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            score = score + bias.expand(*q.shape[:3], k.shape[2])[b, h, i]
        weight = (score - score.max()).exp()
        out[b, h, i] = (weight[:, None] * v[b, h]).sum(0) / weight.sum()
    return out


def run(function, qkv, dtype, bias=None, scale=None, **options):
    """(out, dq, dk, dv[, dbias]) for a fixed cotangent, in float64 after the fact."""
    inputs = [t.to(dtype).requires_grad_() for t in qkv]
    if bias is not None:
        bias = bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        inputs.append(bias)
    out = function(*inputs[:3], bias, scale, **options)
    assert out.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, inputs, cotangent))]


@pytest.mark.parametrize("bias", [None, "heads", "padding"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_reference_is_the_definition(bias, scale):
    q, k, v = heads(2, 7, features=8)
    if bias == "heads":
        bias = torch.randn(1, 3, 7, 7, dtype=torch.float64)
    elif bias == "padding":
        bias = torch.where(torch.arange(7) < 4, 0.0, -1e9).double()[None, None, None]
    torch.testing.assert_close(attention_reference(q, k, v, bias, scale), by_definition(q, k, v, bias, scale))


def test_reference_gradients():
    q, k, v = (t.clone().requires_grad_() for t in heads(1, 5, count=2, features=4))
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention_reference, (q, k, v, bias))


@pytest.mark.parametrize("spread", [1.0, 3.0], ids=["even", "peaked"])
@pytest.mark.parametrize("tokens", [1, 17, 63, 129, 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_error_budget(implementation, dtype, tokens, spread):
    qkv = heads(2, tokens, spread)
    truth = run(attention_reference, qkv, torch.float64)
    ours = run(attention, qkv, dtype, implementation=implementation)
    torch_sdpa = run(lambda q, k, v, bias, scale: F.scaled_dot_product_attention(q, k, v, bias, 0.0, False), qkv, dtype)
    for name, exact, mine, theirs in zip(("out", "dq", "dk", "dv"), truth, ours, torch_sdpa, strict=True):
        floor = torch.finfo(dtype).eps * exact.norm()  # one token: dq and dk are 0, and PyTorch may hit it exactly
        scale = torch.finfo(dtype).eps * truth[0].norm() if tokens == 1 else 0.0
        assert (mine - exact).norm() <= max(2 * (theirs - exact).norm(), floor, scale), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bias_of_the_text_tower(implementation, dtype):
    """Unscaled scores, relative bias with a gradient, padding at -1e9: what T5 asks of attention."""
    qkv = heads(4, 17, spread=0.3)
    generator = torch.Generator().manual_seed(2)
    relative = torch.randn(1, 3, 17, 17, generator=generator, dtype=torch.float64).bfloat16().double()
    padding = torch.where(torch.arange(17)[None] < torch.tensor([[17], [9], [2], [1]]), 0.0, -1e9).double()[:, None, None]
    truth = run(attention_reference, qkv, torch.float64, relative + padding, 1.0)
    ours = run(attention, qkv, dtype, relative + padding, 1.0, implementation=implementation)
    for name, exact, mine in zip(("out", "dq", "dk", "dv", "dbias"), truth, ours, strict=True):
        assert (mine - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm(), name
    masked_keys = ours[2][3, :, 1:]
    assert masked_keys.abs().max() == 0, "a padded key has no gradient"


def test_layout_of_the_inputs_does_not_matter():
    q, k, v = heads(2, 33).to(torch.bfloat16)
    assert not q.is_contiguous()
    assert torch.equal(attention(q, k, v), attention(q.contiguous(), k.contiguous(), v.contiguous()))


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'fast' is not one of auto, reference, sdpa, wide"):
        attention(*heads(1, 3), implementation="fast")  # type: ignore[arg-type]
