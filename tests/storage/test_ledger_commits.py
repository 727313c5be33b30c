"""A round's commit settles what the round reserved, in the one transaction that commits everything else."""

from collections.abc import Iterator

import pytest

from contract.errors import LedgerError, StorageError
from contract.privacy_records import Unit
from storage.ledger import Ledger, open_ledger
from storage.ledger_chain import head_fault, unit_id_of
from storage.records import RoundCommit
from storage.store import Store, open_store
from tests.storage.conftest import Clock
from tests.storage.ledger_cases import RUN, Key, admit_all, charge, unit

WARD, CLINIC = unit("ward"), unit("clinic")


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = open_store(database_url, Clock(), Key())
    opened.create_run(RUN, "7", {}, "simulation", "f" * 64)
    opened.add_adapter_version(RUN, 0, "a" * 64, "b" * 64)
    opened.open_round(RUN, 1, ["11", "12"])
    yield opened
    opened.close()


@pytest.fixture
def ledger(store: Store, database_url: str) -> Iterator[Ledger]:
    opened = open_ledger(database_url, Clock())
    yield opened
    opened.close()


def commit_of(survivors: list[str], settle_privacy: bool = True) -> RoundCommit:
    return RoundCommit(RUN, 1, 1, "c" * 64, "d" * 64, 9, survivors, 2.5, settle_privacy=settle_privacy)


def states(ledger: Ledger, of: Unit) -> list[str]:
    return [row.state for row in ledger.rows(of)]


def test_a_commit_commits_what_its_attempt_reserved_and_signs_the_heads(store: Store, ledger: Ledger) -> None:
    ledger.reserve([charge(WARD), charge(CLINIC), charge(WARD, attempt=2), charge(WARD, run="r2")], admit_all)
    ledger.settle(RUN, 1, 1, "VOID", [CLINIC])
    store.commit_round(commit_of(["11"]))
    assert states(ledger, WARD) == ["RESERVED", "RESERVED", "RESERVED", "COMMITTED"]
    assert states(ledger, CLINIC) == ["RESERVED", "VOID"]
    (head,) = ledger.heads()
    assert (head.unit_id, head.seq, head.signer) == (unit_id_of(WARD), 4, Key().public_key_text)
    assert (head_fault(head), ledger.verify()) == (None, [])


def test_a_commit_that_fails_leaves_the_charges_reserved(store: Store, ledger: Ledger) -> None:
    ledger.reserve([charge(WARD)], admit_all)
    with pytest.raises(StorageError, match="client 99 is a survivor but not in the cohort"):
        store.commit_round(commit_of(["99"]))
    assert (states(ledger, WARD), ledger.heads()) == (["RESERVED"], [])
    store.commit_round(commit_of(["11"]))
    assert states(ledger, WARD) == ["RESERVED", "COMMITTED"]


def test_a_round_that_reserved_nothing_cannot_be_committed_as_one_that_is_paid_for(
    store: Store, ledger: Ledger
) -> None:
    ledger.reserve([charge(WARD, attempt=2)], admit_all)
    with pytest.raises(LedgerError, match="nothing was reserved for attempt 1 at round 1 of run r1"):
        store.commit_round(commit_of(["11"]))
    assert [row.status for row in store.rounds(RUN)] == ["open"]
    assert [version.number for version in store.adapter_versions(RUN)] == [0]


def test_a_commit_without_privacy_touches_no_ledger(store: Store, ledger: Ledger) -> None:
    ledger.reserve([charge(WARD)], admit_all)
    store.commit_round(commit_of(["11"], settle_privacy=False))
    assert (states(ledger, WARD), ledger.heads()) == (["RESERVED"], [])
