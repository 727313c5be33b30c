"""Faults that are planted in the program, each of which the simulation must find: else it proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from sqlalchemy import text

from aggregation.secure_client import SecureClient, Stage
from contract.records import RoundKey
from orchestrator import secure_round
from orchestrator.commitment import Mean
from orchestrator.deadline import ProgressDeadline
from orchestrator.desk import Desk, Version
from orchestrator.secure_run import SecureRun
from orchestrator.secure_session import SecureSession
from storage.store import Store

Plant = Callable[[ExitStack], None]


def _patch(stack: ExitStack, target: Any, name: str, new: object) -> None:
    stack.enter_context(mock.patch.object(target, name, new))


def _nothing(*arguments: object, **more: object) -> None:
    """Does nothing, whatever it is asked."""


def unfenced(stack: ExitStack) -> None:
    """A driver that was taken over from may go on writing."""
    stack.enter_context(mock.patch("storage.leases.require_driver", _nothing))


def taken_over_alive(stack: ExitStack) -> None:
    """A run is taken over while its driver is heard."""
    stack.enter_context(mock.patch("storage.leases.require_resumable", _nothing))


def refunded(stack: ExitStack) -> None:
    """Who did not answer in time gets its charge back, though its vector may have left it."""

    def close_charges(run: SecureRun, key: RoundKey, session: SecureSession) -> None:
        if run.spending is not None:
            gone = set(session.failures) | session.undelivered
            run.spending.give_back(key, sorted(gone & set(session.shared)))

    _patch(stack, SecureRun, "close_charges", close_charges)


def charged_late(stack: ExitStack) -> None:
    """A round is charged once its answers are there."""
    charge = SecureRun.charge
    _patch(stack, SecureRun, "charge", _nothing)
    _patch(stack, SecureRun, "close_charges", lambda run, key, session: charge(run, key, session))


def site_pays_nothing(stack: ExitStack) -> None:
    """A site keeps no ledger of its own."""
    for name in ("reserve", "committed"):
        stack.enter_context(mock.patch(f"clients.spending.SiteSpending.{name}", _nothing))


def overspent(stack: ExitStack) -> None:
    """Nobody asks whether a budget has room."""
    stack.enter_context(mock.patch("orchestrator.spending.admit_standing", _nothing))
    stack.enter_context(mock.patch("clients.spending.admit_standing", _nothing))


def masks_again(stack: ExitStack) -> None:
    """A site that is asked twice trains twice, under the same session's masks."""
    require_stage = SecureClient._require_stage

    def lenient(client: SecureClient, stage: Stage, act: str) -> None:
        if (client.stage, stage) != (Stage.UPLOADED, Stage.SHARED):
            require_stage(client, stage, act)

    _patch(stack, SecureClient, "_require_stage", lenient)
    _patch(stack, SecureClient, "require_turn", _nothing)


def other_survivors(stack: ExitStack) -> None:
    """The trunk averages over all survivors but one, and nobody compares the weights."""

    def average(desk: Desk, key: RoundKey, before: Version, mean: Mean) -> str:
        if desk.config.trunk_adapter == "frozen":
            return before.trunk_sha256
        return desk.trunk.commit_round(key, before.trunk_sha256, mean.survivors[1:]).sha256

    _patch(stack, secure_round, "average_trunk", average)
    stack.enter_context(mock.patch("orchestrator.round.average_trunk", average))


def commits_again(stack: ExitStack) -> None:
    """Who resumes a run plays its last round once more, and commits it a second time."""
    resume = Store.resume_run

    def resume_run(store: Store, run_id: str, flower_run_id: str) -> object:
        with store._engine.begin() as connection:
            last = "(SELECT max(number) FROM adapter_versions WHERE run_id = :run)"
            for change in ("UPDATE rounds SET status = 'aborted', reason = 'x'", "DELETE FROM adapter_versions"):
                where = f"WHERE run_id = :run AND number > 0 AND number = {last}"
                connection.execute(text(f"{change} {where}"), {"run": run_id})
        return resume(store, run_id, flower_run_id)

    _patch(stack, Store, "resume_run", resume_run)


def forgets_the_last(stack: ExitStack) -> None:
    """A resumed run goes on from the version before the last one."""

    def newest(desk: Desk) -> Version | None:
        found = newest_version(desk)
        rows = desk.store.adapter_versions(desk.run_id)
        if found is None or len(rows) < 2:
            return found
        before = rows[-2]
        return replace(
            found, number=before.number, client_sha256=before.client_sha256, trunk_sha256=before.trunk_sha256
        )

    from orchestrator.resumption import newest_version

    stack.enter_context(mock.patch("orchestrator.run.newest_version", newest))


def waits_for_ever(stack: ExitStack) -> None:
    """An exchange waits until everybody has answered."""
    _patch(stack, ProgressDeadline, "passed", property(lambda deadline: False))


def wrong_mean(stack: ExitStack) -> None:
    """The clients' half moves by the mean over one survivor too many."""

    def decoded(desk: Desk, session: SecureSession, total: Any) -> Any:
        update_d, weight = right(desk, session, total)
        return update_d * len(session.survivors) / (len(session.survivors) + 1), weight

    right = secure_round._decoded
    _patch(stack, secure_round, "_decoded", decoded)


MUTANTS: Mapping[str, Plant] = {
    plant.__name__: plant
    for plant in (
        *(unfenced, taken_over_alive, refunded, charged_late, site_pays_nothing, overspent),
        *(masks_again, other_survivors, commits_again, forgets_the_last, waits_for_ever, wrong_mean),
    )
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The program has that fault while the block runs."""
    with ExitStack() as stack:
        MUTANTS[name](stack)
        yield
