"""What a release costs, whom it concerns and who sees it: records that ledgers, accountants and mechanisms share.

Numbers that are not whole travel as text of Python's `float.hex()`, so that two replays read the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from contract.errors import UnpricedError

Channel = Literal["wire_forward", "wire_backward", "trunk_adapter", "adapter_sum", "metrics"]
"""Every way on which a client's data can reach another party."""
Adversary = Literal["holder", "orchestrator", "trunk"]
"""(a) who holds the released adapter, (b) the orchestrator and the other clients, (c) the trunk."""
Level = Literal["client", "example"]
"""What one unit of protection is: all of a client's dataset, or one row of it."""
Adjacency = Literal["zero-out", "replace"]
"""Two datasets are neighbours where one unit's contribution is absent in one, or is another's in one."""
State = Literal["RESERVED", "COMMITTED", "VOID"]
"""RESERVED and COMMITTED are spent. VOID is given back: provably nothing left."""

CHANNELS: tuple[Channel, ...] = get_args(Channel)
ADVERSARIES: tuple[Adversary, ...] = get_args(Adversary)
ALL_DATASETS = "*"
"""The dataset of a unit that stands for all of a client's datasets together; only budgets are kept for it."""
NODE_CONFIG, RUN_PREFIX = "node config", "run "
"""Who sets a budget where no person does: a site's settings, and a run (with its id)."""


@dataclass(frozen=True, slots=True)
class PrivacyEvent:
    """One release that has a price: the mechanism and its parameters, as exact text that an accountant can replay.

    - `gaussian`: `noise_multiplier` (hex), the noise's standard deviation over `clip` (hex), the L2 norm of one unit's
      contribution.
    - `skellam`: the same two, and `scale` (hex, steps per unit), `size` (coordinates, an integer), `rounding_bias`
      (hex, beta of conditional rounding). The noise's variance over the whole sum is (noise_multiplier scale clip)^2.
    """

    mechanism: Literal["gaussian", "skellam"]
    parameters: Mapping[str, str]

    def number(self, name: str) -> float:
        """A parameter as a number. Raises UnpricedError where it is absent, no hex float, or not above 0."""
        text = self.parameters.get(name, "")
        try:
            value = float(int(text)) if text.isdigit() else float.fromhex(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not 0.0 < value < math.inf:
            raise UnpricedError(f"{name} of the {self.mechanism} event is {text!r}; it must be a number above 0")
        return value


@dataclass(frozen=True, slots=True)
class View:
    """What one adversary sees of a charge: how many releases of one unit, how sampled, between which neighbours.

    `sampling_rate` is the hex float of the chance, secret from this adversary, with which a unit takes part in each of
    the releases; `1` is certain or visible participation, for which no amplification is charged.
    """

    releases: int
    sampling_rate: str
    adjacency: Adjacency


@dataclass(frozen=True, slots=True)
class PricedRelease:
    """A channel's release in one round, the same for every unit in it; an absent adversary sees none of it."""

    channel: Channel
    event: PrivacyEvent
    views: Mapping[Adversary, View]

    def canonical(self) -> str:
        """The release as text: equal texts are equal prices."""
        views = {name: [view.releases, view.sampling_rate, view.adjacency] for name, view in self.views.items()}
        told = [self.channel, self.event.mechanism, dict(self.event.parameters), views]
        return json.dumps(told, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_canonical(cls, text: str) -> PricedRelease:
        """What `canonical` wrote. Raises UnpricedError for anything else."""
        try:
            channel, mechanism, parameters, views = json.loads(text)
            release = cls(
                channel, PrivacyEvent(mechanism, parameters), {name: View(*view) for name, view in views.items()}
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise UnpricedError(f"a ledger row holds no release that can be priced: {error}") from error
        if release.canonical() != text:
            raise UnpricedError("a ledger row's release is not written as it is by this program")
        return release


@dataclass(frozen=True, slots=True)
class Unit:
    """Whose privacy is spent: a client's dataset, protected as a whole or row by row."""

    client: str
    dataset: str
    level: Level

    @property
    def whole(self) -> Unit:
        """All of the client's datasets together."""
        return replace(self, dataset=ALL_DATASETS)

    @property
    def at_other_level(self) -> Unit:
        """The same dataset, protected as what this unit does not protect it as."""
        return replace(self, level="example" if self.level == "client" else "client")

    @property
    def data_in_words(self) -> str:
        return "all datasets" if self.dataset == ALL_DATASETS else f"dataset {self.dataset}"


@dataclass(frozen=True, slots=True)
class Budget:
    """What one unit may spend, against each adversary by itself.

    `gaussian_share` says, by adversary, which part of (epsilon, delta) the filter of unamplified Gaussian releases has;
    the rest is the Renyi filter's at the pre-registered `order`. 1 is all of it, 0 nothing: unamplified Gaussian
    releases are then the Renyi filter's too, so that a budget refuses none for its kind.
    """

    epsilon: float
    delta: float
    order: float
    gaussian_share: Mapping[Adversary, float]


@dataclass(frozen=True, slots=True)
class Standing:
    """What a unit may spend and has spent, RESERVED or COMMITTED: counts of releases by their canonical text.

    `budget` is the unit's own, `client_budget` that of all of its client's datasets together, at the unit's level; None
    where none was ever set. `spent` is the unit's own spending by run, `client_spent` that of all the client's units of
    this level. `chosen` says that a person set `budget`, `client_chosen` that one set `client_budget`; `other_level`
    that the same dataset of the client has spent at the other level, or that a person set a budget for it there.
    """

    unit: Unit
    budget: Budget | None
    client_budget: Budget | None
    spent: Mapping[str, Mapping[str, int]]
    client_spent: Mapping[str, int]
    chosen: bool = False
    client_chosen: bool = False
    other_level: bool = False


def chosen_by_person(operator: str) -> bool:
    """Whether `operator`, who set a budget, is a person rather than settings that stood there before."""
    return operator != NODE_CONFIG and not operator.startswith(RUN_PREFIX)
