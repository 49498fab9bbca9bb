"""Whose attention runs: the choice of the fastest, with times made up here, and how the libraries are found and called."""

from __future__ import annotations

import json
import logging
import sys
import types

import pytest
import torch
from torch import Tensor

from vatt.kernels import attention_choice, attention_libraries
from vatt.kernels.attention import attention_reference
from vatt.kernels.attention_choice import choices, choose, forget_choices, use_choices
from vatt.kernels.rows.bias_gelu import mask


def packed(tokens: int) -> Tensor:
    return torch.randn(2, tokens, 3, 2, 32, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch):
    """Milliseconds by name instead of measurements; the names measured, in order."""
    forget_choices()
    times: dict[str, float | Exception] = {}
    asked: list[str] = []

    def measure(name: str, *rest) -> float:
        asked.append(name)
        if isinstance(times[name], Exception):
            raise times[name]
        return times[name]

    monkeypatch.setattr(attention_choice, "measure", measure)
    yield times, asked
    forget_choices()


def pick(qkv: Tensor, names: tuple[str, ...] = ("triton", "sdpa", "cudnn"), bias: Tensor | None = None, dropout=None) -> str:
    return choose(names, ["flash2"], lambda *_: qkv, qkv, bias, 1.0, dropout)


def test_the_fastest_is_measured_once_remembered_and_said(timed, caplog: pytest.LogCaptureFixture) -> None:
    times, asked = timed
    times.update(triton=0.7, sdpa=0.9, cudnn=0.5)
    qkv = packed(5)
    with caplog.at_level(logging.INFO, "vatt"):
        assert [pick(qkv), pick(qkv)] == ["cudnn", "cudnn"]
    assert asked == ["triton", "sdpa", "cudnn"]
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("attention: auto: cudnn for 2 x 5 tokens, 2 heads of 32, float64, cpu (cudnn 0.500 ms, triton 0.700")
    assert line.endswith("not for these: flash2)")


def test_every_kind_of_call_is_its_own(timed) -> None:
    times, asked = timed
    times.update(triton=1.0, sdpa=2.0)
    qkv, names = packed(5), ("triton", "sdpa")
    kinds = [
        {"qkv": qkv},
        {"qkv": qkv.clone().requires_grad_()},
        {"qkv": qkv.float()},
        {"qkv": packed(6)},
        {"qkv": qkv, "dropout": mask(2, torch.device("cpu"))},
        {"qkv": qkv, "bias": torch.zeros(1, 2, 5, 5)},
        {"qkv": qkv, "bias": torch.zeros(1, 2, 5, 5, requires_grad=True)},
    ]
    for kind in kinds:
        pick(names=names, **kind)
    assert len(choices()) == len(kinds) and len(asked) == 2 * len(kinds)
    with torch.no_grad():
        pick(kinds[1]["qkv"], names)
    assert len(choices()) == len(kinds), "without gradients it is the first kind again"


def test_choices_travel(timed) -> None:
    times, asked = timed
    times.update(triton=1.0, sdpa=2.0, cudnn=3.0)
    qkv = packed(5)
    pick(qkv)
    made = json.loads(json.dumps(choices()))
    forget_choices()
    use_choices({kind: "sdpa" for kind in made})
    asked.clear()
    assert pick(qkv) == "sdpa" and not asked
    assert pick(qkv, ("triton", "cudnn")) == "triton" and asked, "one that cannot run here is measured anew"


def test_one_that_fails_is_passed_over(timed, caplog: pytest.LogCaptureFixture) -> None:
    times, _ = timed
    times.update(triton=RuntimeError("no image\nfor this device"), sdpa=2.0, cudnn=TypeError())
    with caplog.at_level(logging.INFO, "vatt"):
        assert pick(packed(5)) == "sdpa"
    assert "attention: auto: triton failed: no image" in caplog.messages
    times["sdpa"] = RuntimeError("nor this")
    with pytest.raises(RuntimeError, match="none of triton, sdpa, cudnn ran for 2 x 6 tokens"):
        pick(packed(6))


def test_nothing_is_measured_while_a_graph_is_captured(timed, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    times, asked = timed
    times.update(triton=3.0, sdpa=2.0, cudnn=1.0)
    qkv = packed(5)
    monkeypatch.setattr(attention_choice, "_must_not_measure", lambda: True)
    with caplog.at_level(logging.WARNING, "vatt"):
        assert [pick(qkv), pick(qkv)] == ["triton", "triton"]
    assert not asked and not choices() and len(caplog.records) == 1
    monkeypatch.undo()
    use_choices({attention_choice.kind_of(qkv, None, None): "sdpa"})
    monkeypatch.setattr(attention_choice, "_must_not_measure", lambda: True)
    assert pick(qkv) == "sdpa"


def test_determinism_asked_for_is_given(timed) -> None:
    times, asked = timed
    torch.use_deterministic_algorithms(True)
    try:
        assert pick(packed(5)) == "triton" and not asked
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "remedy"), [("flash2", "pip install flash-attn"), ("flash3", "flash_attn_3 wheel"), ("flash4", "flash-attn-4")]
)
def test_a_library_that_is_not_there_names_its_install(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, attention_libraries.LIBRARIES[name].module, None)
    here = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    refusal = attention_libraries.refusal(name, here, None, None)  # type: ignore[arg-type]
    assert refusal and refusal.startswith(f"{name!r} cannot be imported (") and remedy in refusal
    refused = attention_libraries.refusal(name, here, torch.zeros(5), None)  # type: ignore[arg-type]
    assert refused == f"{name!r} takes no bias; use 'native', 'sdpa' or 'cudnn'"
    here.dtype = torch.float32
    refused = attention_libraries.refusal(name, here, None, None)  # type: ignore[arg-type]
    assert refused == f"{name!r} takes fp16 or bf16, qkv is torch.float32; cast it, or use 'native'"


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
@pytest.mark.parametrize("extra", [False, True], ids=["tensor", "tuple"])
def test_libraries_are_called_as_they_want(name: str, extra: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the library's signature, shapes and result: (B, N, H, D), in some versions with the log-sum-exp."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> Tensor | tuple[Tensor, None]:
        out = attention_reference(torch.stack((q, k, v), 2), None, softmax_scale).unflatten(-1, q.shape[2:])
        return (out, None) if extra else out

    qkv = packed(5)
    module = types.ModuleType("stand_in")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_qkvpacked_func = lambda qkv, **options: flash_attn_func(*qkv.unbind(2), **options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, attention_libraries.LIBRARIES[name].module, module)
    if "flash_attn" not in sys.modules:
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    torch.testing.assert_close(attention_libraries.LIBRARIES[name].run(qkv, None, 0.3), attention_reference(qkv, None, 0.3))
