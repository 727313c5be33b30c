"""The exchanges of a secure round. Each serves two sums: the round's own, and the next one's, set up beside it.

Exchange 1: train; advertise keys for the next round. Exchange 2: confirm who is in the sum; share the next round's
secrets. Exchange 3: unmask. A session that nobody set up beside another sets itself up in two exchanges of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping

from flwr.app import Message

from aggregation.ring import RingVector
from contract.errors import SecureSumError, UpdateError
from contract.records import OUTSIDE_ROUNDS, RoundKey, RoundProgress
from contract.secure_records import SecureOrder
from orchestrator.collection import report_progress
from orchestrator.deadline import ProgressDeadline, TrainedDeadline
from orchestrator.desk import Desk, Version
from orchestrator.exchange import Deadline
from orchestrator.messages import RoundOrder, adapter_record, order_message, read_update, round_order
from orchestrator.secure_exchange import SecureAnswer, ask_all, stage_deadline
from orchestrator.secure_session import SecureSession
from storage.records import Outcome

log = logging.getLogger("trunkline.orchestrator")


def set_up(desk: Desk, session: SecureSession) -> None:
    """The two stages before a session's vectors. Raises SecureSumError where too few advertise."""
    orders = {node: SecureOrder(desk.run_id, join=session.terms.to_bytes()) for node in session.cohort}
    heard = session.take_all(ask_all(desk, orders, stage_deadline(desk)), "advert", session.cohort)
    share, session_id = session.server.adverts(), session.session_id
    orders = {node: SecureOrder(desk.run_id, next_session=session_id, share=share) for node in heard}
    session.shared = session.take_all(ask_all(desk, orders, stage_deadline(desk)), "shares", heard)


def train(
    desk: Desk,
    before: Version,
    key: RoundKey,
    session: SecureSession,
    following: SecureSession | None,
    heads: Mapping[str, bytes],
) -> RoundProgress:
    """Exchange 1 of a round: masked vectors into the sum, keys into the next one. Answers the trunk's last counters.

    `heads` are the signed heads of the ledger that go to the nodes which train.
    """
    recorded: set[str] = set()
    trains = set(session.shared)

    def report(seen: RoundProgress, replies: int) -> None:
        report_progress(desk, key, "training", seen, replies)

    def record(node_id: str, status: Outcome, reason: str | None) -> None:
        recorded.add(node_id)
        desk.store.record_participation(key.run, key.round, key.attempt, node_id, status, reason)
        desk.audience.tell(lambda one: one.participated(key, node_id, status, reason))

    progress = ProgressDeadline(desk.clock, desk.config.round_timeout_s, lambda: desk.trunk.progress(key), report)
    deadline = TrainedDeadline(desk.clock, progress, trains, desk.config.secagg_stage_timeout_s)
    heard = set()
    for answer in _vectors(desk, before, key, session, following, deadline, heads):
        heard.add(answer.node_id)
        deadline.answered(answer.node_id)
        if answer.node_id in trains:
            record(answer.node_id, *_added(answer, session))
        if following is not None and answer.node_id in following.members:
            following.take(answer, "advert")
    for node_id in session.cohort:
        if node_id in recorded:
            continue
        if node_id in trains:
            session.failed(node_id, f"no answer, and no progress for {desk.config.round_timeout_s:g} s")
            record(node_id, "late", session.failures[node_id])
        else:
            record(node_id, "failed", session.failures.get(node_id, "it shared no secrets"))
    if following is not None:
        for node_id in sorted(set(following.cohort) - heard):
            following.failed(node_id, "no advert in time")
    progress.last_look()
    return progress.seen


def judge(desk: Desk, version: Version, session: SecureSession) -> None:
    """Exchange 1 of a judgement: masked tallies into the sum."""
    key = RoundKey(desk.run_id, session.terms.round, OUTSIDE_ROUNDS)
    deadline = ProgressDeadline(desk.clock, desk.config.round_timeout_s, lambda: desk.trunk.progress(key))
    for answer in _vectors(desk, version, key, session, None, deadline, {}):
        _added(answer, session)


def confirm(desk: Desk, session: SecureSession, following: SecureSession | None) -> list[str]:
    """Exchange 2. Answers the nodes that signed the survivors; `following` knows afterwards who shared its secrets.

    Raises SecureSumError, before anything is asked, where fewer than the threshold survived.
    """
    survivors, message = set(session.survivors), session.server.survivors_message()
    share, sharing = _next_adverts(following)
    orders = {
        node_id: SecureOrder(
            run=desk.run_id,
            session=session.session_id if node_id in survivors else b"",
            confirm=message if node_id in survivors else b"",
            next_session=following.session_id if following and node_id in sharing else b"",
            share=share if node_id in sharing else b"",
        )
        for node_id in {*survivors, *sharing}
    }
    signed, heard = [], set()
    for answer in ask_all(desk, orders, stage_deadline(desk)):
        heard.add(answer.node_id)
        if answer.node_id in survivors and session.take(answer, "confirmation"):
            signed.append(answer.node_id)
        if following is not None and answer.node_id in sharing and following.take(answer, "shares"):
            following.shared.append(answer.node_id)
    for node_id in sorted(set(survivors) - heard):
        session.failed(node_id, "no confirmation in time")
    return signed


def unmask(desk: Desk, session: SecureSession, confirmed: Collection[str]) -> RingVector:
    """Exchange 3. The sum, shape (size,). Raises SecureSumError where too few confirmed or answer, or falsely."""
    request = session.server.unmask_request()
    order = SecureOrder(desk.run_id, session=session.session_id, unmask=request)
    answers = ask_all(desk, dict.fromkeys(confirmed, order), stage_deadline(desk))
    session.take_all(answers, "answer", confirmed)
    return session.server.finish()


def tell_heads(desk: Desk, heads: Mapping[str, bytes]) -> dict[str, str]:
    """One exchange that brings each node the head of its chain; answers who did not take it, and why."""
    if not heads:
        return {}
    orders = {node_id: SecureOrder(desk.run_id, head=head) for node_id, head in heads.items()}
    missing = dict.fromkeys(heads, "no answer in time")
    for answer in ask_all(desk, orders, stage_deadline(desk)):
        del missing[answer.node_id]
        if answer.failure is not None:
            missing[answer.node_id] = answer.failure
    return missing


def _vectors(
    desk: Desk,
    version: Version,
    key: RoundKey,
    session: SecureSession,
    following: SecureSession | None,
    deadline: Deadline,
    heads: Mapping[str, bytes],
) -> Iterator[SecureAnswer]:
    """Ask for masked vectors, and for adverts of the session that follows, if any; yields the answers."""
    session.server.train_from(f"{version.client_sha256}:{version.trunk_sha256}")
    order = round_order(desk.config, version, key, len(session.cohort), final=key.attempt == OUTSIDE_ROUNDS)
    join, later = (following.terms.to_bytes(), set(following.cohort)) if following else (b"", set[str]())
    trains = set(session.shared)
    orders = {
        node_id: SecureOrder(
            run=key.run,
            session=session.session_id if node_id in trains else b"",
            inbox=session.inbox(node_id) if node_id in trains else b"",
            join=join if node_id in later else b"",
            head=heads.get(node_id, b"") if node_id in trains else b"",
        )
        for node_id in trains | later
    }
    adapter, ticket = adapter_record(version.client.vector_d), _ticketing(desk, key, order, session)
    traceparent = desk.audience.traceparent()

    def training(node_id: str) -> Message:
        return order_message(node_id, order, adapter, ticket(node_id), traceparent)

    return ask_all(desk, orders, deadline, training, trains)


def _ticketing(desk: Desk, key: RoundKey, order: RoundOrder, session: SecureSession) -> Callable[[str], bytes]:
    """What makes each node's ticket when its order leaves; empty ones where the trunk needs none."""
    if desk.tickets is None:
        return lambda node_id: b""
    keys = {member.client_id: member.identity_key for member in session.terms.members}
    issue = desk.tickets.for_round(key, order.factor, order.trunk_sha256, final=order.final)
    return lambda node_id: issue(node_id, keys[session.members[node_id]])


def _added(answer: SecureAnswer, session: SecureSession) -> tuple[Outcome, str | None]:
    """Add a node's masked vector to the sum; its outcome, and why where it is not in."""
    if answer.undelivered:
        session.undelivered.add(answer.node_id)
    if answer.content is None:
        session.failed(answer.node_id, answer.failure or "")
        return "failed", answer.failure
    if answer.reply is not None and answer.reply.failure:
        session.failed(answer.node_id, answer.reply.failure)
        return "failed", answer.reply.failure
    due_bytes = session.terms.size * session.terms.ring_bits // 8
    try:
        session.server.accept_upload(session.members[answer.node_id], read_update(answer.content, due_bytes))
    except (UpdateError, SecureSumError) as error:
        session.failed(answer.node_id, str(error))
        return "refused", str(error)
    return "trained", None


def _next_adverts(following: SecureSession | None) -> tuple[bytes, list[str]]:
    """What the next session's members are to share their secrets over, and who they are; nobody where too few are."""
    if following is None:
        return b"", []
    try:
        return following.server.adverts(), following.advertised
    except SecureSumError as error:
        log.warning("round %d is not set up ahead: %s; %s", following.terms.round, error, following.told_failures())
        return b"", []
