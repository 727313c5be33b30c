"""Poisson numbers with large and small means, as distances from the mean's whole part, from a secret stream.

Means of 10 and more: transformed rejection with a squeeze, PTRS (Hoermann, "The transformed rejection method for
generating Poisson random variables", 1993), accepted by Loader's saddle-point form of the log-probability ("Fast and
Accurate Computation of Binomial Probabilities", 2000), whose terms stay small where a mean is 2^59. Smaller means:
inversion of the tail, summed from its far end.
"""

from __future__ import annotations

import math

import numpy as np

from contract.errors import PrivacyError
from privacy.stream import Floats, SecretStream

SMALLEST_REJECTED = 10.0
"""Hoermann's hat covers the probabilities from this mean on."""
SURE_FROM = 0.07
"""Nearer to the middle than this, an offset is accepted with a chance of at least `Proposal.sure`."""
_TURNS = 100
"""One turn proposes as many as are most likely enough; 100 are never taken."""
_TAIL_END = 2.0**-140
_NEAR = 0.1
_STIRLING_TABLE = np.array(
    [0.0] + [math.lgamma(k + 1.0) - (k + 0.5) * math.log(k) + k - 0.5 * math.log(2.0 * math.pi) for k in range(1, 16)]
)


def poisson_offsets(stream: SecretStream, mean: float, size: int) -> Floats:
    """`size` independent Poisson(mean) numbers minus floor(mean), whole numbers, exact for means up to 2^59."""
    if mean < SMALLEST_REJECTED:
        return _inverted(stream, mean, size)
    proposal = Proposal(mean)
    offsets = np.empty(size)
    filled = 0
    for _ in range(_TURNS):
        found = proposal.draw(stream, size - filled)[: size - filled]
        offsets[filled : filled + found.size] = found
        filled += found.size
        if filled == size:
            return offsets
    raise PrivacyError(f"{size - filled} of {size} Poisson numbers of mean {mean} were rejected {_TURNS} times")


class Proposal:
    """Hoermann's hat for one mean: an offset is floor((2 a / us + b) u + ...) with u uniform in (-1/2, 1/2).

    With his constants the probabilities stick out of the hat by up to 0.6 % at means below 1,000, and the region in
    which no probability is looked at reaches 0.4 % too far. The hat is therefore 1 % larger here, the region smaller.
    """

    def __init__(self, mean: float) -> None:
        self._mean = mean
        self._whole = math.floor(mean)
        self._part = mean - self._whole
        self._b = 0.931 + 2.53 * math.sqrt(mean)
        self._a = -0.059 + 0.02483 * self._b
        self._alpha = 1.01 * (1.1239 + 1.1328 / (self._b - 3.4))
        self.sure = (0.9277 - 3.6224 / (self._b - 2.0)) / 1.01 - 0.01

    def draw(self, stream: SecretStream, wanted: int) -> Floats:
        """Accepted offsets, most often `wanted` of them or a few more."""
        tries = int(self._alpha * (wanted + 4.0 * math.sqrt(wanted))) + 8
        u, chance = stream.uniform((2, tries))
        u -= 0.5
        us = 0.5 - np.abs(u)
        offsets = self.offsets(u)
        accepted = (us >= SURE_FROM) & (chance <= self.sure)
        unsure = np.flatnonzero(~accepted)
        accepted[unsure] = np.log(chance[unsure]) <= self.log_ratio(us[unsure], offsets[unsure])
        found: Floats = offsets[accepted]
        return found

    def offsets(self, u: Floats) -> Floats:
        """The offsets that are proposed for u in (-1/2, 1/2)."""
        proposed: Floats = np.floor((2.0 * self._a / (0.5 - np.abs(u)) + self._b) * u + (self._part + 0.43))
        return proposed

    def log_ratio(self, us: Floats, offsets: Floats) -> Floats:
        """Log of (the offset's probability over the hat): what the log of a uniform number must not exceed."""
        hat = np.log((self._a / (us * us) + self._b) / self._alpha)
        ratio: Floats = hat + log_probability(self._whole, self._part, offsets)
        return ratio


def log_probability(whole: int, part: float, offsets: Floats) -> Floats:
    """Log of the Poisson probability of whole + offset at the mean whole + part; -inf below 0."""
    count = offsets + whole
    if count.min(initial=1.0) >= 1.0:
        return _saddle_point(count, whole + part, offsets - part)
    positive = count >= 1.0
    value = _saddle_point(np.where(positive, count, 1.0), whole + part, np.where(positive, offsets, 1.0 - whole) - part)
    found: Floats = np.where(positive, value, np.where(count == 0.0, -(whole + part), -np.inf))
    return found


def _saddle_point(count: Floats, mean: float, away: Floats) -> Floats:
    """The log-probability of counts of at least 1, with away = count - mean known better than that difference."""
    value: Floats = -_stirling_error(count) - _deviance(count, mean, away) - 0.5 * np.log(2.0 * math.pi * count)
    return value


def _stirling_error(count: Floats) -> Floats:
    """log(count!) less Stirling's formula, for whole numbers of at least 1."""
    inverse = 1.0 / count
    square = inverse * inverse
    error: Floats = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188))))
    small = np.flatnonzero(count < _STIRLING_TABLE.size)
    error[small] = _STIRLING_TABLE[count[small].astype(np.intp)]
    return error


def _deviance(count: Floats, mean: float, away: Floats) -> Floats:
    """count log(count / mean) + mean - count: Loader's bd0, a series near the mean, where the terms would cancel."""
    v = away / (count + mean)
    square = v * v
    near = min(float(square.max(initial=0.0)), _NEAR * _NEAR)
    series = np.zeros_like(v)
    for power in range(math.ceil(53.0 / -math.log2(near)) if near else 0, 0, -1):
        series = square * (1.0 / (2 * power + 1) + series)
    deviance: Floats = v * (away + 2.0 * count * series)
    if near == _NEAR * _NEAR:
        far = np.flatnonzero(np.abs(v) >= _NEAR)
        deviance[far] = count[far] * np.log(count[far] / mean) - away[far]
    return deviance


def _inverted(stream: SecretStream, mean: float, size: int) -> Floats:
    """As many as the tails P(X > 0), P(X > 1), ... that exceed a uniform number."""
    chances = [math.exp(-mean)]
    while chances[-1] > _TAIL_END or len(chances) <= mean:
        chances.append(chances[-1] * mean / len(chances))
    rising_tails = np.cumsum(chances[:0:-1])
    counts = rising_tails.size - np.searchsorted(rising_tails, stream.fine_uniform(size), side="right")
    return counts.astype(np.float64) - math.floor(mean)
