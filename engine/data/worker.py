"""A decoding process, started by `pool` with four numbers: its connection, the shared memory, its number, its parent.

Its own program rather than a child of `multiprocessing`, so it starts in a third of a second (NumPy and PyAV, no torch),
never runs the user's script again, and needs no `if __name__ == "__main__"` there. It ends when its connection does: a
parent that is gone, however it went, leaves no workers.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from vatt.engine.data.assemble import Assembler, AssemblySettings, ClipTask
from vatt.engine.data.decode import DecodeError, MissingAudioError, ShortClipError
from vatt.engine.data.slots import Arrays, SlotLayout

POLL = 5.0  # seconds between looks at whether the parent is still there


@dataclass
class Outcome:
    """How a task ended: `error` is None if the row is filled. `fatal`: not to be made good by a substitute."""

    slot: int
    task: ClipTask
    counts: Counter[str] = field(default_factory=Counter)
    error: str | None = None
    fatal: bool = False


@dataclass
class Reply:
    """What a worker sends back for a message: the outcome of every task, and a note for the log."""

    outcomes: list[Outcome]
    note: str | None = None
    bug: str | None = None


def run_task(assembler: Assembler, arrays: Arrays, slot: int, task: ClipTask) -> Outcome:
    """Fill a row; what is wrong with a clip becomes part of the outcome."""
    try:
        return Outcome(slot, task, assembler.fill(arrays, task))
    except (ShortClipError, MissingAudioError) as error:
        return Outcome(slot, task, error=str(error), fatal=True)
    except DecodeError as error:
        return Outcome(slot, task, error=str(error))


def serve(connection: Connection, memory: int, number: int, parent: int) -> None:
    """Answer messages (slot, tasks) until the connection closes."""
    settings: AssemblySettings
    layout: SlotLayout
    settings, layout = connection.recv()
    assembler = Assembler(settings)
    buffer = mmap.mmap(memory, layout.nbytes)
    at_work = layout.at_work(buffer)
    slots = [layout.slot(buffer, slot) for slot in range(layout.slots)]
    noted: str | None = None
    while True:
        while not connection.poll(POLL):
            if os.getppid() != parent:
                return
        slot, tasks = connection.recv()
        reply = Reply([])
        try:
            for task in tasks:
                at_work[number] = task.index
                reply.outcomes.append(run_task(assembler, slots[slot], slot, task))
        except Exception:
            # Not a bad clip but a defect of this program: it belongs in front of the user, whole.
            reply.bug = f"while decoding clip {task.clip.id!r}:\n{traceback.format_exc()}"
        at_work[number] = -1
        if noted is None:
            noted = reply.note = assembler.cache.note()
        connection.send(reply)


def main() -> None:
    """Entry point of the process."""
    # A Ctrl-C or a SIGTERM to the process group is for the parent, which may still need batches to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    descriptor, memory, number, parent = map(int, sys.argv[1:])
    with suppress(EOFError, ConnectionError):  # the parent closed its end: the work is over
        serve(Connection(descriptor), memory, number, parent)
