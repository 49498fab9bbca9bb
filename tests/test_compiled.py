"""backend.compile: the blocks through torch.compile take the same steps, whole (no graph break)."""

from __future__ import annotations

import pytest
import torch

from vatt.benchmarks.steps import ours, recipe

SMALL = """
data.frames=8 data.size=32 data.audio_samples=2048 data.captions=2 model.text.vocabulary=64 model.text.layers=1
model.video.layers=1 model.video.width=32 model.video.hidden=64 model.video.heads=2
model.audio.layers=1 model.audio.width=32 model.audio.hidden=64 model.audio.heads=2
"""


@pytest.mark.slow
def test_compiled_blocks_take_the_same_steps() -> None:
    losses = {}
    for compiled in (False, True):
        overrides = [f"--{setting}" for setting in SMALL.split()] + [f"--backend.compile={str(compiled).lower()}"]
        torch.manual_seed(0)  # of the synthetic clips
        step, _ = ours(recipe("bbs", "fp32", 4, overrides), "cpu")
        losses[compiled] = [float(step()) for _ in range(3)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
