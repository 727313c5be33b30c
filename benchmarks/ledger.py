"""What the privacy ledger costs on SQLite with many rows behind it: a reservation, a listing, the check of it all.

Two ledgers: all rows in one unit's chain, and 1,000 units that took part in every round. A reservation is of one unit
and one channel, admitted by the filter that runs use, and durable when it is timed. What one fsync costs on this disk
is shown beside it: a reservation waits for at least one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.report import Cell, Report, Spread, Target
from contract.identity import public_key_text
from contract.privacy_records import Budget, PricedRelease, PrivacyEvent, Standing, Unit, View
from privacy.accountant import ACCOUNTANT
from privacy.filters import admit_standing
from storage.ledger import Ledger, open_ledger
from storage.records import Charge

UNITS = 1000
RESERVE_LIMIT_MS = 5.0
ACCOUNTS_LIMIT_S = 1.0
BUDGET = Budget(epsilon=1e6, delta=1e-5, order=8.0, gaussian_share={"holder": 1.0, "orchestrator": 1.0})


class Key:
    """A key of the benchmark's own: a run's orchestrator signs the heads of the chains that it settles."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    @property
    def public_key_text(self) -> str:
        return public_key_text(self._key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows: a sanity check")
    options = parser.parse_args(argv)
    rows = 10_000 if options.quick else 100_000
    readings = 100 if options.quick else 500
    found = Report("ledger", f"SQLite, {rows} charges in one unit, and in {UNITS} units that are committed too")
    with tempfile.TemporaryDirectory() as directory:
        one = open_ledger(f"sqlite:///{directory}/one.db", signer=Key())
        many = open_ledger(f"sqlite:///{directory}/many.db", signer=Key())
        fill_one(one, rows)
        fill_many(many, rows // UNITS)
        timed = time_reservations(one, many, Path(directory), readings)
        for name, ledger in (("one unit", one), (f"{UNITS} units", many)):
            found.results += reading_rows(name, ledger, timed[name])
            ledger.close()
        found.results.append(_row("this disk", "fsync_ms", timed["fsync"]))
    reserve_ms = max(Spread.of(timed[name]).median for name in timed if name != "fsync")
    accounts_s = max(float(row["median"] or 0.0) for row in found.results if row["reading"] == "accounts_s")
    found.targets.append(Target.at_most("reserve_ms", reserve_ms, RESERVE_LIMIT_MS))
    found.targets.append(Target.at_most("accounts_s", accounts_s, ACCOUNTS_LIMIT_S))
    return found.finish(options.json)


def release() -> PricedRelease:
    """What a round of DP-SGD without amplification costs."""
    event = PrivacyEvent("gaussian", {"noise_multiplier": (4.0).hex(), "clip": (1.0).hex()})
    return PricedRelease("adapter_sum", event, {"holder": View(10, "1", "zero-out")})


def charge(unit: Unit, run: str, number: int) -> Charge:
    return Charge(unit, run, number, 1, release(), ACCOUNTANT)


def afford(standing: Standing, proposed: Sequence[PricedRelease]) -> None:
    """As a run admits."""
    admit_standing(BUDGET, max(standing.spent, default=""), standing, proposed)


def fill_one(ledger: Ledger, rows: int) -> None:
    """One unit with so many charges."""
    unit = Unit("client-0", "notes", "example")
    ledger.register_budgets([unit], BUDGET, "before")
    for first in range(0, rows, UNITS):
        ledger.reserve([charge(unit, "before", first + index) for index in range(UNITS)], afford)


def fill_many(ledger: Ledger, rounds: int) -> None:
    """Many units, each charged and committed in every round."""
    units = [Unit(f"client-{number}", "notes", "example") for number in range(UNITS)]
    ledger.register_budgets(units, BUDGET, "before")
    for number in range(rounds):
        ledger.reserve([charge(unit, "before", number) for unit in units], afford)
        ledger.settle("before", number, 1, "COMMITTED")


def time_reservations(one: Ledger, many: Ledger, directory: Path, readings: int) -> dict[str, list[float]]:
    """Milliseconds of reservations in both ledgers and of an fsync, taken in turns."""
    timed: dict[str, list[float]] = {"one unit": [], f"{UNITS} units": [], "fsync": []}
    with (directory / "yardstick").open("ab", buffering=0) as file:
        for number in range(readings):
            for name, ledger in (("one unit", one), (f"{UNITS} units", many)):
                unit = Unit(f"client-{number % UNITS if ledger is many else 0}", "notes", "example")
                wanted = [charge(unit, "timed", number)]
                timed[name].append(1e3 * _seconds(lambda ledger=ledger, wanted=wanted: ledger.reserve(wanted, afford)))  # type: ignore[misc]
            file.write(bytes(4096))
            timed["fsync"].append(1e3 * _seconds(lambda: os.fsync(file.fileno())))
    return timed


def reading_rows(name: str, ledger: Ledger, reserve_ms: Sequence[float]) -> list[dict[str, Cell]]:
    """A ledger's figures; raises RuntimeError where it is not sound."""
    accounts_s = [_seconds(ledger.accounts) for _ in range(5)]
    started = time.perf_counter()
    findings = ledger.verify()
    verify_s = time.perf_counter() - started
    if findings:
        raise RuntimeError(f"the ledger is not sound: {findings[0]}")
    return [
        _row(name, "reserve_ms", reserve_ms),
        _row(name, "accounts_s", accounts_s),
        _row(name, "verify_s", [verify_s]),
    ]


def _row(ledger: str, reading: str, values: Sequence[float]) -> dict[str, Cell]:
    spread = Spread.of(values)
    row: dict[str, Cell] = {"ledger": ledger, "reading": reading, "median": spread.median}
    return row | {"min": spread.min, "max": spread.max}


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
