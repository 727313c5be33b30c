"""`trunkline clients show`: one client, from everything that SQL has of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from contract.identity import public_key_text
from orchestrator.clients_cli import app
from storage.records import RoundCommit
from storage.store import Store, open_store
from tests.orchestrator.budget_cases import NORTH, ROUNDS


def key(number: int) -> str:
    private = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
    return public_key_text(private.public_key().public_bytes_raw())


def show(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["show", *arguments])


def data(client: str) -> Any:
    done = show(client, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["data"]


@pytest.fixture
def store(ledger_home: Path) -> Store:
    """Node 11 spoke for ward in run r1, in which it trained twice and failed once; nobody enrolled node 12."""
    opened = open_store()
    opened.create_run("r1", "7", {}, "deployment", "f" * 64)
    opened.add_adapter_version("r1", 0, "a" * 64, "b" * 64)
    opened.enroll_client("ward", key(1), "ada")
    opened.enroll_client("idle", key(2), "ada")
    opened.bind_node("r1", "11", "ward", bytes(64))
    for number in (1, 2):
        opened.open_round("r1", number, ["11", "12"])
        opened.commit_round(RoundCommit("r1", number, 1, "c" * 64, "d" * 64, 10, ["11", "12"], 1.0))
    opened.open_round("r1", 3, ["11", "12"])
    opened.record_participation("r1", 3, 1, "11", "failed", "its disk is full")
    opened.close()
    return opened


def test_an_enrolled_client_is_shown_with_nodes_outcomes_and_who_changed_it(store: Store) -> None:
    shown = data("ward")
    assert (shown["client"], shown["status"], shown["public_key"]) == ("ward", "enrolled", key(1))
    assert (shown["enrolled_by"], shown["revoked_by"], shown["certificate_key_sha256"]) == ("ada", None, None)
    assert [(one["node_id"], one["run_id"]) for one in shown["nodes"]] == [("11", "r1")]
    (counts,) = shown["participations"]
    assert {name: counts[name] for name in ("run_id", "trained", "failed", "late", "refused", "invited")} == {
        "run_id": "r1",
        "trained": 2,
        "failed": 1,
        "late": 0,
        "refused": 0,
        "invited": 0,
    }
    assert shown["last_seen_at"] is not None
    assert shown["budgets"] == []
    assert [(one["kind"], one["operator"]) for one in shown["changes"]] == [("client-enrolled", "ada")]


def test_a_revoked_client_tells_by_whom_and_why(store: Store) -> None:
    assert CliRunner().invoke(app, ["revoke", "ward", "--reason", "left", "--yes", "--operator", "bob"]).exit_code == 0
    shown = data("ward")
    assert (shown["status"], shown["revoked_by"], shown["revoke_reason"]) == ("revoked", "bob", "left")
    table = " ".join(show("ward").stdout.split())
    assert "bob revoked client ward: left" in table
    assert "nodes that spoke for it" in table


def test_a_node_that_nobody_enrolled_is_shown_as_one(store: Store) -> None:
    shown = data("12")
    assert (shown["status"], shown["nodes"]) == ("a node that nobody enrolled", [])
    assert shown["participations"][0]["trained"] == 2
    assert shown["participations"][0]["invited"] == 1


def test_who_never_took_part_is_shown_without_empty_tables(store: Store) -> None:
    shown = data("idle")
    assert (shown["last_seen_at"], shown["nodes"], shown["participations"]) == (None, [], [])
    table = show("idle").stdout
    assert "by run and outcome" not in table
    assert "enrolled" in table


def test_a_stranger_is_named_and_told_where_to_look(store: Store) -> None:
    done = show("nobody")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "there is no client nobody: it is neither enrolled (`trunkline clients list --all`)" in done.stderr


def test_a_clients_budgets_are_shown_with_their_adversaries(spent: None) -> None:
    client = NORTH.client
    writer = open_store()
    writer.enroll_client(client, key(5), "ada")
    writer.close()
    shown = data(client)
    assert shown["budgets"], shown
    assert {row["client"] for row in shown["budgets"]} == {client}
    assert {row["adversary"] for row in shown["budgets"]} == {"holder", "orchestrator", "trunk"}
    assert {row["last_round"] for row in shown["budgets"]} == {ROUNDS}
    assert "privacy: epsilon by adversary" in show(client).stdout


def test_clients_are_listed_from_a_moment_on_and_the_newest_only(store: Store) -> None:
    def listed(*arguments: str) -> list[str]:
        done = CliRunner().invoke(app, ["list", *arguments, "-o", "json"])
        assert done.exit_code == 0, done.output
        return [row["client_id"] for row in json.loads(done.stdout)["data"]]

    assert listed("--limit", "1") == ["idle"]
    assert listed("--since", "2020-01-01") == ["idle", "ward"]
    assert listed("--since", "2999-01-01") == []
