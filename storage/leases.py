"""Who drives a run: one Flower run at a time, for as long as it renews its lease.

A lease that ran out does not end by itself: it only lets another Flower run take the run over. From then on what the
former one still writes is refused, however late it comes.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from contract.errors import LeaseError, StorageError
from storage import schema
from storage.records import RunStatus

LEASE_S = 20.0
"""How long a run stays its driver's after the driver was last heard."""


def begin(run: schema.Run, flower_run_id: str, now: datetime) -> None:
    """Make `flower_run_id` the run's driver."""
    run.flower_run_id = flower_run_id
    renew(run, now)


def renew(run: schema.Run, now: datetime) -> None:
    run.lease_until = now + timedelta(seconds=LEASE_S)


def require_driver(run: schema.Run, flower_run_id: str | None) -> None:
    """Raise LeaseError where the run was taken over from `flower_run_id`; None stands for who never drove it."""
    if flower_run_id is not None and run.flower_run_id != flower_run_id:
        raise LeaseError(
            f"run {run.run_id} was resumed as Flower run {run.flower_run_id}: Flower run {flower_run_id} drives it no "
            "more, and what it still had to write is not taken"
        )


def require_resumable(run_id: str, status: RunStatus, lease_until: datetime | None, now: datetime) -> None:
    """Raise LeaseError while somebody may still drive the run, StorageError where it has nothing left to do."""
    if status == "finished":
        raise StorageError(f"run {run_id} has finished: there is nothing to resume")
    if status == "running" and lease_until is not None and now < lease_until:
        left_s = (lease_until - now).total_seconds()
        raise LeaseError(
            f"run {run_id} is being driven: its orchestrator was heard {max(0.0, LEASE_S - left_s):.0f} s ago; stop it "
            f"first, or, if it is dead, wait {left_s:.0f} s"
        )


def silent_since(status: RunStatus, lease_until: datetime | None, now: datetime) -> datetime | None:
    """When the driver of a run that goes on was last heard, where that is so long ago that it may be dead."""
    if status != "running" or lease_until is None:
        return None
    heard = lease_until - timedelta(seconds=LEASE_S)
    return heard if (now - heard).total_seconds() > 2 * LEASE_S else None
