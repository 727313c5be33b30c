"""What an attack's scores are worth: ranks of members against others, and exposure of canaries. Pure numpy.

A score is higher where the attacker believes more that a text was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from privacy.audits.intervals import Interval, bootstrap_pairs, percentile_interval, wilson

Floats = npt.NDArray[np.float64]
Scores = Sequence[float] | Floats


def auc(members: Scores, others: Scores, seed: int) -> Interval:
    """The chance that a random member scores above a random other one, ties by half: 0.5 is guessing, 1 is certainty.

    The interval draws both groups anew. Raises ValueError where either is empty or a score is not finite.
    """
    inside_M, outside_N = _scores(members), _scores(others)
    wins_MN = (inside_M[:, None] > outside_N) + 0.5 * (inside_M[:, None] == outside_N)
    drawn_M, drawn_N = bootstrap_pairs(inside_M, outside_N, seed)
    drawn = ((drawn_M @ wins_MN) * drawn_N).sum(axis=1) / (len(inside_M) * len(outside_N))
    return percentile_interval(float(wins_MN.mean()), drawn)


def caught_at(members: Scores, others: Scores, false_alarms: float, seed: int) -> Interval:
    """Share of members scored above a threshold that at most a share `false_alarms` of the others pass.

    The interval draws both groups anew, each draw with its own threshold, and is at least Wilson's. With fewer others
    than 1 / `false_alarms` the threshold is the highest of them. Raises ValueError as `auc` does.
    """
    inside_M, outside_N = _scores(members), _scores(others)
    caught = int((inside_M > _threshold(np.sort(outside_N), false_alarms)).sum())
    drawn_M, drawn_N = bootstrap_pairs(inside_M, outside_N, seed)
    order = np.argsort(outside_N)
    shares = [
        float(times_M @ (inside_M > _threshold(np.repeat(outside_N[order], times_N[order]), false_alarms)))
        for times_M, times_N in zip(drawn_M, drawn_N, strict=True)
    ]
    drawn = percentile_interval(caught / len(inside_M), np.asarray(shares) / len(inside_M))
    least = wilson(caught, len(inside_M))
    return Interval(drawn.value, min(drawn.lower, least.lower), max(drawn.upper, least.upper))


def exposures(canaries: Scores, unseen: Scores) -> Floats:
    """Bits by which each canary stands out: log2 of (unseen + 1) less log2 of its rank among them, 1 being the highest.

    After Carlini et al., "The Secret Sharer" (USENIX Security 2019), section 4. A tie counts against the attacker.
    Guessing gives about 1.44 bits in the mean (1 / ln 2), perfect recall log2 of (unseen + 1).
    """
    inside, outside = _scores(canaries), np.sort(_scores(unseen))
    ranks = 1 + len(outside) - np.searchsorted(outside, inside, side="left")
    found: Floats = math.log2(len(outside) + 1) - np.log2(ranks)
    return found


def guessed_exposure(unseen: int) -> float:
    """The mean exposure of a canary that nothing tells apart from `unseen` others: every rank is as likely."""
    ranks = np.arange(1, unseen + 2)
    return float(math.log2(unseen + 1) - np.log2(ranks).mean())


def mean_exposure(canaries: Scores, unseen: Scores, seed: int) -> Interval:
    """The mean of `exposures`; the interval draws the canaries anew."""
    bits = exposures(canaries, unseen)
    drawn_M, _ = bootstrap_pairs(bits, bits, seed)
    return percentile_interval(float(bits.mean()), (drawn_M @ bits) / len(bits))


def _threshold(ascending_N: Floats, false_alarms: float) -> float:
    """The lowest of the scores that at most that share of them lies above."""
    allowed = int(false_alarms * len(ascending_N) + 1e-9)
    return float(ascending_N[-1 - allowed])


def _scores(values: Scores) -> Floats:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite numbers, at least one: {scores.size} of shape {scores.shape}")
    return scores
