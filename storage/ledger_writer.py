"""Appends to units' chains within a transaction that somebody else opened and ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Insert, Table, bindparam, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from contract.privacy_records import Unit
from storage import schema
from storage.ledger_chain import chained, signed_head, unit_id_of
from storage.ledger_rows import COLUMNS
from storage.ledger_tables import NAMED, ROWS, TALLIES, UNITS, chunks
from storage.records import HeadSigner, LedgerRow, SignedHead

HEAD_COLUMNS = ("unit_id", "seq", "hash", "run", "round", "attempt", "signer", "signature")

_ENDS = select(UNITS.c.unit_id, UNITS.c.seq, UNITS.c.hash).where(UNITS.c.unit_id.in_(NAMED))
_BEGIN_UNIT, _APPEND = insert(UNITS), insert(ROWS)
_END_OF_UNIT = (
    update(UNITS)
    .where(UNITS.c.unit_id == bindparam("of_unit"))
    .values(seq=bindparam("ends_at"), hash=bindparam("ends_in"))
)


def _add_to_tallies(upsert: Callable[[Table], Any]) -> Insert:
    adding = upsert(TALLIES)
    changed = {"count": TALLIES.c["count"] + adding.excluded["count"]}
    added: Insert = adding.on_conflict_do_update(index_elements=list(TALLIES.primary_key), set_=changed)
    return added


_ADD_TO_TALLIES = {"sqlite": _add_to_tallies(sqlite_insert), "postgresql": _add_to_tallies(postgresql_insert)}


def moment(at: datetime) -> str:
    """How the ledger writes a moment."""
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def take_turn(session: Session) -> None:
    """Wait until nobody else writes to the ledger, and keep it so until the transaction ends; readers go on.

    On SQLite a writing transaction has the only turn already. On PostgreSQL it must be the first statement of a
    serializable one, which sees the database as it was at its first query: LOCK TABLE alone takes no such picture.
    Locks on units' rows were tried: their waiters must all begin again, and so must many that share no unit, because
    PostgreSQL tells conflicts by pages: eight processes then took twice as long as they do in turn.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("LOCK TABLE privacy_units IN SHARE ROW EXCLUSIVE MODE"))


class LedgerWriter:
    """Appends to some units' chains, in the turn that was taken; a unit that has none gets one. `write` sends all."""

    def __init__(self, session: Session, unit_ids: Iterable[str]) -> None:
        self._session = session
        self._ends: dict[str, tuple[int, str]] = {}
        for some in chunks(dict.fromkeys(unit_ids)):
            for unit_id, seq, row_sha256 in session.execute(_ENDS, {"named": some}):
                self._ends[unit_id] = (seq, row_sha256)
        self._rows: list[LedgerRow] = []
        self._tallied: Counter[tuple[str, str, str]] = Counter()

    def append(self, row: LedgerRow) -> None:
        """Put a row, as storage.ledger_rows makes one, at the end of its unit's chain."""
        unit_id = unit_id_of(Unit(row.client, row.dataset, row.level))  # type: ignore[arg-type]
        seq, previous = self._ends.get(unit_id, (0, unit_id))
        placed = chained(row, unit_id, seq + 1, previous)
        self._ends[unit_id] = (placed.seq, placed.hash)
        self._rows.append(placed)
        if row.state in ("RESERVED", "VOID"):
            self._tallied[unit_id, row.run, row.release] += 1 if row.state == "RESERVED" else -1

    def write(self) -> None:
        """Send all that was appended."""
        first = {row.unit_id: row for row in reversed(self._rows)}
        began = [self._unit_columns(row) for row in first.values() if row.seq == 1]
        went_on = [
            {"of_unit": unit_id, "ends_at": self._ends[unit_id][0], "ends_in": self._ends[unit_id][1]}
            for unit_id, row in first.items()
            if row.seq != 1
        ]
        rows = [{name: getattr(row, name) for name in COLUMNS} for row in self._rows]
        for statement, parameters in (
            (_BEGIN_UNIT, began),
            (_END_OF_UNIT, went_on),
            (_APPEND, rows),
            (_ADD_TO_TALLIES[self._session.get_bind().dialect.name], self._tallies()),
        ):
            if parameters:
                self._session.execute(statement, parameters)

    def sign(self, signer: HeadSigner, at: datetime) -> None:
        """Sign the heads of the chains that were appended to, each as of what its last row settled or set."""
        last = {row.unit_id: row for row in self._rows}
        for unit_id, row in sorted(last.items()):
            head = signed_head(signer, unit_id, row.seq, row.hash, (row.run, row.round, row.attempt))
            self._session.add(schema.PrivacyHead(source="own", at=moment(at), **head_columns(head)))

    def _unit_columns(self, row: LedgerRow) -> dict[str, object]:
        seq, row_sha256 = self._ends[row.unit_id]
        named = {"unit_id": row.unit_id, "client": row.client, "dataset": row.dataset, "level": row.level}
        return {**named, "seq": seq, "hash": row_sha256}

    def _tallies(self) -> list[dict[str, object]]:
        return [
            {"unit_id": unit_id, "run": run, "release": release, "count": change}
            for (unit_id, run, release), change in sorted(self._tallied.items())
        ]


def head_columns(head: SignedHead) -> dict[str, str | int]:
    """A head's fields by name."""
    return {name: getattr(head, name) for name in HEAD_COLUMNS}
