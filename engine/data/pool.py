"""Who runs the tasks: worker processes, or the calling process itself. Both have the same four methods.

submit(slot, tasks)   start filling rows of a slot
collect()             outcomes of some tasks that have ended; waits for at least one
arrays(slot)          the slot's arrays
close()               stop; safe to call twice
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import subprocess
import sys
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from vatt.engine.data.assemble import Assembler, AssemblySettings, ClipTask
from vatt.engine.data.slots import Arrays, SlotLayout, anonymous_file
from vatt.engine.data.worker import Outcome, Reply, run_task

log = logging.getLogger("vatt.data")

# Not `-m`: that would call the module __main__, and its records could not be sent back.
PROGRAM = "from vatt.engine.data.worker import main; main()"
DEATHS_OF_A_CLIP = 2  # a clip that ended this many workers is not tried again
DEATHS_IN_A_ROW = 10  # of one worker, without one answer in between


class LoaderError(RuntimeError):
    """Decoding workers that cannot be kept running."""


class InlinePool:
    """Decodes in the calling process, when results are asked for."""

    def __init__(self, settings: AssemblySettings, layout: SlotLayout):
        self._assembler = Assembler(settings)
        self._slots = [layout.slot(bytearray(layout.nbytes), 0) for _ in range(layout.slots)]
        self._waiting: deque[tuple[int, ClipTask]] = deque()
        self._noted = False

    def submit(self, slot: int, tasks: Sequence[ClipTask]) -> None:
        self._waiting.extend((slot, task) for task in tasks)

    def collect(self) -> list[Outcome]:
        slot, task = self._waiting.popleft()
        outcome = run_task(self._assembler, self._slots[slot], slot, task)
        note = self._assembler.cache.note()
        if note and not self._noted:
            self._noted = True
            log.warning("%s", note)
        return [outcome]

    def arrays(self, slot: int) -> Arrays:
        return self._slots[slot]

    def close(self) -> None:
        self._waiting.clear()


class ProcessPool:
    """Worker processes that write into shared memory. One that dies is replaced, and its tasks are done again.

    A clip always goes to the same worker, so that a cache keeps it once.
    """

    def __init__(self, settings: AssemblySettings, layout: SlotLayout):
        self._settings, self._layout = settings, layout
        self._memory = anonymous_file(layout.nbytes)
        self._buffer = mmap.mmap(self._memory, layout.nbytes)
        self._slots = [layout.slot(self._buffer, slot) for slot in range(layout.slots)]
        self._at_work = layout.at_work(self._buffer)
        self._at_work[:] = -1
        # Messages sent and not answered, oldest first.
        self._owed: list[deque[tuple[int, list[ClipTask]]]] = [deque() for _ in range(layout.workers)]
        self._deaths_in_a_row = [0] * layout.workers
        self._deaths_of_clip: Counter[int] = Counter()
        self._ready: list[Outcome] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._finalizer = weakref.finalize(self, _shut, self._processes, self._connections, self._memory)
        for number in range(layout.workers):
            process, connection = self._start(number)
            self._processes.append(process)
            self._connections.append(connection)

    @property
    def process_ids(self) -> list[int]:
        """Ids of the worker processes."""
        return [process.pid for process in self._processes]

    def submit(self, slot: int, tasks: Sequence[ClipTask]) -> None:
        shares: list[list[ClipTask]] = [[] for _ in self._processes]
        for task in tasks:
            if self._deaths_of_clip[task.index] >= DEATHS_OF_A_CLIP:
                self._ready.append(_deadly(slot, task))
            else:
                shares[task.index % len(shares)].append(task)
        for number, share in enumerate(shares):
            if share:
                self._owed[number].append((slot, share))
                self._send(number, (slot, share))

    def collect(self) -> list[Outcome]:
        while not self._ready:
            for connection in wait(self._connections):
                number = self._connections.index(connection)  # type: ignore[arg-type]
                try:
                    reply = self._connections[number].recv()
                except (EOFError, ConnectionError):
                    self._replace(number)
                    break  # the list of connections has changed
                self._receive(number, reply)
        ready, self._ready = self._ready, []
        return ready

    def arrays(self, slot: int) -> Arrays:
        return self._slots[slot]

    def close(self) -> None:
        """Stop the workers. They hold nothing that could be lost."""
        self._finalizer()

    def _start(self, number: int) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-c", PROGRAM]
            command += [str(value) for value in (theirs.fileno(), self._memory, number, os.getpid())]
            # Libraries inside a worker must not start threads: the workers are what is parallel.
            single = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
            process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(), self._memory),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        connection = Connection(ours.detach())
        with suppress(ConnectionError):  # if it died at once, `collect` will notice
            connection.send((self._settings, self._layout))
        return process, connection

    def _send(self, number: int, message: tuple[int, list[ClipTask]]) -> None:
        with suppress(ConnectionError):  # if it has died, `collect` will notice, and send again what is owed
            self._connections[number].send(message)

    def _receive(self, number: int, reply: Reply) -> None:
        if reply.bug:
            raise LoaderError(f"decoding worker {number} failed {reply.bug}")
        if reply.note:
            log.warning("decoding worker %d: %s", number, reply.note)
        self._deaths_in_a_row[number] = 0
        self._owed[number].popleft()
        self._ready.extend(reply.outcomes)

    def _replace(self, number: int) -> None:
        """Start another worker in place of a dead one, and send it what the dead one owed."""
        process = self._processes[number]
        self._connections[number].close()
        process.kill()
        status = process.wait()
        clip_index = int(self._at_work[number])
        self._at_work[number] = -1
        self._deaths_in_a_row[number] += 1
        culprit = ""
        if clip_index >= 0:
            self._deaths_of_clip[clip_index] += 1
            culprit = f" while decoding clip number {clip_index} of the catalogue"
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        if self._deaths_in_a_row[number] >= DEATHS_IN_A_ROW:
            raise LoaderError(
                f"decoding worker {number} {how}{culprit}, {DEATHS_IN_A_ROW} times in a row; "
                "see its messages above, check the machine's free memory, or set data.workers = 0 to see the error itself"
            )
        log.warning("decoding worker %d (process %d) %s%s; another takes over its work", number, process.pid, how, culprit)
        self._processes[number], self._connections[number] = self._start(number)
        owed, self._owed[number] = self._owed[number], deque()
        for slot, tasks in owed:
            self.submit(slot, tasks)


def _deadly(slot: int, task: ClipTask) -> Outcome:
    return Outcome(slot, task, error=f"{task.clip.video}: ended {DEATHS_OF_A_CLIP} decoding processes; not tried again")


def _shut(processes: list[subprocess.Popen[bytes]], connections: list[Connection], memory: int) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    os.close(memory)


def make_pool(settings: AssemblySettings, layout: SlotLayout) -> InlinePool | ProcessPool:
    """Processes if the layout has workers, else this process."""
    return ProcessPool(settings, layout) if layout.workers else InlinePool(settings, layout)
