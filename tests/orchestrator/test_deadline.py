"""When a round stops waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from contract.errors import ConnectionFailedError
from contract.records import NOTHING_SEEN, RoundProgress
from orchestrator.deadline import LOOK_EVERY_S, ProgressDeadline
from orchestrator.exchange import MESSAGE_TTL_S
from tests.orchestrator.fakes import FakeClock


class Trunk:
    def __init__(self) -> None:
        self.seen = NOTHING_SEEN
        self.reads = 0
        self.fails = False

    def read(self) -> RoundProgress:
        self.reads += 1
        if self.fails:
            raise ConnectionFailedError("trunk at HERE does not answer")
        return self.seen


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_the_trunk_is_asked_at_most_once_a_second(clock: FakeClock) -> None:
    trunk = Trunk()
    deadline = ProgressDeadline(clock, 10.0, trunk.read)
    for _ in range(50):
        deadline.look()
        clock.sleep(0.1)
    assert trunk.reads == pytest.approx(50 * 0.1 / LOOK_EVERY_S, abs=1)


@pytest.mark.parametrize("counter", ["steps", "tokens", "received_bytes"])
def test_any_counter_that_rises_is_progress(clock: FakeClock, counter: str) -> None:
    trunk = Trunk()
    deadline = ProgressDeadline(clock, 10.0, trunk.read)
    deadline.look()
    clock.sleep(9.0)
    trunk.seen = replace(trunk.seen, **{counter: 1})
    deadline.look()
    clock.sleep(9.0)
    assert not deadline.passed
    deadline.look()
    clock.sleep(1.5)
    assert deadline.passed


def test_an_open_session_that_does_nothing_is_no_progress(clock: FakeClock) -> None:
    trunk = Trunk()
    trunk.seen = replace(NOTHING_SEEN, sessions=4)
    deadline = ProgressDeadline(clock, 10.0, trunk.read)
    clock.sleep(9.0)
    deadline.look()
    clock.sleep(2.0)
    assert deadline.passed


def test_a_restarted_trunk_whose_counters_fell_is_no_progress(clock: FakeClock) -> None:
    trunk = Trunk()
    trunk.seen = RoundProgress(1, 5, 5, 5, 5)
    deadline = ProgressDeadline(clock, 10.0, trunk.read)
    deadline.look()
    clock.sleep(8.0)
    trunk.seen = NOTHING_SEEN
    deadline.look()
    clock.sleep(3.0)
    assert deadline.passed
    assert deadline.seen.steps == 5


def test_a_trunk_that_does_not_answer_ends_the_wait_but_raises_nothing(clock: FakeClock) -> None:
    trunk = Trunk()
    trunk.fails = True
    deadline = ProgressDeadline(clock, 10.0, trunk.read)
    while not deadline.passed:
        deadline.look()
        clock.sleep(1.0)
    assert clock.now < 1000.0 + 13.0


def test_no_progress_keeps_a_round_open_longer_than_its_messages_live(clock: FakeClock) -> None:
    trunk = Trunk()
    deadline = ProgressDeadline(clock, 600.0, trunk.read)
    steps = 0
    while not deadline.passed:
        steps += 1
        trunk.seen = replace(trunk.seen, steps=steps)
        deadline.look()
        clock.sleep(300.0)
    assert clock.now - 1000.0 == pytest.approx(MESSAGE_TTL_S, abs=600)


def test_who_watches_is_told_of_each_change_once(clock: FakeClock) -> None:
    trunk, told = Trunk(), list[tuple[int, int]]()
    deadline = ProgressDeadline(clock, 10.0, trunk.read, lambda seen, replies: told.append((seen.steps, replies)))
    for second in range(6):
        if second == 2:
            deadline.replied()
        trunk.seen = replace(trunk.seen, steps=second // 4)
        deadline.look()
        clock.sleep(1.0)
    assert told == [(0, 1), (1, 1)]


def test_the_last_look_reads_at_once(clock: FakeClock) -> None:
    trunk, told = Trunk(), list[int]()
    deadline = ProgressDeadline(clock, 10.0, trunk.read, lambda seen, replies: told.append(seen.steps))
    deadline.look()
    trunk.seen = replace(trunk.seen, steps=7)
    deadline.last_look()
    assert (deadline.seen.steps, told) == (7, [7])
