"""Replays a ledger's rows by the filters: did each reservation fit the budget that was in force when it was made?

A chain that is sound says that rows are as they were written; the replay says that they were right to be written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from contract.errors import PrivacyError
from contract.privacy_records import ADVERSARIES, ALL_DATASETS, Budget, Unit
from privacy.accountant import epsilon, spent
from privacy.coverage import IN_WORDS
from privacy.filters import used
from storage.ledger_rows import budget_from, unit_of
from storage.records import Account, LedgerRow


@dataclass(slots=True)
class Replay:
    """Takes the rows of all units, each unit's in order; `finish` answers what was wrong, one line each."""

    findings: list[str] = field(default_factory=list)
    accounts: dict[tuple[Unit, str, str], Account] = field(default_factory=dict)
    budgets: dict[Unit, Budget] = field(default_factory=dict)
    rows: int = 0
    _whole: dict[Unit, list[Budget]] = field(default_factory=dict)

    def take(self, rows: Iterable[LedgerRow]) -> None:
        """All rows of one unit, the first one first."""
        charged: Counter[str] = Counter()
        newest = 0  # the last reservation that was not looked at yet
        row = None
        for row in rows:
            self.rows += 1
            try:
                unit = unit_of(row)
                if newest and row.state != "RESERVED" and row.state != "COMMITTED":
                    self._look(unit, charged, newest)
                    newest = 0
                newest = self._follow(unit, row, charged) or newest
            except PrivacyError as error:
                self.findings.append(f"client {row.client}, dataset {row.dataset}, row {row.seq}: {error}")
                return
        if row is not None and newest:
            self._look(unit_of(row), charged, newest)

    def finish(self) -> list[str]:
        """What was wrong; the budgets over all of a client's datasets are looked at here, over all rows together."""
        for whole, budgets in self._whole.items():
            total: Counter[str] = Counter()
            for account in self.accounts.values():
                if (account.unit.client, account.unit.level) == (whole.client, whole.level):
                    total[account.release] += account.count
            faults = [_over(total, budget) for budget in budgets]
            if all(faults):
                self.findings.append(f"client {whole.client}, all datasets: {faults[-1]}")
        return self.findings

    def spending(self) -> list[Account]:
        """What the rows count up to, given back left out."""
        return [account for account in self.accounts.values() if account.count]

    def _follow(self, unit: Unit, row: LedgerRow, charged: Counter[str]) -> int:
        """Count a row; answers its number where it is a reservation, else 0."""
        if row.kind == "budget":
            self.budgets[unit] = budget_from(row.parameters)
            if unit.dataset == ALL_DATASETS:
                self._whole.setdefault(unit, []).append(self.budgets[unit])
            return 0
        change = {"RESERVED": 1, "VOID": -1}.get(row.state, 0)
        charged[row.release] += change
        key = (unit, row.run, row.release)
        before = self.accounts.get(key, Account(unit, row.run, row.release, 0, 0))
        self.accounts[key] = Account(
            unit, row.run, row.release, before.count + change, max(before.last_round, row.round)
        )
        return row.seq if row.state == "RESERVED" else 0

    def _look(self, unit: Unit, charged: Counter[str], seq: int) -> None:
        """Spending only grows between what gives back and what changes the budget: there it is at its highest."""
        budget = self.budgets.get(unit)
        fault = "it was reserved before there was a budget" if budget is None else _over(charged, budget)
        if fault:
            self.findings.append(f"client {unit.client}, dataset {unit.dataset}, row {seq}: {fault}")


def _over(charged: Counter[str], budget: Budget) -> str:
    for adversary in ADVERSARIES:
        cost = spent(+charged, adversary, budget.order)
        if used(cost, budget, adversary) > 1.0:
            return (
                f"epsilon {epsilon(cost, budget, adversary):.6g} is reserved against {IN_WORDS[adversary]}, over the "
                f"budget of {budget.epsilon:g} at delta {budget.delta:g} that was in force"
            )
    return ""
