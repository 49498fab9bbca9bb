"""FLOPs in closed form: the paper's tables, the true counts, and a count of what torch really dispatches."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vatt.engine.backend.plain import PlainBackend
from vatt.engine.config import (
    AudioConfig,
    BackendConfig,
    DataConfig,
    DropRateConfig,
    EncoderConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
)
from vatt.engine.data.batch import Batch
from vatt.engine.gradient_cache import backward_in_chunks
from vatt.engine.loss import contrastive_losses
from vatt.engine.model import VATT
from vatt.engine.profile.flops import add_up, encoder_flops, executed_flops, peak_tflops, run_flops, step_flops
from vatt.engine.randomness import Draws

GIGA = 1e9


def run(video="medium", frames=32, size=224, rate=0.0, dropout=0.0):
    model = ModelConfig(video=VideoConfig(size=video), dropout=dropout, attention_dropout=dropout)
    return RunConfig(data=DataConfig(frames=frames, size=size), drop_rate=DropRateConfig(video=rate, audio=rate), model=model)


def tower(config, name, training=True):
    return add_up(row for row in run_flops(config, training=training) if row.tower == name)


def towers(config):
    return add_up(tower(config, name) for name in ("video", "audio", "text"))


@pytest.mark.parametrize(("size", "tera"), [("base", 9.09), ("medium", 15.02), ("large", 29.80)])
def test_paper_table_1(size, tera):
    """12 views of 32 x 320 x 320."""
    assert 12 * tower(run(size, size=320), "video", training=False).paper / 1e12 == pytest.approx(tera, rel=0.005)


@pytest.mark.parametrize(("rate", "giga"), [(0.0, 784.8), (0.25, 574.2), (0.5, 375.4), (0.75, 188.1)])
def test_paper_table_5(rate, giga):
    """MBS with five sentences; with heads and logits or without."""
    config = run(rate=rate)
    assert towers(config).paper / GIGA == pytest.approx(giga, rel=0.005)
    assert add_up(run_flops(config, training=True)).paper / GIGA == pytest.approx(giga, rel=0.005)


@pytest.mark.parametrize(
    ("frames", "size", "rate", "giga"),
    [
        (32, 224, 0.0, 548.1),
        (64, 224, 0.0, 1222.1),
        (32, 320, 0.0, 1252.3),
        (32, 320, 0.25, 898.9),
        (32, 320, 0.5, 572.5),
        (32, 320, 0.75, 279.8),
    ],
)
def test_paper_table_6(frames, size, rate, giga):
    """Tokens are dropped in training mode only, and there the released dropout of 0.1 is on and counted."""
    config = run(frames=frames, size=size, rate=rate, dropout=0.1)
    counted = tower(config, "video", training=rate > 0).paper / GIGA
    assert counted == pytest.approx(giga, rel=0.002)


@pytest.mark.parametrize(
    ("size", "name", "by_rate"),
    [
        ("base", "video", (364.7, 256.6, 159.8, 74.3)),
        ("medium", "video", (604.7, 430.9, 272.3, 128.7)),
        ("large", "video", (1199.5, 854.5, 539.6, 255.0)),
        ("base", "audio", (257.4, 183.2, 115.5, 54.5)),
        ("base", "text", (3.25, 3.25, 3.25, 3.25)),
    ],
)
def test_true_counts(size, name, by_rate):
    for rate, giga in zip((0.0, 0.25, 0.5, 0.75), by_rate, strict=True):
        assert tower(run(size, rate=rate), name).true / GIGA == pytest.approx(giga, rel=0.001)


@pytest.mark.parametrize(("size", "tera"), [("base", 0.832), ("medium", 1.168), ("large", 1.970)])
def test_forward_and_backward_of_a_clip(size, tera):
    """No gradient for pixels: a little less than three times the forward pass."""
    total = towers(run(size, rate=0.5))
    assert (total.true + total.backward) / 1e12 == pytest.approx(tera, rel=0.001)


def test_true_counts_differ_from_the_papers_as_documented():
    rows = {row.module: row for row in run_flops(run(rate=0.5), training=True) if row.tower == "video"}
    assert rows["patch projection"].true == 784 * 3072 * 1024 * 2 == rows["patch projection"].paper / 2
    assert rows["patch projection"].backward == rows["patch projection"].true
    assert rows["attention scores"].true == rows["attention values"].true == 12 * 2 * 785**2 * 1024
    assert rows["attention scores"].paper == 0 and rows["attention values"].paper == rows["attention values"].true
    assert rows["softmax"].true == 0 and rows["softmax"].paper == 12 * 16 * 785**2 * 7


def test_evaluation_keeps_every_token_and_has_no_dropout():
    config = run(rate=0.5, dropout=0.1)
    assert run_flops(config, training=False) == run_flops(run(), training=False) == run_flops(run(), training=True)


def test_alignment_is_followed():
    config = replace(run(), drop_rate=DropRateConfig(video=0.5, audio=0.5, align=64))
    rows = {(row.tower, row.module): row for row in run_flops(config, training=True)}
    assert rows["video", "patch projection"].true == 767 * 3072 * 1024 * 2
    assert rows["video", "attention projections"].true == 12 * 8 * 768 * 1024**2


def test_step_is_the_whole_global_batch():
    config = replace(run(rate=0.5), batch_size=8)
    total = add_up(run_flops(config, training=True))
    assert step_flops(config) == 8 * (total.true + total.backward)
    larger = replace(config, batch_size=16)
    logits = 2 * 3 * (512 + 5 * 256)
    assert step_flops(larger) - 2 * step_flops(config) == pytest.approx(logits * (16 * 16 - 2 * 8 * 8))


def test_encoder_from_explicit_geometry():
    shape = EncoderConfig(size="custom", layers=2, width=8, heads=2, hidden=16)
    total = add_up(encoder_flops("any", shape, 5))
    assert total.true == 2 * (8 * 5 * 64 + 4 * 25 * 8 + 4 * 5 * 8 * 16) and total.backward == 2 * total.true
    assert add_up(encoder_flops("any", shape, 5, bias=False)).paper == total.paper - 2 * 5 * (5 * 8 + 16)


SMALL = {"size": "custom", "layers": 1, "width": 16, "heads": 2, "hidden": 24}
SPECIFIC = ModelConfig(
    video=VideoConfig(**SMALL, patch=(2, 8, 8)),
    audio=AudioConfig(**(SMALL | {"layers": 2, "width": 12}), patch=32),
    text=TextConfig(**SMALL, vocabulary=32, word_width=10, linear_width=20),
    shared=EncoderConfig(**SMALL),
    post_width=14,
    heads=HeadsConfig(video_audio=9, video_text=7),
    attention_dropout=0.1,  # attention then writes its products out, where the counter sees them
)


class Products(TorchDispatchMode):
    """Adds up the FLOPs of what is dispatched (torch's FlopCounterMode hooks modules too, and fails under no_grad)."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def count_dispatched(config, word_table=True):
    """(forward, forward + backward) FLOPs of the matrix products torch runs in one training step on one process."""
    data, clips = config.data, config.batch_size
    model = VATT(config).train()
    model.text.words.weight.requires_grad_(word_table)
    batch = Batch(
        video=torch.randint(0, 256, (clips, data.frames, 3, data.size, data.size), dtype=torch.uint8),
        audio=torch.rand(clips, data.audio_samples),
        text=torch.randint(1, config.model.text.vocabulary, (clips, data.captions, data.words)),
        has_text=torch.ones(clips, dtype=torch.bool),
        has_audio=torch.ones(clips, dtype=torch.bool),
        sample_id=torch.arange(clips),
    )
    draws, chunk = Draws.at(1, 2, batch.sample_id), config.backend.chunk
    with Products() as counter:
        if chunk:
            backend = PlainBackend(model, config, rank=0, world_size=1, device=torch.device("cpu"))
            backward_in_chunks(backend, batch, draws, chunk, lambda space: contrastive_losses(space, config.loss))
            return None, counter.total
        losses = contrastive_losses(model(batch, draws), config.loss)
        forward = counter.total
        losses.total.backward()
    return forward, counter.total


@pytest.mark.parametrize(
    ("kind", "text", "rate", "form"),
    [("specific", "t5", 0.5, "row_column"), ("specific", "linear", 0.0, "all_pairs"), ("agnostic", "t5", 0.5, "symmetric")],
)
def test_every_product_that_torch_dispatches_is_counted(kind, text, rate, form):
    config = RunConfig(
        batch_size=3,
        data=DataConfig(frames=4, size=24, audio_samples=320, captions=2, words=6),
        drop_rate=DropRateConfig(video=rate, audio=rate),
        model=replace(SPECIFIC, kind=kind, text=replace(SPECIFIC.text, tower=text)),
        loss=LossConfig(form=form),
    )
    forward, both = count_dispatched(config)
    assert forward == config.batch_size * add_up(run_flops(config, training=True)).true
    assert both == step_flops(config)


DATA = DataConfig(frames=4, size=24, audio_samples=320, captions=2, words=6)


@pytest.mark.parametrize(("kind", "text"), [("specific", "t5"), ("specific", "linear"), ("agnostic", "t5")])
@pytest.mark.parametrize(("chunk", "recompute_layers"), [(0, 1), (0, 9), (2, 0), (2, 1)])
def test_what_runs_twice_is_executed_and_not_counted(kind, text, chunk, recompute_layers):
    model = replace(SPECIFIC, kind=kind, text=replace(SPECIFIC.text, tower=text))
    plain = RunConfig(batch_size=3, data=DATA, model=model, backend=BackendConfig(name="torch", precision="fp32"))
    config = replace(plain, backend=replace(plain.backend, chunk=chunk, recompute_layers=recompute_layers))
    assert executed_flops(plain) == step_flops(plain) == step_flops(config)
    assert count_dispatched(config)[1] == executed_flops(config) > step_flops(config)
    assert executed_flops(replace(plain, backend=replace(plain.backend, chunk=2)), ranks=2) == step_flops(plain), (
        "1 clip a rank"
    )


@pytest.mark.parametrize(("chunk", "recompute_layers"), [(0, 0), (0, 1), (2, 0), (2, 1)])
def test_what_agg_alone_does_not_need_is_neither(chunk, recompute_layers):
    """One layer a tower, so that no product is hidden in a fused attention."""
    audio, text = replace(SPECIFIC.audio, layers=1), replace(SPECIFIC.text, tower="linear")
    model = replace(SPECIFIC, audio=audio, text=text, attention_dropout=0.0, last_block="agg")
    backend = BackendConfig(name="torch", precision="fp32", chunk=chunk, recompute_layers=recompute_layers)
    config = RunConfig(batch_size=3, data=DATA, model=model, backend=backend)
    every_token = replace(config, model=replace(model, last_block="all"))
    assert count_dispatched(config)[1] == executed_flops(config) < executed_flops(every_token)
    assert step_flops(config) < step_flops(every_token)
    if not chunk and not recompute_layers:
        assert executed_flops(config) == step_flops(config)


@pytest.mark.parametrize(("kind", "text"), [("specific", "t5"), ("specific", "linear"), ("agnostic", "t5")])
def test_a_frozen_word_table_saves_its_gradient(kind, text):
    data = DataConfig(frames=4, size=24, audio_samples=320, captions=2, words=6)
    learned = RunConfig(batch_size=3, data=data, model=replace(SPECIFIC, kind=kind, text=replace(SPECIFIC.text, tower=text)))
    frozen_text = replace(learned.model.text, word_table="frozen", word_table_file="words.npy")
    frozen = replace(learned, model=replace(learned.model, text=frozen_text))
    assert count_dispatched(learned, word_table=False)[1] == step_flops(frozen)
    # T5's AGG is learned in word space, so there the gradient is needed all the same.
    assert (step_flops(frozen) < step_flops(learned)) == ((kind, text) != ("specific", "t5"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA RTX A4000", None),
        ("cpu", None),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", None),
        ("", None),
    ],
)
def test_peak(name, peak):
    assert peak_tflops(name) == peak
