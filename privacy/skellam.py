"""Whole-number noise shares for a secure sum: the Skellam mechanism with conditional rounding.

Agarwal, Kairouz and Liu, "The Skellam Mechanism for Differentially Private Federated Learning" (NeurIPS 2021). The
rounding: Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism" (ICML 2021), proposition 4.22. Skellam
shares add up to Skellam noise, so that a sum over any `fewest` honest shares hides each client.

Floating point. The noise is whole numbers without a gap, however large. Its two Poisson numbers are made of floats with
a finer grid than whole numbers, and what is uneven in one is smoothed by the other: the chance of each number is the
exact one's times about 1 +- 2^-40, up to 8 standard deviations.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from contract.errors import ConfigError, PrivacyError, UpdateError
from contract.privacy_records import PrivacyEvent
from privacy.gaussian import clip_rows
from privacy.poisson import poisson_offsets
from privacy.stream import Floats, SecretStream

Codes = npt.NDArray[np.int64]

ROUNDING_BIAS = math.exp(-0.5)
"""Chance (beta) left to a rounding of being longer than its bound; 1 - beta of all first tries succeed at least."""
SMALLEST_VARIANCE, LARGEST_VARIANCE = 1e-3, 2.0**60
_MOST_STEPS = 2.0**52
_CHUNK = 1 << 15  # coordinates; keeps the intermediates in cache
_TRIES = 200
"""With a bias of exp(-1/2) all of them fail with a chance below 2^-144."""


def sample_skellam(stream: SecretStream, variance: float, size: int) -> Codes:
    """Independent Skellam(0, variance) numbers, int64 of shape (size,): differences of two Poisson(variance / 2).

    Raises ConfigError unless the variance is SMALLEST_VARIANCE to LARGEST_VARIANCE.
    """
    if not SMALLEST_VARIANCE <= variance <= LARGEST_VARIANCE:
        raise ConfigError(f"the variance of Skellam noise is {variance}; it must be {SMALLEST_VARIANCE} to 2^60")
    noise = np.empty(size, dtype=np.int64)
    for start in range(0, size, _CHUNK):
        chunk = noise[start : start + _CHUNK]
        offsets = poisson_offsets(stream, variance / 2.0, 2 * chunk.size)
        chunk[:] = offsets[: chunk.size] - offsets[chunk.size :]
    return noise


def rounded_norm_bound2(scale: float, clip: float, size: int, beta: float) -> float:
    """Squared L2 norm, in steps, to which an update of norm `clip` is held when it is rounded to steps of 1 / scale.

    min{(sC)^2 + d/4 + sqrt(2 ln(1/beta)) (sC + sqrt(d)/2), (sC + sqrt(d))^2} for d = `size` coordinates.
    """
    steps, root = scale * clip, math.sqrt(size)
    likely = steps * steps + size / 4.0 + math.sqrt(2.0 * math.log(1.0 / beta)) * (steps + root / 2.0)
    return min(likely, (steps + root) ** 2)


def conditional_round(stream: SecretStream, scaled_d: Floats, bound2: float) -> Codes:
    """Each value up or down by chance, so that its mean is the value, all again until the squared norm is <= `bound2`.

    The squared norm is a float's, off by far less than what an accountant rounds its price up by. Raises PrivacyError
    where no rounding is short enough, as for a vector that is longer than its bound.
    """
    lower_d = np.floor(scaled_d)
    part_d = scaled_d - lower_d
    for _ in range(_TRIES):
        rounded_d = lower_d + (stream.uniform(scaled_d.size) < part_d)
        if float(np.dot(rounded_d, rounded_d)) <= bound2:
            return rounded_d.astype(np.int64)
    raise PrivacyError(
        f"an update of {scaled_d.size} values could not be rounded to a squared norm of {bound2:g} steps"
    )


def skellam_event(noise_multiplier: float, clip: float, scale: float, size: int) -> PrivacyEvent:
    """The event of one sum of `size` coordinates with noise of variance (noise_multiplier scale clip)^2 in all.

    Raises ConfigError for numbers that are not above 0.
    """
    for name, value in (("noise multiplier", noise_multiplier), ("clip", clip), ("scale", scale), ("size", size)):
        if not 0.0 < value < math.inf:
            raise ConfigError(f"the {name} of the Skellam mechanism is {value}; it must be a number above 0")
    numbers = {"noise_multiplier": noise_multiplier, "clip": clip, "scale": scale, "rounding_bias": ROUNDING_BIAS}
    return PrivacyEvent("skellam", {name: float(value).hex() for name, value in numbers.items()} | {"size": str(size)})


class SkellamShare:
    """One client's half of a noisy sum: its update clipped, rounded and with its share of the noise."""

    def __init__(self, event: PrivacyEvent, fewest: int, stream: SecretStream) -> None:
        """`fewest`: how many honest clients' shares the event's whole noise is made of, at the least.

        Raises ConfigError where a share's variance or a clipped update's codes are out of range.
        """
        if fewest < 1:
            raise ConfigError(f"the fewest honest clients of a sum are {fewest}; there must be 1 at least")
        self.event = event
        self._clip, self._scale = event.number("clip"), event.number("scale")
        self._size = int(event.number("size"))
        steps = self._scale * self._clip
        self._bound2 = rounded_norm_bound2(self._scale, self._clip, self._size, event.number("rounding_bias"))
        self._variance = (event.number("noise_multiplier") * steps) ** 2 / fewest
        if not SMALLEST_VARIANCE <= self._variance <= LARGEST_VARIANCE:
            raise ConfigError(
                f"one share of the noise has variance {self._variance:g}, in steps; it must be {SMALLEST_VARIANCE} to "
                "2^60: change dp-noise-multiplier or dp-clip"
            )
        if steps > _MOST_STEPS:
            raise ConfigError(f"dp-clip is {steps:g} steps of the fixed point; it must be at most 2^52")
        self._stream = stream

    def apply(self, update_d: Floats) -> tuple[Codes, PrivacyEvent]:
        """The update, float64 of shape (size,), as noised steps of 1 / scale, int64, and what the whole sum costs.

        Raises UpdateError for another shape and for values that are not finite, before anything is drawn.
        """
        if update_d.shape != (self._size,):
            raise UpdateError(f"the update has shape {update_d.shape}; its noise was priced for ({self._size},)")
        if not np.isfinite(update_d).all():
            place = int(np.argmin(np.isfinite(update_d)))
            raise UpdateError(f"coordinate {place} of the update is {update_d[place]}; it must be finite")
        clipped_d = clip_rows(update_d.astype(np.float64)[np.newaxis], self._clip)[0]
        codes_d = conditional_round(self._stream, clipped_d * self._scale, self._bound2)
        codes_d += sample_skellam(self._stream, self._variance, self._size)
        return codes_d, self.event
