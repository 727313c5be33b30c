"""Appends to units' chains within a transaction that somebody else opened and ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar

from sqlalchemy import insert, select, update
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
_Item = TypeVar("_Item")


def chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """`items` in lists of at most CHUNK."""
    left = iter(items)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


def moment(at: datetime) -> str:
    """How the ledger writes a moment."""
    return at.astimezone(UTC).isoformat(timespec="microseconds")


class LedgerWriter:
    """Holds some units' chains until the transaction ends, and appends to them; nothing is sent before `write`.

    The chains are taken in the order of their ids, so that two writers cannot wait for each other. A unit that has no
    chain yet gets one: of two transactions that begin it, the database refuses one.
    """

    def __init__(self, session: Session, unit_ids: Iterable[str]) -> None:
        self._session = session
        self._ends: dict[str, tuple[int, str]] = {}
        unit = schema.PrivacyUnit
        for some in chunks(sorted(set(unit_ids))):
            query = select(unit.unit_id, unit.seq, unit.hash).where(unit.unit_id.in_(some)).order_by(unit.unit_id)
            for unit_id, seq, row_sha256 in session.execute(query.with_for_update(key_share=True)):
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
        went_on = [self._unit_columns(row) for row in first.values() if row.seq != 1]
        if began:
            self._session.execute(insert(schema.PrivacyUnit), began)
        if went_on:
            self._session.execute(update(schema.PrivacyUnit), went_on)
        if self._rows:
            rows = [{name: getattr(row, name) for name in COLUMNS} for row in self._rows]
            self._session.execute(insert(schema.PrivacyRow), rows)
        self._write_tallies()

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

    def _write_tallies(self) -> None:
        rows = [
            {"unit_id": unit_id, "run": run, "release": release, "count": change}
            for (unit_id, run, release), change in sorted(self._tallied.items())
        ]
        if rows:
            postgresql = self._session.get_bind().dialect.name == "postgresql"
            adding = (postgresql_insert if postgresql else sqlite_insert)(schema.PrivacyTally)
            tally = schema.PrivacyTally.__table__.c
            changed = {"count": tally["count"] + adding.excluded["count"]}
            key = ["unit_id", "run", "release"]
            self._session.execute(adding.on_conflict_do_update(index_elements=key, set_=changed), rows)


def head_columns(head: SignedHead) -> dict[str, str | int]:
    """A head's fields by name."""
    return {name: getattr(head, name) for name in HEAD_COLUMNS}


HEAD_COLUMNS: Sequence[str] = ("unit_id", "seq", "hash", "run", "round", "attempt", "signer", "signature")
