"""Runs as they stand in SQL, written by the real Store and Ledger on a clock that the case sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from contract.config import ConfigValue, RunConfig
from contract.privacy_records import Unit
from privacy.accountant import ACCOUNTANT
from privacy.plan import register_budget, round_releases
from storage.ledger import open_ledger
from storage.records import Charge, Outcome, RoundCommit
from storage.store import Store, open_store

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)
EVIL = "<script>document.title = 'taken'; fetch('http://evil.example/')</script>"
EVIL_NAME = '"><img src=x onerror=alert(1)>'
PRIVATE: dict[str, ConfigValue] = {"dp": "client", "trunk-adapter": "frozen", "dp-noise-multiplier": 4.0}
PHASE_SECONDS = {
    "cohort": 0.5, "training": 12.25, "confirming": 1.5, "unmasking": 1.125, "averaging": 0.25, "storing": 0.0625
}  # fmt: skip


@dataclass
class Case:
    """One run in the database at `url`; time passes only where the case says so."""

    url: str
    run_id: str = "20260101-120000-abcd"
    now: datetime = BEGAN
    config: RunConfig = field(default_factory=lambda: RunConfig.from_flower({}))
    _store: Store | None = None

    @property
    def store(self) -> Store:
        assert self._store is not None
        return self._store

    def passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def begin(self, **settings: ConfigValue) -> Case:
        """The run's row and its first adapter."""
        values = {key.replace("_", "-"): value for key, value in settings.items()}
        self.config = RunConfig.from_flower({"num-rounds": 3, **values})
        self.store.create_run(self.run_id, f"flower-{self.run_id}", self.config.to_flower(), "simulation", "f" * 64)
        self.passes(2)
        self.store.add_adapter_version(self.run_id, 0, sha(self.run_id, 0, "client"), sha(self.run_id, 0, "trunk"))
        return self

    def attempt(
        self, number: int, nodes: Sequence[str], lost: Mapping[str, tuple[Outcome, str]] | None = None
    ) -> tuple[int, list[str]]:
        """An attempt under way at which `lost` fell out: its number, and who is left."""
        attempt = self.store.open_round(self.run_id, number, nodes, threshold=len(nodes) * 2 // 3 + 1)
        for node, (outcome, reason) in (lost or {}).items():
            self.store.record_participation(self.run_id, number, attempt, node, outcome, reason)
        self.passes(13)
        left = [node for node in nodes if node not in (lost or {})]
        self.store.record_progress(
            self.run_id, number, attempt, phase="training", replies=len(left), steps=10 * len(nodes),
            tokens=1000 * len(nodes), received_bytes=41_000_000 * len(nodes) + number, sent_bytes=40_500_000 * len(left)
        )  # fmt: skip
        return attempt, left

    def commit(
        self, number: int, nodes: Sequence[str], lost: Mapping[str, tuple[Outcome, str]] | None = None, *,
        losses: bool = True,
    ) -> None:  # fmt: skip
        """A whole round; its adapter's held-out loss is told by the next one, as in a run."""
        attempt, survivors = self.attempt(number, nodes, lost)
        if losses:
            self.judge(number - 1)
        metrics = {"train_loss": 3.1 + 0.97**number, "steps": 10.0 * len(survivors)} if losses else {}
        seconds = {phase: value * (1 + number % 3 / 4) for phase, value in PHASE_SECONDS.items()}
        self.passes(sum(seconds.values()) - 13 if sum(seconds.values()) > 13 else 1)
        self.store.commit_round(
            RoundCommit(
                self.run_id, number, attempt, sha(self.run_id, number, "client"), sha(self.run_id, number, "trunk"),
                1000 * len(survivors) + number, survivors, sum(seconds.values()), seconds, metrics
            )
        )  # fmt: skip
        self.passes(0.75)

    def judge(self, version: int) -> None:
        loss = 3.2 + 0.97**version
        self.store.record_metrics(self.run_id, version, None, {"eval_loss": loss, "eval_tokens": 900})

    def charge(self, rounds: int, units: Sequence[Unit]) -> None:
        """What so many rounds of the run spend of `units`."""
        ledger = open_ledger(self.url)
        ledger.register_budgets(units, register_budget(self.config), self.run_id)
        for number in range(1, rounds + 1):
            releases = round_releases(self.config, scale=2.0**20, size=1000)
            charges = [Charge(unit, self.run_id, number, 1, one, ACCOUNTANT) for unit in units for one in releases]
            assert ledger.reserve(charges, lambda standing, proposed: None) == []
            ledger.settle(self.run_id, number, 1, "COMMITTED")
        ledger.close()


@contextmanager
def case_at(url: str, **fields: str) -> Iterator[Case]:
    case = Case(url, **fields)
    case._store = open_store(url, lambda: case.now)
    try:
        yield case
    finally:
        case.store.close()


def url_in(directory: Path) -> str:
    return f"sqlite:///{directory / 'trunkline.db'}"


def sha(*parts: object) -> str:
    """A hash that follows from `parts`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def eventful(case: Case) -> Case:
    """Five clients, one of them hostile in name and reason; an aborted attempt, a resumed run, budgets spent."""
    nodes = ["1001", "1002", "1003", "1004", "1005"]
    case.begin(num_rounds=6, metrics="sum", **{key.replace("-", "_"): value for key, value in PRIVATE.items()})
    for node, name in zip(nodes, ("clinic-north", "clinic-south", "ward-7", EVIL_NAME, "lab"), strict=True):
        case.store.add_client(node, name)
    case.commit(1, nodes)
    case.commit(2, nodes, {"1004": ("failed", EVIL)})
    attempt, _ = case.attempt(3, nodes, {"1004": ("late", "no answer in 60 s"), "1005": ("failed", "disk is full")})
    case.store.abort_round(case.run_id, 3, attempt, f"3 of 5 masked updates came; threshold is 4: {EVIL}")
    case.passes(1)
    case.attempt(3, nodes)
    case.passes(200)  # its orchestrator was killed; another takes over
    case.store.resume_run(case.run_id, "flower-resumed")
    case.commit(3, nodes, {"1002": ("refused", "its update is 9 times the clip")})
    case.commit(4, nodes)
    case.charge(4, [Unit(client, "notes", "client") for client in ("clinic-north", "clinic-south", "lab", "ward-7")])
    return case


def long(case: Case, rounds: int = 200, clients: int = 64) -> Case:
    """Many rounds of many clients, a few of whom are late now and then."""
    nodes = [str(2000 + number) for number in range(clients)]
    case.begin(num_rounds=rounds)
    for number in range(1, rounds + 1):
        late = {nodes[number * 7 % clients]: ("late", f"no answer in {number} s")} if number % 4 == 0 else {}
        case.commit(number, nodes, late)  # type: ignore[arg-type]
    case.judge(rounds)
    case.store.finish_run(case.run_id, "finished")
    return case
