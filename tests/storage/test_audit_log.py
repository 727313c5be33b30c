"""What operators did is kept with what they changed, or not at all, and nobody alters it afterwards; both engines."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text

from contract.errors import LedgerError, StorageError
from contract.identity import public_key_text
from contract.privacy_records import NODE_CONFIG
from storage import audit_log, identities
from storage.engine import make_engine
from storage.ledger import Ledger
from storage.records import AuditRow, Deed, RoundCommit
from storage.revisions import head_revision, upgrade
from storage.store import Store, open_reader, open_store
from tests.storage.ledger_cases import BUDGET, unit


def key(number: int) -> str:
    private = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
    return public_key_text(private.public_key().public_bytes_raw())


def entries(url: str) -> list[AuditRow]:
    """The log, oldest first."""
    reader = open_reader(url)
    try:
        return reader.audit_log()[::-1]
    finally:
        reader.close()


def told(url: str) -> list[tuple[str, str, str]]:
    return [(one.operator, one.action, one.target) for one in entries(url)]


def test_who_enrolled_and_revoked_whom_is_kept_with_the_change(store: Store, database_url: str) -> None:
    store.enroll_client("ward", key(1), "ada")
    store.revoke_client("ward", "bob", "laptop stolen")
    assert told(database_url) == [("ada", "client-enrolled", "ward"), ("bob", "client-revoked", "ward")]
    enrolled, revoked = entries(database_url)
    assert enrolled.detail == {"public_key": key(1), "roster_version": 1}
    assert revoked.detail == {"reason": "laptop stolen", "roster_version": 2}
    assert enrolled.at < revoked.at


def test_what_is_refused_or_fails_half_way_is_in_no_log(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.enroll_client("ward", key(1), "ada")
    with pytest.raises(StorageError):
        store.enroll_client("ward", key(2), "bob")
    with pytest.raises(StorageError):
        store.revoke_client("nobody", "bob", "x")

    def full(*_: object) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(audit_log, "note", full)
    with pytest.raises(StorageError, match="no space left"):
        store.revoke_client("ward", "bob", "x")
    monkeypatch.undo()
    assert told(database_url) == [("ada", "client-enrolled", "ward")]
    assert [row.client_id for row in store.list_identities()] == ["ward"], "a change that is in no log was kept"
    assert identities.audit_log is audit_log


def test_a_budget_that_a_person_sets_is_in_the_log_and_a_sites_settings_are_not(
    ledger: Ledger, database_url: str
) -> None:
    ledger.set_budget(unit(), BUDGET, NODE_CONFIG, "the site's settings")
    ledger.set_budget(unit(), BUDGET, "ada", "agreed")
    with pytest.raises(LedgerError):
        ledger.set_budget(unit(), BUDGET, "ada", " ")
    assert told(database_url) == [("ada", "budget-set", "ward")]
    (entry,) = entries(database_url)
    assert entry.detail == {
        "dataset": "notes",
        "level": "client",
        "epsilon": 8.0,
        "delta": 1e-5,
        "reason": "agreed",
    }


def test_a_run_is_stopped_once_and_so_is_its_entry(store: Store, database_url: str) -> None:
    store.create_run("r1", "7", {}, "simulation", "f")
    deed = Deed("ada", "run-stopped", "r1", {"reason": "wrong data"})
    assert store.finish_run("r1", "stopped", "stopped by ada", deed=deed)
    assert not store.finish_run("r1", "stopped", "stopped by ada", deed=deed)
    assert told(database_url) == [("ada", "run-stopped", "r1")]


def test_the_log_is_read_newest_first_by_each_filter(store: Store) -> None:
    for number, (operator, action) in enumerate(
        [("ada", "run-stopped"), ("bob", "run-resumed"), ("ada", "run-resumed"), ("bob", "run-stopped")]
    ):
        store.note(Deed(operator, action, f"r{number}"))
    whole = store.audit_log()
    assert [one.target for one in whole] == ["r3", "r2", "r1", "r0"]
    assert [one.target for one in store.audit_log(2)] == ["r3", "r2"]
    assert [one.target for one in store.audit_log(operator="ada")] == ["r2", "r0"]
    assert [one.target for one in store.audit_log(action="run-resumed")] == ["r2", "r1"]
    assert [one.target for one in store.audit_log(since=whole[1].at)] == ["r3", "r2"]
    assert store.audit_log(since=datetime(2999, 1, 1, tzinfo=UTC)) == []
    assert [one.target for one in store.audit_log(1, operator="bob", action="run-stopped")] == ["r3"]


def test_what_a_database_cannot_store_does_not_spoil_an_entry(store: Store) -> None:
    store.note(Deed("a\x00da", "run-stopped", "r\x001\ud800"))
    (entry,) = store.audit_log()
    assert (entry.operator, entry.target) == ("ada", "r1\\ud800")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit_log SET operator = 'nobody'",
        "DELETE FROM audit_log",
        "TRUNCATE audit_log",
        "INSERT OR REPLACE INTO audit_log SELECT audit_id, at, 'nobody', action, target, detail FROM audit_log",
    ],
)
def test_the_database_itself_lets_nobody_alter_the_log(store: Store, database_url: str, change: str) -> None:
    only = {"TRUNCATE": "postgresql", "INSERT": "sqlite"}.get(change.split()[0])
    store.note(Deed("ada", "run-stopped", "r1"))
    engine = make_engine(database_url)
    if only not in (None, engine.dialect.name):
        pytest.skip(f"{engine.dialect.name} has no such statement")
    with pytest.raises(Exception, match="append-only"):
        with engine.begin() as connection:
            connection.execute(text(change))
    engine.dispose()
    assert told(database_url) == [("ada", "run-stopped", "r1")]


def test_an_upgrade_that_changes_something_names_who_asked_for_it(database_url: str) -> None:
    engine = make_engine(database_url)
    upgrade(engine, "ada")
    upgrade(engine, "bob")
    engine.dispose()
    (entry,) = entries(database_url)
    assert (entry.operator, entry.action) == ("ada", "database-upgraded")
    assert entry.detail == {"before": None, "revision": head_revision()}


# ---- one client's history --------------------------------------------------------------------------------------------


def two_rounds(store: Store) -> None:
    """Run r1, in which node 11 speaks for ward: it trains in round 1 and fails in round 2; node 12 is another's."""
    store.create_run("r1", "7", {}, "deployment", "f" * 64)
    store.add_adapter_version("r1", 0, "a" * 64, "b" * 64)
    store.enroll_client("ward", key(1), "ada")
    store.bind_node("r1", "11", "ward", bytes(64))
    store.open_round("r1", 1, ["11", "12"])
    store.commit_round(RoundCommit("r1", 1, 1, "c" * 64, "d" * 64, 10, ["11", "12"], 1.0))
    store.open_round("r1", 2, ["11", "12"])
    store.record_participation("r1", 2, 1, "11", "failed", "its disk is full")
    store.abort_round("r1", 2, 1, "too few")
    store.open_round("r1", 2, ["11", "12"])
    store.record_participation("r1", 2, 2, "11", "failed", "its disk is full")


def test_a_clients_history_has_its_nodes_outcomes_and_who_changed_it(store: Store) -> None:
    two_rounds(store)
    store.revoke_client("ward", "bob", "left")
    found = store.client_history("ward")
    assert found is not None
    assert found.identity is not None
    assert (found.identity.enrolled_by, found.identity.certificate_key_sha256) == ("ada", None)
    assert [(one.node_id, one.run_id) for one in found.bindings] == [("11", "r1")]
    assert [(one.run_id, one.status, one.count) for one in found.participations] == [
        ("r1", "failed", 2),
        ("r1", "trained", 1),
    ]
    assert [(one.kind, one.detail["operator"]) for one in found.changes] == [
        ("client-enrolled", "ada"),
        ("client-revoked", "bob"),
    ]
    committed = store.rounds("r1")[0]
    assert found.last_seen_at == committed.progress_at, "to have failed is not to have been seen"


def test_a_node_that_nobody_enrolled_has_a_history_too(store: Store) -> None:
    two_rounds(store)
    found = store.client_history("12")
    assert found is not None
    assert (found.identity, found.bindings, found.changes) == (None, [], [])
    assert found.first_seen_at is not None
    assert [(one.status, one.count) for one in found.participations] == [("invited", 2), ("trained", 1)]


def test_who_is_neither_client_nor_node_has_none(store: Store) -> None:
    two_rounds(store)
    store.enroll_client("north", key(2), "ada")
    assert store.client_history("nobody") is None
    fresh = store.client_history("north")
    assert fresh is not None
    assert (fresh.bindings, fresh.participations, fresh.last_seen_at) == ([], [], None)


def test_one_clients_changes_are_not_anothers(store: Store, tmp_path: Path) -> None:
    store.enroll_client("a", key(1), "ada")
    store.enroll_client("b", key(2), "bob")
    found = store.client_history("b")
    assert found is not None
    assert [event.detail["operator"] for event in found.changes] == ["bob"]
    other = open_store(f"sqlite:///{tmp_path / 'another.db'}")
    assert other.client_history("a") is None
    other.close()
