"""Who drives a run: taken over only when its driver is gone, and from then on the former one writes nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from contract.errors import LeaseError, StorageError
from storage import leases
from storage.leases import LEASE_S
from storage.ledger import open_ledger
from storage.records import RoundCommit
from storage.store import Store, _locked_run, open_store
from tests.storage.ledger_cases import Key, admit_all, charge, unit

SHA = "a" * 64


class HandClock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def former(database_url: str, clock: HandClock) -> Store:
    """A store whose Flower run 7 began a run, committed round 1 and opened round 2."""
    store = open_store(database_url, clock)
    store.create_run("r1", "7", {"num-rounds": 3}, "simulation", "f" * 64)
    store.add_adapter_version("r1", 0, SHA, SHA)
    store.open_round("r1", 1, ["1", "2"])
    store.commit_round(RoundCommit("r1", 1, 1, SHA, SHA, 10, ["1", "2"], 1.0))
    store.open_round("r1", 2, ["1", "2"])
    return store


@pytest.fixture
def later(database_url: str, clock: HandClock, former: Store) -> Store:
    return open_store(database_url, clock)


def test_a_run_whose_driver_is_heard_is_not_taken_over(former: Store, later: Store, clock: HandClock) -> None:
    for _ in range(3):
        clock.wait(LEASE_S - 1)
        former.renew_lease("r1")
        with pytest.raises(LeaseError, match="run r1 is being driven: its orchestrator was heard 0 s ago"):
            later.resume_run("r1", "8")
    assert later.get_run("r1").flower_run_id == "7"
    assert former.rounds("r1")[-1].status == "open"


def test_a_run_whose_driver_fell_silent_goes_on_under_another(former: Store, later: Store, clock: HandClock) -> None:
    clock.wait(LEASE_S)
    run = later.resume_run("r1", "8")
    assert (run.status, run.flower_run_id, run.committed_rounds, run.ended_at) == ("running", "8", 1, None)
    told = [(row.number, row.attempt, row.status, row.reason) for row in later.rounds("r1")]
    assert told[1:] == [(2, 1, "aborted", "interrupted; the run was resumed")]
    assert later.open_round("r1", 2, ["1", "2"]) == 2
    (event,) = [event for event in later.events("r1") if event.kind == "resumed"]
    assert event.detail == {"from": "7", "to": "8", "was": "running", "reason": None}


def test_what_the_former_driver_still_writes_is_refused(former: Store, later: Store, clock: HandClock) -> None:
    clock.wait(LEASE_S)
    later.resume_run("r1", "8")
    attempt = later.open_round("r1", 2, ["1", "2"])
    before = (later.rounds("r1"), later.adapter_versions("r1"), later.get_run("r1"))
    for write in (
        lambda: former.commit_round(RoundCommit("r1", 2, attempt, SHA, SHA, 10, ["1", "2"], 1.0)),
        lambda: former.open_round("r1", 2, ["1"]),
        lambda: former.abort_round("r1", 2, attempt, "late"),
        lambda: former.record_metrics("r1", 1, None, {"eval_loss": 1.0}),
        lambda: former.renew_lease("r1"),
    ):
        with pytest.raises(LeaseError, match="run r1 was resumed as Flower run 8: Flower run 7 drives it no more"):
            write()
    assert former.finish_run("r1", "failed", "too late", flower_run_id="7") is False
    assert (later.rounds("r1"), later.adapter_versions("r1"), later.get_run("r1")) == before


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_run_that_ended_early_is_resumed_at_once(former: Store, later: Store, status: str) -> None:
    former.finish_run("r1", status, "no quorum", flower_run_id="7")  # type: ignore[arg-type]
    with pytest.raises(LeaseError, match=f"run r1 has {status}; it changes no more"):
        former.renew_lease("r1")
    run = later.resume_run("r1", "8")
    assert (run.status, run.reason) == ("running", None)
    with pytest.raises(LeaseError, match="resumed as Flower run 8"):
        former.renew_lease("r1")


def test_a_run_that_finished_is_not_resumed(former: Store, later: Store, clock: HandClock) -> None:
    former.finish_run("r1", "finished", flower_run_id="7")
    clock.wait(10 * LEASE_S)
    with pytest.raises(StorageError, match="run r1 has finished: there is nothing to resume"):
        later.resume_run("r1", "8")


def test_of_two_that_would_resume_one_run_one_does(former: Store, later: Store, clock: HandClock) -> None:
    clock.wait(LEASE_S)
    later.resume_run("r1", "8")
    with pytest.raises(LeaseError, match="is being driven"):
        former.resume_run("r1", "9")


def test_a_run_of_an_older_version_without_a_lease_is_resumed(former: Store, later: Store, database_url: str) -> None:
    from sqlalchemy import create_engine, make_url, text

    url = make_url(database_url)
    engine = create_engine(url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE runs SET lease_until = NULL"))
    engine.dispose()
    assert later.resume_run("r1", "8").flower_run_id == "8"


def test_the_former_driver_charges_nothing_and_says_nothing_more(
    former: Store, later: Store, clock: HandClock, database_url: str
) -> None:
    ledger = open_ledger(database_url, clock, Key())
    assert ledger.reserve([charge(number=2)], admit_all, driver="7") == []
    clock.wait(LEASE_S)
    later.resume_run("r1", "8")
    with pytest.raises(LeaseError, match="Flower run 7 drives it no more"):
        ledger.reserve([charge(number=3)], admit_all, driver="7")
    with pytest.raises(LeaseError, match="Flower run 7 drives it no more"):
        former.add_event("r1", "said", "too late")
    assert [row.round for row in ledger.rows(unit()) if row.kind == "charge"] == [2]
    assert ledger.reserve([charge(number=3)], admit_all, driver="8") == []
    later.add_event("r1", "said", "in time")
    ledger.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_renewal_waits_no_longer_than_it_is_worth(
    former: Store, later: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 0.2)
    with later._writing("hold the run's row") as session:
        _locked_run(session, "r1")
        with pytest.raises(StorageError, match="statement timeout"):
            former.renew_lease("r1")
    former.renew_lease("r1")
