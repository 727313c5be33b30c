"""Wall and CPU time of `trunkline budget show` over a ledger of many clients and rounds: the command, start included.

The ledger is made by reservations and commits as a run makes them: a row for each client and round that reserves, and
one that commits. Every epsilon is recomputed from those rows.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.report import Cell, Report, Spread, Target

LIMIT_S = 2.0
RUN = "bench"
SETTINGS: dict[str, str | int | float | bool] = {
    "dp": "client", "trunk-adapter": "frozen", "metrics": "off", "dp-noise-multiplier": 9.0,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget_show", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--clients", type=int, default=1000, help="clients in the ledger")
    parser.add_argument("--rounds", type=int, default=100, help="rounds that each client was charged for")
    parser.add_argument("--repeats", type=int, default=5, help="how often each form of the command is run")
    options = parser.parse_args(argv)
    found = Report("budget_show", f"{options.clients} clients, {options.rounds} rounds, SQLite, {options.repeats} runs")
    with tempfile.TemporaryDirectory() as directory:
        fill(Path(directory), options.clients, options.rounds)
        for form in ("table", "json"):
            readings = [shown(Path(directory), form, options.clients) for _ in range(options.repeats)]
            wall, cpu = Spread.of([one[0] for one in readings]), Spread.of([one[1] for one in readings])
            row: dict[str, Cell] = {"form": form, "wall_s": wall.median, "min": wall.min, "max": wall.max}
            found.results.append(row | {"cpu_s": cpu.median})
            found.targets.append(Target.at_most(f"budget_show_{form}_s", wall.median, LIMIT_S))
    return found.finish(options.json)


def fill(home: Path, clients: int, rounds: int) -> None:
    """Charge every client of a client-level run for every round, in the database of the home directory `home`."""
    from contract.config import RunConfig
    from contract.privacy_records import Unit
    from privacy.accountant import ACCOUNTANT
    from privacy.plan import register_budget, round_releases
    from storage.ledger import open_ledger
    from storage.records import Charge
    from storage.store import open_store

    config = RunConfig.from_flower(SETTINGS)
    url = f"sqlite:///{home / 'trunkline.db'}"
    store = open_store(url)
    store.create_run(RUN, "1", config.to_flower(), "simulation", "f" * 64)
    store.close()
    ledger = open_ledger(url, clock=lambda: datetime.now(UTC))
    units = [Unit(f"client-{number:05d}", "notes", "client") for number in range(clients)]
    ledger.register_budgets(units, register_budget(config), RUN)
    (release,) = round_releases(config, scale=2.0**16, size=100_000)
    for number in range(1, rounds + 1):
        charges = [Charge(unit, RUN, number, 1, release, ACCOUNTANT) for unit in units]
        ledger.reserve(charges, lambda standing, proposed: None)
        ledger.settle(RUN, number, 1, "COMMITTED")
    ledger.close()


def shown(home: Path, form: str, clients: int) -> tuple[float, float]:
    """Wall and CPU seconds of the command as a process of its own.

    Raises RuntimeError where it does not show every client.
    """
    environment = {**os.environ, "TRUNKLINE_HOME": str(home)}
    environment.pop("TRUNKLINE_DATABASE_URL", None)
    command = [sys.executable, "-m", "trunkline", "budget", "show", "-o", form]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if f"client-{clients - 1:05d}" not in done.stdout:
        raise RuntimeError("budget show left a client out")
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
