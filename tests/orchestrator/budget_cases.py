"""What the tests of `trunkline budget` work on: the command, and ledgers as runs leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from contract.config import ConfigValue, RunConfig
from contract.privacy_records import Unit
from orchestrator.budget_cli import app
from orchestrator.ledger_key import KEY_FILE, open_ledger_key
from privacy.accountant import ACCOUNTANT
from privacy.plan import register_budget, round_releases
from storage.ledger import Ledger, open_ledger
from storage.records import Charge
from storage.store import open_store

CLIENT: dict[str, ConfigValue] = {
    "dp": "client", "trunk-adapter": "frozen", "dp-noise-multiplier": 2.0, "num-rounds": 9,
}  # fmt: skip
WIRE: dict[str, ConfigValue] = {
    "dp": "example", "trunk-adapter": "trained", "wire": "dp", "metrics": "off", "dp-noise-multiplier": 9.0,
    "wire-noise-multiplier": 9.0, "num-rounds": 3,
}  # fmt: skip
ROUNDS = 5
ROWS = 2 + 2 * 2 * ROUNDS  # a budget for each unit; what each reserved and committed
NORTH, SOUTH = Unit("north", "letters", "client"), Unit("south", "notes", "client")


def budget(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def data(*arguments: str | Path, code: int = 0) -> Any:
    done = budget(*arguments, "-o", "json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)["data"]


def refused(code: int, told: str, *arguments: str | Path) -> None:
    done = budget(*arguments)
    assert done.exit_code == code, done.output
    assert told in done.stderr
    assert done.stdout == ""


def config(base: Mapping[str, ConfigValue], **changed: ConfigValue) -> RunConfig:
    return RunConfig.from_flower({**base, **{name.replace("_", "-"): value for name, value in changed.items()}})


def scale_of(of: RunConfig) -> float | None:
    return 2.0**20 if of.dp == "client" else None


def charge(ledger: Ledger, of: RunConfig, run: str, rounds: int, units: tuple[Unit, ...], runs: str = "") -> None:
    """What a run of `rounds` rounds leaves in a ledger, and in the list of runs of the database at `runs`, if any."""
    if runs:
        store = open_store(runs)
        store.create_run(run, run, of.to_flower(), "simulation", "f" * 64)
        store.close()
    ledger.register_budgets(units, register_budget(of), run)
    for number in range(1, rounds + 1):
        releases = round_releases(of, scale=scale_of(of), size=1000)
        charges = [Charge(unit, run, number, 1, release, ACCOUNTANT) for unit in units for release in releases]
        assert ledger.reserve(charges, lambda standing, proposed: None) == []
        ledger.settle(run, number, 1, "COMMITTED")


def fill_home(home: Path) -> None:
    """A home with a client-level run of ROUNDS rounds over north and south, whose losses were told."""
    url = f"sqlite:///{home / 'trunkline.db'}"
    ledger = open_ledger(url, signer=open_ledger_key(home / KEY_FILE))
    charge(ledger, config(CLIENT), "run-1", ROUNDS, (NORTH, SOUTH), runs=url)
    ledger.close()


def fill_site(directory: Path) -> None:
    """A site's state directory with what the same run left in its own ledger."""
    ledger = open_ledger(f"sqlite:///{directory / 'ledger.db'}")
    charge(ledger, config(CLIENT), "run-1", ROUNDS, (NORTH,))
    ledger.close()
