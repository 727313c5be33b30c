"""Whatever is asked of the Store, in whatever order, its invariants hold and it agrees with a small model."""

import itertools
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from contract.errors import StorageError
from storage.records import Outcome, RoundCommit
from storage.store import Store, open_store

NODES = ["1", "2", "3"]
SHA = "a" * 64


class StoreStates(RuleBasedStateMachine):
    """One run under every sequence of calls; the model is what the attempts and participations should be."""

    store: ClassVar[Store]
    fresh: ClassVar[Any] = itertools.count()

    @initialize()
    def begin(self) -> None:
        self.run_id = f"run-{next(self.fresh)}"
        self.store.create_run(self.run_id, "7", {}, "unknown", "f")
        self.store.add_adapter_version(self.run_id, 0, SHA, SHA)
        self.status = "running"
        self.committed = 0
        self.attempts: dict[tuple[int, int], str] = {}
        self.outcomes: dict[str, str] = {}

    @property
    def opened(self) -> tuple[int, int] | None:
        return next((key for key, status in self.attempts.items() if status == "open"), None)

    def expect(self, allowed: bool, call: Any) -> Any:
        try:
            result = call()
        except StorageError:
            assert not allowed, "the Store refused what its contract allows"
            return None
        assert allowed, "the Store took what its contract forbids"
        return result

    @rule(ahead=st.integers(-1, 2), cohort=st.lists(st.sampled_from(NODES), unique=True, min_size=1))
    def open_round(self, ahead: int, cohort: list[str]) -> None:
        number = self.committed + ahead
        allowed = self.status == "running" and ahead == 1
        attempt = self.expect(allowed, lambda: self.store.open_round(self.run_id, number, cohort))
        if allowed:
            if self.opened:
                self.attempts[self.opened] = "aborted"
            assert attempt == 1 + max((made for of, made in self.attempts if of == number), default=0)
            self.attempts[number, attempt] = "open"
            self.outcomes = dict.fromkeys(cohort, "invited")

    @rule(node=st.sampled_from(NODES), outcome=st.sampled_from(["trained", "failed", "late", "refused"]))
    def record_participation(self, node: str, outcome: Outcome) -> None:
        number, attempt = self.opened or (self.committed + 1, 1)
        allowed = self.opened is not None and node in self.outcomes
        self.expect(allowed, lambda: self.store.record_participation(self.run_id, number, attempt, node, outcome))
        if allowed:
            self.outcomes[node] = outcome

    @rule(survivors=st.lists(st.sampled_from(NODES), unique=True), right=st.booleans())
    def commit_round(self, survivors: list[str], right: bool) -> None:
        number, attempt = self.opened or (self.committed + 1, 1)
        if right:
            survivors = [node for node, was in self.outcomes.items() if was == "trained"]
        trained = {node for node, was in self.outcomes.items() if was == "trained"}
        able = {node for node, was in self.outcomes.items() if was in ("trained", "invited")}
        allowed = self.opened is not None and trained <= set(survivors) <= able
        commit = RoundCommit(self.run_id, number, attempt, SHA, SHA, 5, survivors, 0.1, {}, {"eval_loss": 1.0})
        self.expect(allowed, lambda: self.store.commit_round(commit))
        if allowed:
            self.attempts[number, attempt] = "committed"
            self.committed = number
            ended = {node: "late" if was == "invited" else was for node, was in self.outcomes.items()}
            self.outcomes = ended | dict.fromkeys(survivors, "trained")

    @rule()
    def abort_round(self) -> None:
        number, attempt = self.opened or (self.committed + 1, 1)
        allowed = self.opened is not None
        self.expect(allowed, lambda: self.store.abort_round(self.run_id, number, attempt, "so it was"))
        if allowed:
            self.attempts[number, attempt] = "aborted"

    @rule(sure=st.integers(0, 5))
    def finish_run(self, sure: int) -> None:
        if sure:
            return
        assert self.store.finish_run(self.run_id, "stopped", "enough") is (self.status == "running")
        if self.opened:
            self.attempts[self.opened] = "aborted"
        self.status = "stopped"

    @invariant()
    def agrees_with_the_model(self) -> None:
        run = self.store.get_run(self.run_id)
        assert (run.status, run.committed_rounds) == (self.status, self.committed)
        rows = self.store.rounds(self.run_id)
        assert {(row.number, row.attempt): row.status for row in rows} == self.attempts
        assert sum(row.status == "open" for row in rows) <= 1
        assert all((row.ended_at is None) == (row.status == "open") for row in rows)
        versions = [version.number for version in self.store.adapter_versions(self.run_id)]
        assert versions == list(range(self.committed + 1))
        if rows:
            newest = self.store.participations(self.run_id, rows[-1].number)
            last = max(row.attempt for row in newest)
            assert {row.node_id: row.status for row in newest if row.attempt == last} == self.outcomes


def test_the_store_keeps_its_invariants_in_every_order_of_calls() -> None:
    with tempfile.TemporaryDirectory() as directory:
        StoreStates.store = open_store(f"sqlite:///{Path(directory) / 'x.db'}")
        machine: Any = StoreStates.TestCase
        machine.settings = settings(
            max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        )
        machine().runTest()
        StoreStates.store.close()
