"""How a trunk is watched: metrics and health over HTTP, and what its log and its traces tell of each session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

from contract import logs, traces
from contract.addresses import is_loopback
from contract.errors import ConfigError, ConnectionFailedError, RoundError, TrunklineError
from contract.records import RoundKey
from contract.scrape import Exporter, metrics_address
from server_trunk.engine import Engine
from server_trunk.lane import Graph
from server_trunk.log import is_of_a_vanished_client
from server_trunk.memory import MemoryBudget, Spill
from server_trunk.metrics import Facts, TrunkMetrics
from server_trunk.scheduler import PassSeen, Scheduler
from server_trunk.session_adapter import SessionAdapter
from server_trunk.sessions import SessionTable

if TYPE_CHECKING:
    from server_trunk.sessions import Session

logger = logging.getLogger("trunkline.server_trunk")

ANSWER_S = 5.0
"""How long the event loop may take to answer who asks after the trunk's health."""
_HEADER_LETTERS = 128
_NAME_LETTERS = 128

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a serving trunk is made of, as far as its metrics tell of it."""

    engine: Engine
    table: SessionTable[SessionAdapter, Graph]
    scheduler: Scheduler
    memory: MemoryBudget
    spill: Spill

    def facts(self) -> Facts:
        """To be called on the event loop."""
        engine, scheduler = self.engine, self.scheduler
        return Facts(
            open_sessions=self.table.taken,
            max_sessions=self.table.max_sessions,
            pending_graphs=self.table.pending_graphs,
            done=self.table.counted(),
            memory={
                "waiting": (self.memory.taken, self.memory.limit),
                "passes": (scheduler.running_bytes, scheduler.pass_bytes),
                "adapters": (scheduler.residents.taken, scheduler.residents.limit),
            },
            spill_bytes=self.spill.taken,
            spill_limit_bytes=self.spill.limit,
            spilled_bytes=self.spill.put_bytes,
            evictions=scheduler.residents.evictions,
            recomputes=sum(lane.recomputes for lane in engine.lanes),
            expired_graphs=self.table.expired,
            about={
                "version": _version(),
                "model": engine.fingerprint[:12],
                "cut": f"{engine.cut.head},{engine.cut.tail}",
                "dtype": engine.dtype,
                "device": engine.device,
            },
        )


class SessionSeen:
    """One session's stream as it is watched. It counts as refused until it is admitted."""

    def __init__(self, watch: Watch, traceparent: str) -> None:
        self._watch = watch
        self._traceparent = traceparent
        self._session: Session[Any, Any] | None = None
        self._span: traces.Span | None = None

    def admit(self, session: Session[Any, Any]) -> None:
        """From here on the log names the session's round and client, and its span has begun."""
        self._session = session
        about: dict[str, str | int] = {"client": session.client_id[:_NAME_LETTERS]} if session.client_id else {}
        about |= _named(session.round_key)
        logs.note(**about)
        self._span = self._watch.span("trunk session", self._traceparent, about)

    def ended(self, error: BaseException | None) -> None:
        session, kind = self._session, _kind(error)
        if error is None or isinstance(error, asyncio.CancelledError) or is_of_a_vanished_client(error):
            outcome = "closed" if session is not None and session.closed else "dropped"
        elif session is None:
            outcome = "refused"
        else:
            outcome = "cut_off" if isinstance(error, ConnectionFailedError | RoundError) else "failed"
        if self._watch.metrics is not None:
            self._watch.metrics.session_ended(outcome, kind)
        if session is not None:
            logger.info("session %s: %s", session.session_id, outcome)
        if self._span is not None:
            self._span.note(outcome=outcome)
            self._span.end("" if outcome == "closed" else kind or outcome)


class Watch:
    """What watches one trunk. Of what is not asked for nothing runs, and nothing is counted."""

    def __init__(self, listen: str = "", *, insecure: bool = False, name_clients: bool = False) -> None:
        """`listen` is HOST:PORT for metrics, "" for none; `name_clients` lets them tell which client did how much.

        Raises ConfigError where `listen` cannot be an address, or clients are to be named without one.
        """
        if name_clients and not listen:
            raise ConfigError("client-metrics is given without metrics, HOST:PORT, where they would be served")
        self._address = None
        self.metrics: TrunkMetrics | None = None
        if listen:
            self._address = metrics_address("metrics", listen, insecure=insecure, allowed_by="--insecure-metrics")
            self.metrics = TrunkMetrics(name_clients=name_clients)
        self._tracer = traces.tracer("trunkline-trunk")
        self._exporter: Exporter | None = None
        self._parts: Parts | None = None

    @property
    def address(self) -> str:
        """HOST:PORT of the metrics; empty where none are served."""
        return "" if self._exporter is None else self._exporter.address

    def begin(self) -> None:
        """To be called on the trunk's event loop, before the model is loaded. Raises ListenError."""
        self._loop = asyncio.get_running_loop()
        if self._address is None or self.metrics is None:
            return
        host, port = self._address
        self._exporter = Exporter(
            host, port, self.metrics.registry, healthy=self._healthy, ready=self._ready, what="the trunk's metrics"
        )
        if not is_loopback(host):
            logger.warning("metrics at %s have neither TLS nor a login: who reaches the port reads them", self.address)
        logger.info("metrics at http://%s/metrics", self.address)

    def serving(self, parts: Parts) -> None:
        """The trunk is about to take sessions."""
        self._parts = parts
        if self.metrics is not None:
            self.metrics.attach(lambda: self._asked(parts.facts))

    def end(self) -> None:
        """Give the port back and send the spans that are left; safe to call twice."""
        if self._exporter is not None:
            exporter, self._exporter = self._exporter, None
            exporter.close()
        if self._tracer is not None:
            self._tracer.close()

    def passed(self, seen: PassSeen) -> None:
        """What the scheduler reports of each pass."""
        if self.metrics is not None:
            self.metrics.passed(seen)

    def committed(self) -> None:
        if self.metrics is not None:
            self.metrics.committed()

    @contextmanager
    def session(self, metadata: Any) -> Iterator[SessionSeen]:
        """Watch the block, which serves one stream; `metadata` is what its call came with."""
        given = (value for key, value in metadata or () if key == traces.HEADER and isinstance(value, str))
        seen = SessionSeen(self, next(given, "")[:_HEADER_LETTERS])
        try:
            yield seen
        except BaseException as error:
            seen.ended(error)
            raise
        seen.ended(None)

    def span(self, name: str, parent: str, about: dict[str, str | int]) -> traces.Span | None:
        return None if self._tracer is None else self._tracer.begin(name, parent, **about)

    def _asked(self, look: Callable[[], T]) -> T:
        """What `look` answers on the event loop. Raises TimeoutError where that is stuck."""

        async def looked() -> T:
            return look()

        return asyncio.run_coroutine_threadsafe(looked(), self._loop).result(ANSWER_S)

    def _healthy(self) -> str:
        try:
            return self._asked(lambda: "")
        except TimeoutError:
            return f"the trunk's event loop has not answered for {ANSWER_S:g} s"

    def _ready(self) -> str:
        parts = self._parts
        if parts is None:
            return "the model is being loaded"
        return self._healthy() or ("" if parts.table.admitting else "it takes no new sessions")


def _named(key: RoundKey | None) -> dict[str, str | int]:
    return {} if key is None else {"run": key.run, "round": key.round, "attempt": key.attempt}


def _kind(error: BaseException | None) -> str:
    """A class of ours by its name, so that there are never more labels than classes."""
    if error is None:
        return ""
    return type(error).__name__ if isinstance(error, TrunklineError) else "internal"


def _version() -> str:
    try:
        return version("trunkline")
    except PackageNotFoundError:  # run from a checkout that nobody installed
        return "unknown"
