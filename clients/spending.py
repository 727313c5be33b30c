"""This site's own ledger: what it releases is paid for here first, or it is not released.

It lies in the site's state directory and belongs to nobody else. A run's budget is registered at its first round; no
later run can raise it, only the site's operator can, by the node config or by `trunkline budget set --site`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from aggregation.encoding import noise_scale
from clients.site import Site
from contract.config import RunConfig
from contract.errors import BudgetError, LedgerError
from contract.privacy_records import Channel, PricedRelease, PrivacyEvent, Standing, Unit
from contract.records import RoundKey
from privacy.accountant import ACCOUNTANT
from privacy.filters import admit_standing
from privacy.plan import level_of, register_budget, round_releases
from storage.ledger import Ledger, open_ledger
from storage.ledger_rows import NODE_CONFIG
from storage.records import Charge, SignedHead

logger = logging.getLogger("trunkline.clients")


@dataclass(frozen=True, slots=True)
class SiteSpending:
    """The charges of one run to this site's dataset."""

    site: Site
    config: RunConfig
    ledger: Ledger

    @property
    def unit(self) -> Unit:
        return Unit(self.site.name, self.site.dataset, level_of(self.config))

    def reserve(
        self, key: RoundKey, clients: int, threshold: int, size: int, events: Mapping[Channel, PrivacyEvent]
    ) -> None:
        """Charge a round over `clients`, of whom `threshold` must stay, that trains `size` values; durable on return.

        `events` are what the wire's mechanism says that its passes cost: they must be what is charged. Raises
        BudgetError, and charges nothing, where there is no room.
        """
        scale = noise_scale(self.config, clients, threshold)
        releases = round_releases(self.config, scale=scale, size=size)
        charged = {release.channel: release.event for release in releases}
        for channel, event in events.items():
            if charged.get(channel) != event:
                raise LedgerError(f"{channel} is released by {event}, but {charged.get(channel)} would be charged")
        self._set_budget(key.run)
        charges = [Charge(self.unit, key.run, key.round, key.attempt, release, ACCOUNTANT) for release in releases]
        for refusal in self.ledger.reserve(charges, partial(self._admit, key.run)):
            raise BudgetError(f"this site's own ledger refuses: {refusal.reason}")

    def committed(self, key: RoundKey) -> None:
        """Note that what was reserved is about to leave."""
        self.ledger.settle(key.run, key.round, key.attempt, "COMMITTED")

    def keep_head(self, head: bytes) -> None:
        """Keep the head that the orchestrator signed: from now on its ledger can lose nothing that this one names.

        Raises LedgerError for one of another dataset, and for one that goes behind, or denies, one that was kept.
        """
        try:
            told = json.loads(head)
            unit, signed = Unit(**told["unit"]), SignedHead(**told["head"])
        except (ValueError, TypeError, KeyError) as error:
            raise LedgerError(f"the orchestrator's head of the ledger cannot be read: {error}") from error
        if (unit.dataset, unit.level) != (self.unit.dataset, self.unit.level):
            raise LedgerError(f"the orchestrator's head is of dataset {unit.dataset}, not of {self.unit.dataset}")
        self.ledger.note_peer_head(unit, signed)

    def _set_budget(self, run: str) -> None:
        """The site's own budget where its node config names one, else the first run's."""
        if self.site.budget is None:
            self.ledger.register_budgets([self.unit], register_budget(self.config), run)
            return
        epsilon, delta = self.site.budget
        standing = self.ledger.standing(self.unit)
        if standing.budget is None or (standing.budget.epsilon, standing.budget.delta) != self.site.budget:
            own = register_budget(self.config.model_copy(update={"dp_epsilon": epsilon, "dp_delta": delta}))
            self.ledger.set_budget(self.unit, own, NODE_CONFIG, "privacy-epsilon, privacy-delta of the node config")
            logger.info("privacy budget of dataset %s: epsilon %g at delta %g", self.unit.dataset, epsilon, delta)

    def _admit(self, run: str, standing: Standing, proposed: Sequence[PricedRelease]) -> None:
        admit_standing(register_budget(self.config), run, standing, proposed)


@contextmanager
def open_spending(site: Site, config: RunConfig) -> Iterator[SiteSpending]:
    """This site's ledger, made where there is none. Raises StorageError where it cannot be opened."""
    ledger = open_ledger(f"sqlite:///{quote(str(site.ledger))}")
    try:
        yield SiteSpending(site, config, ledger)
    finally:
        ledger.close()
