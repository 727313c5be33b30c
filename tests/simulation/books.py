"""What the databases hold, read by plain SQL beside the program's own way to them."""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Attempt = tuple[str, int, int]
"""Run, round, attempt."""


@dataclass(frozen=True)
class Version:
    number: int
    client_sha256: str
    trunk_sha256: str
    trained_tokens: int


class Books:
    """One SQLite file, as of its last commit."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA query_only = ON")

    def close(self) -> None:
        self._connection.close()

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(query, values).fetchall()

    def runs(self) -> list[str]:
        return [row[0] for row in self._rows("SELECT run_id FROM runs ORDER BY created_at, run_id")]

    def run(self, run_id: str) -> tuple[str, str, str | None, str]:
        """Status, driver, reason and model of a run."""
        found: tuple[str, str, str | None, str] = self._rows(
            "SELECT status, flower_run_id, reason, model_fingerprint FROM runs WHERE run_id = ?", run_id
        )[0]  # type: ignore[assignment]
        return found

    def run_driven_by(self, flower_run_id: str) -> str:
        found = self._rows("SELECT run_id FROM runs WHERE flower_run_id = ?", flower_run_id)
        return str(found[0][0]) if found else ""

    def versions(self, run_id: str) -> list[Version]:
        query = "SELECT number, client_sha256, trunk_sha256, trained_tokens FROM adapter_versions WHERE run_id = ?"
        return [Version(*row) for row in self._rows(f"{query} ORDER BY number", run_id)]

    def attempts(self, run_id: str) -> list[tuple[int, int, str, int | None, str | None]]:
        """Number, attempt, status, threshold and reason of each attempt at a round."""
        query = "SELECT number, attempt, status, threshold, reason FROM rounds WHERE run_id = ?"
        return self._rows(f"{query} ORDER BY number, attempt", run_id)  # type: ignore[return-value]

    def trained(self, of: Attempt) -> list[int]:
        """The nodes that an attempt counts as in its sum."""
        query = "SELECT node_id FROM participations WHERE run_id = ? AND number = ? AND attempt = ?"
        return [int(row[0]) for row in self._rows(f"{query} AND status = 'trained' ORDER BY node_id", *of)]

    def states(self, client: str, of: Attempt) -> set[str]:
        """The states of the charges to a client for an attempt."""
        query = "SELECT state FROM privacy_rows WHERE kind = 'charge' AND client = ? AND run = ? AND round = ?"
        return {row[0] for row in self._rows(f"{query} AND attempt = ?", client, *of)}

    def reserved(self) -> int:
        """How many charges were ever reserved."""
        return int(self._rows("SELECT count(*) FROM privacy_rows WHERE state = 'RESERVED'")[0][0])

    def charged(self, run_id: str | None = None) -> dict[str, Counter[str]]:
        """How often each client pays for each release, in a run or in all."""
        found: dict[str, Counter[str]] = {}
        query = "SELECT client, release, state, run FROM privacy_rows WHERE kind = 'charge' AND state != 'COMMITTED'"
        for client, release, state, run in self._rows(query):
            if run_id in (None, run):
                found.setdefault(client, Counter())[release] += 1 if state == "RESERVED" else -1
        return found
