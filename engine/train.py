"""Pre-training: one step on one screen, the loop around it, and what a run is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vatt.engine.attention_choices import settle_attention
from vatt.engine.backend.interface import Backend, StepOutcome, make_backend
from vatt.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from vatt.engine.config import ConfigError, RunConfig
from vatt.engine.cuda_graph import Replayed
from vatt.engine.data.batch import Batch
from vatt.engine.data.catalogue import Catalogue
from vatt.engine.data.loader import ClipLoader
from vatt.engine.data.words import Vocabulary
from vatt.engine.distributed import Process, joined
from vatt.engine.evaluate.retrieval import evaluate_run
from vatt.engine.gradient_cache import backward_in_chunks
from vatt.engine.interrupt import EXIT_INTERRUPTED, InterruptWatch
from vatt.engine.loss import Losses, contrastive_losses
from vatt.engine.meter import Meter, device_name
from vatt.engine.model import VATT, CommonSpace
from vatt.engine.optimizer import learning_rate
from vatt.engine.pretrained import export_weights, from_pretrained
from vatt.engine.randomness import Draws
from vatt.engine.run_directory import RunDirectory


@dataclass
class Run:
    """Everything a step needs. `directory` is rank 0's alone."""

    config: RunConfig
    process: Process
    backend: Backend
    loader: ClipLoader
    vocabulary: Vocabulary
    directory: RunDirectory | None
    skipped: Tensor  # int64 scalar on the device: steps skipped so far
    replayed: Replayed | None = None  # the step as a CUDA graph, where backend.cuda_graph asks for one

    def __post_init__(self) -> None:
        if self.config.backend.cuda_graph:
            if self.process.device.type != "cuda":
                raise ConfigError(f"backend.cuda_graph: the run is on {self.process.device.type}; set it to false")
            self.replayed = Replayed(self._tensors_of_a_step)

    def _tensors_of_a_step(self, batch: Batch, draws: Draws, rate: Tensor) -> tuple[Tensor, ...]:
        losses, outcome = forward_backward_update(self, batch, draws, rate)
        return losses.total.detach(), losses.video_audio.detach(), losses.video_text.detach(), *outcome

    @property
    def replicas(self) -> int:
        """How many parts of the batch have a mean of their own, where the loss asks for that."""
        return self.config.loss.replicas or self.process.world_size

    def losses(self, space: CommonSpace) -> Losses:
        """The losses of a common space that holds the whole global batch."""
        return contrastive_losses(space, self.config.loss, self.replicas)


@dataclass
class StepReport:
    """What a step leaves behind, still on the device: nothing above waits for it."""

    step: int
    learning_rate: float
    losses: Losses
    outcome: StepOutcome


def train_step(run: Run, batch: Batch, step: int) -> StepReport:
    """One step, the `step`-th from 0."""
    rate = learning_rate(step, run.config.optimizer, run.config.steps)
    draws = Draws.at(run.config.seed, step, batch.sample_id)
    if run.replayed is None:
        losses, outcome = forward_backward_update(run, batch, draws, rate)
    else:
        *found, norm, skipped = run.replayed(batch, draws, torch.full((), rate, device=batch.video.device))
        losses, outcome = Losses(*found), StepOutcome(norm, skipped)
    run.skipped += outcome.skipped
    return StepReport(step, rate, losses, outcome)


def forward_backward_update(run: Run, batch: Batch, draws: Draws, rate: float | Tensor) -> tuple[Losses, StepOutcome]:
    """All the arithmetic of a step; nothing in it waits for the device."""
    chunk = run.config.backend.chunk
    if 0 < chunk < len(batch):
        losses = backward_in_chunks(run.backend, batch, draws, chunk, run.losses)
    else:
        losses = run.losses(run.backend.module(batch, draws))
        run.backend.backward(losses.total)
    return losses, run.backend.step(rate)


def pretrain(config: RunConfig) -> int:
    """Pre-train as `config` says, from its newest checkpoint if there is one; the exit code.

    0: trained to the end (or to `stop_after`) and evaluated; EXIT_INTERRUPTED: a signal came and the run was saved.
    Raises ConfigError and CatalogueError for what cannot be used, before the first step; a run directory that holds no
    step yet stands in nobody's way.
    """
    config = config.with_buckets()
    if not config.data.train:
        remedy = "make one with `vatt data sample-world`, or see README, Your own data"
        raise ConfigError(f"data.train: no catalogue named; {remedy}")
    catalogue = Catalogue.read(config.data.train)
    test = Catalogue.read(config.data.test) if config.data.test else None
    with joined(config.backend) as process:
        directory = RunDirectory(config) if process.is_main else None
        try:
            vocabulary = shared_vocabulary(config, catalogue, process)
            loader = ClipLoader(config, catalogue, vocabulary, rank=process.rank, world_size=process.world_size)
            try:
                run, first = build(config, process, loader, vocabulary, directory)
                code = train(run, first)
            finally:
                loader.close()
            if code == 0 and not config.stop_after:
                finish(run, test)
            return code
        finally:
            if directory:
                directory.close()


def build(
    config: RunConfig, process: Process, loader: ClipLoader, vocabulary: Vocabulary, directory: RunDirectory | None
) -> tuple[Run, int]:
    """The run, and the number of steps it has already done."""
    settle_attention(config, process)
    backend = make_backend(VATT(config), config, rank=process.rank, world_size=process.world_size, device=process.device)
    skipped = torch.zeros((), dtype=torch.int64, device=process.device)
    run = Run(config, process, backend, loader, vocabulary, directory, skipped)
    first = 0
    checkpoint = newest_checkpoint(config.output)
    if checkpoint is not None:
        state, record = load_checkpoint(checkpoint)
        backend.load_state(state)
        first = record["step"]
        run.skipped.fill_(record["skipped"])
        loader.counts.update(record["counts"].get(str(process.rank), {}))
    if directory:
        directory.start(first, world_size=process.world_size, device=device_name(process.device))
        if checkpoint is not None:
            directory.say(f"resumed after step {first} from {checkpoint}")
    return run, first


def train(run: Run, first: int) -> int:
    """The loop: from step `first` to the end, or to the first reason to stop."""
    config = run.config
    last = min(config.steps, config.stop_after or config.steps)
    meter = Meter(config, run.process, first)
    run.backend.module.train()
    with InterruptWatch(run.process.world_size) as watch:
        for step, batch in enumerate(run.loader.batches(first, last), start=first):
            report = train_step(run, batch.to(run.process.device), step)
            done = step + 1
            if done % config.log.every == 0 or done == last:
                line = meter.line(report, run.loader, run.skipped)
                if run.directory:
                    run.directory.log(line)
            stop = watch.stop_after_this_step()
            if stop or done == last or done % config.checkpoint.every == 0:
                save(run, done)
            if stop:
                if run.directory:
                    run.directory.say(f"{watch.received or 'a signal'} came: saved after step {done}; the same command goes on")
                return EXIT_INTERRUPTED
    return 0


def save(run: Run, done: int) -> None:
    """Checkpoint after `done` steps. Collective."""
    state = run.backend.gather_state()
    counts = gather_counts(run)
    if run.directory and state is not None:
        run.directory.sync()
        record = {
            "samples": done * run.config.batch_size,
            "seed": run.config.seed,
            "world_size": run.process.world_size,
            "skipped": int(run.skipped),
            "counts": counts,
        }
        save_checkpoint(run.config.output, done, state, record, keep=run.config.checkpoint.keep)


def finish(run: Run, test: Catalogue | None) -> None:
    """Export the last checkpoint's weights, evaluate them, and write the report. Rank 0 works; the others wait at the end."""
    if not run.directory:
        return
    from vatt.engine.report import write_report  # plotting is rank 0's business

    state, _ = load_checkpoint(Path(run.config.output) / "checkpoints" / f"step-{run.config.steps}")
    model = from_pretrained(export_weights(run.directory.path / "weights", state, run.config, run.vocabulary))
    if test is None:
        run.directory.say("data.test names no catalogue: no evaluation")
    else:
        evaluate_run(run.directory, model.to(run.process.device), test, run.vocabulary)
    run.directory.say(f"report: {write_report(run.directory.path)}")


def gather_counts(run: Run) -> dict[str, dict[str, int]]:
    """Each rank's data counts, by rank, on rank 0."""
    counts: list[dict[str, int] | None] = [None] * run.process.world_size
    own = dict(run.loader.counts)
    if run.process.world_size == 1:
        counts = [own]
    else:
        dist.gather_object(own, counts if run.process.is_main else None)
    return {str(rank): each for rank, each in enumerate(counts) if each is not None}


def shared_vocabulary(config: RunConfig, catalogue: Catalogue, process: Process) -> Vocabulary:
    """The run's words: built from the training captions by rank 0 the first time, read by everyone."""
    path = Path(config.output) / "words.txt"
    if process.is_main and not path.exists():
        captions = (caption.text for clip in catalogue for caption in clip.captions)
        Vocabulary.build(captions, config.model.text.vocabulary).write(path)
    if process.world_size > 1:
        dist.barrier()
    return Vocabulary.read(path)
