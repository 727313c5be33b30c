"""A run's metrics for Prometheus and its health, served by the orchestrator for as long as the run lasts."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from contract.errors import TrunklineError, error_named
from contract.named_clients import NamedClients
from contract.records import NOTHING_SEEN, RoundKey, RoundProgress
from orchestrator.audience import WAITING, Listener
from storage.records import Outcome, RoundCommit

PREFIX = "trunkline_orchestrator_"
PHASES = (WAITING, "cohort", "training", "confirming", "unmasking", "averaging", "storing", "judging")
CALL_S = 900.0
"""Longer than any call of the run's thread takes, adapters on their way included, where the trunk answers."""
PROBE_S = 5.0
"""How long an answer about the trunk is good for."""

_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


class RunMetrics(Listener):
    """The registry of one run. Safe to read from any thread."""

    what = "metrics"

    def __init__(
        self, run_id: str, rounds: int, lease_age_s: Callable[[], float], *, name_clients: bool = False
    ) -> None:
        """Where `name_clients`, what clients did is told by client too."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._moved_s = time.monotonic()
        self._counted: tuple[RoundKey | None, RoundProgress] = (None, NOTHING_SEEN)
        about = Info(PREFIX[:-1], "Which run this is.", registry=self.registry)
        about.info({"run": run_id})
        self._round = self._gauge("round", "Number of the round that is played, or was last.")
        self._attempt = self._gauge("attempt", "Number of the attempt at it.")
        self._gauge("rounds_planned", "Rounds that the run is to have.").set(rounds)
        self._cohort = self._gauge("cohort_clients", "Clients that the attempt asked.")
        self._replies = self._gauge("replies", "Clients whose answer to the attempt came.")
        self._train_loss = self._gauge("train_loss", "Mean training loss of the newest round, where it is told.")
        self._train_loss.set(math.nan)
        self._gauge("lease_age_seconds", "Since the lease was last renewed.").set_function(lease_age_s)
        self._gauge("progress_age_seconds", "Since the run's thread last moved.").set_function(self.still_s)
        self._phase = Gauge(f"{PREFIX}phase", "1 for what the run is at.", ["phase"], registry=self.registry)
        self._is_at(WAITING)
        self._commits = self._counter("rounds_committed", "Rounds that were committed.")
        self._aborts = self._counter("attempts_aborted", "Attempts that came to nothing.")
        self._outcomes = self._counter("participations", "What clients did in attempts, by outcome.", "outcome")
        self._failures = self._counter("failures", "Clients that an attempt did without, by the kind of why.", "error")
        self._named = NamedClients()
        self._by_client: Counter | None = None
        if name_clients:
            told = "What clients did in attempts, by client and outcome."
            self._by_client = self._counter("client_participations", told, "client", "outcome")
        self._charges = self._counter("ledger_charges", "Charges that were reserved in the privacy ledger.")
        self._trained = self._counter("trained_tokens", "Tokens that committed rounds were trained on, where told.")
        self._work = {
            "steps": self._counter("steps", "Optimiser steps at the trunk, by its progress."),
            "tokens": self._counter("tokens", "Rows times tokens of training forwards at the trunk, by its progress."),
            "received_bytes": self._counter("trunk_received_bytes", "Bytes that the trunk got, by its progress."),
            "sent_bytes": self._counter("trunk_sent_bytes", "Bytes that the trunk sent, by its progress."),
        }
        self._exchange = self._histogram("exchange_seconds", "How long an exchange with a cohort took, by phase.")
        self._phases = self._histogram("phase_seconds", "How long a phase of a round took.")

    # ---- what is told --------------------------------------------------------------------------------------------

    def moves(self) -> None:
        """The run's thread is alive."""
        self._moved_s = time.monotonic()

    def still_s(self) -> float:
        """Seconds for which it has not moved."""
        return time.monotonic() - self._moved_s

    def phase_began(self, phase: str) -> None:
        self.moves()
        self._is_at(phase)

    def phase_ended(self, phase: str, seconds: float) -> None:
        self.moves()
        self._is_at(WAITING)
        self._phases.labels(phase).observe(seconds)

    def opened(self, key: RoundKey, clients: int) -> None:
        self._round.set(key.round)
        self._attempt.set(key.attempt)
        self._cohort.set(clients)
        self._replies.set(0)

    def moved(self, key: RoundKey, seen: RoundProgress, replies: int) -> None:
        counted, before = self._counted
        if counted != key:
            before = NOTHING_SEEN
        for name, counter in self._work.items():
            counter.inc(max(0, getattr(seen, name) - getattr(before, name)))
        self._counted = (key, seen)
        self._replies.set(replies)

    def participated(self, key: RoundKey, node_id: str, outcome: Outcome, reason: str | None) -> None:
        self._outcomes.labels(outcome).inc()
        if self._by_client is not None:
            self._by_client.labels(self._named.name(node_id), outcome).inc()
        if outcome != "trained":
            self._failures.labels(failure_kind(outcome, reason)).inc()

    def committed(self, commit: RoundCommit) -> None:
        self._commits.inc()
        self._replies.set(len(commit.survivors))
        self._trained.inc(commit.trained_tokens)
        if "train_loss" in commit.metrics:
            self._train_loss.set(commit.metrics["train_loss"])

    def aborted(self, key: RoundKey) -> None:
        self._aborts.inc()

    def exchanged(self, phase: str, seconds: float) -> None:
        self._exchange.labels(phase).observe(seconds)

    def charged(self, charges: int) -> None:
        self._charges.inc(charges)

    # ---- how it is kept ------------------------------------------------------------------------------------------

    def _is_at(self, phase: str) -> None:
        for one in PHASES:
            self._phase.labels(one).set(one == phase)

    def _gauge(self, name: str, told: str) -> Gauge:
        return Gauge(PREFIX + name, told, registry=self.registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, told, labels, registry=self.registry)

    def _histogram(self, name: str, told: str) -> Histogram:
        return Histogram(PREFIX + name, told, ["phase"], buckets=_SECONDS, registry=self.registry)


class Health:
    """Whether a run moves, and whether it is well: its lease held and its trunk there."""

    def __init__(
        self, still_s: Callable[[], float], lease: Callable[[], str], probe: Callable[[], object], stuck_s: float
    ) -> None:
        """A run is stuck that stood still for `stuck_s`.

        `lease` answers why the lease is not held; `probe` asks the trunk something, and raises TrunklineError.
        """
        self._still_s = still_s
        self._lease = lease
        self._probe = probe
        self._stuck_s = stuck_s
        self._asking = threading.Lock()
        self._asked_s = float("-inf")
        self._trunk = ""

    def healthy(self) -> str:
        still_s = self._still_s()
        return f"the run has not moved for {still_s:.0f} s" if still_s > self._stuck_s else ""

    def ready(self) -> str:
        return self.healthy() or self._lease() or self._of_trunk()

    def _of_trunk(self) -> str:
        with self._asking:
            if time.monotonic() - self._asked_s > PROBE_S:
                try:
                    self._probe()
                    self._trunk = ""
                except TrunklineError as error:
                    self._trunk = str(error)
                self._asked_s = time.monotonic()
            return self._trunk


def failure_kind(outcome: Outcome, reason: str | None) -> str:
    """The class of ours that a client's reason names, so that there are never more labels than classes."""
    named = (reason or "").partition(":")[0].partition(" at the client")[0]
    return named if error_named(named) is not None else outcome
