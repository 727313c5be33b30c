"""Renyi prices: at one order, what Skellam sums and Poisson-sampled Gaussian releases cost, and what a budget allows.

A price is an upper bound of the Renyi divergence in nats (Mironov 2017); prices at one order add up. Every price is
rounded up beyond the error of the floating point that finds it, so that a filter errs on the side of refusing.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import lru_cache

from contract.errors import UnpricedError
from privacy.skellam import rounded_norm_bound2

SMALLEST_ORDER = 1.05
"""dp-accounting converts no order of 1.01 or less: the bound is not stable there."""
_RELATIVE_MARGIN, _ABSOLUTE_MARGIN = 1e-9, 1e-12
_PROBE_DELTA = 1e-30


@dataclass(frozen=True, slots=True)
class SkellamSum:
    """Integers summed with Skellam noise of variance `variance`, where one unit's part has bounded norms.

    `l2_squared` and `l1` bound the part's squared L2 norm and its L1 norm, in steps. The bound is Agarwal, Kairouz and
    Liu: The Skellam Mechanism (2021), theorem 3.5 and corollary 3.6, which holds at whole orders of 2 and more.
    """

    variance: float
    l2_squared: float
    l1: float
    releases: int = 1

    @classmethod
    def rounded(
        cls, noise_multiplier: float, clip: float, scale: float, size: int, bias: float, releases: int = 1
    ) -> SkellamSum:
        """Of parts of `size` coordinates, clipped to `clip`, times `scale`, and conditionally rounded with `bias`.

        An integer vector's L1 norm is at most its squared L2 norm. Raises UnpricedError where no float holds the
        numbers, or where `bias` is not below 1.
        """
        if not bias < 1.0:
            raise UnpricedError(f"rounding_bias is {bias}; it must be below 1")
        deviation = noise_multiplier * scale * clip
        variance = deviation * deviation
        try:
            l2_squared = rounded_norm_bound2(scale, clip, size, bias)
        except OverflowError:
            l2_squared = math.inf
        if not (0.0 < variance < math.inf and l2_squared < math.inf):
            raise UnpricedError(
                f"a sum of noise multiplier {noise_multiplier}, clip {clip} and scale {scale} overflows"
            )
        return cls(variance, l2_squared, min(l2_squared, math.sqrt(size) * math.sqrt(l2_squared)), releases)

    def at(self, order: float) -> float:
        """The price at `order`. Raises UnpricedError for an order at which the theorem says nothing."""
        if order != int(order) or order < 2:
            raise UnpricedError(f"the budget's order is {order}; a Skellam sum has a price at whole orders from 2 on")
        gaussian = order * self.l2_squared / (2.0 * self.variance)
        fine = ((2.0 * order - 1.0) * self.l2_squared + 6.0 * self.l1) / (4.0 * self.variance * self.variance)
        coarse = 3.0 * self.l1 / (2.0 * self.variance)
        return self.releases * _rounded_up(gaussian + min(fine, coarse))


@dataclass(frozen=True, slots=True)
class SampledGaussian:
    """Gaussian releases in each of which a unit takes part with a secret chance (Mironov, Talwar, Zhang 2019)."""

    noise_multiplier: float
    sampling_rate: float
    releases: int

    def at(self, order: float) -> float:
        """The price at `order`, by dp-accounting; infinite where its series does not converge."""
        return self.releases * _sampled_gaussian(self.noise_multiplier, self.sampling_rate, order)


class _NoConvergence(logging.Filter):
    """Drops the library's warning that a series does not converge: the price is infinite then, and refused."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "failed to converge" not in record.getMessage()


_NO_CONVERGENCE = _NoConvergence()


@lru_cache(maxsize=4096)
def _sampled_gaussian(noise_multiplier: float, sampling_rate: float, order: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    logging.getLogger("absl").addFilter(_NO_CONVERGENCE)
    event = PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier))
    try:
        # The accountant tells no divergence, only the epsilon that it converts to; at one order that can be undone.
        told = RdpAccountant([order]).compose(event).get_epsilon(_PROBE_DELTA)
    except (ArithmeticError, ValueError) as error:
        raise UnpricedError(
            f"Gaussian noise of multiplier {noise_multiplier} sampled at {sampling_rate} has no price: {error}"
        ) from error
    price = float(told) - conversion(order, _PROBE_DELTA)
    if math.isnan(price):
        raise UnpricedError(f"Gaussian noise of multiplier {noise_multiplier} sampled at {sampling_rate} has no price")
    return _rounded_up(max(0.0, price))


def _rounded_up(price: float) -> float:
    return price * (1.0 + _RELATIVE_MARGIN) + _ABSOLUTE_MARGIN


def conversion(order: float, delta: float) -> float:
    """What epsilon is more than the Renyi divergence at `order`: Canonne, Kamath, Steinke (2020), proposition 12."""
    return math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1.0)


def renyi_epsilon(spent: float, order: float, delta: float) -> float:
    """The epsilon at `delta` of what costs `spent` at `order`."""
    return max(0.0, spent + conversion(order, delta)) if spent else 0.0


def renyi_allowance(epsilon: float, order: float, delta: float) -> float:
    """What may be spent at `order` under (epsilon, delta); below 0 where this order can certify nothing."""
    return epsilon - conversion(order, delta)
