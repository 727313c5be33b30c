"""Bounds of pending graphs and sessions, with a clock that the test moves."""

from __future__ import annotations

import pytest

from contract.errors import CapacityError, ConnectionFailedError, ExpiredGraphError, FrameError, SessionError
from contract.records import RoundKey, RoundProgress
from server_trunk.sessions import PendingGraphs, Session, SessionTable

KEY = RoundKey("run", 1, 1)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pending(clock: Clock) -> PendingGraphs[str]:
    return PendingGraphs(2, 10.0, clock)


@pytest.fixture
def table(clock: Clock) -> SessionTable[str, str]:
    return SessionTable(2, 2, 10.0, clock)


def opened(table: SessionTable[str, str], key: RoundKey | None = KEY) -> Session[str, str]:
    return table.open("1", key, "sha", "identity", "adapter")


def test_a_graph_is_taken_once(pending: PendingGraphs[str]) -> None:
    pending.add(7, "graph")
    assert pending.pop(7) == "graph"
    with pytest.raises(SessionError, match="no forward of microbatch 7 waits"):
        pending.pop(7)


def test_pending_graphs_are_bounded_and_numbers_are_not_reused(pending: PendingGraphs[str]) -> None:
    pending.add(1, "a")
    pending.require_room(2)
    with pytest.raises(FrameError, match="microbatch 1 waits for its backward already"):
        pending.require_room(1)
    pending.add(2, "b")
    with pytest.raises(CapacityError, match="2 forwards wait for their backward, which is this trunk's limit"):
        pending.require_room(3)
    pending.drop([1, 99])
    pending.require_room(3)
    assert len(pending) == 1


def test_a_graph_expires_by_the_clock_alone(pending: PendingGraphs[str], clock: Clock) -> None:
    pending.add(1, "old")
    clock.now += 6
    pending.add(2, "new")
    clock.now += 5
    assert pending.sweep() == 1
    with pytest.raises(ExpiredGraphError, match="microbatch 1 is gone: it was freed after waiting 10 s"):
        pending.pop(1)
    assert pending.pop(2) == "new"


def test_freed_graphs_say_why(pending: PendingGraphs[str]) -> None:
    pending.add(1, "a")
    pending.free_all("the adapter was stepped")
    with pytest.raises(ExpiredGraphError, match="the adapter was stepped"):
        pending.pop(1)


def test_what_is_remembered_of_freed_graphs_is_bounded(clock: Clock) -> None:
    pending: PendingGraphs[str] = PendingGraphs(1000, 10.0, clock)
    for microbatch in range(1000):
        pending.add(microbatch, "graph")
    pending.free_all("gone")
    with pytest.raises(ExpiredGraphError):
        pending.pop(999)
    with pytest.raises(SessionError, match="no forward of microbatch 0"):
        pending.pop(0)


def test_sessions_are_bounded_and_places_come_back(table: SessionTable[str, str]) -> None:
    with table.place(), table.place():
        with pytest.raises(CapacityError, match="all 2 sessions of this trunk are taken"):
            with table.place():
                pass
        assert table.taken == 2
    with table.place():
        assert table.taken == 1
    assert table.taken == 0


def test_a_draining_table_admits_nobody(table: SessionTable[str, str]) -> None:
    table.stop_admitting()
    with pytest.raises(ConnectionFailedError, match="shutting down"):
        with table.place():
            pass


def test_progress_adds_up_over_open_and_closed_sessions_of_a_round(table: SessionTable[str, str]) -> None:
    first, second, other = opened(table), opened(table), opened(table, RoundKey("run", 2, 1))
    first.count(tokens=10, received_bytes=100)
    table.close(first)
    second.count(steps=1, tokens=5, sent_bytes=7)
    other.count(tokens=1000)
    assert table.progress(KEY) == RoundProgress(sessions=2, steps=1, tokens=15, received_bytes=100, sent_bytes=7)
    assert second.counters.tokens == 5
    assert table.progress(RoundKey("other", 1, 1)) == RoundProgress(0, 0, 0, 0, 0)


def test_totals_are_kept_for_the_last_rounds_only(table: SessionTable[str, str]) -> None:
    for number in range(300):
        table.close(opened(table, RoundKey("run", number, 1)))
    assert table.progress(RoundKey("run", 0, 1)).sessions == 0
    assert table.progress(RoundKey("run", 299, 1)).sessions == 1


def test_a_session_of_its_own_counts_for_no_round(table: SessionTable[str, str]) -> None:
    opened(table, None).count(tokens=3)
    assert table.progress(KEY).tokens == 0


def test_closing_and_sweeping_free_graphs(table: SessionTable[str, str], clock: Clock) -> None:
    session = opened(table)
    session.pending.add(1, "graph")
    clock.now += 11
    assert table.sweep() == 1
    session.pending.add(2, "graph")
    table.close(session)
    assert len(session.pending) == 0
    assert table.sweep() == 0
