"""Appends to units' chains within a transaction that somebody else opened and ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar

from sqlalchemy import Insert, bindparam, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from contract.privacy_records import Unit
from storage import schema
from storage.ledger_chain import chained, signed_head, unit_id_of
from storage.ledger_rows import COLUMNS
from storage.records import HeadSigner, LedgerRow, SignedHead

CHUNK = 500
"""How many units one statement names: both databases bound a statement's parameters."""
HEAD_COLUMNS = ("unit_id", "seq", "hash", "run", "round", "attempt", "signer", "signature")
_Item = TypeVar("_Item")

# Tables and not their classes: a reservation is to take milliseconds, and half of it was spent in the ORM.
_UNITS, _ROWS, _TALLIES = (
    schema.Base.metadata.tables[name] for name in ("privacy_units", "privacy_rows", "privacy_tallies")
)
_END_OF_UNIT = (
    update(_UNITS)
    .where(_UNITS.c.unit_id == bindparam("of_unit"))
    .values(seq=bindparam("ends_at"), hash=bindparam("ends_in"))
)


def chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """`items` in lists of at most CHUNK."""
    left = iter(items)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


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
        unit = schema.PrivacyUnit
        for some in chunks(dict.fromkeys(unit_ids)):
            query = select(unit.unit_id, unit.seq, unit.hash).where(unit.unit_id.in_(some))
            for unit_id, seq, row_sha256 in session.execute(query):
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
            (insert(_UNITS), began),
            (_END_OF_UNIT, went_on),
            (insert(_ROWS), rows),
            (self._adding_tallies(), self._tallies()),
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

    def _adding_tallies(self) -> Insert:
        postgresql = self._session.get_bind().dialect.name == "postgresql"
        adding = (postgresql_insert if postgresql else sqlite_insert)(_TALLIES)
        changed = {"count": _TALLIES.c["count"] + adding.excluded["count"]}
        return adding.on_conflict_do_update(index_elements=list(_TALLIES.primary_key), set_=changed)


def head_columns(head: SignedHead) -> dict[str, str | int]:
    """A head's fields by name."""
    return {name: getattr(head, name) for name in HEAD_COLUMNS}
