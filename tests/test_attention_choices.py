"""What `auto` means for a run is settled once: all calls of a step are known first, measured by rank 0, kept and shared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vatt.benchmarks.steps import recipe
from vatt.engine import attention_choices
from vatt.engine.attention_choices import FILE, calls_of_a_step, settle_attention
from vatt.engine.config import RunConfig
from vatt.engine.distributed import Process
from vatt.kernels.attention_choice import choices, forget_choices, use_choices


def shapes(config: RunConfig, world_size: int = 1) -> list[tuple]:
    return [(call.shape, call.gradient, call.bias is not None) for call in calls_of_a_step(config, world_size)]


def test_the_calls_of_a_step_are_those_of_its_towers() -> None:
    video, audio, text = (8, 785, 3, 16, 64), (8, 601, 3, 12, 64), (40, 17, 3, 8, 64)
    expected = [(video, True, False), (audio, True, False), (text, True, True)]
    assert shapes(recipe("lbs", "bf16", 16), world_size=2) == expected
    (first, *_) = calls_of_a_step(recipe("lbs", "bf16", 16), 2)
    assert first.dtype == torch.bfloat16 and first.scale == 64**-0.5 and first.dropout == 0.0


def test_chunks_ask_without_a_gradient_too() -> None:
    found = shapes(recipe("bbs", "bf16", 10, ["--backend.chunk=4"]))
    assert {shape[0] for shape, _, bias in found if not bias} == {4, 2}
    for clips in (4, 2):
        assert ((clips, 785, 3, 12, 64), True, False) in found and ((clips, 785, 3, 12, 64), False, False) in found


def test_dropout_is_part_of_a_call() -> None:
    dropped = ["--model.last_block=all", "--model.attention_dropout=0.1"]
    assert {call.dropout for call in calls_of_a_step(recipe("bbs", "fp32", 2, dropped), 1)} == {0.1}


def test_rank_0_measures_what_the_file_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring itself needs a GPU; here it is a name made up for each call."""
    config = replace(recipe("bbs", "bf16", 4), output=str(tmp_path))
    made = []

    def make(call, device) -> None:
        made.append(call)
        use_choices({f"call {len(call.shape)} {call.shape[1]}": "triton"})

    monkeypatch.setattr(attention_choices, "_make", make)
    forget_choices()
    try:
        settle_attention(config, Process())
        assert not made and not (tmp_path / FILE).exists(), "a CPU has nothing to settle"
        (tmp_path / FILE).write_text(json.dumps({"kept from before": "cudnn"}))
        settle_attention(config, Process(device=torch.device("cuda", 0)))
        expected = {"kept from before": "cudnn", "call 5 785": "triton", "call 5 601": "triton", "call 5 17": "triton"}
        assert choices() == expected == json.loads((tmp_path / FILE).read_text()) and len(made) == 3
    finally:
        forget_choices()


@pytest.mark.gpu
def test_a_gpu_settles_and_keeps(tmp_path: Path) -> None:
    config = replace(recipe("bbs", "bf16", 2), output=str(tmp_path))
    forget_choices()
    settle_attention(config, Process(device=torch.device("cuda", 0)))
    kept = json.loads((tmp_path / FILE).read_text())
    assert len(kept) == 3
    forget_choices()
    settle_attention(config, Process(device=torch.device("cuda", 0)))
    assert choices() == kept
    forget_choices()
