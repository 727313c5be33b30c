"""A round's deadline, which rests on progress and not on a guess of the round's length."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from contract.errors import TrunklineError
from contract.records import NOTHING_SEEN, RoundProgress
from orchestrator.exchange import MESSAGE_TTL_S, Clock

log = logging.getLogger("trunkline.orchestrator")

LOOK_EVERY_S = 1.0


class TrainedDeadline:
    """`progress` until all of `trains` have answered; then `short_s` seconds without a reply are enough.

    Who is only asked for the next round's keys in the same exchange holds up nobody's training for longer.
    """

    def __init__(self, clock: Clock, progress: ProgressDeadline, trains: Collection[str], short_s: float) -> None:
        self._clock = clock
        self._progress = progress
        self._left = set(trains)
        self._short_s = short_s
        self._replied = clock.monotonic()

    def look(self) -> None:
        self._progress.look()

    def replied(self) -> None:
        self._replied = self._clock.monotonic()
        self._progress.replied()

    def answered(self, node_id: str) -> None:
        """Note whose reply the last one was."""
        self._left.discard(node_id)

    @property
    def passed(self) -> bool:
        overdue = not self._left and self._clock.monotonic() - self._replied > self._short_s
        return overdue or self._progress.passed


class ProgressDeadline:
    """Passes when for `timeout_s` no client replied and no counter at the trunk rose.

    In a deployment a client is silent until its reply, but the trunk sees each of its steps. `read` asks the trunk;
    `report` is given the counters and the number of replies whenever one of them rose.
    """

    def __init__(
        self,
        clock: Clock,
        timeout_s: float,
        read: Callable[[], RoundProgress],
        report: Callable[[RoundProgress, int], None] = lambda progress, replies: None,
    ) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._read = read
        self._report = report
        self._opened = self._moved = clock.monotonic()
        self._looked = float("-inf")
        self._reported_replies = 0
        self._unreadable = False
        self.replies = 0
        self.seen = NOTHING_SEEN

    def replied(self) -> None:
        self.replies += 1
        self._moved = self._clock.monotonic()

    def look(self) -> None:
        """Read the trunk's counters, at most once a second. A trunk that does not answer has made no progress."""
        now = self._clock.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._read_and_report(now)

    def last_look(self) -> None:
        """Read the trunk's counters once more, so that they are whole when the last client has answered."""
        self._read_and_report(self._clock.monotonic())

    def _read_and_report(self, now: float) -> None:
        self._looked = now
        seen = self._counters()
        if seen != self.seen:
            self.seen, self._moved = seen, now
        elif self.replies == self._reported_replies:
            return
        self._reported_replies = self.replies
        self._report(self.seen, self.replies)

    def _counters(self) -> RoundProgress:
        try:
            seen = self._read()
        except TrunklineError as error:
            if not self._unreadable:
                log.warning("no progress can be read from the trunk: %s", error)
            self._unreadable = True
            return self.seen
        self._unreadable = False
        risen = (seen.steps, seen.tokens, seen.received_bytes) > (
            self.seen.steps,
            self.seen.tokens,
            self.seen.received_bytes,
        )
        return seen if risen else self.seen

    @property
    def passed(self) -> bool:
        now = self._clock.monotonic()
        return now - self._moved > self._timeout_s or now - self._opened > MESSAGE_TTL_S
