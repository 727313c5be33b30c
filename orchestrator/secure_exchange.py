"""One Flower exchange of a secure run: each node is sent its order of the sum's stages, and its reply is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from contract.errors import FrameError
from contract.records import NOTHING_SEEN
from contract.secure_records import SecureOrder, SecureReply, reply_from, to_record
from orchestrator.deadline import ProgressDeadline
from orchestrator.desk import Desk
from orchestrator.exchange import MESSAGE_TTL_S, Deadline

SECURE = "query.secure"


@dataclass(frozen=True, slots=True)
class SecureAnswer:
    """One node's reply, or why there is none. `content` is the whole reply, of which `reply` is a part.

    `undelivered`: the node was never asked.
    """

    node_id: str
    reply: SecureReply | None
    content: RecordDict | None
    failure: str | None
    undelivered: bool = False


def stage_deadline(desk: Desk) -> ProgressDeadline:
    """For an exchange in which nothing is trained: replies alone are progress."""
    return ProgressDeadline(desk.clock, desk.config.secagg_stage_timeout_s, lambda: NOTHING_SEEN)


def ask_all(
    desk: Desk,
    orders: Mapping[str, SecureOrder],
    deadline: Deadline,
    training: Callable[[str], Message] | None = None,
    trained: Collection[str] = (),
) -> Iterator[SecureAnswer]:
    """Send each node its order, beside the message of `training` where it is one of `trained`; yield the answers."""

    def message_for(node_id: str) -> Message:
        record = ConfigRecord(dict(to_record(orders[node_id])))
        if training is not None and node_id in trained:
            message = training(node_id)
            message.content["secure"] = record
            return message
        return Message(RecordDict({"secure": record}), dst_node_id=int(node_id), message_type=SECURE, ttl=MESSAGE_TTL_S)

    for answer in desk.exchange.ask(sorted(orders), message_for, deadline):
        if answer.content is None:
            yield SecureAnswer(answer.node_id, None, None, answer.failure, answer.undelivered)
            continue
        record = answer.content.get("secure")
        try:
            reply = reply_from(record if isinstance(record, ConfigRecord) else {})
        except FrameError as error:
            yield SecureAnswer(answer.node_id, None, None, str(error))
            continue
        yield SecureAnswer(answer.node_id, reply, answer.content, None)
