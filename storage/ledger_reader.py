"""Opens a ledger to look at it: the database is neither made nor brought to another schema."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import case, func, select

from contract.errors import LedgerError
from contract.privacy_records import Unit
from storage import schema
from storage.engine import make_engine, storage_errors
from storage.home import database_url
from storage.ledger import Ledger
from storage.revisions import require_current


@dataclass(frozen=True, slots=True)
class Account:
    """How often a unit spent one release (its canonical text) in a run, and in which round last."""

    unit: Unit
    run: str
    release: str
    count: int
    last_round: int


def open_ledger_reader(url: str | None = None) -> LedgerReader:
    """The ledger in the database at `url` (default as in open_store).

    Raises SchemaError where the database is absent or not of this code's schema, else as open_store.
    """
    engine = make_engine(url or database_url())
    with storage_errors(engine):
        require_current(engine)
    return LedgerReader(engine)


class LedgerReader(Ledger):
    """A ledger with what a listing of all units asks of it."""

    def accounts(self) -> list[Account]:
        """What Ledger.summary counts from the rows, each with its last round, in no order."""
        row = schema.PrivacyRow
        # As an expression no index serves the grouping: SQLite then reads the table once, in its own order, rather
        # than every row through the index, which takes twice as long.
        unit_id = row.unit_id.concat("")
        count = func.sum(case((row.state == "RESERVED", 1), else_=-1))
        query = select(unit_id, row.run, row.release, count, func.max(row.round))
        query = query.where(row.state.in_(("RESERVED", "VOID"))).group_by(unit_id, row.run, row.release)
        with self._reading() as session:
            units = self._units_by_id(session)
            found = session.execute(query).all()
        if strangers := {unit_id for unit_id, *_ in found} - units.keys():
            raise LedgerError(f"unit {min(strangers)[:16]} has rows but is none: `trunkline budget verify` tells more")
        return [Account(units[name], run, text, int(times), last) for name, run, text, times, last in found if times]
