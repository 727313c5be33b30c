"""Intervals for what an attack scored, 95 % unless told otherwise.

Tokens of one row depend on each other, rows do not: every interval comes of drawing whole rows anew (the percentile
bootstrap, Efron and Tibshirani 1993, chapter 13). A bootstrap of rows that all went alike is a point, and knows nothing
of what few rows could not show; so no interval of a rate is narrower than Wilson's for as many independent tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DRAWS = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """`value` is the point estimate; all three have its unit."""

    value: float
    lower: float
    upper: float


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The interval of a rate over independent trials (Wilson 1927). Raises ValueError for no trials."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is no rate")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, spread = successes / trials, z * z / trials
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials)) / (1 + spread)
    return Interval(rate, min(rate, max(0.0, middle - half)), max(rate, min(1.0, middle + half)))


def rate_of_rows(hits_R: Sequence[int], sizes_R: Sequence[int], seed: int) -> Interval:
    """Share of hits over rows of unequal sizes. Raises ValueError where there is nothing to hit."""
    hits, sizes = _columns(hits_R, sizes_R)
    drawn = _drawn_rows(len(sizes), seed)
    bounds = _percentiles((drawn @ hits) / (drawn @ sizes))
    least = wilson(int(hits.sum()), int(sizes.sum()))
    return Interval(least.value, min(bounds[0], least.lower), max(bounds[1], least.upper))


def difference_of_rows(hits_R: Sequence[int], others_R: Sequence[int], sizes_R: Sequence[int], seed: int) -> Interval:
    """Share of `hits_R` less that of `others_R`, on the same rows: each is drawn for both or for neither."""
    hits, sizes = _columns(hits_R, sizes_R)
    others, _ = _columns(others_R, sizes_R)
    drawn = _drawn_rows(len(sizes), seed)
    bounds = _percentiles((drawn @ (hits - others)) / (drawn @ sizes))
    return Interval(float((hits.sum() - others.sum()) / sizes.sum()), *bounds)


def bootstrap_pairs(inside_M: Floats, outside_N: Floats, seed: int) -> tuple[Counts, Counts]:
    """How often each of M members and N others is drawn, in DRAWS draws: two arrays of DRAWS rows."""
    generator = np.random.default_rng(seed)
    return tuple(  # type: ignore[return-value]
        generator.multinomial(len(part), np.full(len(part), 1 / len(part)), size=DRAWS)
        for part in (inside_M, outside_N)
    )


def percentile_interval(value: float, drawn: Floats) -> Interval:
    """`value` within the percentiles of its bootstrap draws."""
    lower, upper = _percentiles(drawn)
    return Interval(value, min(value, lower), max(value, upper))


def _columns(hits_R: Sequence[int], sizes_R: Sequence[int]) -> tuple[Counts, Counts]:
    hits, sizes = np.asarray(hits_R, dtype=np.int64), np.asarray(sizes_R, dtype=np.int64)
    if hits.shape != sizes.shape or not sizes.size or (sizes < 1).any() or (hits < 0).any() or (hits > sizes).any():
        raise ValueError(f"{hits.size} rows of hits do not fit {sizes.size} rows of at least one token")
    return hits, sizes


def _drawn_rows(rows: int, seed: int) -> Counts:
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=DRAWS)


def _percentiles(drawn: Floats) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    lower, upper = np.percentile(drawn, [tail, 100 - tail])
    return float(lower), float(upper)
