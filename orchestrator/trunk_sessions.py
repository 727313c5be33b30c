"""No site trains for an attempt that is over: the trunk is told to end its sessions, which frees their sites."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from contract.errors import TrunklineError
from contract.records import RoundKey
from orchestrator.audience import Listener
from orchestrator.replicas import ConnectedTrunk
from storage.records import RoundCommit, RoundRow

log = logging.getLogger("trunkline.orchestrator")


class TrunkSessions(Listener):
    """Those of one run's attempts. A trunk that does not answer keeps them until their sites have done their round."""

    what = "sessions of attempts that are over"

    def __init__(self, trunk: ConnectedTrunk) -> None:
        self._trunk = trunk
        self._over: RoundKey | None = None

    def take_over(self, rounds: Sequence[RoundRow]) -> None:
        """End what the attempts before a resumption left: their sites answer nobody until they are done with them."""
        if rounds:
            last = max(rounds, key=lambda row: (row.number, row.attempt))
            self._over = RoundKey(last.run_id, last.number, last.attempt)
            self.end()

    def opened(self, key: RoundKey, clients: int) -> None:
        self._over = key

    def committed(self, commit: RoundCommit) -> None:
        self.end()

    def aborted(self, key: RoundKey) -> None:
        self.end()

    def end(self) -> None:
        """End what is open of the newest attempt and of those before it."""
        if self._over is None:
            return
        try:
            self._trunk.end_before(replace(self._over, attempt=self._over.attempt + 1))
        except TrunklineError as error:
            log.warning("%s stay at the trunk until their sites are done: %s", self.what, error)
