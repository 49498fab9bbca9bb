"""The step counted on meta tensors, against closed forms: FLOPs of the whole, bytes of what a block reads and writes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vatt.benchmarks.steps import recipe
from vatt.engine.config import RunConfig
from vatt.engine.profile.counted_step import ADAM_BYTES, counted_step, totals
from vatt.engine.profile.flops import step_flops
from vatt.engine.profile.roofline import CEILINGS

H200 = CEILINGS["h200"]


def whole(size: str, batch: int, drop_rate: float = 0.5, *overrides: str) -> RunConfig:
    return recipe(size, "bf16", batch, ["--model.last_block=all", *overrides], drop_rate)


def by_operator(config: RunConfig) -> dict:
    return {work.operator: work for work in counted_step(config, H200)}


@pytest.mark.parametrize(
    ("size", "batch", "drop_rate"), [("bbs", 3, 0.5), ("mbs", 2, 0.0), ("lbs", 2, 0.75), ("lbs", 64, 0.5)], ids=str
)
def test_flops_are_those_of_the_closed_form(size: str, batch: int, drop_rate: float) -> None:
    config = whole(size, batch, drop_rate)
    works = counted_step(config, H200)
    # The closed form leaves out what an implementation does twice: attention's scores and the logits in backward.
    again = 0.0
    for work in works:
        if work.operator == "vatt.attention_backward":
            again += work.flops / 5
        if work.operator == "vatt.contrastive_backward":
            again += work.flops / 3
    assert totals(works).flops - again == pytest.approx(step_flops(config), rel=1e-9)


@pytest.mark.parametrize("size", ["bbs", "lbs"])
def test_bytes_of_a_block_are_those_of_its_tensors(size: str) -> None:
    """The difference of two depths of the video tower is one block, whose tensors are known on paper; bf16 is 2 bytes."""
    batch, tokens = 4, 785
    shape = whole(size, batch).model.video
    less = whole(size, batch, 0.5, f"--model.video.layers={shape.layers - 1}")
    deep, shallow = by_operator(whole(size, batch)), by_operator(less)
    M, D, F = batch * tokens, shape.width, shape.hidden
    log_sums, statistics = 4 * batch * shape.heads * tokens, 4 * M

    def block(name: str) -> float:
        return deep[name].bytes - shallow[name].bytes

    assert block("vatt.attention") == 2 * (3 * M * D + M * D) + log_sums
    assert block("vatt.attention_backward") == 2 * (M * D + 3 * M * D + M * D + 3 * M * D) + log_sums
    assert block("vatt.bias_gelu") == 2 * (2 * M * F + F)
    assert block("vatt.bias_gelu_backward") == 2 * (3 * M * F + 2 * F)
    # Two norms a block; each reads branch and stream, writes both, and keeps two statistics a row.
    assert block("vatt.add_layer_norm") == 2 * (2 * (4 * M * D + 2 * D) + 2 * statistics)
    # Gradients of both results and the saved stream in, one shared gradient out; weight in, and its two gradients out.
    assert block("vatt.add_layer_norm_backward") == 2 * (2 * (4 * M * D + 3 * D) + 2 * statistics)
    products = {(D, 3 * D): True, (D, D): True, (D, F): False, (F, D): True}  # (K, N): the bias is in the product
    forward = sum(2 * (M * K + K * N + M * N + bias * N) for (K, N), bias in products.items())
    backward = sum(2 * 2 * (M * K + K * N + M * N) for K, N in products)
    assert block("aten.addmm") + block("aten.mm") == forward + backward


def test_patches_that_are_dropped_are_not_read() -> None:
    dense, half = (by_operator(whole("bbs", 4, rate))["vatt.patch_project"] for rate in (0.0, 0.5))
    pixels = 4 * 784 * 3072
    tokens = 2 * 4 * 784 * 768
    audio = 4 * 600 * (4 * 128 + 2 * 768)
    index = 8 * 4 * (784 + 600)
    assert dense.bytes - half.bytes == pixels + tokens + audio - index


def test_adam_is_bytes_alone() -> None:
    adam = by_operator(whole("bbs", 2))["adam"]
    parameters = adam.bytes / ADAM_BYTES
    assert adam.flops == 0 and parameters == int(parameters) and 150e6 < parameters < 250e6
    assert adam.seconds == pytest.approx(adam.bytes / 4.8e12)


def test_time_is_the_sum_of_what_binds() -> None:
    """Doubling both ceilings halves it; no operator is faster than either."""
    config = whole("bbs", 2)
    works = counted_step(config, H200)
    faster = counted_step(config, replace(H200, tflops=2 * H200.tflops, tb_s=2 * H200.tb_s))
    assert totals(faster).seconds == pytest.approx(totals(works).seconds / 2)
    for work in works:
        assert work.seconds >= max(work.flops / H200.tflops, work.bytes / H200.tb_s) / 1e12 * (1 - 1e-9), work.operator


def test_a_last_block_of_agg_alone_does_less() -> None:
    config = whole("bbs", 4)
    agg = replace(config, model=replace(config.model, last_block="agg"))
    assert totals(counted_step(agg, H200)).flops < totals(counted_step(config, H200)).flops


def test_launches_of_our_operators_are_those_of_their_wrappers() -> None:
    """Attention: one kernel forward, two backward; a fused norm forward: one; a product of PyTorch: one."""
    works = by_operator(whole("bbs", 2))
    attention, backward, norm = (works[f"vatt.{name}"] for name in ("attention", "attention_backward", "add_layer_norm"))
    assert attention.launches == attention.calls and norm.launches == norm.calls
    assert backward.launches >= 2 * backward.calls
    assert totals(works.values()).launches > totals(works.values()).calls
    assert works["aten.mm"].launches == works["aten.mm"].calls
