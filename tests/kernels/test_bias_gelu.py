"""bias_gelu beyond the shared cases: its tails, its gradients in fp64, dropout against the drawn mask, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vatt.kernels.bias_gelu import bias_gelu, bias_gelu_reference
from vatt.kernels.contract import row
from vatt.kernels.dropout import DropoutMask, keep_mask
from vatt.kernels.gpu.bias_gelu import upper_tail
from vatt.kernels.implementation import KernelError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU in this process")


def mask(samples: int, rate: float = 0.25) -> DropoutMask:
    return DropoutMask(rate, torch.tensor(2**35 + 9), torch.tensor(77), torch.arange(samples) * 3 + 1, 1030)


@pytest.mark.parametrize("dropout", [None, mask(2)], ids=["plain", "dropout"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_gradients_in_fp64(implementation: str, bias: bool, dropout: DropoutMask | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, b = (torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 5), (5,)))
    inputs = (x, b) if bias else (x,)
    assert torch.autograd.gradcheck(lambda x, b=None: bias_gelu(x, b, dropout, implementation), inputs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_op_differentiates_in_fp64(bias: bool) -> None:
    """The dispatcher op's own backward on a CPU, which the public function does not use there."""
    x, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 5), (5,)))

    def op(x: Tensor, b: Tensor | None = None) -> Tensor:
        return torch.ops.vatt.bias_gelu(x, b, *mask(4), "native")

    assert torch.autograd.gradcheck(op, (x, b) if bias else (x,))


def test_native_is_gelu_as_torch_has_it() -> None:
    x, b = torch.randn(3, 7), torch.randn(7)
    assert torch.equal(bias_gelu(x), F.gelu(x))
    assert torch.equal(bias_gelu(x, b), F.gelu(x + b))


def test_reference_is_the_erf_form() -> None:
    z = torch.linspace(-8, 8, 81, dtype=torch.float64)
    expected = torch.tensor([v * 0.5 * math.erfc(-v / 2**0.5) for v in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(bias_gelu_reference(z), expected, rtol=1e-12, atol=1e-15)


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 8], ids=lambda rows: f"{rows} rows of a sample")
@pytest.mark.parametrize("implementation", ["native", "reference", "interpreter"])
def test_dropout_is_the_drawn_mask(implementation: str, rows: int) -> None:
    """130 columns: the last group of four is cut short."""
    x = torch.randn(2 * rows, 130).abs() + 0.5  # no zero of its own
    y = bias_gelu(x, None, mask(2), implementation)
    kept = keep_mask(x.shape, *mask(2))
    assert torch.equal(y != 0, kept) and 0.15 < 1 - kept.float().mean() < 0.35
    torch.testing.assert_close(y[kept], F.gelu(x)[kept] / 0.75)


@interpreted
def test_rate_zero_is_no_dropout() -> None:
    x = torch.randn(4, 9)
    for implementation in ("native", "reference", "interpreter"):
        bare = bias_gelu(x, None, None, implementation)
        assert torch.equal(bias_gelu(x, None, mask(4, 0.0), implementation), bare), implementation


@triton.jit
def _tail(p_a, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, upper_tail(tl.load(p_a + o)))


def test_fitted_tail_of_the_normal_distribution() -> None:
    """What 16-bit tensors are computed with, held to far more than they can show: 3.3e-6 is the fit's error, and log2 Phi, as
    far as -30, is rounded to 1.9e-6 in each of the last steps.
    """
    a = torch.cat([torch.linspace(0, 6, 3840), torch.linspace(6, 40, 256)]).to(DEVICE)
    y = torch.empty_like(a)
    _tail[(1,)](a, y, BLOCK=4096)
    truth = torch.special.ndtr(-a.double())
    error = (y.double() - truth).abs()
    assert (error / truth)[:3840].max() < 8e-6
    assert error[3840:].max() < 1e-12 and (y[3840:] >= 0).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_far_tails_and_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([[-60000.0, -300.0, -20.0, 0.0, 20.0, 300.0, 60000.0, float("nan")]], dtype=dtype).requires_grad_()
    y = bias_gelu(x, implementation="interpreter")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y[0, :7], torch.tensor([0, 0, 0, 0, 20, 300, 60000], dtype=dtype)) and y[0, 7].isnan()
    assert torch.equal(dx[0, :7], torch.tensor([0, 0, 0, 0.5, 1, 1, 1], dtype=dtype)) and dx[0, 7].isnan()


@interpreted
def test_bias_gradient_of_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that walk over several blocks of rows, the last of them cut short."""
    from vatt.kernels.gpu import bias_gelu as gpu
    from vatt.kernels.gpu.launch import Tuning

    monkeypatch.setitem(gpu.BACKWARD.candidates, "few", Tuning({"BLOCK_M": 2, "BLOCK_C": 64}, programs=6))
    x, b = torch.randn(23, 150, requires_grad=True), torch.randn(150, requires_grad=True)
    grad = torch.randn(23, 150)
    with gpu.BACKWARD.forced("few"):
        found = torch.autograd.grad(bias_gelu(x, b, mask(23), "interpreter"), (x, b), grad)
    expected = torch.autograd.grad(bias_gelu_reference(x, b, mask(23)), (x, b), grad)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("implementation", ["native", "triton"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_dispatchers_own_checks(implementation: str, bias: bool) -> None:
    x, b = torch.randn(4, 3, 10, requires_grad=True), torch.randn(10, requires_grad=True) if bias else None
    for flat in ((0.0, None, None, None, 0), tuple(mask(4))):
        torch.library.opcheck(torch.ops.vatt.bias_gelu.default, (x, b, *flat, implementation))


X, B = torch.zeros(4, 6), torch.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.long(),), "x: is torch.int64; it must be floating point"),
        ((X[:0],), r"x: has shape \(0, 6\): nothing to compute"),
        ((torch.tensor(1.0),), r"x: has shape \(\): nothing to compute"),
        ((X, torch.zeros(5)), r"bias: has shape \(5,\); x has 6 columns"),
        ((X, B.half()), "bias: is torch.float16, x is torch.float32; cast it"),
        ((X, B.to("meta")), "bias: is on meta, the rest on cpu; move it there"),
        ((X, B, mask(3)), "sample_id: 4 rows are not a multiple of 3 samples"),
        ((X, B, mask(4, 1.0)), r"rate: 1.0 is not in \[0, 1\)"),
        ((X, B, mask(4)._replace(seed=torch.tensor(1, dtype=torch.int32))), "seed: is torch.int32; make it int64"),
        ((X, B, None, "fast"), "implementation: 'fast' is not one of native, reference, interpreter"),
        ((X.bfloat16(), None, None, "interpreter"), "implementation: 'interpreter' takes fp32 or fp16, bf16 is wrong in it"),
        ((X.double(), None, None, "interpreter"), "dtype: torch.float64 has no GPU kernel; use fp32, fp16 or bf16, or 'refer"),
    ],
)
def test_errors_name_argument_and_remedy(arguments: tuple, message: str) -> None:
    with pytest.raises(KernelError, match="bias_gelu: " + message):
        bias_gelu(*arguments)


def test_bytes_of_the_row_are_those_of_its_tensors() -> None:
    for shape in row("bias_gelu").shapes:
        x = shape.make(torch.bfloat16, torch.device("meta"))["x"]
        tensor = x.numel() * x.element_size()
        assert (shape.forward_bytes, shape.backward_bytes) == (2 * tensor, 3 * tensor), shape.name
