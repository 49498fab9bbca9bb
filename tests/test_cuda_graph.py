"""A recorded step: it reads its static tensors and nothing else, so replaying it is taking the step.

Without a GPU the recording is stood in for by calling the same function again, which shows whatever the function took from
outside its static tensors; with one, the graph itself is compared with eager steps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vatt.engine import cuda_graph
from vatt.engine.backend.interface import make_backend
from vatt.engine.config import BackendConfig, ConfigError, RunConfig
from vatt.engine.config_file import load_run
from vatt.engine.cuda_graph import WARM_STEPS, Replayed
from vatt.engine.data.batch import Batch
from vatt.engine.distributed import Process
from vatt.engine.model import VATT
from vatt.engine.train import Run, train_step

STEPS = WARM_STEPS + 4


def again(work):
    """Record nothing: run it at each replay, into the same results."""
    results = []

    def replay():
        found = work()
        for kept, new in zip(results, found, strict=True):
            kept.copy_(new)

    # Recording runs nothing: of the results only shapes are known.
    results.extend(torch.full((), -1.0) for _ in range(4))
    results.append(torch.zeros((), dtype=torch.bool))
    return replay, tuple(results)


def configured(micro_run: Path, **backend) -> RunConfig:
    run = load_run(micro_run)
    return replace(run, backend=replace(run.backend, name="torch", zero_stage=0, **backend)).with_buckets()


def batch_at(step: int, config: RunConfig, device: str = "cpu") -> Batch:
    generator, data, count = torch.Generator().manual_seed(step), config.data, config.batch_size
    return Batch(
        video=torch.randint(0, 256, (count, data.frames, 3, data.size, data.size), dtype=torch.uint8, generator=generator),
        audio=torch.rand(count, data.audio_samples, generator=generator) * 2 - 1,
        text=torch.randint(2, config.model.text.vocabulary, (count, data.captions, data.words), generator=generator),
        has_text=torch.arange(count) != step % count,
        has_audio=torch.arange(count) != (step + 1) % count,
        sample_id=torch.arange(count) + count * step,
    ).to(device)


def steps(config: RunConfig, device: str = "cpu", record=None) -> tuple[list[list[float]], dict]:
    """Losses and norms of a few steps, and the state after them."""
    torch.manual_seed(0)
    backend = make_backend(VATT(config), config, rank=0, world_size=1, device=torch.device(device))
    backend.module.train()
    process = Process(device=torch.device(device))
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    run = Run(config, process, backend, loader=None, vocabulary=None, directory=None, skipped=skipped)  # type: ignore[arg-type]
    if record:
        run.replayed = Replayed(run._tensors_of_a_step, record)
    log = []
    for step in range(STEPS):
        report = train_step(run, batch_at(step, config, device), step)
        values = report.losses.total, report.losses.video_audio, report.losses.video_text, report.outcome.gradient_norm
        log.append([float(value.detach()) for value in values])
    state = backend.gather_state()
    assert state is not None
    return log, state


@pytest.mark.parametrize("chunk", [0, 3], ids=["whole", "chunks"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replayed_step_is_the_step(micro_run: Path, monkeypatch: pytest.MonkeyPatch, precision: str, chunk: int) -> None:
    config = configured(micro_run, precision=precision, chunk=chunk)
    assert config.model.dropout > 0 and config.drop_rate.video > 0, "the draws have to move on"
    replayed, replayed_state = steps(config, record=again)
    monkeypatch.setattr(cuda_graph, "WARM_STEPS", STEPS)  # so nothing is recorded; the rate is a tensor all the same
    eager, eager_state = steps(config, record=again)
    assert replayed == eager
    for name, tensor in eager_state.items():
        assert torch.equal(replayed_state[name], tensor), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_graph_takes_the_same_steps(micro_run: Path, precision: str) -> None:
    eager, _ = steps(configured(micro_run, precision=precision, device="cuda"), "cuda")
    graphed, _ = steps(configured(micro_run, precision=precision, device="cuda", cuda_graph=True), "cuda")
    assert graphed == [pytest.approx(values, rel=1e-4 if precision == "fp32" else 1e-2) for values in eager]


def test_a_batch_of_another_shape_is_an_error(micro_run: Path) -> None:
    config = configured(micro_run, precision="fp32")
    steps_taken = Replayed(lambda batch, draws, rate: (batch.audio.sum(),), lambda work: (work, work()))
    from vatt.engine.randomness import Draws

    for step in range(WARM_STEPS + 1):
        batch = batch_at(step, config)
        steps_taken(batch, Draws.at(0, step, batch.sample_id), torch.tensor(0.1))
    smaller = batch.rows(slice(0, 2))
    with pytest.raises(ValueError, match="a recorded step takes video of"):
        steps_taken(smaller, Draws.at(0, 9, smaller.sample_id), torch.tensor(0.1))


def test_settings_that_cannot_be(micro_run: Path) -> None:
    with pytest.raises(ConfigError, match="cuda_graph: needs backend.name = 'torch'"):
        BackendConfig(cuda_graph=True)
    with pytest.raises(ConfigError, match="compile: does not go with backend.recompute_layers"):
        BackendConfig(name="torch", compile=True, recompute_layers=2)
    config = configured(micro_run, cuda_graph=True)
    with pytest.raises(ConfigError, match="backend.cuda_graph: the run is on cpu"):
        Run(config, Process(), None, None, None, None, torch.zeros(()))  # type: ignore[arg-type]
    divided = replace(config, batch_size=4, backend=replace(config.backend, zero_stage=1))
    with pytest.raises(ConfigError, match="backend.cuda_graph: weights arrive during the next step"):
        make_backend(torch.nn.Linear(2, 2), divided, rank=0, world_size=2, device=torch.device("cpu"))
