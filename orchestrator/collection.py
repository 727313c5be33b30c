"""What one exchange with the cohort brings: updates into the running sum, judgements, and why the rest is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from flwr.app import Message

from aggregation.protocol import ServerHalf
from contract.errors import UpdateError
from contract.records import NOTHING_SEEN, RoundKey, RoundProgress
from orchestrator.deadline import ProgressDeadline
from orchestrator.desk import Desk, Version
from orchestrator.exchange import Answer
from orchestrator.messages import RoundOrder, adapter_record, order_message, read_metrics, read_update
from orchestrator.metrics import judgement, over_clients
from storage.records import Outcome

log = logging.getLogger("trunkline.orchestrator")


@dataclass(slots=True)
class Collected:
    """Each usable client's metrics, why the others' answers are not usable, and the trunk's counters at the end."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seen: RoundProgress = NOTHING_SEEN


def collect_updates(
    desk: Desk,
    order: RoundOrder,
    cohort: Sequence[str],
    adapter_d: npt.NDArray[np.float32],
    summing: ServerHalf,
    due_bytes: int,
) -> Collected:
    """Ask `cohort` to train and add each update to `summing` as it comes, recording in SQL what every client did.

    An update that cannot be used is recorded with its reason and leaves the sum as it was.
    """
    key = RoundKey(order.run, order.round, order.attempt)
    got = Collected()

    def record(node_id: str, status: Outcome, reason: str | None = None) -> None:
        metrics = got.metrics.get(node_id)
        desk.store.record_participation(key.run, key.round, key.attempt, node_id, status, reason, metrics)
        desk.audience.tell(lambda one: one.participated(key, node_id, status, reason))
        if reason is not None:
            got.failures[node_id] = reason
            log.warning("round %d: client %s %s: %s", key.round, node_id, status, reason)

    def report(seen: RoundProgress, replies: int) -> None:
        report_progress(desk, key, "training", seen, replies)

    deadline = _deadline(desk, key, report)
    for answer in _answers(desk, order, cohort, adapter_d, deadline):
        if answer.content is None:
            record(answer.node_id, "failed", answer.failure)
            continue
        try:
            summing.accept(answer.node_id, read_update(answer.content, due_bytes))
        except UpdateError as error:
            record(answer.node_id, "refused", str(error))
            continue
        got.metrics[answer.node_id] = read_metrics(answer.content, answer.node_id)
        record(answer.node_id, "trained")
    for node_id in cohort:
        if node_id not in got.metrics and node_id not in got.failures:
            record(node_id, "late", f"no answer, and no progress for {desk.config.round_timeout_s:g} s")
    deadline.last_look()
    got.seen = deadline.seen
    return got


def collect_judgements(desk: Desk, order: RoundOrder, cohort: Sequence[str], version: Version) -> Collected:
    """Ask `cohort` what `version` loses on their held-out text. Who does not answer is left out."""
    key = RoundKey(order.run, order.round, order.attempt)
    got = Collected()
    deadline = _deadline(desk, key, lambda seen, replies: None)
    for answer in _answers(desk, order, cohort, version.client.vector_d, deadline):
        if answer.content is None:
            got.failures[answer.node_id] = answer.failure or ""
            log.warning("client %s did not judge the last adapter: %s", answer.node_id, answer.failure)
        else:
            got.metrics[answer.node_id] = read_metrics(answer.content, answer.node_id)
    return got


def record_judgements(desk: Desk, number: int, got: Collected) -> None:
    """Write what the clients lost with version `number`, each and all together."""
    told = {node_id: judgement(metrics) for node_id, metrics in got.metrics.items()}
    for node_id, values in told.items():
        desk.store.record_metrics(desk.run_id, number, node_id, values)
    desk.store.record_metrics(desk.run_id, number, None, judgement(over_clients(told.values())))


def report_progress(desk: Desk, key: RoundKey, phase: str, seen: RoundProgress, replies: int) -> None:
    """Write where an open round stands, for who watches it."""
    desk.store.record_progress(
        key.run,
        key.round,
        key.attempt,
        phase=phase,
        replies=replies,
        steps=seen.steps,
        tokens=seen.tokens,
        received_bytes=seen.received_bytes,
        sent_bytes=seen.sent_bytes,
    )
    desk.audience.tell(lambda one: one.moved(key, seen, replies))


def _deadline(desk: Desk, key: RoundKey, report: Callable[[RoundProgress, int], None]) -> ProgressDeadline:
    return ProgressDeadline(desk.clock, desk.config.round_timeout_s, lambda: desk.trunk.progress(key), report)


def _answers(
    desk: Desk,
    order: RoundOrder,
    cohort: Sequence[str],
    adapter_d: npt.NDArray[np.float32],
    deadline: ProgressDeadline,
) -> Iterator[Answer]:
    adapter = adapter_record(adapter_d)
    traceparent = desk.audience.traceparent()

    def training(node_id: str) -> Message:
        return order_message(node_id, order, adapter, traceparent=traceparent)

    return desk.exchange.ask(cohort, training, deadline)
