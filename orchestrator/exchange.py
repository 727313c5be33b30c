"""One exchange with the clients over Flower's Grid: push, then pull until all have answered or time is up.

Flower's own send_and_receive polls every 3 s and keeps all replies at once; here a poll comes every 0.1 s and replies
are pulled one at a time, so that the caller can add each to a running sum and let it go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message, RecordDict

from contract.failpoint import failpoint

log = logging.getLogger("trunkline.orchestrator")

POLL_S = 0.1
MESSAGE_TTL_S = 24 * 3600.0
"""No round lasts longer, whatever progress it makes; a client that comes back later finds nothing to do."""

_FLOWER_FAILURES: Mapping[int, str] = {
    1: "its ClientApp could not be loaded",
    2: "its ClientApp raised an error",
    3: "the message to it expired",
    4: "its reply expired",
    5: "the node is not connected any more",
    6: "a mod on the node refused the message",
    7: "the app bundle did not fit the node",
    8: "its ClientApp process died",
}


class Clock(Protocol):
    """Time, so that tests need not wait."""

    def monotonic(self) -> float:
        """Seconds that never go back."""

    def sleep(self, seconds: float) -> None: ...


class MessageGrid(Protocol):
    """What an exchange needs of flwr.serverapp.Grid."""

    def get_node_ids(self) -> Collection[int]: ...

    def push_messages(self, messages: list[Message]) -> Collection[str | None]: ...

    def pull_messages(self, message_ids: list[str]) -> Collection[Message]: ...


class Deadline(Protocol):
    """When an exchange stops waiting. `look` is called on every poll, `replied` after every reply."""

    def look(self) -> None: ...

    def replied(self) -> None: ...

    @property
    def passed(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """One client's reply: its content, or why there is none. Exactly one of the two is set.

    `undelivered`: the message never left this process.
    """

    node_id: str
    content: RecordDict | None
    failure: str | None
    undelivered: bool = False


class Exchange:
    """Sends to nodes and collects their answers; remembers which nodes still owe one from an earlier exchange."""

    def __init__(
        self,
        grid: MessageGrid,
        clock: Clock,
        check: Callable[[], None] = lambda: None,
        tell_seconds: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`check` is called again and again while anything is waited for, and ends the wait by what it raises.

        `tell_seconds` hears how long each exchange took that came to its end.
        """
        self._grid = grid
        self._clock = clock
        self._check = check
        self._tell_seconds = tell_seconds
        self._owed: dict[str, str] = {}
        self._asked = 0

    @property
    def asked(self) -> int:
        """How many exchanges there have been, each one message to every node of a cohort."""
        return self._asked

    def connected(self) -> list[str]:
        """Ids of the nodes that Flower believes to be connected, sorted. Some may be ghosts."""
        self._check()
        return sorted(str(node_id) for node_id in self._grid.get_node_ids())

    def busy(self) -> frozenset[str]:
        """Nodes that still owe an answer to an earlier exchange: a Flower node handles one message at a time."""
        for message_id, node_id in list(self._owed.items()):
            if self._pull(message_id) is not None:
                log.info("client %s answered an earlier round; its late answer is not used", node_id)
                del self._owed[message_id]
        return frozenset(self._owed.values())

    def ask(
        self, nodes: Collection[str], message_for: Callable[[str], Message], deadline: Deadline
    ) -> Iterator[Answer]:
        """Send each node its message and yield the answers as they come; ends when all came or `deadline` passed.

        A node that is missing from the answers was late. Pulls no further reply before the last one was consumed.
        """
        self._check()
        self._asked += 1
        began = self._clock.monotonic()
        yield from self._answers(nodes, message_for, deadline)
        self._tell_seconds(self._clock.monotonic() - began)

    def _answers(
        self, nodes: Collection[str], message_for: Callable[[str], Message], deadline: Deadline
    ) -> Iterator[Answer]:
        pending: dict[str, str] = {}
        for node_id in nodes:
            message_id = self._push(message_for(node_id))
            if message_id is None:
                yield Answer(node_id, None, "Flower did not take the message to it", undelivered=True)
            else:
                pending[message_id] = node_id
        while pending:
            started = self._clock.monotonic()
            for message_id, node_id in list(pending.items()):
                reply = self._pull(message_id)
                if reply is None:
                    continue
                del pending[message_id]
                failpoint("flower.reply")
                deadline.replied()
                yield _answer(node_id, reply)
            self._check()
            deadline.look()
            if pending and deadline.passed:
                self._owed.update(pending)
                return
            if pending:
                # With many clients a pass costs as much as a poll; never spend more than half the time asking.
                self._clock.sleep(max(POLL_S, self._clock.monotonic() - started))

    def _push(self, message: Message) -> str | None:
        failpoint("flower.push.before")
        ids = list(self._grid.push_messages([message]))
        failpoint("flower.push.after")
        return ids[0] or None if ids else None

    def _pull(self, message_id: str) -> Message | None:
        """The reply to `message_id`, or None. What answers something else is dropped: Flower should not send it."""
        found = None
        for reply in self._grid.pull_messages([message_id]):
            if reply.metadata.reply_to_message_id != message_id:
                log.warning("dropped a reply to message %s, which is not awaited", reply.metadata.reply_to_message_id)
            elif found is not None:
                log.warning("dropped a second reply to message %s", message_id)
            else:
                found = reply
        return found


def _answer(node_id: str, reply: Message) -> Answer:
    if reply.has_error():
        reason = " ".join((reply.error.reason or "").split())
        meaning = _FLOWER_FAILURES.get(reply.error.code)
        told = ": ".join(part for part in (meaning, reason) if part)
        return Answer(node_id, None, told or f"it answered with error code {reply.error.code}")
    if not reply.has_content():
        return Answer(node_id, None, "its reply is empty")
    return Answer(node_id, reply.content, None)
