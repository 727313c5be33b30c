"""A trunk's metrics for Prometheus: what passed is counted as it passes, what is held is looked at when asked.

Of quiet sessions, whose work is a function of rows that were drawn in secret, nothing but their number is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from server_trunk.scheduler import PassSeen
from server_trunk.sessions import Counters

PREFIX = "trunkline_trunk_"
KINDS = ("forward", "backward", "other")
_PASSES = ("forward", "backward")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_CLIENTS = (1, 2, 4, 8, 16, 32, 64)
_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a trunk holds at one moment, and what its sessions have done since it started.

    `memory` is by kind, `done` by client.
    """

    open_sessions: int
    max_sessions: int
    pending_graphs: int
    done: Mapping[str, Counters]
    memory: dict[str, tuple[int, int]]
    spill_bytes: int
    spill_limit_bytes: int
    spilled_bytes: int
    evictions: int
    recomputes: int
    expired_graphs: int
    about: dict[str, str]


class TrunkMetrics:
    """The registry of one trunk, and what its parts report to. Safe to read from any thread."""

    def __init__(self, *, name_clients: bool = False) -> None:
        """Where `name_clients`, what sessions have done is told by client too."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._name_clients = name_clients
        own = self.registry
        self._sessions = Counter(
            f"{PREFIX}sessions",
            "Sessions that ended, refused hellos included, by outcome.",
            ["outcome"],
            registry=own,
        )
        self._refused = Counter(
            f"{PREFIX}hellos_refused", "Hellos that were refused, by the kind of the reason.", ["error"], registry=own
        )
        self._failed = Counter(
            f"{PREFIX}sessions_failed", "Sessions that an error ended, by its kind.", ["error"], registry=own
        )
        self._work = {
            kind: Counter(f"{PREFIX}{kind}s", f"{kind.capitalize()}s that were computed.", registry=own)
            for kind in _PASSES
        }
        self._waited = self._by_kind("queue_seconds", "Work's wait for a lane, by kind.", _SECONDS, KINDS)
        told = "How long a pass took in its lane, decoding and encoding included, by kind."
        self._computed = self._by_kind("pass_seconds", told, _SECONDS, KINDS)
        self._together = self._by_kind("pass_clients", "Sessions that shared a pass, by kind.", _CLIENTS, _PASSES)
        self._size = self._by_kind("pass_tokens", "Rows times tokens of a pass, by kind.", _TOKENS, _PASSES)
        self._commits = Counter(f"{PREFIX}commits", "Rounds whose average was asked for and given.", registry=own)

    def _by_kind(self, name: str, told: str, buckets: Sequence[float], kinds: Sequence[str]) -> dict[str, Histogram]:
        """A histogram's children, looked up once: a pass asks for several of them."""
        family = Histogram(PREFIX + name, told, ["kind"], buckets=buckets, registry=self.registry)
        return {kind: family.labels(kind) for kind in kinds}

    def attach(self, look: Callable[[], Facts]) -> None:
        """From now on each scrape asks `look` what the trunk holds; it may raise TimeoutError."""
        self.registry.register(_Held(look, name_clients=self._name_clients))

    def passed(self, seen: PassSeen) -> None:
        """Count one pass. One in which a quiet session took part is not measured, for its size would tell of that."""
        kind, clients = seen.kind, len(seen.waited_s)
        if kind in self._work:
            self._work[kind].inc(clients)
        if not seen.whole:
            return
        waited = self._waited[kind]
        for waited_s in seen.waited_s:
            waited.observe(waited_s)
        self._computed[kind].observe(seen.seconds)
        if kind in self._work:
            self._together[kind].observe(clients)
            self._size[kind].observe(seen.tokens)

    def session_ended(self, outcome: str, error: str = "") -> None:
        """`outcome` is closed, dropped (its client hung up), cut_off, failed or refused; `error` says why, by kind."""
        self._sessions.labels(outcome).inc()
        if outcome == "refused":
            self._refused.labels(error).inc()
        elif outcome == "failed":
            self._failed.labels(error).inc()

    def committed(self) -> None:
        self._commits.inc()


_DONE = {
    "steps": "Optimiser steps of the sessions' adapters",
    "tokens": "Rows times tokens of forwards that a backward follows",
    "received_bytes": "Bytes of sessions' frames that came",
    "sent_bytes": "Bytes of sessions' frames that were sent",
}
"""What is counted of sessions, by the name of its counter."""


class _Held(Collector):
    def __init__(self, look: Callable[[], Facts], *, name_clients: bool) -> None:
        self._look = look
        self._name_clients = name_clients

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering asks nothing

    def collect(self) -> Iterable[Metric]:
        facts = self._look()
        yield InfoMetricFamily(f"{PREFIX[:-1]}", "What is served.", facts.about)
        yield _gauge("sessions_open", "Sessions that have a place.", facts.open_sessions)
        yield _gauge("sessions_limit", "Places for sessions.", facts.max_sessions)
        yield _gauge("pending_graphs", "Forwards that wait for their backward.", facts.pending_graphs)
        for name, told in _DONE.items():
            yield _counter(name, f"{told}.", sum(getattr(done, name) for done in facts.done.values()))
        if self._name_clients:
            yield from _by_client(facts.done)
        used = GaugeMetricFamily(f"{PREFIX}memory_bytes", "Memory that is taken, by what for.", labels=["kind"])
        limit = GaugeMetricFamily(f"{PREFIX}memory_limit_bytes", "Memory that may be taken.", labels=["kind"])
        for kind, (taken, most) in facts.memory.items():
            used.add_metric([kind], taken)
            limit.add_metric([kind], most)
        yield used
        yield limit
        yield _gauge("spill_bytes", "Bytes of requests that lie on disk.", facts.spill_bytes)
        yield _gauge("spill_limit_bytes", "Bytes of requests that may lie on disk.", facts.spill_limit_bytes)
        yield _counter("spilled_bytes", "Bytes of requests that were put on disk.", facts.spilled_bytes)
        yield _counter("evictions", "Idle adapters that were put on disk.", facts.evictions)
        yield _counter("recomputes", "Forwards that were computed again for their backward.", facts.recomputes)
        yield _counter("expired_graphs", "Graphs that were freed for waiting too long.", facts.expired_graphs)


def _by_client(done: Mapping[str, Counters]) -> Iterable[Metric]:
    for name, told in _DONE.items():
        family = CounterMetricFamily(f"{PREFIX}client_{name}", f"{told}, by client.", labels=["client"])
        for client, counters in done.items():
            family.add_metric([client], getattr(counters, name))
        yield family


def _gauge(name: str, told: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, told, value)


def _counter(name: str, told: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, told, value)
