"""What trackers draw of a run: numbers by round, all of them from what SQL and the ledger hold of committed rounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from contract.config import RunConfig
from contract.privacy_records import ADVERSARIES
from orchestrator.metrics import judged_losses
from orchestrator.protection import most_spent
from privacy.coverage import withheld
from storage.ledger import Ledger
from storage.reader import Reader
from storage.records import Account, RoundRow

TRAIN_LOSS, HELD_OUT_LOSS = "loss/train", "loss/held_out"


@dataclass(frozen=True, slots=True)
class Point:
    """Numbers of one round, by name; `at` is when SQL took them."""

    round: int
    at: datetime
    values: Mapping[str, float]


class RunScalars:
    """The numbers of one run. Held-out losses are told once each, when they are known: a round late, as a rule."""

    def __init__(self, run_id: str, config: RunConfig, reader: Reader, ledger: Ledger | None) -> None:
        self._run_id = run_id
        self._config = config
        self._reader = reader
        self._ledger = ledger if config.dp != "off" else None
        self._judged: set[int] = set()

    def history(self) -> Iterator[Point]:
        """Everything up to now, in order: of a run that is resumed, what was before."""
        rounds = [row for row in self._reader.rounds(self._run_id) if row.status == "committed"]
        for row in rounds:
            yield self._of_round(row, self._charged_through(row.number))
        yield from self.judgements()

    def newest(self, number: int) -> Iterator[Point]:
        """What the commit of round `number` brought."""
        for row in self._reader.rounds(self._run_id):
            if row.number == number and row.status == "committed":
                accounts = [] if self._ledger is None else self._ledger.accounts(self._run_id)
                yield self._of_round(row, accounts)
        yield from self.judgements()

    def judgements(self) -> Iterator[Point]:
        """The held-out losses of versions that were not told yet."""
        found = self._reader.metrics(self._run_id, over_clients=True)
        at = {row.number: row.recorded_at for row in found if row.name == "eval_loss"}
        for number, loss in sorted(judged_losses(found).items()):
            if number not in self._judged:
                self._judged.add(number)
                yield Point(number, at[number], {HELD_OUT_LOSS: loss})

    def _of_round(self, row: RoundRow, accounts: list[Account]) -> Point:
        values: dict[str, float] = {"clients/trained": row.replies, "tokens/trained": row.trained_tokens}
        for metric in self._reader.metrics(self._run_id, over_clients=True):
            if (metric.number, metric.attempt, metric.name) == (row.number, row.attempt, "train_loss"):
                values[TRAIN_LOSS] = metric.value
        values |= {"bytes/received_by_trunk": row.received_bytes, "bytes/sent_by_trunk": row.sent_bytes}
        if row.seconds is not None:
            values["seconds/round"] = row.seconds
        values |= {f"seconds/{phase}": float(spent) for phase, spent in row.phase_seconds.items()}
        values |= self._epsilons(accounts)
        return Point(row.number, row.ended_at or row.progress_at, values)

    def _epsilons(self, accounts: list[Account]) -> dict[str, float]:
        """The most that any client spent in this run, against whom it may be told."""
        if self._ledger is None:
            return {}
        told = [name for name in ADVERSARIES if withheld(self._config, name) is None]
        most = most_spent(self._config, accounts)
        return {f"epsilon/{name}": most[name] for name in told if math.isfinite(most.get(name, math.inf))}

    def _charged_through(self, number: int) -> list[Account]:
        """As Ledger.accounts, of this run's charges up to a round."""
        if self._ledger is None:
            return []
        found = []
        for unit in self._ledger.units():
            counts: Counter[str] = Counter()
            for row in self._ledger.rows(unit):
                if row.run == self._run_id and row.round <= number and row.state in ("RESERVED", "VOID"):
                    counts[row.release] += 1 if row.state == "RESERVED" else -1
            found += [Account(unit, self._run_id, text, times, number) for text, times in counts.items() if times]
        return found
