"""Who watches a run, by the environment of the process: its metrics, its traces, its trackers, the names in its log."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from contract import logs, traces
from contract.addresses import is_loopback
from contract.config import RunConfig
from contract.errors import ListenError
from contract.records import RoundKey
from orchestrator.audience import Audience, Listener, told
from orchestrator.lease import Lease
from orchestrator.replicas import ConnectedTrunk
from orchestrator.run_traces import RunTraces
from storage.ledger import Ledger
from storage.store import Store

log = logging.getLogger("trunkline.orchestrator")

METRICS, INSECURE_METRICS = "TRUNKLINE_METRICS", "TRUNKLINE_INSECURE_METRICS"
CLIENT_METRICS = "TRUNKLINE_CLIENT_METRICS"
MLFLOW = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True, slots=True)
class Watched:
    """What there is of a run to watch. `directory` is its own, for files."""

    run_id: str
    config: RunConfig
    lease: Lease
    trunk: ConnectedTrunk
    store: Store
    ledger: Ledger | None
    directory: Path


class _Names(Listener):
    """Names the present attempt in every line of the log."""

    what = "names in the log"

    def opened(self, key: RoundKey, clients: int) -> None:
        logs.note(round=key.round, attempt=key.attempt)


def metrics_place() -> tuple[str, int] | None:
    """Where TRUNKLINE_METRICS wants metrics served; None for nowhere. Raises ConfigError for what is no such place."""
    if not (asked := os.environ.get(METRICS)):
        return None
    from contract.scrape import metrics_address

    insecure = os.environ.get(INSECURE_METRICS) == "1"
    return metrics_address(METRICS, asked, insecure=insecure, allowed_by=f"{INSECURE_METRICS}=1")


@contextmanager
def watching(run: Watched) -> Iterator[tuple[Audience, Callable[[], None]]]:
    """The run's audience, and what is to be called whenever its thread moves; told of the end when the block ends."""
    with ExitStack() as held:
        audience = Audience([_Names()])
        held.push(lambda kind, error, trace: audience.tell(lambda one: one.ended(error is None)))
        moves = _add_metrics(audience, run, held)
        if (tracer := traces.tracer("trunkline-orchestrator")) is not None:
            rounds = RunTraces(tracer, run.run_id)
            audience.traceparent = lambda: rounds.traceparent
            audience.join(rounds)
        for what, tracker in (("TensorBoard", _tensorboard), ("MLflow", _mlflow)):
            try:
                if (listener := tracker(run)) is not None:
                    audience.join(listener)
            except Exception as error:  # noqa: BLE001 (told; a run is worth more than its pictures)
                log.warning("%s: off for this run: %s", what, told(error))
        yield audience, moves


def _add_metrics(audience: Audience, run: Watched, held: ExitStack) -> Callable[[], None]:
    if (place := metrics_place()) is None:
        return lambda: None
    from contract.scrape import Exporter
    from orchestrator.run_metrics import CALL_S, Health, RunMetrics

    named = os.environ.get(CLIENT_METRICS) == "1"
    metrics = RunMetrics(run.run_id, run.config.num_rounds, run.lease.age_s, name_clients=named)
    stuck_s = CALL_S + run.config.trunk_wait_s
    health = Health(metrics.still_s, run.lease.fault, run.trunk.describe, stuck_s)
    try:
        exporter = Exporter(
            *place, metrics.registry, healthy=health.healthy, ready=health.ready, what="the run's metrics"
        )
    except ListenError as error:
        log.warning("%s; the run goes on without them", error)
        return lambda: None
    held.callback(exporter.close)
    if not is_loopback(place[0]):
        log.warning("metrics at %s have neither TLS nor a login: who reaches the port reads them", exporter.address)
    log.info("metrics at http://%s/metrics", exporter.address)
    audience.join(metrics)
    return metrics.moves


def _tensorboard(run: Watched) -> Listener:
    from orchestrator.event_files import EventFile
    from orchestrator.scalars import RunScalars

    return EventFile(run.directory / "tensorboard", RunScalars(run.run_id, run.config, run.store, run.ledger))


def _mlflow(run: Watched) -> Listener | None:
    if not os.environ.get(MLFLOW):
        return None
    from orchestrator.mlflow_run import MlflowRun
    from orchestrator.scalars import RunScalars

    return MlflowRun(run.run_id, run.config, RunScalars(run.run_id, run.config, run.store, run.ledger))
