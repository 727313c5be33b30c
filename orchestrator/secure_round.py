"""One round under secure aggregation, top to bottom; and the judgement of the last adapter, a sum of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from aggregation import tally
from aggregation.encoding import encoding
from aggregation.ring import RingVector
from aggregation.rules import trainable_factor
from aggregation.terms import DEFAULT_MIN_MEMBERS
from contract.errors import AgreementError, BudgetError, ConfigError, QuorumError, SecureSumError, UpdateError
from contract.records import RoundKey
from orchestrator import secure_stages as stages
from orchestrator.collection import report_progress
from orchestrator.commitment import Mean, average_trunk, commit
from orchestrator.desk import Desk, Version
from orchestrator.metrics import judgement, judges
from orchestrator.secure_run import SecureRun, UnpaidError
from orchestrator.secure_session import SecureSession
from orchestrator.stopwatch import Stopwatch
from orchestrator.telling import told_losses

log = logging.getLogger("trunkline.orchestrator")

Aborts = (QuorumError, SecureSumError, AgreementError, UpdateError)
"""What ends an attempt and not the run: another one begins with fresh secrets."""


class _RefusedError(SecureSumError):
    """Too few sites take part because of what they insist on: with the same clients they would refuse again."""


def play_secure_round(run: SecureRun, before: Version) -> Version:
    """Play the round that follows `before`, if need be several times, and return the version that it commits.

    An attempt that loses too many clients is aborted, with its reason in SQL and nothing revealed; one whose sum cannot
    be used is aborted too. The next one starts afresh. Raises RoundError after too many of them, QuorumError where too
    few clients are there to start one.
    """
    desk, number = run.desk, before.number + 1
    while True:
        values, asked = _values(run, before, number), desk.exchange.asked
        session = run.take_ready() or run.draw(number, values, first=number == 1)
        attempt = desk.store.open_round(desk.run_id, number, session.cohort, session.terms.threshold)
        key = RoundKey(desk.run_id, number, attempt)
        desk.audience.opened(key, len(session.cohort))
        _say_floor(session)
        try:
            after = _play(run, before, key, session, asked)
        except Aborts as error:
            reason = "; ".join(part for part in (str(error), session.told_failures()) if part)
            desk.store.abort_round(desk.run_id, number, attempt, reason)
            desk.audience.aborted(key)
            if isinstance(error, _RefusedError):
                run.wait_for_others(number, reason)
            elif not (isinstance(error, UnpaidError) and run.may_draw_again()):
                run.count_abort(number, reason)
            continue
        run.committed()
        return after


def _play(run: SecureRun, before: Version, key: RoundKey, session: SecureSession, asked: int) -> Version:
    desk, watch = run.desk, Stopwatch(run.desk.clock, run.desk.audience)
    with watch.lap("cohort"):
        if not session.shared:
            _set_up(desk, session)
        run.charge(key, session)
        following = _following(run, before, key.round + 1)
    with watch.lap("training"):
        heads = run.spending.heads(session.shared) if run.spending else {}
        seen = stages.train(desk, before, key, session, following, heads)
        run.close_charges(key, session)
    survivors = session.survivors
    _require_quorum(desk, session, len(survivors))

    with watch.lap("confirming"):
        report_progress(desk, key, "confirming", seen, len(survivors))
        confirmed = stages.confirm(desk, session, following)
    with watch.lap("unmasking"):
        report_progress(desk, key, "unmasking", seen, len(survivors))
        total = stages.unmask(desk, session, confirmed)
        update_d, weight = _decoded(desk, session, total[: -tally.SIZE])
        told = losses(tally.decode(total[-tally.SIZE :]))

    with watch.lap("averaging"):
        report_progress(desk, key, "averaging", seen, len(survivors))
        mean = Mean(trainable_factor(desk.config.aggregation, key.round), update_d, weight, survivors)
        trunk_sha256 = average_trunk(desk, key, before, mean)
    if "eval_loss" in told:
        desk.store.record_metrics(desk.run_id, before.number, None, judgement(told))
    exchanges = desk.exchange.asked - asked
    after = commit(desk, key, before, mean, trunk_sha256, told | {"exchanges": exchanges}, watch)
    if following is not None and len(following.shared) >= _needed(desk, following):
        run.ready = following
    _tell(desk, key.round, session, told, watch)
    return after


def _decoded(desk: Desk, session: SecureSession, total: RingVector) -> tuple[npt.NDArray[np.float64], int]:
    """The mean update and the sum of weights. Raises UpdateError for a sum that honest clients cannot give."""
    encoded = encoding(desk.config, len(session.cohort), session.terms.threshold)
    update_d, weight = encoded.decode(total)
    if desk.config.dp != "off" and weight != len(session.survivors):
        raise UpdateError(f"the weights of {len(session.survivors)} clients sum to {weight}; under dp each weighs 1")
    return update_d, weight


def end_secure_run(run: SecureRun, last: Version) -> None:
    """Have the last version judged, where versions are, and send each client what its ledger's chain came to."""
    if judges(run.desk.config):
        with Stopwatch(run.desk.clock, run.desk.audience).lap("judging"):
            judge_last_secure(run, last)
    _tell_heads(run)


def _tell_heads(run: SecureRun) -> None:
    """Send every client that was charged the head of its chain as the run leaves it."""
    spending = run.spending
    if spending is None:
        return
    present = set(run.desk.exchange.connected()) - run.desk.exchange.busy()
    heads = spending.heads(present & spending.units.keys())
    for node_id, failure in stages.tell_heads(run.desk, heads).items():
        log.warning("client %s did not keep the last head of its ledger's chain: %s", node_id, failure)


def judge_last_secure(run: SecureRun, last: Version) -> None:
    """Have clients judge the last version, told as totals only; that too few of them do fails nothing."""
    desk, session = run.desk, run.take_ready()
    try:
        if session is None or session.terms.size != tally.SIZE:  # the run stopped early: a round was set up instead
            session = run.draw_from(desk.exchange.connected(), last.number + 1, 0)
            _set_up(desk, session)
        stages.judge(desk, last, session)
        total = stages.unmask(desk, session, stages.confirm(desk, session, None))
    except Aborts as error:
        log.warning("the last adapter's held-out loss is not known: %s", error)
        return
    told = judgement(losses(tally.decode(total)))
    desk.store.record_metrics(desk.run_id, last.number, None, told)
    held_out, count = told.get("eval_loss", float("nan")), len(session.survivors)
    log.info("last adapter: held-out loss %.4f over %d of %d clients", held_out, count, len(session.cohort))


def losses(totals: Mapping[str, int]) -> dict[str, float]:
    """The means and counts over all clients that a tally's totals give; nothing where nobody told any."""
    told: dict[str, float] = {}
    if totals["eval_tokens"]:
        told["eval_tokens"] = totals["eval_tokens"]
        told["eval_loss"] = totals["eval_nats"] / tally.NATS_STEPS / totals["eval_tokens"]
    if totals["train_tokens"]:
        told |= {"trained_tokens": totals["train_tokens"], "steps": totals["steps"]}
        told["train_loss"] = totals["train_nats"] / tally.NATS_STEPS / totals["train_tokens"]
    return told


def _values(run: SecureRun, version: Version, number: int) -> int:
    """How many adapter values round `number` trains; 0 for the judgement that follows the last round."""
    if number > run.desk.config.num_rounds:
        return 0
    factor = trainable_factor(run.desk.config.aggregation, number)
    return int(np.count_nonzero(version.client.trained(factor)))


def _needed(desk: Desk, session: SecureSession) -> int:
    """How many clients a sum must be over to be of use: a judgement is, whatever the quorum."""
    return max(desk.config.quorum, session.terms.threshold) if session.values else session.terms.threshold


def _set_up(desk: Desk, session: SecureSession) -> None:
    """Raises SecureSumError where too few will take part: nobody trains for a sum that cannot be used."""
    needed = _needed(desk, session)
    try:
        stages.set_up(desk, session)
        if len(session.shared) < needed:
            quorum = f", quorum {needed}" if needed > session.terms.threshold else ""
            raise SecureSumError(
                f"only {len(session.shared)} shared secrets; threshold {session.terms.threshold}{quorum}"
            )
    except SecureSumError as error:
        never = len(session.cohort) - len(session.refusers) < needed
        raise (_RefusedError(str(error)) if never else error) from error


def _following(run: SecureRun, before: Version, number: int) -> SecureSession | None:
    """The next session, over the clients that are there now; None where none is needed, or too few are there."""
    config = run.desk.config
    if number > config.num_rounds and not judges(config):
        return None
    try:
        return run.draw_from(run.desk.exchange.connected(), number, _values(run, before, number))
    except (QuorumError, SecureSumError, ConfigError, BudgetError) as error:
        log.warning("round %d is not set up ahead: %s", number, error)
        return None


def _require_quorum(desk: Desk, session: SecureSession, survivors: int) -> None:
    if survivors < _needed(desk, session):
        raise QuorumError(
            f"{survivors} of {len(session.cohort)} clients' masked updates came; quorum is {desk.config.quorum}, the "
            f"secure sum's threshold {session.terms.threshold}"
        )


def _say_floor(session: SecureSession) -> None:
    members = len(session.cohort)
    if members < DEFAULT_MIN_MEMBERS:
        log.warning(
            "round %d: a secure sum over only %d clients (%d needed): a site's own default is at least %d; the "
            "fewer there are, the more a sum tells of each",
            session.terms.round,
            members,
            session.terms.threshold,
            DEFAULT_MIN_MEMBERS,
        )


def _tell(desk: Desk, number: int, session: SecureSession, told: Mapping[str, float], watch: Stopwatch) -> None:
    over = f"{len(session.survivors)} of {len(session.cohort)} clients"
    parts = [f"round {number}/{desk.config.num_rounds}: a secure sum over {over}"]
    parts += told_losses(told)
    parts.append(f"{told.get('trained_tokens', 0):.0f} tokens in {watch.total_s:.1f} s")
    log.info(", ".join(parts))
