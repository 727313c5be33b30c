"""What lasts from round to round of a secure run: who is who, the next session, how often the present one failed."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from aggregation.terms import Member
from contract.errors import BudgetError, QuorumError, RoundError
from contract.records import RoundKey
from orchestrator.cohort import LOOK_S, SETTLE_S, draw_cohort, wait_for_clients, wait_until_free
from orchestrator.desk import Desk
from orchestrator.membership import Membership
from orchestrator.secure_session import SecureSession, new_session, session_graph
from orchestrator.spending import Spending
from orchestrator.telling import told_failures
from privacy.plan import level_of

log = logging.getLogger("trunkline.orchestrator")

AGAIN_S = 1.0


class UnpaidError(QuorumError):
    """Budgets ran out between a session's set-up and its charge: with whom they did not, another one may be drawn."""


@dataclass(slots=True)
class SecureRun:
    """`spending` is None in a run without differential privacy. `ready` was set up beside the round before.

    `aborts` counts the aborted attempts at the present round, and `refused_since` is the clock's time of the first one
    that the sites refused to set up, if the last one was such; `unpaid` counts the charges that left too few to pay.
    """

    desk: Desk
    membership: Membership
    model_fingerprint: str
    spending: Spending | None = None
    ready: SecureSession | None = None
    aborts: int = 0
    refused_since: float | None = None
    unpaid: int = 0

    def draw(self, number: int, values: int, *, first: bool = False) -> SecureSession:
        """A session for round `number`, once enough clients are connected and may take part; raises as new_session.

        Raises QuorumError, with the reasons, where within node-wait-s too few may; BudgetError where that is for their
        budgets, at once unless clients that the run knows are away.
        """
        desk, config = self.desk, self.desk.config
        if self.aborts:
            wait_until_free(desk.exchange, desk.clock, config.secagg_stage_timeout_s)
        until = desk.clock.monotonic() + config.node_wait_s
        while True:
            connected = wait_for_clients(desk.exchange, config, desk.clock, first=first)
            try:
                return self.draw_from(connected, number, values)
            except (QuorumError, BudgetError) as error:
                if desk.clock.monotonic() >= until:
                    raise
                if isinstance(error, BudgetError) and not self._someone_is_away(connected):
                    raise
            desk.clock.sleep(AGAIN_S)

    def draw_from(self, connected: list[str], number: int, values: int) -> SecureSession:
        """A session over the `connected` nodes that may take part. Raises QuorumError where they are too few."""
        desk, config = self.desk, self.desk.config
        members = self._affordable(connected, values)
        cohort = draw_cohort(sorted(members), desk.exchange.busy(), config, number)
        if len(cohort) < (wanted := self._wanted):
            told = "".join(f"; node {one}: {why}" for one, why in self.membership.excluded(connected))
            raise QuorumError(
                f"round {number}: {len(cohort)} of {len(connected)} connected clients can take part in a secure sum, "
                f"{wanted} are needed (the larger of quorum and secagg-threshold, and at least 2){told}"
            )
        return new_session(desk.run_id, number, config, members, cohort, values, self.model_fingerprint, desk.entropy)

    def _someone_is_away(self, connected: Collection[str]) -> bool:
        units = {} if self.spending is None else self.spending.units
        return bool(units.keys() - set(connected) - self.membership.shut_out_nodes.keys())

    @property
    def _wanted(self) -> int:
        return max(2, self.desk.config.quorum, self.desk.config.secagg_threshold)

    def _affordable(self, connected: Collection[str], values: int) -> dict[str, Member]:
        """Those of `connected` that may take part, with room in their budgets for a round that trains `values` values.

        Raises BudgetError, with the reasons, where it is for budgets alone, the sites' own too, that too few are left.
        """
        members, spending, config = self.membership.known(connected), self.spending, self.desk.config
        if spending is None or not values:
            return members
        units = self.membership.units(members, level_of(config))
        spending.units.update(units)
        over = {node: why for node, why in self.membership.shut_out_nodes.items() if node in connected}
        if len(units) >= self._wanted:
            clients = min(len(units), config.cohort_size or len(units))
            releases = spending.releases(clients, session_graph(config, clients).threshold, values)
            poor = spending.unaffordable(units, releases)
            for node_id, reason in poor.items():
                self.membership.exclude(node_id, reason)
            over |= poor
        left = {node_id: members[node_id] for node_id in units if node_id not in over}
        together = len(units.keys() | over.keys())
        if len(left) < self._wanted <= together:
            raise BudgetError(
                f"{len(left)} of {together} clients can still pay for a round, {self._wanted} are needed; "
                f"{told_failures(over)}"
            )
        return left

    def charge(self, key: RoundKey, session: SecureSession) -> None:
        """Charge the round to those who are about to train; who cannot pay sits it out. Durable on return.

        Raises UnpaidError where too few are left; nobody was asked for anything then, and nobody has paid.
        """
        spending, config = self.spending, self.desk.config
        if spending is None:
            return
        gone = {node: why for node, why in self.membership.shut_out_nodes.items() if node in session.shared}
        session.leave_out(gone)
        before = spending.charges
        session.leave_out(spending.reserve(key, session))
        self.desk.audience.tell(lambda one: one.charged(spending.charges - before))
        if len(session.shared) < (wanted := max(config.quorum, session.terms.threshold)):
            spending.give_back(key, session.shared)
            raise UnpaidError(f"{len(session.shared)} clients are left to pay for the round, {wanted} are needed")

    def close_charges(self, key: RoundKey, session: SecureSession) -> None:
        """Give back what nobody was asked for; ask no more of sites whose own budgets are spent."""
        if self.spending is None:
            return
        self.spending.give_back(key, session.undelivered)
        for node_id, reason in session.failures.items():
            if reason.startswith(BudgetError.__name__):
                self.membership.shut_out(node_id, reason)

    def take_ready(self) -> SecureSession | None:
        """The session that waits for its vectors, once; None where there is none."""
        ready, self.ready = self.ready, None
        return ready

    def committed(self) -> None:
        """Begin to count anew."""
        self.aborts, self.refused_since, self.unpaid = 0, None, 0

    def may_draw_again(self) -> bool:
        """After a charge that left too few: whether it can have taken another client out of the next draw.

        One that priced a round for more clients than can pay may find the same ones affordable again and again.
        """
        self.unpaid += 1
        return self.spending is not None and self.unpaid <= len(self.spending.units)

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
