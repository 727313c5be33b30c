"""All that the orchestrator knows of one client, put together for `clients show`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from contract.errors import StorageError
from contract.output import talk
from orchestrator.spending_view import SpendingRow, folded, read_settings, spending_rows
from storage.ledger import Ledger
from storage.reader import Reader
from storage.records import ClientHistory, EventRow, ParticipationCount

OUTCOMES = ("trained", "failed", "late", "refused", "invited")
_REVOKED = "client-revoked"

Shown = tuple[str | None, Sequence[str] | None, object]
"""A table's title, its columns, and what is in it."""


def read_client(reader: Reader, ledger: Ledger, client: str) -> dict[str, Any]:
    """Everything of one client as plain data. Raises StorageError where nobody has that name."""
    history = reader.client_history(client)
    if history is None:
        raise StorageError(
            f"there is no client {client}: it is neither enrolled (`trunkline clients list --all`) nor the id of a "
            "node that took part in a run (`trunkline rounds show`)"
        )
    return {
        "client": client,
        **_identity(history),
        "first_seen_at": _whole(history.first_seen_at),
        "last_seen_at": _whole(history.last_seen_at),
        "nodes": [
            {"node_id": one.node_id, "run_id": one.run_id, "bound_at": _whole(one.bound_at)} for one in history.bindings
        ],
        "participations": _by_run(history.participations),
        "budgets": list(_budgets(reader, ledger, client)),
        "changes": [
            {
                "at": _whole(event.at),
                "kind": event.kind,
                "operator": event.detail.get("operator"),
                "message": event.message,
            }
            for event in history.changes
        ],
    }


def tables(shown: dict[str, Any]) -> Iterator[Shown]:
    """What `read_client` answered as tables for people; what there is nothing of is left out."""
    many = ("nodes", "participations", "budgets", "changes")
    yield None, None, {name: value for name, value in shown.items() if name not in many}
    if shown["nodes"]:
        yield "nodes that spoke for it", None, shown["nodes"]
    if shown["participations"]:
        yield "attempts at rounds, by run and outcome", None, shown["participations"]
    if shown["budgets"]:
        columns = ("dataset", "level", "channel", "holder", "orchestrator", "trunk", "budget", "left", "last_round")
        yield "privacy: epsilon by adversary", columns, folded(shown["budgets"])
    if shown["changes"]:
        yield "changes of its identity", None, shown["changes"]


def _identity(history: ClientHistory) -> dict[str, Any]:
    identity = history.identity
    if identity is None:
        return {"status": "a node that nobody enrolled", "public_key": None}
    revoked = (event.detail.get("operator") for event in history.changes if event.kind == _REVOKED)
    return {
        "status": "enrolled" if identity.revoked_at is None else "revoked",
        "public_key": identity.public_key,
        "certificate_key_sha256": identity.certificate_key_sha256,
        "enrolled_at": _whole(identity.enrolled_at),
        "enrolled_by": identity.enrolled_by,
        "revoked_at": _whole(identity.revoked_at),
        "revoked_by": next(revoked, None),
        "revoke_reason": identity.revoke_reason,
        "roster_version": identity.roster_version,
    }


def _change(event: EventRow) -> dict[str, Any]:
    operator = event.detail.get("operator")
    return {"at": _whole(event.at), "kind": event.kind, "operator": operator, "message": event.message}


def _by_run(counts: Sequence[ParticipationCount]) -> list[dict[str, Any]]:
    runs: dict[str, dict[str, Any]] = {}
    for one in counts:
        run = runs.setdefault(one.run_id, {"run_id": one.run_id, **dict.fromkeys(OUTCOMES, 0), "last_at": one.last_at})
        run[one.status] = one.count
        run["last_at"] = max(run["last_at"], one.last_at)
    return [{**run, "last_at": _whole(run["last_at"])} for run in runs.values()]


def _budgets(reader: Reader, ledger: Ledger, client: str) -> Iterator[SpendingRow]:
    accounts = [one for one in ledger.accounts() if one.unit.client == client]
    budgets = {unit: budget for unit, budget in ledger.budgets().items() if unit.client == client}
    settings, unread = read_settings(reader, {one.run for one in accounts})
    for line in unread:
        talk(line)
    return spending_rows(accounts, budgets, settings)


def _whole(moment: datetime | None) -> datetime | None:
    """To the second: what is shown to people needs no more."""
    return None if moment is None else moment.replace(microsecond=0)
