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

    what = "the end of attempts at the trunk"

    def __init__(self, trunk: ConnectedTrunk, run_id: str) -> None:
        self._trunk = trunk
        self._run_id = run_id
        self._over: RoundKey | None = None

    def take_over(self, rounds: Sequence[RoundRow]) -> None:
        """End what the attempts before a resumption left: their sites answer nobody until they are done with them.

        Said also where there were none: the trunk may have heard of later ones, before a backup was restored.
        """
        number, attempt = max(((row.number, row.attempt) for row in rounds), default=(0, 0))
        self._over = RoundKey(self._run_id, number, attempt)
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
            log.warning("sites that train for an attempt that is over do so until they are done: %s", error)
