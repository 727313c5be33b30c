"""What releases cost each adversary: a price for one, the sum for many, and the epsilon that a sum stands for.

Unamplified Gaussian releases are priced in Gaussian DP, exactly; Poisson-sampled Gaussian releases and Skellam sums in
Renyi DP at the order that their budget was registered with. What is neither has no price and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version

from contract.errors import UnpricedError
from contract.privacy_records import ADVERSARIES, CHANNELS, Adversary, Budget, PricedRelease, PrivacyEvent, View
from privacy.gaussian_curve import gaussian_epsilon, gaussian_mu_squared
from privacy.renyi import SampledGaussian, SkellamSum, renyi_epsilon

ACCOUNTANT = f"trunkline 1, dp-accounting {version('dp-accounting')}"
"""Who priced a row. Other versions may find other last digits, or refuse what this one prices."""

_PARAMETERS = {
    "gaussian": {"noise_multiplier", "clip"},
    "skellam": {"noise_multiplier", "clip", "scale", "size", "rounding_bias"},
}
_CERTAIN = ("1", (1.0).hex())


@dataclass(frozen=True, slots=True)
class Price:
    """What one charge costs one adversary's account: mu^2 of Gaussian DP, or a Renyi price, never both."""

    gaussian: Fraction
    renyi: SkellamSum | SampledGaussian | None

    def renyi_at(self, order: float) -> float:
        """The Renyi part at `order`, in nats; raises UnpricedError where it has no price there."""
        return 0.0 if self.renyi is None else self.renyi.at(order)


@dataclass(frozen=True, slots=True)
class Spent:
    """Prices added up: `gaussian` is the sum of mu^2, exact; `renyi` the sum at one order, in nats."""

    gaussian: Fraction = Fraction(0)
    renyi: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.gaussian + other.gaussian, self.renyi + other.renyi)

    def __bool__(self) -> bool:
        return bool(self.gaussian or self.renyi)


def price(release: PricedRelease, adversary: Adversary) -> Price | None:
    """What `release` costs `adversary`, None where it sees nothing of it.

    Raises UnpricedError, naming the field, for whatever this accountant has no theorem for.
    """
    if release.channel not in CHANNELS:
        raise UnpricedError(f"the channel {release.channel!r} is unknown")
    if strangers := set(release.views) - set(ADVERSARIES):
        raise UnpricedError(f"the adversary {min(strangers)!r} is unknown")
    known = _PARAMETERS.get(release.event.mechanism)
    if known is None:
        raise UnpricedError(f"the mechanism {release.event.mechanism!r} has no price")
    if set(release.event.parameters) != known:
        raise UnpricedError(
            f"a {release.event.mechanism} event has {', '.join(sorted(release.event.parameters)) or 'no parameters'}; "
            f"it must have {', '.join(sorted(known))}"
        )
    view = release.views.get(adversary)
    if view is None:
        return None
    _check_releases(view)
    return (
        _gaussian_price(release.event, view) if release.event.mechanism == "gaussian" else _skellam_price(release, view)
    )


def spent(releases: Mapping[str, int], adversary: Adversary, order: float) -> Spent:
    """What `releases` cost `adversary` together: canonical texts with how often each was charged.

    The same to the bit in whatever order they are counted. Raises UnpricedError for one without a price.
    """
    gaussian, renyi = Fraction(0), []
    for text in sorted(releases):
        found, times = _priced(text, adversary), releases[text]
        if times < 0:
            raise UnpricedError(f"a release was charged {times} times")
        if found is not None and times:
            gaussian += times * found.gaussian
            renyi.append(times * found.renyi_at(order))
    return Spent(gaussian, math.fsum(renyi))


def count(releases: tuple[PricedRelease, ...] | list[PricedRelease]) -> dict[str, int]:
    """Releases as `spent` takes them."""
    counted: dict[str, int] = {}
    for release in releases:
        counted[release.canonical()] = counted.get(release.canonical(), 0) + 1
    return counted


def epsilon(spent: Spent, budget: Budget, adversary: Adversary) -> float:
    """The epsilon at the budget's delta of what was spent; infinite where the budget covers no such release at all.

    Each filter answers at its share of delta, and the two add up (Lyu 2022: the interactive mechanisms that the two
    filters are compose as if they were not interleaved).
    """
    gaussian, renyi = divided(spent, budget, adversary)
    share = gaussian_share(budget, adversary)
    found = 0.0
    if gaussian:
        found += gaussian_epsilon(gaussian, share * budget.delta)
    if renyi:
        found += renyi_epsilon(renyi, budget.order, (1.0 - share) * budget.delta) if share < 1.0 else math.inf
    return found


def divided(spent: Spent, budget: Budget, adversary: Adversary) -> tuple[Fraction, float]:
    """What the Gaussian filter and what the Renyi filter answer for.

    A budget without a share for the Gaussian filter charges its releases to the Renyi one, at order * mu^2 / 2 (Mironov
    2017, proposition 7), so that it refuses no release for its kind.
    """
    if gaussian_share(budget, adversary) > 0.0 or not spent.gaussian:
        return spent.gaussian, spent.renyi
    try:
        moved = math.nextafter(float(spent.gaussian * Fraction(budget.order) / 2), math.inf)
    except OverflowError:
        moved = math.inf
    return Fraction(0), spent.renyi + moved


def gaussian_share(budget: Budget, adversary: Adversary) -> float:
    """The Gaussian filter's share of the budget; 0 for an adversary whom the budget does not name."""
    return budget.gaussian_share.get(adversary, 0.0)


@lru_cache(maxsize=4096)
def _priced(text: str, adversary: Adversary) -> Price | None:
    return price(PricedRelease.from_canonical(text), adversary)


def _check_releases(view: View) -> None:
    if type(view.releases) is not int or view.releases < 1:
        raise UnpricedError(f"a view has releases {view.releases!r}; it must be a whole number from 1 on")
    if view.adjacency not in ("zero-out", "replace"):
        raise UnpricedError(f"the adjacency {view.adjacency!r} is unknown")


def _gaussian_price(event: PrivacyEvent, view: View) -> Price:
    multiplier = _hex(event, "noise_multiplier")
    _hex(event, "clip")
    rate = _sampling_rate(view)
    if rate == 1.0:
        sensitivity = 1 if view.adjacency == "zero-out" else 2
        return Price(gaussian_mu_squared(multiplier, sensitivity, view.releases), None)
    if view.adjacency != "zero-out":
        raise UnpricedError(
            f"Gaussian noise sampled at {rate} has no price between neighbours that replace a unit; it must be zero-out"
        )
    return Price(Fraction(0), SampledGaussian(multiplier, rate, view.releases))


def _skellam_price(release: PricedRelease, view: View) -> Price:
    event, rate = release.event, _sampling_rate(view)
    if rate != 1.0 or view.adjacency != "zero-out":
        raise UnpricedError(
            f"a Skellam sum sampled at {rate} with {view.adjacency} neighbours has no price; "
            "it must be certain participation and zero-out"
        )
    size = event.parameters["size"]
    if not (size.isascii() and size.isdigit() and int(size) >= 1):
        raise UnpricedError(f"size of the skellam event is {size!r}; it must be a whole number from 1 on")
    multiplier, clip, scale, bias = (
        _hex(event, name) for name in ("noise_multiplier", "clip", "scale", "rounding_bias")
    )
    return Price(Fraction(0), SkellamSum.rounded(multiplier, clip, scale, int(size), bias, view.releases))


def _hex(event: PrivacyEvent, name: str) -> float:
    """A parameter above 0, which must be written as `float.hex()` writes it: one number, one text."""
    value, text = event.number(name), event.parameters[name]
    if text != value.hex():
        raise UnpricedError(f"{name} of the {event.mechanism} event is {text!r}; it must be written {value.hex()!r}")
    return value


def _sampling_rate(view: View) -> float:
    text = view.sampling_rate
    if text in _CERTAIN:
        return 1.0
    try:
        rate = float.fromhex(text)
    except (ValueError, OverflowError, TypeError):
        rate = math.nan
    if not 0.0 < rate < 1.0 or rate.hex() != text:
        raise UnpricedError(f"a view's sampling_rate is {text!r}; it must be '1' or a hex float above 0 and below 1")
    return rate
