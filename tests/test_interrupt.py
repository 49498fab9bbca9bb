"""Signals: noted once, obeyed the second time, and answered by every rank after the same step."""

from __future__ import annotations

import signal

import pytest
import torch
import torch.distributed as dist

from vatt.engine.interrupt import EXIT_INTERRUPTED, InterruptWatch


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def heard(request):
    """(the signal, how often it reached whoever handled it before us)."""
    calls: list[int] = []
    before = signal.signal(request.param, lambda number, frame: calls.append(number))
    yield request.param, calls
    signal.signal(request.param, before)


def test_the_first_signal_is_noted_and_the_second_acts_as_before(heard) -> None:
    number, calls = heard
    with InterruptWatch(world_size=1) as watch:
        assert not watch.stop_after_this_step() and watch.received is None
        signal.raise_signal(number)
        assert watch.stop_after_this_step() and watch.received == number.name and calls == []
        assert watch.stop_after_this_step(), "it does not forget"
        signal.raise_signal(number)
        assert calls == [number]


def test_handlers_are_given_back(heard) -> None:
    number, calls = heard
    handler = signal.getsignal(number)
    with InterruptWatch(world_size=1):
        assert signal.getsignal(number) is not handler
    assert signal.getsignal(number) is handler


def test_exit_code_is_the_one_that_means_try_again() -> None:
    assert EXIT_INTERRUPTED == 75


class Collective:
    """One all-reduce of ranks that take turns in this process."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.flags: list[torch.Tensor] = []

    @property
    def done(self) -> bool:
        return len(self.flags) == self.ranks

    def join(self, flag: torch.Tensor, op: dist.ReduceOp.RedOpType) -> None:
        self.flags.append(flag)
        if self.done:
            choose = {dist.ReduceOp.MAX: torch.amax, dist.ReduceOp.MIN: torch.amin}[op]
            result = choose(torch.stack(self.flags))
            for member in self.flags:
                member.copy_(result)

    def wait(self) -> None:
        assert self.done, "waits for a rank that has not come to this step yet"


class Network:
    """Stands in for torch.distributed: collectives in the order in which ranks enter them."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.latest = Collective(ranks)

    def all_reduce(self, flag: torch.Tensor, op: dist.ReduceOp.RedOpType, async_op: bool) -> Collective:
        assert async_op and flag.device.type == "cpu", "nothing may wait for a device"
        if self.latest.done:
            self.latest = Collective(self.ranks)
        self.latest.join(flag, op)
        return self.latest


@pytest.mark.parametrize("between", [0, 1, 2], ids=["before all", "between ranks", "after all"])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(monkeypatch, heard, between: int) -> None:
    network = Network(ranks=3)
    monkeypatch.setattr(dist, "all_reduce", network.all_reduce)
    number, _ = heard
    others = [InterruptWatch(world_size=3) for _ in range(2)]
    with InterruptWatch(world_size=3) as signalled:
        ranks = [others[0], signalled, others[1]]
        answers: list[list[bool]] = []
        for step in range(6):
            answers.append([])
            for turn, watch in enumerate(ranks):
                if step == 2 and turn == between:
                    signal.raise_signal(number)
                answers[-1].append(watch.stop_after_this_step())
    first = 4 if between == 2 else 3  # the signalled rank's own turn at step 2 had passed
    assert answers == [[False] * 3] * first + [[True] * 3] * (6 - first)
    assert others[0].received is None
