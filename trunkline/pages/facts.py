"""What the pages tell, read from SQL: each number as the commands tell it, none computed a second way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from contract.config import RunConfig
from contract.errors import ConfigError, PrivacyError
from contract.privacy_records import Budget, Unit
from orchestrator.metrics import judged_losses
from orchestrator.protection import told_run_privacy
from orchestrator.run_view import rounds_data, run_data
from orchestrator.spending_view import (
    Settings,
    SpendingRow,
    read_settings,
    run_budgets,
    spending_rows,
    told_withheld,
)
from storage.home import adapter_dir
from storage.leases import silent_since
from storage.reader import Reader
from storage.records import Account, AdapterVersionRow, EventRow, ParticipationRow, RoundRow, RunRow
from storage.view import View

MOST_EVENTS = 200
MOST_RUNS = 25
MOST_ATTEMPTS = 400
"""Pictures and tables show the newest attempts only: a page must stay one that a browser can hold."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One of a run's settings; `default` is None where this version has no such setting."""

    key: str
    value: Any
    default: Any

    @property
    def changed(self) -> bool:
        return bool(self.value != self.default)


@dataclass(frozen=True, slots=True)
class Privacy:
    """What `runs show` tells of a run's privacy, and where it has a price the rows of `budget show`.

    `in_run` is what the run spent against its own dp-epsilon, `in_all` what the same units spent over all runs against
    their own budgets; `withheld` says why no epsilon is told, a line a reason.
    """

    lines: Sequence[str]
    in_run: Sequence[SpendingRow] = ()
    in_all: Sequence[SpendingRow] = ()
    withheld: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run at one moment. `summary` is its row of `runs list`, `rounds` are those of `rounds list`.

    `silent_s` is how long ago its orchestrator was heard, where the run is said to go on and that is too long ago.
    """

    run: RunRow
    at: datetime
    summary: Mapping[str, Any]
    silent_s: float | None
    attempts: Sequence[RoundRow]
    rounds: Sequence[Mapping[str, Any]]
    held_out: Mapping[int, float]
    participations: Sequence[ParticipationRow]
    client_ids: Mapping[str, str]
    versions: Sequence[AdapterVersionRow]
    events: Sequence[EventRow]
    privacy: Privacy
    settings: Sequence[Setting]
    adapter: Path | None

    @property
    def goes_on(self) -> bool:
        return self.run.status == "running"

    @property
    def heard_at(self) -> datetime:
        """Up to when something is known of the run: its end, or when its orchestrator was last heard."""
        return self.run.ended_at or self.at - timedelta(seconds=self.silent_s or 0.0)

    @property
    def played_again(self) -> bool:
        return any(one.attempt > 1 for one in self.attempts)

    @property
    def private(self) -> bool:
        return bool(self.run.config.get("dp", "off") != "off")


def read_run(view: View, run: RunRow, now: datetime) -> RunFacts:
    """Everything that the page of `run` tells. Raises as Reader's methods do."""
    reader = view.reader
    metrics = reader.metrics(run.run_id, over_clients=True)
    attempts, participations = reader.rounds(run.run_id), reader.participations(run.run_id)
    adapter = adapter_dir(run.run_id)
    return RunFacts(
        run=run,
        at=now,
        summary=run_data(reader, run, now),
        silent_s=silence(run, now),
        attempts=attempts,
        rounds=rounds_data(attempts, participations, metrics),
        held_out=judged_losses(metrics),
        participations=participations,
        client_ids={one.node_id: one.client_id for one in reader.node_bindings(run.run_id)},
        versions=reader.adapter_versions(run.run_id),
        events=reader.events(run.run_id, MOST_EVENTS),
        privacy=read_privacy(view, run),
        settings=settings_of(run),
        adapter=adapter if adapter.is_dir() else None,
    )


def silence(run: RunRow, now: datetime) -> float | None:
    """Seconds since the orchestrator of a run that goes on was heard, where they are so many that it may be dead."""
    since = silent_since(run.status, run.lease_until, now)
    return None if since is None else (now - since).total_seconds()


def settings_of(run: RunRow) -> list[Setting]:
    """A run's settings, in the order in which this version documents them, then those that it does not know."""
    defaults = RunConfig.from_flower({}).to_flower()
    keys = [*(key for key in defaults if key in run.config), *sorted(run.config.keys() - defaults.keys())]
    return [Setting(key, run.config[key], defaults.get(key)) for key in keys]


def read_privacy(view: View, run: RunRow) -> Privacy:
    """What a run spent; a ledger that cannot be priced is told of, and fails nothing else."""
    try:
        lines = told_run_privacy(run, view.ledger)
        accounts = [] if run.config.get("dp", "off") == "off" else view.ledger.accounts()
        units = {one.unit for one in accounts if one.run == run.run_id}
        if not units:
            return Privacy(lines)
        return _priced(view.reader, run, lines, _of_units(accounts, units), view.ledger.budgets())
    except (ConfigError, PrivacyError) as error:
        return Privacy([f"what the run spent cannot be told: {error}"])


def _priced(
    reader: Reader, run: RunRow, lines: Sequence[str], accounts: Sequence[Account], budgets: Mapping[Unit, Budget]
) -> Privacy:
    settings, unread = read_settings(reader, {one.run for one in accounts})
    own = [one for one in accounts if one.run == run.run_id]
    in_run = list(spending_rows(own, run_budgets(run.run_id, own, budgets, settings), settings))
    in_all = list(_standing(accounts, budgets, settings, {one.unit for one in own}))
    return Privacy(lines, in_run, in_all, [*told_withheld([*in_run, *in_all]), *unread])


def _standing(
    accounts: Sequence[Account], budgets: Mapping[Unit, Budget], settings: Settings, units: set[Unit]
) -> Iterable[SpendingRow]:
    wanted = units | {unit.whole for unit in units}
    of_these = {unit: budget for unit, budget in budgets.items() if unit in wanted}
    named = {(unit.client, unit.dataset, unit.level) for unit in wanted}
    rows = spending_rows(accounts, of_these, settings)
    return (row for row in rows if (row.client, row.dataset, row.level) in named)


def _of_units(accounts: Iterable[Account], units: set[Unit]) -> list[Account]:
    """The accounts of all datasets of the same clients at the same level: a client's own budget is over them all."""
    whole = {unit.whole for unit in units}
    return [one for one in accounts if one.unit.whole in whole]


@dataclass(frozen=True, slots=True)
class Standing:
    """A line of the list of runs: its row of `runs list`, and its silence as in RunFacts."""

    row: Mapping[str, Any]
    silent_s: float | None


def read_runs(view: View, now: datetime) -> list[Standing]:
    """The newest MOST_RUNS runs, newest first."""
    return [Standing(run_data(view.reader, run, now), silence(run, now)) for run in view.reader.list_runs(MOST_RUNS)]
