"""Bounds of pending graphs and sessions, with a clock that the test moves."""

from __future__ import annotations

import pytest

from contract.errors import (
    CapacityError,
    ConnectionFailedError,
    ExpiredGraphError,
    FrameError,
    RoundError,
    SessionError,
)
from contract.records import RoundKey, RoundProgress
from server_trunk.memory import Hold, MemoryBudget
from server_trunk.sessions import SIGN_OF_LIFE_S, PendingGraphs, Session, SessionTable

KEY = RoundKey("run", 1, 1)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(100)


@pytest.fixture
def pending(clock: Clock) -> PendingGraphs[str]:
    return PendingGraphs(2, 10.0, clock)


@pytest.fixture
def table(clock: Clock) -> SessionTable[str, str]:
    return SessionTable(2, 2, 10.0, clock)


def holding(budget: MemoryBudget, size: int) -> Hold:
    hold = Hold(budget)
    assert hold.grow(size)
    return hold


def put(pending: PendingGraphs[str], microbatch: int, graph: str = "graph", hold: Hold | None = None) -> None:
    pending.reserve(microbatch, hold or Hold(MemoryBudget(0)))
    pending.add(microbatch, graph)


def opened(table: SessionTable[str, str], key: RoundKey | None = KEY) -> Session[str, str]:
    return table.open("1", key, "sha", "identity", "adapter")


def test_a_graph_is_taken_once(pending: PendingGraphs[str]) -> None:
    put(pending, 7)
    assert pending.pop(7) == "graph"
    with pytest.raises(SessionError, match="no forward of microbatch 7 waits"):
        pending.pop(7)


def test_pending_graphs_are_bounded_and_numbers_are_not_reused(pending: PendingGraphs[str]) -> None:
    put(pending, 1)
    with pytest.raises(FrameError, match="microbatch 1 waits for its backward already"):
        pending.reserve(1, Hold(MemoryBudget(0)))
    put(pending, 2)
    with pytest.raises(CapacityError, match="2 forwards wait for their backward, which is this trunk's limit"):
        pending.reserve(3, Hold(MemoryBudget(0)))
    pending.drop([1, 99])
    pending.reserve(3, Hold(MemoryBudget(0)))
    assert len(pending) == 1


def test_every_way_a_graph_goes_gives_its_memory_back(
    table: SessionTable[str, str], clock: Clock, budget: MemoryBudget
) -> None:
    session = opened(table)
    put(session.pending, 1, hold=holding(budget, 100))
    session.pending.pop(1)
    assert budget.taken == 100  # its backward is still to be computed
    session.pending.settled(1)
    assert budget.taken == 0
    put(session.pending, 2, hold=holding(budget, 100))
    session.pending.drop([2, 2])
    put(session.pending, 3, hold=holding(budget, 100))
    session.pending.free_all("stepped")
    put(session.pending, 4, hold=holding(budget, 100))
    clock.now += 11
    table.sweep()
    assert budget.taken == 0
    put(session.pending, 5, hold=holding(budget, 30))
    put(session.pending, 6, hold=holding(budget, 30))
    session.pending.pop(6)
    table.close(session)
    assert budget.taken == 0
    half = opened(table)
    half.pending.reserve(1, holding(budget, 50))
    table.close(half)
    assert budget.taken == 0


def test_a_graph_expires_by_the_clock_alone(pending: PendingGraphs[str], clock: Clock) -> None:
    put(pending, 1, "old")
    clock.now += 6
    put(pending, 2, "new")
    clock.now += 5
    assert pending.sweep() == 1
    with pytest.raises(ExpiredGraphError, match="microbatch 1 is gone: it was freed after waiting 10 s"):
        pending.pop(1)
    assert pending.pop(2) == "new"


def test_freed_graphs_say_why(pending: PendingGraphs[str]) -> None:
    put(pending, 1)
    pending.free_all("the adapter was stepped")
    with pytest.raises(ExpiredGraphError, match="the adapter was stepped"):
        pending.pop(1)


def test_what_is_remembered_of_freed_graphs_is_bounded(clock: Clock) -> None:
    pending: PendingGraphs[str] = PendingGraphs(1000, 10.0, clock)
    for microbatch in range(1000):
        put(pending, microbatch)
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


def test_of_a_quiet_session_a_round_learns_no_more_than_that_it_goes_on(
    table: SessionTable[str, str], clock: Clock
) -> None:
    quiet = table.open("1", KEY, "sha", "identity", "adapter", quiet=True)
    for tokens in (5, 700, 11):
        quiet.count(steps=3, tokens=tokens, received_bytes=10 * tokens, sent_bytes=tokens)
    assert quiet.counters.tokens == 716
    assert table.progress(KEY) == RoundProgress(sessions=1, steps=1, tokens=0, received_bytes=0, sent_bytes=0)
    clock.now += SIGN_OF_LIFE_S
    for _ in range(50):
        quiet.count(tokens=1)
    assert table.progress(KEY) == RoundProgress(sessions=1, steps=2, tokens=0, received_bytes=0, sent_bytes=0)


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
    put(session.pending, 1)
    clock.now += 11
    assert table.sweep() == 1
    put(session.pending, 2)
    table.close(session)
    assert len(session.pending) == 0
    assert table.sweep() == 0


def test_rounds_that_go_on_are_remembered_however_many_others_are_named(table: SessionTable[str, str]) -> None:
    session = opened(table)
    for number in range(300):
        table.close(opened(table, RoundKey("other", number, 1)))
    session.count(steps=3)
    assert table.progress(KEY).steps == 3
    assert table.progress(RoundKey("other", 0, 1)).sessions == 0


def test_a_graph_that_was_put_aside_keeps_its_place_and_takes_no_memory(
    table: SessionTable[str, str], clock: Clock
) -> None:
    session, budget = opened(table), MemoryBudget(100)
    hold = Hold(budget)
    assert hold.grow(60)
    session.pending.reserve(7, hold)
    session.pending.add(7, "graph")
    clock.now += 2
    assert session.pending.at_rest() == {7: "graph"}
    assert session.pending.rested_s() == 2
    session.pending.put_aside(7, "another graph")
    assert budget.taken == 60
    session.pending.put_aside(7, "graph")
    assert (budget.taken, session.pending.at_rest(), session.pending.rested_s()) == (0, {}, 0.0)
    assert session.pending.reserved == 1
    assert session.pending.pop(7) == "graph"
    session.pending.settled(7)
    assert session.pending.reserved == 0


def test_work_is_counted_by_client_and_no_more_of_them_are_named_than_fit(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("contract.named_clients.MOST", 2)
    table: SessionTable[str, str] = SessionTable(9, 2, 10.0, clock)
    for client_id, quiet in (("1", False), ("2", True), ("3", False), ("4", False), ("5", False), ("1", False)):
        session = table.open(client_id, KEY, "sha", "identity", "adapter", quiet=quiet)
        session.count(steps=1, tokens=8)
        if client_id != "5":  # what an open session has done counts too
            table.close(session)
    assert {client_id: (done.sessions, done.steps, done.tokens) for client_id, done in table.counted().items()} == {
        "1": (2, 2, 16),
        "3": (1, 1, 8),
        "": (2, 2, 16),
    }


def test_the_attempts_of_the_last_runs_alone_are_remembered(table: SessionTable[str, str]) -> None:
    table.end_before(RoundKey("first", 2, 1))
    with pytest.raises(RoundError, match="round 1, attempt 1 of run first is over"):
        table.open("1", RoundKey("first", 1, 1), "0", (), "adapter")
    for number in range(300):
        table.end_before(RoundKey(f"run-{number}", 2, 1))
        table.end_before(RoundKey("kept", 2, 1))
    table.open("1", RoundKey("first", 1, 1), "0", (), "adapter")
    with pytest.raises(RoundError):
        table.require_going_on(RoundKey("kept", 1, 1))
