"""What every listing tells of a run and of an attempt at a round: the rows of `runs list` and of `rounds list`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.metrics import best_version, judged_losses
from orchestrator.protection import told_protection
from storage.reader import Reader
from storage.records import MetricRow, ParticipationRow, RoundRow, RunRow


def run_data(reader: Reader, run: RunRow) -> dict[str, Any]:
    """A run's row: how it stands and why, its rounds and losses."""
    losses = judged_losses(reader.metrics(run.run_id, over_clients=True))
    return {
        "run_id": run.run_id,
        "status": run.status,
        "reason": run.reason,
        "mode": run.mode,
        "rounds": f"{run.committed_rounds}/{run.config.get('num-rounds', '?')}",
        "held_out_loss": losses.get(run.committed_rounds),
        "best_round": best_version(losses),
        "secagg": told_protection(reader, run),
        "created_at": run.created_at.replace(microsecond=0),
    }


def rounds_data(
    attempts: Iterable[RoundRow], taking_part: Iterable[ParticipationRow], metrics: Iterable[MetricRow]
) -> list[dict[str, Any]]:
    """A row for each of a run's `attempts`; `metrics` are the run's values over all clients.

    The held-out loss is that of the adapter which the round committed.
    """
    over_clients = list(metrics)
    cohorts: dict[tuple[int, int], list[ParticipationRow]] = {}
    for one in taking_part:
        cohorts.setdefault((one.number, one.attempt), []).append(one)
    losses = judged_losses(over_clients)
    told = {(one.number, one.attempt): one.value for one in over_clients if one.name == "train_loss"}
    return [_round_data(one, cohorts.get((one.number, one.attempt), []), told, losses) for one in attempts]


def _round_data(
    attempt: RoundRow,
    taking_part: Sequence[ParticipationRow],
    train_losses: Mapping[tuple[int, int], float],
    held_out_losses: Mapping[int, float],
) -> dict[str, Any]:
    training_s = attempt.phase_seconds.get("training")
    return {
        "round": attempt.number,
        "attempt": attempt.attempt,
        "status": attempt.status,
        "phase": attempt.phase,
        "clients": f"{sum(row.status == 'trained' for row in taking_part)}/{len(taking_part)}",
        "threshold": attempt.threshold,
        "train_loss": train_losses.get((attempt.number, attempt.attempt)),
        "held_out_loss": held_out_losses.get(attempt.number) if attempt.status == "committed" else None,
        "tokens": attempt.trained_tokens or attempt.tokens,
        "tokens_per_s": attempt.trained_tokens / training_s if training_s else None,
        "wire_mb": (attempt.received_bytes + attempt.sent_bytes) / 1e6,
        "seconds": attempt.seconds,
        "phase_seconds": attempt.phase_seconds,
        "reason": attempt.reason,
        "participations": taking_part,
    }
