"""Attention: its definition, every implementation against it, masks, dropout, tiles, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vatt.kernels.attention import attention, attention_eager, attention_reference
from vatt.kernels.contract import Arguments, Case, errors, gradients
from vatt.kernels.dropout import DropoutMask, keep_mask
from vatt.kernels.gpu.attention_tuning import TABLES, tail, tile_waste
from vatt.kernels.gpu.launch import Tunings, recording
from vatt.kernels.gpu.target import TARGETS, on_target
from vatt.kernels.implementation import KernelError
from vatt.kernels.rows.attention import ROW
from vatt.kernels.rows.bias_gelu import mask

CPU = torch.device("cpu")
interpreted = pytest.param("interpreter", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here"))


def packed(B: int, N: int, H: int, D: int, spread: float = 1.0) -> Tensor:
    """fp64 values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(N)
    return (torch.randn(B, N, 3, H, D, generator=generator, dtype=torch.float64) * spread).bfloat16().double()


def drop(samples: int, rate: float = 0.25) -> DropoutMask:
    return mask(samples, CPU, rate, 1042)


def case(name: str) -> Case:
    return next(case for case in ROW.cases if case.name == name)


# ---- what it is ------------------------------------------------------------------------------------------------------


def by_definition(qkv: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """One query at a time, from the formula."""
    B, N, _, H, D = qkv.shape
    out = qkv.new_empty(B, N, H, D)
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in (B, N, H))).tolist():
        q, k, v = qkv[b, i, 0, h], qkv[b, :, 1, h], qkv[b, :, 2, h]
        score = (k * q).sum(-1) * (D**-0.5 if scale is None else scale)
        if bias is not None:
            score = score + bias.expand(B, H, N, N)[b, h, i]
        weight = (score - score.max()).exp()
        out[b, i, h] = (weight[:, None] * v).sum(0) / weight.sum()
    return out.flatten(2)


@pytest.mark.parametrize("bias", [None, "heads", "padding"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_reference_is_the_definition(bias: str | Tensor | None, scale: float | None) -> None:
    qkv = packed(2, 7, 3, 8)
    if bias == "heads":
        bias = torch.randn(1, 3, 7, 7, dtype=torch.float64)
    elif bias == "padding":
        bias = torch.where(torch.arange(7) < 4, 0.0, -1e9).double()[None, None, None]
    torch.testing.assert_close(attention_reference(qkv, bias, scale), by_definition(qkv, bias, scale))


@pytest.mark.parametrize("dropout", [None, drop(1)], ids=["plain", "dropout"])
@pytest.mark.parametrize("implementation", ["native", "reference", "wide"])
def test_gradients_in_fp64(implementation: str, dropout: DropoutMask | None) -> None:
    qkv = packed(2, 5, 2, 4).requires_grad_()
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)

    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention(qkv, bias, None, dropout, implementation)

    assert torch.autograd.gradcheck(attend, (qkv, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tail_of_two", "text", "dropout_captions"])
@pytest.mark.parametrize("implementation", ["auto", "wide"])
def test_other_names_within_budget(implementation: str, name: str, dtype: torch.dtype) -> None:
    """The names that the table of cases does not run."""
    wrong = [error for error in errors(ROW, case(name), dtype, CPU, implementation) if not error.within]
    assert not wrong


@pytest.mark.parametrize("implementation", ["native", "reference", interpreted])
def test_a_view_of_a_wider_projection_is_taken(implementation: str) -> None:
    wide = packed(2, 33, 2, 32).float().flatten(2)
    view = torch.cat((wide, wide), -1)[..., : wide.shape[-1]].unflatten(-1, (3, 2, 32))
    assert not view.is_contiguous()
    assert torch.equal(
        attention(view, implementation=implementation), attention(view.contiguous(), implementation=implementation)
    )


# ---- bias ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["native", "reference", interpreted])
def test_a_hidden_key_has_no_gradient(implementation: str) -> None:
    qkv = packed(4, 17, 2, 32, 0.3).float()
    seen = torch.arange(17)[None] < torch.tensor([[17], [9], [2], [1]])
    bias = torch.where(seen, 0.0, -1e9)[:, None, None]
    grads = gradients(attention, {"qkv_BN3HD": qkv, "bias": bias, "scale": 1.0}, ["qkv_BN3HD"], implementation=implementation)
    hidden = grads["dqkv_BN3HD"][:, :, 1:][~seen]
    assert hidden.numel() and hidden.abs().max() == 0


@pytest.mark.parametrize("value", [-1e9, float("-inf")])
@pytest.mark.parametrize("implementation", [interpreted])
def test_hidden_keys_leave_no_nan(implementation: str, value: float) -> None:
    """Whole tiles hidden before the first key that is seen; and a row that sees nothing attends to everything."""
    qkv = packed(2, 140, 1, 32).float()
    bias = torch.full((2, 1, 1, 140), value)
    bias[0, ..., 133:] = 0.0
    arguments: Arguments = {"qkv_BN3HD": qkv, "bias": bias}
    found = gradients(attention, arguments, ["qkv_BN3HD"], implementation=implementation)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    seen = attention_reference(qkv[:1].double(), bias[:1].double())
    torch.testing.assert_close(found["out"][:1].double(), seen, rtol=1e-5, atol=1e-6)
    everything = attention_reference(qkv[1:].double())
    # Scores of -3e4 have 8 bits behind the point.
    torch.testing.assert_close(found["out"][1:].double(), everything, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(5,), (5, 5), (1, 5), (2, 5, 5), (1, 1, 1, 5), (3, 1, 5, 1), (3, 2, 5, 5)])
@pytest.mark.parametrize("implementation", [interpreted])
def test_every_way_to_broadcast_a_bias(implementation: str, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    arguments: Arguments = {"qkv_BN3HD": packed(3, 5, 2, 32), "bias": bias}
    truth = gradients(attention_reference, arguments | {"bias": bias.double()}, ["qkv_BN3HD", "bias"])
    arguments["qkv_BN3HD"] = arguments["qkv_BN3HD"].float()
    ours = gradients(attention, arguments, ["qkv_BN3HD", "bias"], implementation=implementation)
    assert ours["dbias"].shape == shape and ours["dbias"].dtype == torch.bfloat16
    for name, exact in truth.items():
        eps = torch.finfo(ours[name].dtype).eps
        # A bias that is the same for all keys changes nothing: its true gradient is 0.
        assert (ours[name].double() - exact).abs().max() <= 16 * eps * max(1.0, exact.abs().max()), name


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tokens"), [(1, 67), (3, 18), (1, 32)])
@pytest.mark.parametrize("implementation", ["native", "reference", interpreted])
def test_dropout_is_the_drawn_mask(implementation: str, rows: int, tokens: int) -> None:
    """With values that are the unit vectors, the output is the weights."""
    dropout = drop(2)
    qkv = packed(2 * rows, tokens, 2, 128, 0.2).float()
    qkv[:, :, 2] = torch.eye(tokens, 128)[None, :, None]
    shown = attention(qkv, None, None, dropout, implementation).unflatten(-1, (2, 128))[..., :tokens].transpose(1, 2)
    keep = keep_mask(torch.Size((2 * rows, 2, tokens, tokens)), *dropout)
    assert torch.equal(shown != 0, keep)
    weights = attention(qkv).unflatten(-1, (2, 128))[..., :tokens].transpose(1, 2)
    torch.testing.assert_close(shown, weights * keep / (1 - dropout.rate), rtol=1e-5, atol=1e-7)


def test_rate_zero_is_no_dropout() -> None:
    qkv = packed(2, 9, 2, 32).float()
    assert torch.equal(attention(qkv, dropout=drop(2, 0.0)), attention(qkv))
    assert torch.equal(attention_eager(qkv), attention(qkv, implementation="sdpa"))


# ---- tiles -----------------------------------------------------------------------------------------------------------


def test_the_last_tile_is_as_narrow_as_what_is_left() -> None:
    assert [tail(n, 64) for n in (64, 128, 65, 80, 81, 96, 97, 127, 1)] == [0, 0, 16, 16, 32, 32, 64, 64, 16]
    assert tile_waste(768, 64, 64) == 1.0
    assert tile_waste(785, 64, 64) == 832 * 800 / 785**2
    assert tile_waste(785, 128, 128) == 896 * 800 / 785**2


@pytest.mark.parametrize("tokens", [785, 601])
@pytest.mark.parametrize("target", TARGETS)
def test_little_is_computed_for_padding(target: str, tokens: int) -> None:
    """What ships for heads of 64, forward and both halves of backward."""
    for kernel in ("forward", "backward_q", "backward_kv"):
        blocks = TABLES[kernel, "64", target].pick(TARGETS[target]).blocks
        own, walk = (("BLOCK_M", "BLOCK_N"), ("BLOCK_N", "BLOCK_M"))[kernel == "backward_kv"]
        assert tile_waste(tokens, blocks[own], blocks[walk]) <= 1.15, kernel


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.kernel)
def test_every_tuning_offered_gives_the_same(table: Tunings) -> None:
    """Each in the interpreter, on a length that fills no tile."""
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU in this process; the interpreter is tested where there is none")
    target = TARGETS[next(iter(table.default))]
    kind = table.kernel.split("_sm")[0].rsplit("_", 1)[-1]
    dropout = drop(1) if kind == "dropout" else None
    width = {"32": 32, "128": 128}.get(kind, 64)
    qkv = packed(1, 18 if kind == "short" else 149 - 50 * (dropout is not None), 1, width).to(
        torch.float32 if kind == "fp32" else torch.float16
    )
    truth = gradients(attention_reference, {"qkv_BN3HD": qkv.double(), "dropout": dropout}, ["qkv_BN3HD"])
    for name in table.candidates:
        with table.forced(name), recording(target) as launches:
            ROW.launches(qkv, None, None, dropout)
        assert any(launch.tuning is table.candidates[name] for launch in launches), name
        with on_target(target), table.forced(name):
            found = gradients(attention, {"qkv_BN3HD": qkv, "dropout": dropout}, ["qkv_BN3HD"], implementation="interpreter")
        for output, exact in truth.items():
            eps = torch.finfo(qkv.dtype).eps
            assert (found[output].double() - exact).abs().max() <= 8 * eps * exact.abs().max(), (name, output)


MASKS = """
import json, re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vatt.kernels.gpu.launch import recording
from vatt.kernels.gpu.target import TARGETS
from vatt.kernels.rows.attention import ROW

def loops(text):
    lines = text.splitlines()
    for start, line in enumerate(lines):
        if " scf.for " in line:
            indent = len(line) - len(line.lstrip())
            end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(" " * indent + "}"))
            yield lines[start + 1 : end]

found = []
for target in map(TARGETS.get, sys.argv[1:]):
    for shape in ROW.shapes:
        if shape.name != "video large, 50 % drop":
            continue
        with recording(target) as launches:
            ROW.launches(**shape.make(torch.bfloat16, torch.device("meta")))
        for launch in launches:
            types, constants, aligned = launch.specialisation()
            names = list(launch.kernel.arg_names)
            source = ASTSource(
                fn=launch.kernel,
                signature={name: types[name] for name in names},
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
            )
            options = {"num_warps": launch.tuning.warps, "num_stages": launch.tuning.stages}
            binary = triton.compile(source, target=GPUTarget("cuda", target.capability, 32), options=options)
            ((body),) = loops(binary.asm["ttir"])
            found.append({
                "launch": f"{launch.kernel.__name__} {target.name} {shape.name}",
                "dots": sum("tt.dot " in line for line in body),
                "selects": sum("arith.select" in line for line in body),
                # tt.load %pointer : type, against tt.load %pointer, %mask, %other : type
                "masked": sum(bool(re.search(r"tt.load %[^ ]+,", line)) for line in body),
                "outside": sum("arith.select" in line for line in binary.asm["ttir"].splitlines()),
            })
print(json.dumps(found))
"""


@pytest.mark.slow
def test_no_mask_inside_the_walks() -> None:
    """As Triton compiles them: the loops have the products and neither a select nor a masked load."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", MASKS, *TARGETS], capture_output=True, text=True, env=environment, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(TARGETS) * 3
    for row in found:
        products = {"_forward": 2, "_backward_q": 3, "_backward_kv": 4}[row["launch"].split()[0]]
        assert (row["dots"], row["selects"], row["masked"]) == (products, 0, 0), row
    assert any(row["outside"] for row in found), "the last tile has a select: the count would see one"


# ---- the dispatcher --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dropped", [False, True], ids=["kept", "dropout"])
def test_the_dispatchers_own_checks(bias: bool, dropped: bool) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU in this process; the interpreter is tested where there is none")
    mask = drop(1) if dropped else (0.0, None, None, None, 0)
    b = torch.randn(1, 2, 7, 7, requires_grad=True) if bias else None
    torch.library.opcheck(torch.ops.vatt.attention, (packed(1, 7, 2, 32).float().requires_grad_(), b, 0.2, *mask, "triton"))


def test_nothing_waits_for_triton() -> None:
    code = "import sys, vatt.kernels.attention; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- what is refused -------------------------------------------------------------------------------------------------

X = packed(2, 5, 2, 32).float()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv_BN3HD": X.flatten(2)}, r"attention: qkv: has shape \(2, 5, 192\); unflatten it to \(B, N, 3, H, D\)"),
        ({"qkv_BN3HD": X.transpose(1, 2)}, r"attention: qkv: has shape \(2, 3, 5, 2, 32\)"),
        ({"qkv_BN3HD": X.long()}, "attention: qkv: is torch.int64; it must be floating point"),
        ({"qkv_BN3HD": X[:, :0]}, "nothing to attend to"),
        ({"bias": torch.zeros(1, 2, 5, 4)}, r"attention: bias: has shape \(1, 2, 5, 4\); it must broadcast to \(2, 2, 5, 5\)"),
        ({"bias": torch.zeros(1, 1, 1, 1, 5)}, "attention: bias: has shape"),
        ({"bias": torch.ones(5, dtype=torch.bool)}, "attention: bias: is torch.bool; make it floating point, -1e9"),
        ({"bias": torch.zeros(5, device="meta")}, "attention: bias: is on meta, the rest on cpu"),
        ({"scale": 0.0}, "attention: scale: 0.0 is not a positive number"),
        ({"scale": float("nan")}, "attention: scale: nan is not a positive number"),
        ({"dropout": drop(2, 1.0)}, r"attention: rate: 1.0 is not in \[0, 1\)"),
        ({"dropout": drop(3)}, "attention: sample_id: 2 rows are not a multiple of 3 samples"),
        ({"implementation": "fast"}, "attention: implementation: 'fast' is not one of auto, native, triton, interpreter"),
        ({"implementation": "triton"}, "'triton' takes CUDA tensors, qkv is on cpu; use 'native'"),
        ({"implementation": "cudnn"}, "'cudnn' takes CUDA tensors, qkv is on cpu; use 'native'"),
        (
            {"implementation": "sdpa", "dropout": drop(2)},
            "'sdpa' draws dropout that no counter can replay; use 'native', 'wide'",
        ),
        ({"implementation": "interpreter", "qkv_BN3HD": X.bfloat16()}, "takes fp32 or fp16, bf16 is wrong in it"),
        ({"implementation": "interpreter", "qkv_BN3HD": X.double()}, "torch.float64 has no GPU kernel; use fp32, fp16 or bf16"),
        ({"implementation": "interpreter", "qkv_BN3HD": X[..., :16]}, "head_dim 16 is not one of 32, 64, 128; use 'sdpa'"),
    ],
)
def test_errors_name_argument_and_remedy(arguments: Arguments, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        attention(**({"qkv_BN3HD": X} | arguments))
