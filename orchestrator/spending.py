"""What a run may still ask of each client, and what it charges: the orchestrator's ledger beside its rounds.

A round is charged from configuration and cohort, never from what clients report, and before anything is asked of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field

from aggregation.encoding import noise_scale
from contract.config import RunConfig
from contract.errors import BudgetError
from contract.privacy_records import PricedRelease, Standing, Unit
from contract.records import RoundKey
from orchestrator.secure_session import SecureSession
from privacy.accountant import ACCOUNTANT
from privacy.filters import admit_standing
from privacy.plan import register_budget, round_releases
from storage.ledger import Ledger
from storage.records import Charge

log = logging.getLogger("trunkline.orchestrator")


@dataclass(slots=True)
class Spending:
    """One run's charges. `units` says whose privacy each node's part spends, as it greeted.

    With a `driver`, a Flower run, nothing is charged once another one drives the run.

    Those of the attempt that was charged last are kept apart: the next session may be drawn beside it, by other names.
    """

    run_id: str
    config: RunConfig
    ledger: Ledger
    driver: str | None = None
    units: dict[str, Unit] = field(default_factory=dict)
    charges: int = 0  # reserved by this process, in all
    _charged: dict[str, Unit] = field(default_factory=dict)

    def releases(self, clients: int, threshold: int, size: int) -> tuple[PricedRelease, ...]:
        """What a round over `clients` that trains `size` values costs each of them."""
        return round_releases(self.config, scale=noise_scale(self.config, clients, threshold), size=size)

    def unaffordable(self, nodes: Collection[str], releases: Sequence[PricedRelease]) -> dict[str, str]:
        """Those of `nodes` whose budgets have no room for `releases`, with the reason; nothing is charged."""
        found = {}
        standings = self.ledger.standings([self.units[node_id] for node_id in nodes])
        for node_id in nodes:
            try:
                self._admit(standings[self.units[node_id]], releases)
            except BudgetError as error:
                found[node_id] = str(error)
        return found

    def reserve(self, key: RoundKey, session: SecureSession) -> dict[str, str]:
        """Charge the round to every node that is about to be asked; durable on return.

        Answers those that cannot afford it, with the reason: they MUST NOT be asked.
        """
        releases = self.releases(len(session.cohort), session.terms.threshold, session.values)
        self._charged = {node_id: self.units[node_id] for node_id in session.shared}
        nodes = {unit: node_id for node_id, unit in self._charged.items()}
        self.ledger.register_budgets(nodes, register_budget(self.config), self.run_id)
        charges = [
            Charge(unit, key.run, key.round, key.attempt, release, ACCOUNTANT) for unit in nodes for release in releases
        ]
        refusals = self.ledger.reserve(charges, self._admit, driver=self.driver)
        refused = {refusal.unit for refusal in refusals}
        self.charges += sum(charge.unit not in refused for charge in charges)
        return {nodes[refusal.unit]: refusal.reason for refusal in refusals}

    def give_back(self, key: RoundKey, nodes: Collection[str]) -> None:
        """Void the charges of nodes that the order provably never left for."""
        if nodes:
            units = [self._charged[node_id] for node_id in nodes]
            self.ledger.settle(key.run, key.round, key.attempt, "VOID", units)

    def heads(self, nodes: Collection[str]) -> dict[str, bytes]:
        """The newest signed head of each node's chain, for the node to keep; as JSON, with whose chain it is."""
        newest = self.ledger.newest_heads([self.units[node_id] for node_id in nodes])
        told = {}
        for node_id in nodes:
            unit = self.units[node_id]
            if unit in newest:
                whole = {"unit": asdict(unit), "head": asdict(newest[unit])}
                told[node_id] = json.dumps(whole, sort_keys=True).encode()
        return told

    def _admit(self, standing: Standing, proposed: Sequence[PricedRelease]) -> None:
        admit_standing(register_budget(self.config), self.run_id, standing, proposed)
