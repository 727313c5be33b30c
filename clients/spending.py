"""This site's own ledger: what it releases is paid for here first, or it is not released.

It lies in the site's state directory and belongs to nobody else. A run's budget is registered at its first round; no
later run can raise it, only the site's operator can, by the node config or by `trunkline budget set --site`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import quote

from aggregation.encoding import noise_scale
from clients.site import Site
from contract.config import RunConfig
from contract.errors import BudgetError, ConfigError, HeadsFullError, LedgerError
from contract.privacy_records import (
    ALL_DATASETS,
    NODE_CONFIG,
    Budget,
    Channel,
    PricedRelease,
    PrivacyEvent,
    Standing,
    Unit,
)
from contract.records import RoundKey
from privacy.accountant import ACCOUNTANT
from privacy.filters import admit_standing, require_one_level
from privacy.plan import level_of, register_budget, round_releases
from storage.ledger import Ledger, open_ledger, open_ledger_to_read
from storage.records import Charge, SignedHead

logger = logging.getLogger("trunkline.clients")

_MOST_TAKEN_EPSILON, _MOST_TAKEN_DELTA = 10.0, 1e-3
"""What a site that names no budget takes over from a run at most: a budget beyond protects next to nothing, so that a
person at the site must name it, and not whoever starts the run."""
_OWN_BUDGET = "privacy-epsilon and privacy-delta in the node config, or `trunkline budget set --site`, set its own"


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

        `events` are what the wire's mechanism says that its passes cost: they must be what is charged. Raises,
        and charges nothing: BudgetError where there is no room, and as `require_willing`.
        """
        scale = noise_scale(self.config, clients, threshold)
        releases = round_releases(self.config, scale=scale, size=size)
        charged = {release.channel: release.event for release in releases}
        for channel, event in events.items():
            if charged.get(channel) != event:
                raise LedgerError(f"{channel} is released by {event}, but {charged.get(channel)} would be charged")
        self.require_willing()
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
        try:
            self.ledger.note_peer_head(unit, signed)
        except HeadsFullError as error:  # whoever fills the room must not be able to end other orchestrators' runs
            logger.warning("the orchestrator's head of the ledger is not kept: %s", error)
        self._warn_of_a_lost_ledger(signed)

    def require_willing(self) -> None:
        """Raise ConfigError where this site would refuse every round of the run: before anybody pays for one.

        Not in a simulation, where whoever owns the data starts the run, and the orchestrator's ledger is theirs too.
        """
        if self.site.simulated:
            return
        self._require_own_name()
        standing = self.ledger.standing(self.unit)
        try:
            require_one_level(standing)
        except BudgetError as error:  # it holds nothing but names: unlike other refusals for budgets it can be told
            raise ConfigError(f"this site's own ledger refuses: {error}") from error
        if standing.budget is None and self.site.budget is None:
            _require_modest(self.site, register_budget(self.config))

    def _require_own_name(self) -> None:
        others = self.ledger.charged_clients() - {self.site.name}
        if others:
            raise ConfigError(
                f"node config name is {self.site.name!r}, and this site's own ledger {self.site.ledger} is that of "
                f"{min(others)!r}: under another name what is spent would be forgotten; keep the name"
            )

    def _set_budget(self, run: str) -> None:
        """What a person at the site set, else the node config's, else the first run's."""
        standing = self.ledger.standing(self.unit)
        if standing.chosen:
            return
        if self.site.budget is None:
            if standing.budget is None:
                taken = register_budget(self.config)
                _tell_taken(self.site, taken)
                self.ledger.register_budgets([self.unit], taken, run)
            return
        epsilon, delta = self.site.budget
        if standing.budget is None or (standing.budget.epsilon, standing.budget.delta) != self.site.budget:
            own = register_budget(self.config.model_copy(update={"dp_epsilon": epsilon, "dp_delta": delta}))
            if standing.budget is not None:  # whose order was registered before anything was released
                own = replace(standing.budget, epsilon=epsilon, delta=delta)
            self.ledger.set_budget(self.unit, own, NODE_CONFIG, "privacy-epsilon, privacy-delta of the node config")
            logger.info("privacy budget of dataset %s: epsilon %g at delta %g", self.unit.dataset, epsilon, delta)

    def _warn_of_a_lost_ledger(self, head: SignedHead) -> None:
        """A chain's first row is a budget: charges come after it, and before each one this ledger had a budget too."""
        if head.seq > 1 and self.ledger.standing(self.unit).budget is None:
            logger.warning(
                "the orchestrator's ledger holds %d rows on dataset %s, and this site's own ledger %s holds nothing of "
                "it: if this site took part before, its ledger was lost; restore it from a backup",
                *(head.seq, self.unit.dataset, self.site.ledger),
            )

    def _admit(self, run: str, standing: Standing, proposed: Sequence[PricedRelease]) -> None:
        if self.site.simulated:  # which level the text spends at, the ledger of who simulates has settled
            standing = replace(standing, other_level=False)
        admit_standing(register_budget(self.config), run, standing, proposed)


@contextmanager
def open_spending(site: Site, config: RunConfig) -> Iterator[SiteSpending]:
    """This site's ledger, made where there is none. Raises StorageError where it cannot be opened."""
    ledger = open_ledger(_url(site))
    try:
        yield SiteSpending(site, config, ledger)
    finally:
        ledger.close()


def refuse_unpriced(site: Site) -> None:
    """Raise ConfigError where the site's own ledger, which is there, knows of a budget or charges for its data.

    In a simulation, where whoever owns the ledger also starts the run, it is said in the log and no more.
    """
    with closing(open_ledger_to_read(_url(site))) as ledger:
        budgets = ledger.budgets()
        units = [unit for unit in ledger.units() if unit.dataset in (site.dataset, ALL_DATASETS)]
    if not units:
        return
    unit = next((unit for unit in units if unit in budgets), units[0])
    told = (
        f"the run's dp is off, and this site's own ledger {site.ledger} holds {_held(unit, budgets.get(unit))}; a run "
        "without a price would release that data beside its budget"
    )
    if site.simulated:
        logger.warning("%s: it goes on, as this is a simulation", told)
        return
    key = "state-dir" if unit.dataset == ALL_DATASETS else "dataset"
    raise ConfigError(f"{told}: where the site's operator allows it, the node config gives another {key}")


def _held(unit: Unit, budget: Budget | None) -> str:
    whose = f"{unit.data_in_words} ({unit.level} level)"
    if budget is None:
        return f"charges to {whose}"
    return f"a budget for {whose}, epsilon {budget.epsilon:g} at delta {budget.delta:g}"


def _require_modest(site: Site, taken: Budget) -> None:
    """Raise ConfigError for more than a run may choose for a site."""
    if taken.epsilon <= _MOST_TAKEN_EPSILON and taken.delta <= _MOST_TAKEN_DELTA:
        return
    raise ConfigError(
        f"the run's budget is epsilon {taken.epsilon:g} at delta {taken.delta:g}, and this site names none of its own "
        f"for dataset {site.dataset}; it takes over at most epsilon {_MOST_TAKEN_EPSILON:g} at delta "
        f"{_MOST_TAKEN_DELTA:g} from a run: {_OWN_BUDGET}"
    )


def _tell_taken(site: Site, taken: Budget) -> None:
    if not site.simulated:
        logger.warning(
            "this site names no budget of its own: it takes the run's, epsilon %g at delta %g; %s",
            *(taken.epsilon, taken.delta, _OWN_BUDGET),
        )


def _url(site: Site) -> str:
    return f"sqlite:///{quote(str(site.ledger))}"
