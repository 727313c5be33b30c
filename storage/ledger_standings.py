"""What units may spend and have spent, read for many units at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from contract.privacy_records import ALL_DATASETS, Budget, Unit
from storage import schema
from storage.ledger_chain import unit_id_of
from storage.ledger_rows import BUDGET_CHANNEL, budget_from
from storage.ledger_writer import chunks
from storage.records import Charge, Standing


def client_wide(unit: Unit) -> Unit:
    """The unit that stands for all of its client's datasets together."""
    return replace(unit, dataset=ALL_DATASETS)


def budgets_of(session: Session, unit_ids: Iterable[str] | None = None) -> dict[str, Budget]:
    """The budgets in force by unit_id, of all units or of these; raises LedgerError where a row holds none."""
    row = schema.PrivacyRow
    query = select(row.unit_id, row.parameters).where(row.run == "", row.channel == BUDGET_CHANNEL).order_by(row.seq)
    if unit_ids is None:
        return {unit_id: budget_from(text) for unit_id, text in session.execute(query)}
    newest: dict[str, str] = {}
    for some in chunks(unit_ids):
        for unit_id, text in session.execute(query.where(row.unit_id.in_(some))):
            newest[unit_id] = text
    return {unit_id: budget_from(text) for unit_id, text in newest.items()}


class Standings:
    """The standings of some units as they are now, and as they become with what `spend` adds."""

    def __init__(self, session: Session, units: Sequence[Unit]) -> None:
        self._ids = {unit: unit_id_of(unit) for unit in (*units, *map(client_wide, units))}
        self._budgets = budgets_of(session, dict.fromkeys(self._ids.values()))
        self._spent: dict[str, dict[str, Counter[str]]] = {}
        self._of_clients: dict[tuple[str, str], Counter[str]] = {}
        self._read_units(session, [self._ids[unit] for unit in units])
        self._read_clients(session, sorted({unit.client for unit in units}))

    def of(self, unit: Unit) -> Standing:
        """The standing of one of the units."""
        return Standing(
            unit=unit,
            budget=self._budgets.get(self._ids[unit]),
            client_budget=self._budgets.get(self._ids[client_wide(unit)]),
            spent=_positive_by_run(self._spent.get(self._ids[unit], {})),
            client_spent=dict(+self._of_clients.get((unit.client, unit.level), Counter())),
        )

    def spend(self, charges: Iterable[Charge]) -> None:
        """Count charges that are about to be appended."""
        for charge in charges:
            unit, release = charge.unit, charge.release.canonical()
            self._spent.setdefault(self._ids[unit], {}).setdefault(charge.run, Counter())[release] += 1
            self._of_clients.setdefault((unit.client, unit.level), Counter())[release] += 1

    def _read_units(self, session: Session, unit_ids: Sequence[str]) -> None:
        tally = schema.PrivacyTally
        for some in chunks(unit_ids):
            query = select(tally.unit_id, tally.run, tally.release, tally.count).where(tally.unit_id.in_(some))
            for unit_id, run, release, count in session.execute(query):
                self._spent.setdefault(unit_id, {}).setdefault(run, Counter())[release] = count

    def _read_clients(self, session: Session, clients: Sequence[str]) -> None:
        tally, unit = schema.PrivacyTally, schema.PrivacyUnit
        query = (
            select(unit.client, unit.level, tally.release, func.sum(tally.count))
            .join(tally, tally.unit_id == unit.unit_id)
            .group_by(unit.client, unit.level, tally.release)
        )
        for some in chunks(clients):
            for client, level, release, count in session.execute(query.where(unit.client.in_(some))):
                self._of_clients.setdefault((client, level), Counter())[release] = int(count)


def _positive_by_run(spent: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """Without what was all given back."""
    return {run: dict(+releases) for run, releases in spent.items() if +releases}
