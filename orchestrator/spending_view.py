"""What units spent and have left, recomputed from what the ledger counts: the rows of `budget show` and of a report.

An epsilon is told with its adversary, and withheld where that adversary saw a channel that nothing prices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from contract.config import RunConfig
from contract.errors import ConfigError, StorageError
from contract.privacy_records import ADVERSARIES, Adversary, Budget, Channel, PricedRelease, Unit
from privacy.accountant import epsilon, price, spent
from privacy.coverage import IN_WORDS, withheld, withheld_by_rows
from privacy.filters import used
from privacy.plan import register_budget
from storage.reader import Reader
from storage.records import Account

ALL_CHANNELS = "all"


@dataclass(frozen=True, slots=True)
class SpendingRow:
    """What one adversary can have learned of one unit over one channel, or over all, and what may still be.

    `epsilon` is None where it is withheld: `withheld` says why. `used` is the part of the budget's filter that is
    spent, 0 to 1, over all that is priced, whether or not an epsilon may be told of it. `left` is in epsilon.
    """

    client: str
    dataset: str
    level: str
    channel: str
    adversary: Adversary
    epsilon: float | None
    delta: float | None
    budget: float | None
    left: float | None
    used: float | None
    last_run: str | None
    last_round: int | None
    withheld: str | None


@dataclass(slots=True)
class Ledgered:
    """What a ledger holds of one unit: counts by run and release, and the last round by run."""

    spent: dict[str, Counter[str]] = field(default_factory=dict)
    last_round: dict[str, int] = field(default_factory=dict)

    def add(self, account: Account) -> None:
        self.spent.setdefault(account.run, Counter())[account.release] += account.count
        self.last_round[account.run] = max(account.last_round, self.last_round.get(account.run, 0))


Settings = Mapping[str, RunConfig]
"""The settings of runs by id; a run that is not there is judged by its charges alone."""


def spending_rows(
    accounts: Iterable[Account], budgets: Mapping[Unit, Budget], settings: Settings
) -> Iterator[SpendingRow]:
    """The rows of every unit that was charged or has a budget, by client, dataset, level, adversary and channel."""
    known: dict[Unit, Ledgered] = {unit: Ledgered() for unit in budgets}
    for account in accounts:
        known.setdefault(account.unit, Ledgered()).add(account)
        whole = account.unit.whole
        if whole in budgets:
            known[whole].add(account)
    pricing = _Pricing(settings)
    for unit in sorted(known, key=lambda one: (one.client, one.dataset, one.level)):
        yield from pricing.rows(unit, known[unit], budgets.get(unit))


def read_settings(reader: Reader, runs: Iterable[str]) -> tuple[dict[str, RunConfig], list[str]]:
    """The settings of those `runs` that the database still has, as far as this version reads them.

    A line says of each other one why it is judged by its charges alone.
    """
    found: dict[str, RunConfig] = {}
    unread = []
    for run in sorted(runs):
        try:
            found[run] = RunConfig.from_flower(reader.get_run(run).config)
        except (StorageError, ConfigError) as error:
            unread.append(f"run {run} is judged by its charges alone: {error}")
    return found, unread


def run_budgets(
    run: str, accounts: Sequence[Account], budgets: Mapping[Unit, Budget], settings: Settings
) -> Mapping[Unit, Budget]:
    """What the units of a run may spend in it by itself; `accounts` are the run's, `budgets` those over all runs."""
    if not accounts:
        raise StorageError(f"run {run} spent nothing that this ledger knows of")
    units = {one.unit for one in accounts}
    if run not in settings:
        return {unit: budget for unit, budget in budgets.items() if unit in units}
    return dict.fromkeys(units, register_budget(settings[run]))


@dataclass(frozen=True, slots=True)
class _Amount:
    """What a set of charges comes to against one adversary under one budget."""

    channel: str
    adversary: Adversary
    epsilon: float | None
    used: float | None


class _Pricing:
    """Prices units' charges; most units of a run were charged alike, and are priced once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._amounts: dict[object, list[_Amount]] = {}
        self._reasons: dict[object, dict[Adversary, str]] = {}

    def rows(self, unit: Unit, held: Ledgered, budget: Budget | None) -> Iterator[SpendingRow]:
        """The rows of one unit."""
        reasons = self._withheld(held)
        last_run = max(held.last_round, default=None)
        last_round = None if last_run is None else held.last_round[last_run]
        for amount in self._priced(held, budget):
            why = reasons.get(amount.adversary)
            told = None if why is not None else amount.epsilon
            if why is None and budget is None:
                why = "no budget is set, so that there is no delta to tell it at"
            if told == math.inf:
                told, why = None, "the budget covers no releases of this kind"
            left = None if told is None or budget is None else max(0.0, budget.epsilon - told)
            yield SpendingRow(
                unit.client, unit.dataset, unit.level, amount.channel, amount.adversary, told,
                None if budget is None else budget.delta, None if budget is None else budget.epsilon,
                left, amount.used, last_run, last_round, why,
            )  # fmt: skip

    def _priced(self, held: Ledgered, budget: Budget | None) -> list[_Amount]:
        total: Counter[str] = Counter()
        for counts in held.spent.values():
            total.update(counts)
        key = (frozenset(total.items()), _key(budget))
        if key not in self._amounts:
            self._amounts[key] = _amounts(total, budget)
        return self._amounts[key]

    def _withheld(self, held: Ledgered) -> dict[Adversary, str]:
        key = tuple(sorted((run, frozenset(counts)) for run, counts in held.spent.items()))
        if key not in self._reasons:
            found: dict[Adversary, str] = {}
            for run, counts in sorted(held.spent.items()):
                for adversary in ADVERSARIES:
                    why = self._why(run, counts, adversary)
                    if why is not None:
                        found.setdefault(adversary, why if len(held.spent) == 1 else f"run {run}: {why}")
            self._reasons[key] = found
        return self._reasons[key]

    def _why(self, run: str, counts: Iterable[str], adversary: Adversary) -> str | None:
        if run in self._settings:
            return withheld(self._settings[run], adversary)
        return withheld_by_rows([PricedRelease.from_canonical(text) for text in counts], adversary)


def _key(budget: Budget | None) -> object:
    if budget is None:
        return None
    return budget.epsilon, budget.delta, budget.order, tuple(sorted(budget.gaussian_share.items()))


def _amounts(total: Mapping[str, int], budget: Budget | None) -> list[_Amount]:
    """What each channel that an adversary sees comes to, and where there are several, or none, all together."""
    found = []
    for adversary in ADVERSARIES:
        by_channel: dict[Channel, dict[str, int]] = {}
        for text, times in total.items():
            release = PricedRelease.from_canonical(text)
            if price(release, adversary) is not None:
                by_channel.setdefault(release.channel, {})[text] = times
        parts: list[tuple[str, Mapping[str, int]]] = sorted(by_channel.items())
        if len(parts) != 1:
            parts.append((ALL_CHANNELS, total))
        found += [_amount(channel, counts, budget, adversary) for channel, counts in parts]
    return found


def _amount(channel: str, counts: Mapping[str, int], budget: Budget | None, adversary: Adversary) -> _Amount:
    if budget is None:
        return _Amount(channel, adversary, None, None)
    cost = spent(counts, adversary, budget.order)
    return _Amount(channel, adversary, epsilon(cost, budget, adversary), used(cost, budget, adversary))


def folded(rows: Iterable[SpendingRow]) -> list[dict[str, object]]:
    """Rows for people: one for a unit's channel, or for all of them, with the epsilons against each adversary."""
    lines = []
    for _, of_unit in groupby(rows, key=lambda row: (row.client, row.dataset, row.level)):
        lines += _lines(list(of_unit))
    return lines


def _lines(rows: Sequence[SpendingRow]) -> list[dict[str, object]]:
    """One unit's lines. Who sees a single channel has the same under it and under all."""
    priced = [row for row in rows if row.channel != ALL_CHANNELS or row.used] or rows
    found = []
    for channel in dict.fromkeys(row.channel for row in priced):
        told = {row.adversary: row for row in priced if row.channel == channel}
        if channel == ALL_CHANNELS:
            told = {**{row.adversary: row for row in priced}, **told}
        first = next(iter(told.values()))
        left = [row.left for row in told.values() if row.left is not None]
        line: dict[str, object] = {"client": first.client, "dataset": first.dataset, "level": first.level}
        line["channel"] = channel
        for name in ADVERSARIES:
            line[name] = told[name].epsilon if name in told else None
        line |= {"budget": first.budget, "left": min(left, default=None), "last_round": first.last_round}
        found.append(line)
    return found


def told_withheld(rows: Iterable[SpendingRow]) -> list[str]:
    """Why no epsilon is told against whom: a line for each reason, with how many units it is of."""
    units: dict[tuple[Adversary, str], set[tuple[str, str, str]]] = {}
    for row in rows:
        if row.withheld is not None:
            units.setdefault((row.adversary, row.withheld), set()).add((row.client, row.dataset, row.level))
    return [
        f"{IN_WORDS[adversary]}: no epsilon: {why} ({len(of)} of the units)" for (adversary, why), of in units.items()
    ]
