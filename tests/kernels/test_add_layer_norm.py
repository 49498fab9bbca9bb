"""add_layer_norm beyond the shared cases: gradients in fp64, of either output alone, every tuning, and what it refuses."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from vatt.kernels.contract import row
from vatt.kernels.dropout import DropoutMask, keep_mask
from vatt.kernels.gpu import add_layer_norm as gpu
from vatt.kernels.gpu.launch import Tuning, recording
from vatt.kernels.gpu.partial_sums import LEAST_ROWS
from vatt.kernels.gpu.target import TARGETS
from vatt.kernels.implementation import KernelError

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU in this process")
FORMS = ["layer", "rms"]


def mask(samples: int, rate: float = 0.25) -> DropoutMask:
    return DropoutMask(rate, torch.tensor(2**35 + 9), torch.tensor(77), torch.arange(samples) * 3 + 1, 1027)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def arguments(form: str, *shape: int, dtype: torch.dtype = torch.float32, dropout: bool = True) -> dict[str, Any]:
    """Everything the form takes."""
    D = shape[-1]
    return {
        "branch": drawn(*shape, dtype=dtype, seed=1),
        "residual": drawn(*shape, dtype=dtype, seed=2),
        "weight": drawn(D, dtype=dtype, seed=3),
        "bias": drawn(D, dtype=dtype, seed=4) if form == "layer" else None,
        "eps": 1e-5,
        "dropout": mask(shape[0]) if dropout else None,
        "form": form,
        "branch_bias": drawn(D, dtype=dtype, seed=5),
    }


def leaves(given: dict[str, Any]) -> list[Tensor]:
    return [value for value in given.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_gradients_in_fp64(implementation: str, form: str, dropout: bool) -> None:
    given = arguments(form, 4, 2, 5, dtype=torch.float64, dropout=dropout)
    names = [name for name, value in given.items() if isinstance(value, Tensor)]

    def op(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(**given | dict(zip(names, tensors, strict=True)), implementation=implementation)

    assert len(names) == (5 if form == "layer" else 4)
    assert torch.autograd.gradcheck(op, leaves(given))


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no branch"])
@pytest.mark.parametrize("form", FORMS)
def test_the_op_differentiates_in_fp64(form: str, branch: bool) -> None:
    """The dispatcher op's own backward on a CPU, which the public function does not use there."""
    z, x, w, b, c = (drawn(*s, dtype=torch.float64, seed=i) for i, s in enumerate(((4, 2, 5), (4, 2, 5), (5,), (5,), (5,))))
    flat = (1e-5, form == "rms", *(mask(4) if branch else (0.0, None, None, None, 0)), "native")

    def op(x: Tensor, w: Tensor, b: Tensor | None, z: Tensor | None = None, c: Tensor | None = None) -> tuple[Tensor, ...]:
        total, normed, _, _ = torch.ops.vatt.add_layer_norm(z, x, w, b, c, *flat)
        return (total, normed) if branch else (normed,)

    inputs = (x, w, b if form == "layer" else None, *((z, c) if branch else ()))
    assert torch.autograd.gradcheck(op, inputs)


def test_native_is_what_torch_gives_bit_for_bit() -> None:
    z, x, w, b = (drawn(*s, seed=i) for i, s in enumerate(((3, 4, 33), (3, 4, 33), (33,), (33,))))
    total, normed = add_layer_norm(z, x, w, b, 1e-6)
    assert torch.equal(total, x + z) and torch.equal(normed, F.layer_norm(x + z, (33,), w, b, 1e-6))
    total, normed = add_layer_norm(None, x, w, b, 1e-6)
    assert total is x and torch.equal(normed, F.layer_norm(x, (33,), w, b, 1e-6))


@interpreted
@pytest.mark.parametrize("implementation", ["native", "reference", "interpreter"])
def test_rms_form_written_out(implementation: str) -> None:
    x, w = [[3.0, -4.0, 0.0, 5.0]], [1.0, 2.0, 3.0, -1.0]
    total, normed = add_layer_norm(None, torch.tensor(x), torch.tensor(w), eps=0.5, form="rms", implementation=implementation)
    deviation = math.sqrt((9 + 16 + 25) / 4 + 0.5)
    torch.testing.assert_close(normed[0], torch.tensor([a * g / deviation for a, g in zip(x[0], w, strict=True)]))
    assert torch.equal(total, torch.tensor(x))


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 8], ids=lambda rows: f"{rows} rows of a sample")
@pytest.mark.parametrize("implementation", ["native", "reference", "interpreter"])
def test_dropout_is_the_drawn_mask(implementation: str, rows: int) -> None:
    """Of branch and branch bias together. 130 columns: the last group of four is cut short."""
    x, z, w = torch.zeros(2 * rows, 130), torch.full((2 * rows, 130), 2.0), torch.ones(130)
    total, _ = add_layer_norm(z, x, w, None, 1e-6, mask(2), "layer", torch.ones(130), implementation)
    kept = keep_mask(x.shape, *mask(2))
    assert torch.equal(total != 0, kept) and 0.15 < 1 - kept.float().mean() < 0.35
    torch.testing.assert_close(total[kept], torch.full_like(total, 4.0)[kept])


@interpreted
@pytest.mark.parametrize("implementation", ["native", "reference", "interpreter"])
def test_rate_zero_is_no_dropout(implementation: str) -> None:
    given = arguments("layer", 4, 9, dropout=False)
    without = add_layer_norm(**given, implementation=implementation)
    with_zero = add_layer_norm(**given | {"dropout": mask(4, 0.0)}, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(without, with_zero, strict=True))


@interpreted
@pytest.mark.parametrize("output", [0, 1], ids=["of the sum", "of the norm"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_one_output_alone(form: str, output: int) -> None:
    given = arguments(form, 6, 40)
    grad = drawn(6, 40, seed=9).detach()
    found, expected = (
        torch.autograd.grad(result[output], leaves(given), grad, allow_unused=True)
        for result in (add_layer_norm(**given, implementation="interpreter"), add_layer_norm_reference(**given))
    )
    for ours, truth in zip(found, expected, strict=True):
        truth = torch.zeros_like(ours) if truth is None else truth
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@interpreted
def test_a_branch_without_dropout_shares_the_gradient_of_the_stream() -> None:
    """One tensor is written for both; adding to one in place must not reach the other."""
    given = arguments("layer", 6, 40, dropout=False)
    total, normed = add_layer_norm(**given, implementation="interpreter")
    # The stream is used once more, so that its gradient is accumulated.
    (total.sum() + normed.square().sum() + given["residual"].sum()).backward()
    torch.testing.assert_close(given["residual"].grad, given["branch"].grad + 1)


@interpreted
@pytest.mark.parametrize("width", gpu.FORWARD)
def test_every_tuning_of_every_width(width: int) -> None:
    """Rows somewhat narrower than the block; more of them than a step of any candidate holds, and not a multiple."""
    rows, columns = (17, width - width // 5) if width < 2048 else (5, width - 3)
    given = arguments("layer", rows, columns, dropout=width < 512)
    expected = add_layer_norm_reference(**given)
    grads = [drawn(rows, columns, seed=s).detach() for s in (7, 8)]
    truths = torch.autograd.grad(expected, leaves(given), grads)
    forwards, backwards = gpu.FORWARD[width], gpu.BACKWARD[width]
    # Of backward those of one target: the others differ in their programs alone.
    pairs = [forwards.candidates, [name for name in backwards.candidates if name.endswith("x132")]]
    for forward, backward in zip_longest(*pairs, fillvalue=None):
        with forwards.forced(forward or next(iter(pairs[0]))), backwards.forced(backward or next(iter(pairs[1]))):
            result = add_layer_norm(**given, implementation="interpreter")
            found = torch.autograd.grad(result, leaves(given), grads)
        for ours, truth in zip((*result, *found), (*expected, *truths), strict=True):
            # Sums over rows and columns in another order.
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=2e-5, msg=f"{forward} {backward}")


@interpreted
@pytest.mark.parametrize("programs", [1, 3])
def test_programs_that_walk_over_many_rows(programs: int) -> None:
    """The last block of rows is cut short, and so is the share of the last program."""
    rows = 4 * LEAST_ROWS + 5
    given = arguments("layer", rows, 50)
    grads = [drawn(rows, 50, seed=s).detach() for s in (7, 8)]
    truths = torch.autograd.grad(add_layer_norm_reference(**given), leaves(given), grads)
    table = gpu.BACKWARD[128]
    table.candidates["few"] = Tuning({"BLOCK_M": 4, "BLOCK_D": 128}, 1, 1, programs)
    try:
        with table.forced("few"):
            found = torch.autograd.grad(add_layer_norm(**given, implementation="interpreter"), leaves(given), grads)
    finally:
        del table.candidates["few"]
    for ours, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=2e-5)


@interpreted
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e5])
def test_statistics_far_from_zero(offset: float) -> None:
    """fp32 rows of spread 1 around the offset: their own rounding apart, the norm does not feel it."""
    x = (drawn(4, 96, dtype=torch.float64).detach() + offset).float()
    truth = F.layer_norm(x.double(), (96,), eps=1e-6)
    _, normed = add_layer_norm(None, x, torch.ones(96), eps=1e-6, implementation="interpreter")
    # The mean is rounded to fp32 once; the variance is that of what is left after it.
    assert (normed - truth).abs().max() < torch.finfo(torch.float32).eps * max(abs(offset), 10)


def test_buffer_of_partial_sums_is_small() -> None:
    """The traffic that a backward of many short sums drowns in: written and read again, against the bytes of the row."""
    for target in TARGETS.values():
        for shape in row("add_layer_norm").shapes:
            with recording(target) as launches:
                row("add_layer_norm").launches(**shape.make(torch.bfloat16, torch.device("meta")))
            partial = next(launch.arguments["p_partial"] for launch in launches if "p_partial" in launch.arguments)
            assert isinstance(partial, Tensor)
            share = 2 * partial.numel() * partial.element_size() / shape.backward_bytes
            assert share < (0.15 if "text" in shape.name else 0.06), f"{target.name} {shape.name}: {share:.3f}"


def test_bytes_of_the_row_are_those_of_its_launches() -> None:
    """Every tensor with rows that a launch takes is read or written once; vectors of D and the buffer of sums are left out."""
    for shape in row("add_layer_norm").shapes:
        with recording(TARGETS["sm_90"]) as launches:
            row("add_layer_norm").launches(**shape.make(torch.bfloat16, torch.device("meta")))
        counted = []
        for launch in launches[:2]:
            rowed = [t for n, t in launch.arguments.items() if isinstance(t, Tensor) and n != "p_partial" and n != "p_sample"]
            rows = launch.arguments["M"]
            counted.append(sum(t.numel() * t.element_size() for t in rowed if t.numel() >= rows))
        assert counted == [shape.forward_bytes, shape.backward_bytes], shape.name


@interpreted
@pytest.mark.parametrize("implementation", ["native", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_the_dispatchers_own_checks(form: str, implementation: str) -> None:
    given = arguments(form, 4, 3, 10)
    flat = (1e-6, form == "rms")
    for branch, branch_bias, drop in (
        (given["branch"], given["branch_bias"], tuple(mask(4))),
        (given["branch"], None, (0.0, None, None, None, 0)),
        (None, None, (0.0, None, None, None, 0)),
    ):
        inputs = (branch, given["residual"], given["weight"], given["bias"], branch_bias, *flat, *drop, implementation)
        torch.library.opcheck(torch.ops.vatt.add_layer_norm.default, inputs)


X, W = torch.zeros(4, 6), torch.zeros(6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"form": "batch"}, "form: 'batch' is not one of layer, rms"),
        ({"residual": X.long()}, "residual: is torch.int64; it must be floating point"),
        ({"residual": X[:0], "branch": X[:0]}, r"residual: has shape \(0, 6\): nothing to norm"),
        ({"eps": -1.0}, "eps: -1.0 is negative"),
        ({"weight": W[:5]}, r"weight: has shape \(5,\); residual has 6 columns"),
        ({"bias": W.half()}, "bias: is torch.float16, residual is torch.float32; cast it"),
        ({"branch_bias": torch.zeros(1)}, r"branch_bias: has shape \(1,\); residual has 6 columns"),
        ({"weight": W.to("meta")}, "weight: is on meta, the rest on cpu; move it there"),
        ({"form": "rms", "bias": W}, "bias: the rms form has none; pass None"),
        ({"branch": None, "branch_bias": W}, "branch_bias: there is no branch to add it to; pass None"),
        ({"branch": None, "dropout": mask(4)}, "dropout: there is no branch to drop from; pass None"),
        ({"branch": X[:3]}, r"branch: is \(3, 6\), residual \(4, 6\)"),
        ({"branch": X.half()}, "branch: is torch.float16, residual is torch.float32; cast it"),
        ({"dropout": mask(3)}, "sample_id: 4 rows are not a multiple of 3 samples"),
        ({"dropout": mask(4, -0.1)}, r"rate: -0.1 is not in \[0, 1\)"),
        ({"implementation": "apex"}, "implementation: 'apex' is not one of native, reference, interpreter"),
        (
            {"branch": None, "residual": torch.zeros(1, 8193), "weight": torch.zeros(8193), "implementation": "interpreter"},
            "residual: has 8193 columns, the GPU kernel takes up to 8192; use 'reference'",
        ),
    ],
)
def test_errors_name_argument_and_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match="add_layer_norm: " + message):
        add_layer_norm(**{"branch": X, "residual": X, "weight": W} | given)
