"""One round, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from aggregation.protocol import PlainSumServer
from aggregation.ring import plan
from aggregation.rules import trainable_factor
from contract.errors import AgreementError, QuorumError
from contract.records import RoundKey
from orchestrator.cohort import draw_cohort, wait_for_clients
from orchestrator.collection import (
    Collected,
    collect_judgements,
    collect_updates,
    record_judgements,
    report_progress,
)
from orchestrator.desk import Desk, Version
from orchestrator.exchange import Clock
from orchestrator.messages import RoundOrder
from orchestrator.metrics import over_clients
from storage.records import RoundCommit

log = logging.getLogger("trunkline.orchestrator")

REASONS_SHOWN = 3
OUTSIDE_ROUNDS = 0
"""The attempt that a final judgement names: it is no attempt at a round."""


def play_round(desk: Desk, before: Version) -> Version:
    """Play the round that follows `before` and return the version that it commits.

    Raises QuorumError when too few updates can be used, AgreementError when the trunk averaged with other weights, and
    what the trunk, SQL or the artifacts raise. The round is then left open in SQL, and nothing of it is committed.
    """
    config, number, watch = desk.config, before.number + 1, _Stopwatch(desk.clock)
    asked = desk.exchange.asked
    with watch.lap("cohort"):
        connected = wait_for_clients(desk.exchange, config, desk.clock, first=number == 1)
        cohort = draw_cohort(connected, desk.exchange.busy(), config, number)
        fixed_point = plan(len(cohort), config.max_trained_tokens(), config.update_clip)
    attempt = desk.store.open_round(desk.run_id, number, cohort)
    key = RoundKey(desk.run_id, number, attempt)

    with watch.lap("training"):
        order = _order(desk, before, key, cohort)
        size = int(np.count_nonzero(before.client.trained(order.factor))) + 1
        summing = PlainSumServer(size, cohort, fixed_point.bits)
        got = collect_updates(desk, order, cohort, before.client.vector_d, summing, size * fixed_point.bits // 8)
    survivors = sorted(got.metrics)
    _require_quorum(desk, number, cohort, got)

    with watch.lap("averaging"):
        report_progress(desk, key, "averaging", got.seen, len(got.metrics))
        mean, weight = fixed_point.decode(summing.finish(survivors))
        client = before.client.moved(order.factor, mean)
        average = desk.trunk.commit_round(key, before.trunk_sha256, survivors)
        if average.trained_tokens != weight:
            raise AgreementError(
                f"round {number}: the trunk averaged over {average.trained_tokens} trained tokens, the clients' "
                f"updates over {weight}; the two halves of the adapter would not belong together"
            )

    with watch.lap("storing"):
        client_sha256 = desk.artifacts.put(client.to_bytes())
        trunk_sha256 = desk.artifacts.put(desk.trunk.get_adapter(average.sha256))
        record_judgements(desk, before.number, got)
    desk.store.commit_round(
        RoundCommit(
            run_id=desk.run_id,
            number=number,
            attempt=attempt,
            client_sha256=client_sha256,
            trunk_sha256=trunk_sha256,
            trained_tokens=weight,
            survivors=survivors,
            seconds=sum(watch.seconds.values()),
            phase_seconds=watch.seconds,
            metrics=over_clients(got.metrics.values()) | {"exchanges": desk.exchange.asked - asked},
        )
    )
    _tell(desk, number, cohort, got, watch)
    return Version(number, client, client_sha256, trunk_sha256)


def judge_last(desk: Desk, last: Version) -> None:
    """Have the connected clients judge the last version, which no later round will; too few of them fail nothing."""
    cohort = draw_cohort(desk.exchange.connected(), desk.exchange.busy(), desk.config, last.number + 1)
    key = RoundKey(desk.run_id, last.number + 1, OUTSIDE_ROUNDS)
    got = collect_judgements(desk, _order(desk, last, key, cohort, final=True), cohort, last)
    if not got.metrics:
        log.warning("no client judged the last adapter: its held-out loss is not known")
        return
    record_judgements(desk, last.number, got)
    held_out = over_clients(got.metrics.values()).get("eval_loss", float("nan"))
    log.info("last adapter: held-out loss %.4f over %d of %d clients", held_out, len(got.metrics), len(cohort))


def _order(desk: Desk, version: Version, key: RoundKey, cohort: Sequence[str], final: bool = False) -> RoundOrder:
    return RoundOrder(
        run=key.run,
        round=key.round,
        attempt=key.attempt,
        client_sha256=version.client_sha256,
        trunk_sha256=version.trunk_sha256,
        factor=trainable_factor(desk.config.aggregation, key.round),
        clients=len(cohort),
        final=final,
    )


def _require_quorum(desk: Desk, number: int, cohort: Sequence[str], got: Collected) -> None:
    if len(got.metrics) >= desk.config.quorum:
        return
    reasons = [f"client {node_id}: {reason}" for node_id, reason in list(got.failures.items())[:REASONS_SHOWN]]
    more = len(got.failures) - len(reasons)
    raise QuorumError(
        f"round {number}: {len(got.metrics)} of {len(cohort)} clients' updates can be used, quorum is "
        f"{desk.config.quorum}; {'; '.join(reasons)}" + (f"; and {more} more" if more > 0 else "")
    )


def _tell(desk: Desk, number: int, cohort: Sequence[str], got: Collected, watch: _Stopwatch) -> None:
    told = over_clients(got.metrics.values())
    parts = [f"round {number}/{desk.config.num_rounds}: {len(got.metrics)}/{len(cohort)} clients"]
    parts += [f"{label} {told[name]:.4f}" for name, label in _LOSS_LABELS.items() if name in told]
    parts.append(f"{told.get('trained_tokens', 0):.0f} tokens in {sum(watch.seconds.values()):.1f} s")
    log.info(", ".join(parts))


_LOSS_LABELS = {"train_loss": "training loss", "eval_loss": "held-out loss before it"}


@dataclass(slots=True)
class _Stopwatch:
    """Seconds by phase."""

    clock: Clock
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def lap(self, phase: str) -> Iterator[None]:
        started = self.clock.monotonic()
        yield
        self.seconds[phase] = self.clock.monotonic() - started
