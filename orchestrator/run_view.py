"""What every listing tells of a run and of an attempt at a round: the rows of `runs list` and of `rounds list`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from orchestrator.metrics import best_version, judged_losses
from orchestrator.protection import told_protection
from storage.leases import silent_since
from storage.reader import Reader
from storage.records import MetricRow, ParticipationRow, RoundRow, RunRow


def run_data(reader: Reader, run: RunRow, now: datetime) -> dict[str, Any]:
    """A run's row at `now`: how it stands and why, its rounds and losses.

    `silent_since` is when its orchestrator was last heard, where the run goes on and that is so long ago that it may be
    dead.
    """
    losses = judged_losses(reader.metrics(run.run_id, over_clients=True))
    silent = silent_since(run.status, run.lease_until, now)
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
        "silent_since": silent and silent.replace(microsecond=0),
    }


def told_silence(run_id: str, since: datetime, now: datetime) -> str:
    """What a person is told of a run whose orchestrator was last heard at `since`."""
    silent_s = (now - since).total_seconds()
    return f"its orchestrator was last heard {silent_s:.0f} s ago; if it is dead: trunkline runs resume {run_id}"


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
