"""One round, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from aggregation.protocol import PlainSumServer
from aggregation.ring import plan
from contract.errors import QuorumError
from contract.records import OUTSIDE_ROUNDS, RoundKey
from orchestrator.cohort import draw_cohort, wait_for_clients
from orchestrator.collection import (
    Collected,
    collect_judgements,
    collect_updates,
    record_judgements,
    report_progress,
)
from orchestrator.commitment import Mean, average_trunk, commit
from orchestrator.desk import Desk, Version
from orchestrator.messages import round_order
from orchestrator.metrics import judges, over_clients
from orchestrator.stopwatch import Stopwatch
from orchestrator.telling import told_failures, told_losses

log = logging.getLogger("trunkline.orchestrator")


def play_round(desk: Desk, before: Version) -> Version:
    """Play the round that follows `before` and return the version that it commits.

    Raises QuorumError when too few updates can be used, AgreementError when the trunk averaged with other weights, and
    what the trunk, SQL or the artifacts raise. The round is then left open in SQL, and nothing of it is committed.
    """
    config, number, watch = desk.config, before.number + 1, Stopwatch(desk.clock, desk.audience)
    asked = desk.exchange.asked
    with watch.lap("cohort"):
        connected = wait_for_clients(desk.exchange, config, desk.clock, first=number == 1)
        cohort = draw_cohort(connected, desk.exchange.busy(), config, number)
        fixed_point = plan(len(cohort), config.max_trained_tokens(), config.update_clip)
    attempt = desk.store.open_round(desk.run_id, number, cohort)
    key = RoundKey(desk.run_id, number, attempt)
    desk.audience.opened(key, len(cohort))

    with watch.lap("training"):
        order = round_order(config, before, key, len(cohort))
        size = int(np.count_nonzero(before.client.trained(order.factor))) + 1
        summing = PlainSumServer(size, cohort, fixed_point.bits)
        got = collect_updates(desk, order, cohort, before.client.vector_d, summing, size * fixed_point.bits // 8)
    survivors = sorted(got.metrics)
    _require_quorum(desk, number, cohort, got)

    with watch.lap("averaging"):
        report_progress(desk, key, "averaging", got.seen, len(got.metrics))
        update_d, weight = fixed_point.decode(summing.finish(survivors))
        mean = Mean(order.factor, update_d, weight, survivors)
        trunk_sha256 = average_trunk(desk, key, before, mean)
    record_judgements(desk, before.number, got)
    told = over_clients(got.metrics.values()) | {"exchanges": desk.exchange.asked - asked}
    after = commit(desk, key, before, mean, trunk_sha256, told, watch)
    _tell(desk, number, cohort, got, watch)
    return after


def end_run(desk: Desk, last: Version) -> None:
    """Have the last version judged, where versions are."""
    if judges(desk.config):
        with Stopwatch(desk.clock, desk.audience).lap("judging"):
            judge_last(desk, last)


def judge_last(desk: Desk, last: Version) -> None:
    """Have the connected clients judge the last version, which no later round will; too few of them fail nothing."""
    cohort = draw_cohort(desk.exchange.connected(), desk.exchange.busy(), desk.config, last.number + 1)
    key = RoundKey(desk.run_id, last.number + 1, OUTSIDE_ROUNDS)
    got = collect_judgements(desk, round_order(desk.config, last, key, len(cohort), final=True), cohort, last)
    if not got.metrics:
        log.warning("no client judged the last adapter: its held-out loss is not known")
        return
    record_judgements(desk, last.number, got)
    held_out = over_clients(got.metrics.values()).get("eval_loss", float("nan"))
    log.info("last adapter: held-out loss %.4f over %d of %d clients", held_out, len(got.metrics), len(cohort))


def _require_quorum(desk: Desk, number: int, cohort: Sequence[str], got: Collected) -> None:
    if len(got.metrics) >= desk.config.quorum:
        return
    raise QuorumError(
        f"round {number}: {len(got.metrics)} of {len(cohort)} clients' updates can be used, quorum is "
        f"{desk.config.quorum}; {told_failures(got.failures)}"
    )


def _tell(desk: Desk, number: int, cohort: Sequence[str], got: Collected, watch: Stopwatch) -> None:
    told = over_clients(got.metrics.values())
    parts = [f"round {number}/{desk.config.num_rounds}: {len(got.metrics)}/{len(cohort)} clients"]
    parts += told_losses(told)
    parts.append(f"{told.get('trained_tokens', 0):.0f} tokens in {watch.total_s:.1f} s")
    log.info(", ".join(parts))
