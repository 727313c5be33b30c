"""What lasts from round to round of a secure run: who is who, the next session, how often the present one failed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from contract.errors import QuorumError, RoundError
from orchestrator.cohort import LOOK_S, SETTLE_S, draw_cohort, wait_for_clients, wait_until_free
from orchestrator.desk import Desk
from orchestrator.membership import Membership
from orchestrator.secure_session import SecureSession, new_session

log = logging.getLogger("trunkline.orchestrator")

AGAIN_S = 1.0


@dataclass(slots=True)
class SecureRun:
    """`ready` was set up beside the round before. `aborts` counts the aborted attempts at the present round, and
    `refused_since` is the clock's time of the first one that the sites refused to set up, if the last one was such."""

    desk: Desk
    membership: Membership
    model_fingerprint: str
    ready: SecureSession | None = None
    aborts: int = 0
    refused_since: float | None = None

    def draw(self, number: int, values: int, *, first: bool = False) -> SecureSession:
        """A session for round `number`, once enough clients are connected and may take part; raises as new_session.

        Raises QuorumError, with the reasons, where within node-wait-s too few may.
        """
        desk, config = self.desk, self.desk.config
        if self.aborts:
            wait_until_free(desk.exchange, desk.clock, config.secagg_stage_timeout_s)
        until = desk.clock.monotonic() + config.node_wait_s
        while True:
            connected = wait_for_clients(desk.exchange, config, desk.clock, first=first)
            try:
                return self.draw_from(connected, number, values)
            except QuorumError:
                if desk.clock.monotonic() >= until:
                    raise
            desk.clock.sleep(AGAIN_S)

    def draw_from(self, connected: list[str], number: int, values: int) -> SecureSession:
        """A session over the `connected` nodes that may take part. Raises QuorumError where they are too few."""
        desk, config = self.desk, self.desk.config
        members = self.membership.known(connected)
        cohort = draw_cohort(sorted(members), desk.exchange.busy(), config, number)
        wanted = max(2, config.quorum, config.secagg_threshold)
        if len(cohort) < wanted:
            told = "".join(f"; node {one}: {why}" for one, why in self.membership.excluded(connected))
            raise QuorumError(
                f"round {number}: {len(cohort)} of {len(connected)} connected clients can take part in a secure sum, "
                f"{wanted} are needed (the larger of quorum and secagg-threshold, and at least 2){told}"
            )
        return new_session(desk.run_id, number, config, members, cohort, values, self.model_fingerprint)

    def take_ready(self) -> SecureSession | None:
        """The session that waits for its vectors, once; None where there is none."""
        ready, self.ready = self.ready, None
        return ready

    def committed(self) -> None:
        """Begin to count anew."""
        self.aborts, self.refused_since = 0, None

    def count_abort(self, number: int, reason: str) -> None:
        """Raise RoundError where one more attempt would be one too many."""
        self.aborts += 1
        self.refused_since = None
        limit = self.desk.config.secagg_aborts
        log.warning("round %d: attempt aborted: %s", number, reason)
        if self.aborts > limit:
            raise RoundError(
                f"round {number} was aborted {self.aborts} times in a row (secagg-aborts is {limit}); the last time: "
                f"{reason}"
            )

    def wait_for_others(self, number: int, reason: str) -> None:
        """After sites refused a session: return once other clients are there, which is what may change their minds.

        Raises RoundError after node-wait-s without a session that enough of them take part in.
        """
        clock, exchange, limit_s = self.desk.clock, self.desk.exchange, self.desk.config.node_wait_s
        self.refused_since = clock.monotonic() if self.refused_since is None else self.refused_since
        log.warning("round %d: the sites refused: %s; waiting for other clients", number, reason)
        connected = exchange.connected()
        while clock.monotonic() < self.refused_since + limit_s:
            clock.sleep(LOOK_S)
            if exchange.connected() != connected:
                clock.sleep(SETTLE_S)
                return
        raise RoundError(f"round {number}: sites refuse to take part, and for {limit_s:g} s no others came: {reason}")
