"""Identities in the Store, the same on both engines: who may speak for a client, and from when to when."""

import threading

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text

from contract.errors import ConfigError, StorageError
from contract.identity import public_key_text
from storage.reader import Reader
from storage.store import Store, open_reader, open_store

SIGNATURE = bytes(range(64))


def key(number: int) -> str:
    private = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
    return public_key_text(private.public_key().public_bytes_raw())


def start(store: Store, run_id: str = "r1") -> None:
    store.create_run(run_id, run_id, {}, "deployment", "f" * 64)


def everything(store: Reader) -> list[object]:
    return [store.list_identities(True), store.roster(), store.node_bindings("r1"), store.events()]


def test_before_anybody_is_enrolled_the_roster_is_empty_and_of_version_0(store: Store) -> None:
    assert (store.roster().version, store.roster().members, store.roster_version()) == (0, [], 0)
    assert store.list_identities(include_revoked=True) == []
    assert store.bound_client("7") is None


def test_an_enrolled_client_reads_back_with_its_operator_and_version(store: Store) -> None:
    assert store.enroll_client("site-a", key(1), "ada") == 1
    assert store.enroll_client("Site-B", f" {key(2)}\n", "bob") == 2
    upper, lower = store.list_identities()
    assert (lower.client_id, lower.public_key, lower.enrolled_by, lower.roster_version) == ("site-a", key(1), "ada", 1)
    assert (upper.client_id, upper.public_key, upper.enrolled_by, upper.roster_version) == ("Site-B", key(2), "bob", 2)
    assert lower.enrolled_at < upper.enrolled_at
    assert (lower.revoked_at, lower.revoke_reason) == (None, None)
    assert store.roster().members == [upper, lower]
    assert store.roster().version == store.roster_version() == 2


def test_a_revoked_client_leaves_the_roster_and_stays_on_record(store: Store) -> None:
    store.enroll_client("a", key(1), "ada")
    store.enroll_client("b", key(2), "ada")
    assert store.revoke_client("a", "bob", "laptop stolen") == 3
    assert [row.client_id for row in store.list_identities()] == ["b"]
    assert [row.client_id for row in store.roster().members] == ["b"]
    revoked = store.list_identities(include_revoked=True)[0]
    assert (revoked.client_id, revoked.revoke_reason, revoked.roster_version) == ("a", "laptop stolen", 3)
    assert revoked.revoked_at is not None
    assert revoked.revoked_at > revoked.enrolled_at
    assert store.revoke_client("b", "bob", "left") == 4
    assert (store.roster().version, store.roster().members) == (4, [])


def test_each_change_is_an_event_with_its_operator(store: Store) -> None:
    start(store)
    store.enroll_client("a", key(1), "ada")
    store.bind_node("r1", "7", "a", SIGNATURE)
    store.revoke_client("a", "bob", "laptop stolen")
    enrolled, bound, revoked = store.events()
    assert (enrolled.kind, enrolled.message, enrolled.run_id) == ("client-enrolled", "ada enrolled client a", None)
    assert enrolled.detail == {"client_id": "a", "public_key": key(1), "operator": "ada", "roster_version": 1}
    assert (revoked.kind, revoked.message) == ("client-revoked", "bob revoked client a: laptop stolen")
    assert revoked.detail == {"client_id": "a", "operator": "bob", "reason": "laptop stolen", "roster_version": 2}
    assert (bound.kind, bound.run_id, bound.detail) == ("node-bound", "r1", {"node_id": "7", "client_id": "a"})


@pytest.mark.parametrize(
    ("client_id", "number", "error", "told"),
    [
        ("a", 3, StorageError, "client a was enrolled on 2026-01-01 already$"),
        ("gone", 3, StorageError, "a revoked id is never used again: choose another"),
        ("c", 1, StorageError, "the public key is the key of client a; each client has a key of its own"),
        ("c", 2, StorageError, "the public key was the key of revoked client gone"),
        ("a b", 3, ConfigError, "client id is 'a b'"),
    ],
)
def test_an_id_or_key_is_enrolled_once_for_ever(
    store: Store, client_id: str, number: int, error: type[Exception], told: str
) -> None:
    store.enroll_client("a", key(1), "ada")
    store.enroll_client("gone", key(2), "ada")
    store.revoke_client("gone", "ada", "left")
    before = everything(store)
    with pytest.raises(error, match=told):
        store.enroll_client(client_id, key(number), "ada")
    assert everything(store) == before


def test_what_is_no_key_is_not_enrolled(store: Store) -> None:
    with pytest.raises(ConfigError, match="public key is not base64"):
        store.enroll_client("a", "ed25519:?", "ada")
    assert store.roster_version() == 0


def test_only_an_enrolled_client_is_revoked_and_once(store: Store) -> None:
    with pytest.raises(StorageError, match="client a is not enrolled; `trunkline clients list` shows who is"):
        store.revoke_client("a", "ada", "typo")
    store.enroll_client("a", key(1), "ada")
    store.revoke_client("a", "ada", "laptop stolen")
    before = everything(store)
    with pytest.raises(StorageError, match="client a was revoked on 2026-01-01: laptop stolen"):
        store.revoke_client("a", "ada", "again")
    assert everything(store) == before


def test_an_operator_or_reason_cannot_spoil_the_record(store: Store) -> None:
    store.enroll_client("a", key(1), "a\x00da\ud800")
    store.revoke_client("a", "ada", "no\x00ne")
    row = store.list_identities(include_revoked=True)[0]
    assert (row.enrolled_by, row.revoke_reason) == ("ada\\ud800", "none")


def test_a_node_speaks_for_the_client_that_it_showed_itself_to_be(store: Store) -> None:
    start(store)
    start(store, "r2")
    store.enroll_client("a", key(1), "ada")
    store.bind_node("r1", "7", "a", SIGNATURE)
    store.bind_node("r1", "7", "a", bytes(64))
    store.bind_node("r1", "8", "a", SIGNATURE)
    store.bind_node("r2", "7", "a", SIGNATURE)
    assert store.bound_client("7") == store.bound_client("8") == "a"
    assert store.bound_client("9") is None
    assert [(row.node_id, row.client_id, row.signature) for row in store.node_bindings("r1")] == [
        ("7", "a", SIGNATURE.hex()),
        ("8", "a", SIGNATURE.hex()),
    ]
    assert len(store.node_bindings("r2")) == 1


def test_a_node_is_bound_to_nobody_who_is_not_enrolled_nor_to_two(store: Store) -> None:
    start(store)
    store.enroll_client("a", key(1), "ada")
    store.enroll_client("b", key(2), "ada")
    store.bind_node("r1", "7", "a", SIGNATURE)
    before = everything(store)
    with pytest.raises(StorageError, match="node 7 speaks for client a already, not for b"):
        store.bind_node("r1", "7", "b", SIGNATURE)
    with pytest.raises(StorageError, match="client c is not enrolled"):
        store.bind_node("r1", "8", "c", SIGNATURE)
    with pytest.raises(StorageError, match="the signature of node 8 is of 3 bytes, not 64"):
        store.bind_node("r1", "8", "a", b"abc")
    with pytest.raises(StorageError, match="there is no run r9"):
        store.bind_node("r9", "8", "a", SIGNATURE)
    assert everything(store) == before


def test_a_revoked_client_speaks_through_no_node_and_its_site_may_come_back_under_another_id(store: Store) -> None:
    start(store)
    store.enroll_client("a", key(1), "ada")
    store.bind_node("r1", "7", "a", SIGNATURE)
    store.revoke_client("a", "ada", "key lost")
    assert store.bound_client("7") is None
    with pytest.raises(StorageError, match="client a was revoked"):
        store.bind_node("r1", "7", "a", SIGNATURE)
    store.enroll_client("a2", key(2), "ada")
    store.bind_node("r1", "7", "a2", SIGNATURE)
    assert store.bound_client("7") == "a2"
    assert [row.client_id for row in store.node_bindings("r1")] == ["a", "a2"]


def test_a_run_that_has_ended_binds_no_more(store: Store) -> None:
    start(store)
    store.enroll_client("a", key(1), "ada")
    store.finish_run("r1", "stopped")
    with pytest.raises(StorageError, match="run r1 has stopped; it changes no more"):
        store.bind_node("r1", "7", "a", SIGNATURE)


def test_operators_at_the_same_time_never_share_a_version(store: Store, database_url: str) -> None:
    versions: list[int] = []

    def enroll(first: int) -> None:
        own = open_store(database_url)
        versions.extend(own.enroll_client(f"c{number}", key(number + 1), "ada") for number in range(first, first + 5))
        own.close()

    threads = [threading.Thread(target=enroll, args=(first,)) for first in (0, 5, 10, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(versions) == list(range(1, 21))
    assert store.roster().version == 20
    assert sorted(row.roster_version for row in store.list_identities()) == sorted(versions)


def test_a_version_outlives_the_rows_that_it_counted(store: Store) -> None:
    store.enroll_client("a", key(1), "ada")
    with store._engine.begin() as connection:
        connection.execute(text("DELETE FROM identities"))
    assert store.enroll_client("b", key(2), "ada") == 2


def test_a_database_without_its_version_is_refused(store: Store) -> None:
    with store._engine.begin() as connection:
        connection.execute(text("DELETE FROM roster"))
    for use in (store.roster, store.roster_version, lambda: store.enroll_client("a", key(1), "ada")):
        with pytest.raises(StorageError, match="has lost the roster's version"):
            use()


def test_a_certificates_key_is_one_clients_and_each_change_of_it_an_event(store: Store) -> None:
    store.enroll_client("a", key(1), "ada", "a" * 64)
    store.enroll_client("b", key(2), "ada")
    store.set_client_certificate("b", "b" * 64, "bob")
    assert {row.client_id: row.certificate_key_sha256 for row in store.list_identities()} == {
        "a": "a" * 64,
        "b": "b" * 64,
    }
    changed = store.events()[-1]
    assert (changed.kind, changed.message) == ("client-certificate", f"bob gave client b the TLS key {'b' * 12}")
    assert changed.detail["certificate_key_sha256"] == "b" * 64
    assert changed.detail["before"] is None
    assert store.roster_version() == 2, "no roster names a certificate"
    store.set_client_certificate("b", "b" * 64, "bob")
    store.revoke_client("a", "ada", "laptop stolen")
    before = everything(store)
    refused = [
        (StorageError, "is that of client a", lambda: store.set_client_certificate("b", "a" * 64, "bob")),
        (StorageError, "is that of client b", lambda: store.enroll_client("c", key(3), "ada", "b" * 64)),
        (StorageError, "client a was revoked", lambda: store.set_client_certificate("a", "c" * 64, "bob")),
        (StorageError, "client c is not enrolled", lambda: store.set_client_certificate("c", "c" * 64, "bob")),
        (ConfigError, "64 hexadecimal digits", lambda: store.set_client_certificate("b", "B" * 64, "bob")),
        (ConfigError, "64 hexadecimal digits", lambda: store.enroll_client("c", key(3), "ada", "")),
    ]
    for error, told, change in refused:
        with pytest.raises(error, match=told):
            change()
    assert everything(store) == before


def test_the_database_itself_has_one_roster_and_one_owner_of_a_key(store: Store) -> None:
    store.enroll_client("a", key(1), "ada", "a" * 64)
    columns = "client_id, public_key, enrolled_at, enrolled_by, certificate_key_sha256, roster_version"
    for statement in (
        "INSERT INTO roster VALUES (2, 9)",
        f"INSERT INTO identities ({columns}) SELECT 'b', public_key, enrolled_at, 'x', NULL, 1 FROM identities",
        f"INSERT INTO identities ({columns}) "
        "SELECT 'b', 'other', enrolled_at, 'x', certificate_key_sha256, 1 FROM identities",
    ):
        with pytest.raises(Exception, match=r"(?i)unique|check"):
            with store._engine.begin() as connection:
                connection.execute(text(statement))


def test_identities_are_there_when_the_database_is_opened_again_and_for_readers(
    store: Store, database_url: str
) -> None:
    start(store)
    store.enroll_client("a", key(1), "ada")
    store.bind_node("r1", "7", "a", SIGNATURE)
    reader = open_reader(database_url)
    assert not hasattr(reader, "enroll_client")
    assert [reader.list_identities(True), reader.roster(), reader.node_bindings("r1"), reader.events()] == everything(
        store
    )
    assert reader.bound_client("7") == "a"
    reader.close()
