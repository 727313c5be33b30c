"""An epsilon from below: how well two neighbouring inputs can be told apart by what a mechanism gave for each.

A mechanism that is mu-GDP lets no test with false positive rate a have a false negative rate under
Phi(Phi^-1(1 - a) - mu) (Dong, Roth and Su, "Gaussian Differential Privacy", 2019, definition 2.6). So one test's two
rates, bounded from above, bound mu from below, and mu gives epsilon at delta (Nasr et al., "Tight Auditing of
Differentially Private Machine Learning", 2023, section 4). The bound is as good as the claim that the mechanism is a
Gaussian one, which it is: it finds noise that is too small, not noise of another kind.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from contract.errors import ConfigError
from privacy.gaussian_curve import gaussian_epsilon
from privacy.stream import Floats

FEWEST_OUTPUTS = 1000
_CHOOSING = 10
"""One output in so many goes to choose the threshold; the others, which it was not made for, judge it. Half way between
the two means is the best there is for Gaussian noise, and needs few to be found."""


def audit_gaussian(without: Floats, with_unit: Floats, delta: float, confidence: float = 0.95) -> float:
    """The epsilon at `delta` that the mechanism has at least, wrong with a chance of at most 1 - `confidence`.

    Each is (n,): one score for every call of the mechanism, larger where the unit seems to be there. The calls must be
    independent, and the same but for the unit. 0 where the two cannot be told apart. Raises ConfigError for fewer than
    FEWEST_OUTPUTS scores a side, for scores that are not finite, and a confidence not within (0, 1).
    """
    from scipy.special import ndtri

    for side in (without, with_unit):
        if side.ndim != 1 or side.size < FEWEST_OUTPUTS or not np.isfinite(side).all():
            raise ConfigError(f"an audit needs {FEWEST_OUTPUTS} finite scores a side or more; it got {side.shape}")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"an audit's confidence is {confidence}; it must be within (0, 1)")
    chosen = [side[: side.size // _CHOOSING] for side in (without, with_unit)]
    judging = [side[side.size // _CHOOSING :] for side in (without, with_unit)]
    threshold = (float(np.mean(chosen[0])) + float(np.mean(chosen[1]))) / 2.0
    missed = (1.0 - confidence) / 2.0
    false_positive_rate = _rate_at_most(int(np.sum(judging[0] > threshold)), judging[0].size, missed)
    false_negative_rate = _rate_at_most(int(np.sum(judging[1] <= threshold)), judging[1].size, missed)
    mu = -float(ndtri(false_positive_rate)) - float(ndtri(false_negative_rate))
    return gaussian_epsilon(Fraction(mu) ** 2, delta) if mu > 0.0 else 0.0


def _rate_at_most(hits: int, tries: int, missed: float) -> float:
    """Clopper and Pearson's upper bound of a rate, exceeded with a chance of at most `missed`."""
    from scipy.special import betaincinv

    return float(betaincinv(hits + 1, tries - hits, 1.0 - missed)) if hits < tries else 1.0
