"""What units may spend and have spent, read for many units at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from contract.privacy_records import Budget, Standing, Unit, chosen_by_person
from storage.ledger_chain import unit_id_of
from storage.ledger_rows import BUDGET_CHANNEL, budget_from
from storage.ledger_tables import NAMED, ROWS, TALLIES, UNITS, chunks
from storage.records import Charge

_BUDGETS = (
    select(ROWS.c.unit_id, ROWS.c.parameters, ROWS.c.operator)
    .where(ROWS.c.run == "", ROWS.c.channel == BUDGET_CHANNEL)
    .order_by(ROWS.c.seq)
)
_BUDGETS_OF = _BUDGETS.where(ROWS.c.unit_id.in_(NAMED))
_SPENT_OF = select(TALLIES.c.unit_id, TALLIES.c.run, TALLIES.c.release, TALLIES.c["count"]).where(
    TALLIES.c.unit_id.in_(NAMED)
)
_SPENT_OF_CLIENTS = (
    select(UNITS.c.client, UNITS.c.level, TALLIES.c.release, func.sum(TALLIES.c["count"]))
    .join(TALLIES, TALLIES.c.unit_id == UNITS.c.unit_id)
    .where(UNITS.c.client.in_(NAMED))
    .group_by(UNITS.c.client, UNITS.c.level, TALLIES.c.release)
)


def all_budgets(session: Session) -> dict[str, Budget]:
    """The budgets in force by unit_id; raises LedgerError where a row holds none."""
    newest = {unit_id: text for unit_id, text, _ in session.execute(_BUDGETS)}
    return {unit_id: budget_from(text) for unit_id, text in newest.items()}


class Standings:
    """The standings of some units as they are now, and as they become with what `spend` adds."""

    def __init__(self, session: Session, units: Sequence[Unit]) -> None:
        both = [*units, *(unit.at_other_level for unit in units)]
        self._ids = {unit: unit_id_of(unit) for unit in (*both, *(unit.whole for unit in both))}
        self._budgets: dict[str, Budget] = {}
        self._chosen: dict[str, bool] = {}
        self._spent: dict[str, dict[str, Counter[str]]] = {}
        self._of_clients: dict[tuple[str, str], Counter[str]] = {}
        self._read_budgets(session)
        self._read_units(session, list(dict.fromkeys(self._ids[unit] for unit in both)))
        self._read_clients(session, sorted({unit.client for unit in units}))

    def of(self, unit: Unit) -> Standing:
        """The standing of one of the units."""
        return Standing(
            unit=unit,
            budget=self._budgets.get(self._ids[unit]),
            client_budget=self._budgets.get(self._ids[unit.whole]),
            spent=_positive_by_run(self._spent.get(self._ids[unit], {})),
            client_spent=dict(+self._of_clients.get((unit.client, unit.level), Counter())),
            chosen=self._is_chosen(unit),
            client_chosen=self._is_chosen(unit.whole),
            other_level=self._is_used(unit.at_other_level),
        )

    def spend(self, charges: Iterable[Charge]) -> None:
        """Count charges that are about to be appended."""
        for charge in charges:
            unit, release = charge.unit, charge.release.canonical()
            self._spent.setdefault(self._ids[unit], {}).setdefault(charge.run, Counter())[release] += 1
            self._of_clients.setdefault((unit.client, unit.level), Counter())[release] += 1

    def _is_chosen(self, unit: Unit) -> bool:
        return self._chosen.get(self._ids[unit], False)

    def _is_used(self, unit: Unit) -> bool:
        spent = bool(_positive_by_run(self._spent.get(self._ids[unit], {})))
        return spent or self._is_chosen(unit) or self._is_chosen(unit.whole)

    def _read_budgets(self, session: Session) -> None:
        newest = {}
        for some in chunks(dict.fromkeys(self._ids.values())):
            for unit_id, text, operator in session.execute(_BUDGETS_OF, {"named": some}):
                newest[unit_id] = text, operator
        for unit_id, (text, operator) in newest.items():
            self._budgets[unit_id], self._chosen[unit_id] = budget_from(text), chosen_by_person(operator)

    def _read_units(self, session: Session, unit_ids: Sequence[str]) -> None:
        for some in chunks(unit_ids):
            for unit_id, run, release, count in session.execute(_SPENT_OF, {"named": some}):
                self._spent.setdefault(unit_id, {}).setdefault(run, Counter())[release] = count

    def _read_clients(self, session: Session, clients: Sequence[str]) -> None:
        for some in chunks(clients):
            for client, level, release, count in session.execute(_SPENT_OF_CLIENTS, {"named": some}):
                self._of_clients.setdefault((client, level), Counter())[release] = int(count)


def _positive_by_run(spent: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """Without what was all given back."""
    return {run: dict(+releases) for run, releases in spent.items() if +releases}
