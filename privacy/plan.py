"""What a run of certain settings releases each round, the budget that fits it, and what it comes to in the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from contract.config import RunConfig
from contract.errors import ConfigError
from contract.privacy_records import ADVERSARIES, Adjacency, Adversary, Budget, Channel, Level, PricedRelease, View
from privacy.accountant import Price, count, epsilon, price, spent
from privacy.filters import require_sound
from privacy.gaussian import gaussian_event
from privacy.renyi import SampledGaussian, renyi_allowance
from privacy.skellam import skellam_event

WHOLE_ORDERS = (*range(2, 65), *range(72, 129, 8), *range(144, 257, 16), *range(288, 513, 32), *range(576, 1025, 64))
FRACTIONAL_ORDERS = tuple(quarters / 4 for quarters in range(5, 24) if quarters % 4)
"""1.25 to 5.75: where budgets are large; Skellam sums have no price at these."""


def round_releases(config: RunConfig, *, scale: float | None, size: int) -> tuple[PricedRelease, ...]:
    """What one round costs every unit that takes part in it, a release for each channel that has a price.

    `size` is how many values the round trains, `scale` the steps per unit of a noisy sum (None unless `dp` is client).
    Raises ConfigError where the settings need a scale that is not given, or are out of a mechanism's range.
    """
    if config.dp == "off":
        return ()
    if config.dp == "client":
        return (_noisy_sum(config, scale, size),)
    if config.wire != "dp":
        return (_dp_sgd(config),)
    return (_wire(config, "wire_forward", config.wire_clip_forward),
            _wire(config, "wire_backward", config.wire_clip_backward),
            _dp_sgd(config))  # fmt: skip


@lru_cache(maxsize=256)
def register_budget(config: RunConfig) -> Budget:
    """`dp-epsilon` and `dp-delta` as a budget for what the run needs. Raises ConfigError where `dp` is off."""
    if config.dp == "off":
        raise ConfigError("dp is off: nothing of the run has a price, so it has no budget")
    # A Skellam sum's price has the shape of a Gaussian's at every scale, so that any scale finds its order.
    releases = round_releases(config, scale=1.0, size=1)
    return budget_for(releases, config.dp_epsilon, config.dp_delta, level_of(config))


def budget_for(releases: Iterable[PricedRelease], epsilon: float, delta: float, level: Level) -> Budget:
    """A budget for more of such releases: the Renyi filter's order, and the two filters' shares.

    Against an adversary who sees releases for both filters each gets half; for one alone, all. The order is the one of
    a fixed grid that affords the most rounds.
    """
    releases = list(releases)
    seen = {adversary: _prices(releases, adversary) for adversary in ADVERSARIES}
    shares = {adversary: _share(prices) for adversary, prices in seen.items()}
    amplified = [one for prices in seen.values() for one in prices if isinstance(one.renyi, SampledGaussian)]
    rest = min((1.0 - share for share in shares.values() if share < 1.0), default=1.0)
    order = best_order(epsilon * rest, delta * rest, level, amplified[:1])
    return Budget(epsilon, delta, order, shares)


def best_order(epsilon: float, delta: float, level: Level, amplified: Iterable[Price] = ()) -> float:
    """The order that affords the most: of the releases in `amplified`, or of Gaussians and sums like them.

    At client level it is a whole one, as Skellam sums need it.
    """
    sampled = [one for one in amplified if one.renyi is not None]
    orders: tuple[float, ...] = WHOLE_ORDERS if level == "client" else (*FRACTIONAL_ORDERS, *WHOLE_ORDERS)

    def affords(order: float) -> tuple[bool, float]:
        allowed = renyi_allowance(epsilon, order, delta)
        if allowed <= 0.0:
            return False, allowed
        return True, allowed / (sum(one.renyi_at(order) for one in sampled) or order)

    return float(max(sorted(orders), key=affords))


def operators_budget(epsilon: float, delta: float, level: Level, before: Budget | None) -> Budget:
    """A budget that an operator sets, for whatever runs come: it has one filter against each adversary.

    The Gaussian filter against the trunk, which sees unamplified releases only, and the Renyi filter against the
    others, which takes every kind. The order is that of the budget in force, where there is one: it was registered
    before anything was released. Raises ConfigError for numbers that are no budget.
    """
    shares: dict[Adversary, float] = {"holder": 0.0, "orchestrator": 0.0, "trunk": 1.0 if level == "example" else 0.0}
    found = Budget(epsilon, delta, 2.0 if before is None else before.order, shares)
    require_sound(found)
    return found if before is not None else replace(found, order=best_order(epsilon, delta, level))


def level_of(config: RunConfig) -> Level:
    """What one unit of a run with differential privacy is."""
    return "client" if config.dp == "client" else "example"


def expected_spend(config: RunConfig, *, scale: float | None, size: int) -> dict[Adversary, float]:
    """The epsilon of all `num-rounds` rounds for a unit that takes part in each, by adversary that sees of them."""
    budget = register_budget(config)
    counted = {text: times * config.num_rounds for text, times in _count(config, scale, size).items()}
    found = {}
    for adversary in ADVERSARIES:
        total = spent(counted, adversary, budget.order)
        if total:
            found[adversary] = epsilon(total, budget, adversary)
    return found


def _count(config: RunConfig, scale: float | None, size: int) -> dict[str, int]:
    return count(round_releases(config, scale=scale, size=size))


def _prices(releases: Iterable[PricedRelease], adversary: Adversary) -> list[Price]:
    return [found for release in releases if (found := price(release, adversary)) is not None]


def _share(prices: Iterable[Price]) -> float:
    gaussian = {one.renyi is None for one in prices}
    if gaussian == {True, False}:
        return 0.5
    return 1.0 if gaussian == {True} else 0.0


def _noisy_sum(config: RunConfig, scale: float | None, size: int) -> PricedRelease:
    if scale is None:
        raise ConfigError("dp is client: its price needs the scale of the noisy sum")
    event = skellam_event(config.dp_noise_multiplier, config.dp_clip, scale, size)
    view = View(1, "1", "zero-out")
    return PricedRelease("adapter_sum", event, {"holder": view, "orchestrator": view})


def _dp_sgd(config: RunConfig) -> PricedRelease:
    """A row takes part in each step by a chance, secret from whoever gets nothing of what the trunk is sent.

    A trained trunk's half comes of the very rows that were drawn, so that it may tell who was: where it is released
    too, nobody is charged less for the draw.
    """
    drawn_in_secret = config.wire != "dp" or config.trunk_adapter == "frozen"
    rate = "1" if config.dp_sample_rate == 1.0 else config.dp_sample_rate.hex()
    seen = View(config.local_steps, rate, "zero-out") if drawn_in_secret else _visible(config, "zero-out")
    views: dict[Adversary, View] = {"holder": seen, "orchestrator": seen}
    if config.wire == "dp":
        views["trunk"] = _visible(config, "replace")
    return PricedRelease("adapter_sum", gaussian_event(config.dp_noise_multiplier, config.dp_clip), views)


def _wire(config: RunConfig, channel: Channel, clip: float) -> PricedRelease:
    views: dict[Adversary, View] = {"trunk": _visible(config, "replace")}
    if config.trunk_adapter == "trained":
        views |= {"holder": _visible(config, "zero-out"), "orchestrator": _visible(config, "zero-out")}
    return PricedRelease(channel, gaussian_event(config.wire_noise_multiplier, clip), views)


def _visible(config: RunConfig, adjacency: Adjacency) -> View:
    return View(config.wire_releases, "1", adjacency)
