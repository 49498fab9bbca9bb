"""Batches of a run, from a catalogue. What is in a batch depends on (seed, step) alone: not on workers, ranks or restarts.

A clip that cannot be decoded is replaced by its substitute, drawn from (seed, its number): the same one whenever and
wherever it is met, and decided anew every time, so a resumed run need not know what an earlier one has seen.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from vatt.engine.config import ConfigError, RunConfig
from vatt.engine.data.assemble import AssemblySettings, ClipTask
from vatt.engine.data.batch import Batch
from vatt.engine.data.catalogue import Catalogue, CatalogueError, listing
from vatt.engine.data.decode import DecodeError
from vatt.engine.data.order import batch_samples
from vatt.engine.data.pool import InlinePool, LoaderError, ProcessPool, make_pool
from vatt.engine.data.slots import Arrays, SlotLayout
from vatt.engine.data.words import Vocabulary
from vatt.engine.data.worker import Outcome
from vatt.kernels import counter
from vatt.kernels.counter import Stream

__all__ = ["ClipLoader", "LoaderError", "evaluation_batches", "substitute"]

log = logging.getLogger("vatt.data")

SUBSTITUTES = 64  # tried one after the other before a catalogue is called unusable


def substitute(index: int, attempt: int, seed: int, count: int) -> int:
    """The `attempt`-th (from 1) clip to try in place of clip `index` of `count`; never the clip itself."""
    other = int(counter.words(seed, Stream.SUBSTITUTE, attempt, index, 1)[0]) % (count - 1)
    return other + (other >= index)


@dataclass
class _Job:
    """A batch on its way: rows still open, what was counted, rows given up, and the error to raise in its turn."""

    slot: int
    rows: int
    pending: int
    counts: Counter[str] = field(default_factory=Counter)
    left_out: list[int] = field(default_factory=list)
    error: Exception | None = None


class _Pipeline:
    """Fills slots ahead of the consumer, and hands them over in order."""

    def __init__(self, pool: InlinePool | ProcessPool, slots: int, failed: Callable[[Outcome], ClipTask | Exception | None]):
        self.pool, self.failed = pool, failed
        self.wait_seconds = 0.0
        self._slots = slots
        self._jobs: dict[int, _Job] = {}

    def run(self, jobs: Iterator[Sequence[ClipTask]]) -> Iterator[tuple[Arrays, _Job]]:
        """Batches of tasks -> filled arrays, valid until the next one is asked for."""
        self._drain()
        free = list(range(self._slots))
        order: list[int] = []
        while True:
            while free:
                tasks = next(jobs, None)
                if tasks is None:
                    break
                slot = free.pop()
                self._jobs[slot] = _Job(slot, len(tasks), len(tasks))
                self.pool.submit(slot, tasks)
                order.append(slot)
            if not order:
                return
            job = self._jobs[order.pop(0)]
            began = time.perf_counter()
            while job.pending:
                self._collect()
            self.wait_seconds += time.perf_counter() - began
            if job.error is not None:
                raise job.error
            yield self.pool.arrays(job.slot), job
            free.append(job.slot)

    def _collect(self) -> None:
        for outcome in self.pool.collect():
            job = self._jobs[outcome.slot]
            job.counts.update(outcome.counts)
            answer = self.failed(outcome) if outcome.error is not None else None
            if isinstance(answer, ClipTask):
                job.counts["substituted"] += answer.attempt == 1
                self.pool.submit(outcome.slot, [answer])
                continue
            job.pending -= 1
            if outcome.error is not None:
                job.left_out.append(outcome.task.row)
                job.error = job.error or answer

    def _drain(self) -> None:
        """Wait for what an abandoned iterator left in progress: its rows would be written into the next one's."""
        for job in self._jobs.values():
            while job.pending:
                self._collect()


class ClipLoader:
    """This rank's share of the batches of a run.

    counts: over the batches handed out, of clips `substituted`, `looped`, `no_audio`, `no_text`, `short_audio`, `decoded`
    (as opposed to taken from the cache), and all `clips`. wait_seconds: how long the consumer has waited.

    Raises ConfigError, or CatalogueError for a catalogue whose files are absent and may not be substituted; while
    iterating, DecodeError where the settings make a clip an error, LoaderError if workers cannot be kept running.
    """

    def __init__(self, config: RunConfig, catalogue: Catalogue, vocabulary: Vocabulary, *, rank: int = 0, world_size: int = 1):
        if config.batch_size % world_size:
            raise ConfigError(f"batch_size: {config.batch_size} does not divide among {world_size} ranks; use a multiple")
        if config.batch_size > len(catalogue):
            raise ConfigError(
                f"batch_size: {config.batch_size} is more than the {len(catalogue)} clips of {catalogue.path}: a clip would be "
                "its own negative; lower batch_size or add clips"
            )
        _check_decoder(config)
        _check_vocabulary(config, vocabulary)
        self.config, self.catalogue = config, catalogue
        self.rows, self.rank = config.batch_size // world_size, rank
        self.counts: Counter[str] = Counter()
        self._reported: set[int] = set()
        _check_files(config, catalogue, announce=rank == 0)
        slots = config.data.prefetch if config.data.workers else 1
        keep = config.data.cache_bytes if config.data.cache == "memory" else 0
        settings = _settings(config, vocabulary, keep, keep_latest=False)
        pool = make_pool(settings, _layout(config, slots, self.rows))
        self._pipeline = _Pipeline(pool, slots, self._failed)

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer has spent waiting for batches."""
        return self._pipeline.wait_seconds

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's contiguous slice of the global batch of each step in [first_step, last_step)."""
        for arrays, job in self._pipeline.run(self._tasks(step) for step in range(first_step, last_step)):
            self.counts.update(job.counts)
            yield _batch(arrays, slice(None))

    def close(self) -> None:
        """Stop the workers."""
        self._pipeline.pool.close()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tasks(self, step: int) -> list[ClipTask]:
        samples = batch_samples(step, self.config.batch_size, self.config.seed, len(self.catalogue))
        mine = samples[self.rank * self.rows : (self.rank + 1) * self.rows].tolist()
        return [ClipTask(row, sample, step, sample, self.catalogue[sample]) for row, sample in enumerate(mine)]

    def _failed(self, outcome: Outcome) -> ClipTask | Exception:
        """The substitute's task for a row that could not be filled, or the error that ends the run."""
        task = outcome.task
        where = f"{self.catalogue.path}: line {task.clip.row}: {outcome.error}"
        if outcome.fatal:
            return DecodeError(where)
        if self.config.data.on_bad_clip == "error":
            return DecodeError(f'{where}; repair or remove the row, or set data.on_bad_clip = "substitute"')
        if task.index not in self._reported:
            self._reported.add(task.index)
            log.warning("%s; another clip takes its place", where)
        attempt = task.attempt + 1
        if attempt > SUBSTITUTES:
            return CatalogueError(
                f"{self.catalogue.path}: {SUBSTITUTES} clips in a row cannot be read, the last because: {outcome.error}; "
                "check where the catalogue's paths point"
            )
        other = substitute(task.sample_id, attempt, self.config.seed, len(self.catalogue))
        return replace(task, index=other, clip=self.catalogue[other], attempt=attempt)


def evaluation_batches(
    config: RunConfig, catalogue: Catalogue, vocabulary: Vocabulary
) -> Iterator[tuple[np.ndarray, np.ndarray, Batch]]:
    """(clip index, window index, batch) over all windows of all clips, clip by clip; both int64 (B,).

    `config.evaluate.windows` uniform windows a clip, centre crop, no augmentation, at most `config.evaluate.batch_size`
    rows a batch. Nothing is put in the place of an unreadable clip: its rows are left out, and it is reported once; with
    on_bad_clip = "error" it raises DecodeError.
    """
    _check_decoder(config)
    _check_vocabulary(config, vocabulary)
    _check_files(config, catalogue, announce=True)
    windows, rows = config.evaluate.windows, config.evaluate.batch_size
    items = [(index, window) for index in range(len(catalogue)) for window in range(windows)]
    jobs = (
        [
            ClipTask(row, index, 0, index, catalogue[index], window, windows)
            for row, (index, window) in enumerate(items[begin : begin + rows])
        ]
        for begin in range(0, len(items), rows)
    )
    reported: set[int] = set()

    def failed(outcome: Outcome) -> Exception | None:
        where = f"{catalogue.path}: line {outcome.task.clip.row}: {outcome.error}"
        if outcome.fatal or config.data.on_bad_clip == "error":
            return DecodeError(where)
        if outcome.task.index not in reported:
            reported.add(outcome.task.index)
            log.warning("%s; left out of the evaluation", where)
        return None

    slots = config.data.prefetch + 1 if config.data.workers else 1
    pool = make_pool(_settings(config, vocabulary, 0, keep_latest=windows > 1), _layout(config, slots, rows))
    try:
        begin = 0
        for arrays, job in _Pipeline(pool, slots, failed).run(iter(jobs)):
            kept = np.setdiff1d(np.arange(job.rows), job.left_out)
            if len(kept):
                indices = np.array(items[begin : begin + job.rows], dtype=np.int64)[kept]
                yield indices[:, 0], indices[:, 1], _batch(arrays, kept)
            begin += job.rows
    finally:
        pool.close()


def _batch(arrays: Arrays, rows: slice | np.ndarray) -> Batch:
    """A batch that owns its memory, so that the slot can be filled again."""
    return Batch(**{f.name: torch.from_numpy(getattr(arrays, f.name)[rows].copy()) for f in fields(Arrays)})


def _settings(config: RunConfig, vocabulary: Vocabulary, cache_bytes: int, *, keep_latest: bool) -> AssemblySettings:
    share = cache_bytes // max(1, config.data.workers)
    return AssemblySettings(config.data, config.augment, config.seed, vocabulary, share, keep_latest)


def _layout(config: RunConfig, slots: int, rows: int) -> SlotLayout:
    data = config.data
    return SlotLayout(slots, data.workers, rows, data.frames, data.size, data.captions, data.words, data.audio_samples)


def _check_decoder(config: RunConfig) -> None:
    if config.data.decoder == "dali":
        raise ConfigError('data.decoder: "dali" does not decode anything yet; use "pyav" or "auto"')


def _check_vocabulary(config: RunConfig, vocabulary: Vocabulary) -> None:
    if len(vocabulary) > config.model.text.vocabulary:
        raise ConfigError(
            f"model.text.vocabulary: {config.model.text.vocabulary} rows are too few for a vocabulary of {len(vocabulary)}; "
            "raise it, or build the vocabulary with this limit"
        )


def _check_files(config: RunConfig, catalogue: Catalogue, *, announce: bool) -> None:
    """Absent files end the run at once if unreadable clips are errors, or if nothing would be left."""
    absent = catalogue.absent()
    if not absent:
        return
    message = listing(catalogue.path, [(clip.row, f"{' or '.join(clip.files)}: no such file") for clip in absent])
    if config.data.on_bad_clip == "error" or len(absent) == len(catalogue):
        raise CatalogueError(f"{message}; paths are relative to the catalogue")
    if announce:
        log.warning("%s", message)
