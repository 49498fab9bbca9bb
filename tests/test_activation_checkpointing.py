"""Blocks that run again in backward instead of being kept: the same gradients, bit for bit, for less memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vatt.engine import recompute
from vatt.engine.config import (
    AudioConfig,
    BackendConfig,
    DataConfig,
    EncoderConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.data.batch import Batch
from vatt.engine.loss import contrastive_losses
from vatt.engine.model import VATT
from vatt.engine.randomness import Draws
from vatt.engine.recompute import recomputed
from vatt.engine.transformer import Block

SHAPE = {"size": "custom", "layers": 3, "width": 16, "heads": 2, "hidden": 24}
CONFIG = RunConfig(
    batch_size=3,
    data=DataConfig(frames=4, size=16, words=5, audio_samples=160, captions=2),
    model=ModelConfig(
        video=VideoConfig(**SHAPE, patch=(2, 8, 8)),
        audio=AudioConfig(**SHAPE, patch=16),
        text=TextConfig(**SHAPE, vocabulary=40, word_width=12, linear_width=20),
        shared=EncoderConfig(**SHAPE),
        post_width=20,
        dropout=0.1,
        attention_dropout=0.1,
    ),
)


def clips() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        video=torch.randint(0, 256, (3, 4, 3, 16, 16), generator=generator, dtype=torch.uint8),
        audio=torch.rand(3, 160, generator=generator) * 2 - 1,
        text=torch.randint(0, 40, (3, 2, 5), generator=generator),
        has_text=torch.ones(3, dtype=torch.bool),
        has_audio=torch.ones(3, dtype=torch.bool),
        sample_id=torch.arange(3),
    )


def gradients(config: RunConfig, precision: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
    """One step's gradients, and how many blocks ran in it."""
    model = VATT(config).train().to(precision)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in model.modules():
        if hasattr(module, "feed_forward_norm"):
            module.register_forward_hook(count)
    batch = clips()
    contrastive_losses(model(batch, Draws.at(5, 3, batch.sample_id)), config.loss).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls


@pytest.mark.parametrize(
    ("kind", "text", "layers", "extra"),
    [
        ("specific", "t5", 1, 3),
        ("specific", "t5", 2, 6),
        ("specific", "t5", 99, 9),
        ("specific", "linear", 3, 6),
        ("agnostic", "t5", 2, 6),
    ],
)
def test_gradients_are_the_same_bits(kind: str, text: str, layers: int, extra: int) -> None:
    """`extra`: the blocks that run a second time, over the towers that have blocks."""
    config = replace(CONFIG, model=replace(CONFIG.model, kind=kind, text=replace(CONFIG.model.text, tower=text)))
    plain, once = gradients(config)
    ours, calls = gradients(replace(config, backend=BackendConfig(recompute_layers=layers)))
    assert calls == once + extra
    assert plain.keys() == ours.keys() and len(plain) > 30
    assert not [name for name, gradient in plain.items() if not torch.equal(ours[name], gradient)]


def test_gradients_are_the_same_bits_in_bf16() -> None:
    plain, _ = gradients(CONFIG, torch.bfloat16)
    ours, _ = gradients(replace(CONFIG, backend=BackendConfig(recompute_layers=2)), torch.bfloat16)
    assert not [name for name, gradient in plain.items() if not torch.equal(ours[name], gradient)]


def block_and_input() -> tuple[Block, Tensor, Draws]:
    torch.manual_seed(0)
    block = Block(EncoderConfig(**SHAPE), 0, 0.2, 0.2).train()
    return block, torch.randn(4, 7, 16, requires_grad=True), Draws.at(1, 2, torch.arange(4))


def kept_bytes(make: Callable[[], Tensor], block: nn.Module) -> int:
    """Bytes that a graph keeps for backward, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = make()
    assert out.requires_grad
    return sum(seen.values())


def test_nothing_is_kept_but_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, draws = block_and_input()
    assert kept_bytes(lambda: block(x, draws, None), block) > 10 * x.numel() * 4
    assert kept_bytes(lambda: recomputed(block, x, draws, None), block) == 0, "the input is its maker's, not the graph's"
    made: list[recompute._Replay] = []
    call_again = recompute._Replay._call_again

    def noted(replay: recompute._Replay) -> None:
        made.append(replay)
        call_again(replay)

    monkeypatch.setattr(recompute._Replay, "_call_again", noted)
    y = recomputed(block, recomputed(block, x, draws, None), draws, None)
    assert not made, "nothing runs again before backward"
    y.sum().backward()
    assert len(made) == 2 and len({id(replay) for replay in made}) == 2, "each block once"


def test_a_graph_may_be_used_twice() -> None:
    block, x, draws = block_and_input()
    (expected,) = torch.autograd.grad(block(x, draws, None).square().sum(), x)
    y = recomputed(block, x, draws, None).square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, expected) and torch.equal(second, expected)


def test_without_gradients_it_is_a_plain_call(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, draws = block_and_input()
    monkeypatch.setattr(recompute, "_Replay", None)
    with torch.no_grad():
        assert torch.equal(recomputed(block, x, draws, None), block(x, draws, None))


def test_a_block_that_changes_its_mind_is_an_error() -> None:
    calls = 0

    def fickle(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.exp() if calls == 1 else x.exp().exp()

    y = recomputed(fickle, torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="saved 2 tensors in backward and 1 in forward"):
        y.sum().backward()


def test_it_imports_no_compiler() -> None:
    """torch.utils.checkpoint's first call does, which takes longer than the first steps of a small run."""
    code = """
import sys, torch
from vatt.engine.recompute import recomputed
layer = torch.nn.Linear(4, 4)
recomputed(layer, torch.randn(2, 4, requires_grad=True)).sum().backward()
assert layer.weight.grad is not None
print("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


def test_random_generators_are_left_alone() -> None:
    block, x, draws = block_and_input()
    before = torch.get_rng_state()
    recomputed(block, x, draws, None).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
