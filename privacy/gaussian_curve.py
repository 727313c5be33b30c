"""What Gaussian releases cost together: exact sums of mu^2, and the exact curve between mu and (epsilon, delta).

A Gaussian release is mu-GDP with mu = sensitivity over the noise's deviation, and releases compose as the sum of mu^2
(Dong, Roth, Su: Gaussian Differential Privacy, 2019, corollary 3.3), a rational number where the noise multiplier is a
float. What mu allows is the curve of Balle and Wang (2018, theorem 8), taken from dp-accounting.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

_MARGIN = Fraction(10**9 + 1, 10**9)
"""The library finds a noise deviation to about 1e-12; a billionth more noise is beyond what its rounding can miss."""


def gaussian_mu_squared(noise_multiplier: float, sensitivity: int, releases: int) -> Fraction:
    """mu^2 of `releases` Gaussian releases, exactly; `sensitivity` counts clips: 1 for zero-out, 2 for replace."""
    return releases * (Fraction(sensitivity) / Fraction(noise_multiplier)) ** 2


@lru_cache(maxsize=4096)
def gaussian_epsilon(mu_squared: Fraction, delta: float) -> float:
    """The epsilon at `delta` of what costs `mu_squared`, to 1e-12; infinite where no float holds mu."""
    import numpy as np
    from dp_accounting import get_epsilon_gaussian

    if not mu_squared:
        return 0.0
    try:
        deviation = 1.0 / math.sqrt(mu_squared)
    except (OverflowError, ZeroDivisionError):
        return math.inf if mu_squared > 1 else 0.0
    with np.errstate(divide="ignore"):  # the library probes where delta is 0 to the last bit
        return float(get_epsilon_gaussian(deviation, delta))


@lru_cache(maxsize=1024)
def gaussian_allowance(epsilon: float, delta: float) -> Fraction:
    """The largest mu^2 that (epsilon, delta) covers, less a margin that no rounding reaches (2e-9 of it)."""
    import numpy as np
    from dp_accounting import get_sigma_gaussian

    with np.errstate(divide="ignore"):
        deviation = Fraction(float(get_sigma_gaussian(epsilon, delta)))
    return 1 / (deviation * _MARGIN) ** 2
