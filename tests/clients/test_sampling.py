"""Secret Poisson sampling of rows."""

from __future__ import annotations

import os

import numpy as np
import pytest
from scipy import stats

from clients.sampling import RowSampler
from privacy.stream import SecretStream

LEAST_P = 1e-6  # of a test that is right: how rarely it may fail


def known(key: int) -> SecretStream:
    return SecretStream(lambda count: key.to_bytes(count, "big"))


def counts(sampler: RowSampler, rows: int, steps: int) -> np.ndarray:
    """[steps, rows] of 0 and 1."""
    joined = np.zeros((steps, rows), dtype=np.int64)
    for step in range(steps):
        joined[step, sampler.draw()] = 1
    return joined


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_every_row_joins_at_the_rate_and_the_batch_size_is_binomial(rate: float) -> None:
    rows, steps = 200, 2000
    joined = counts(RowSampler(rows, rate, SecretStream(os.urandom)), rows, steps)
    expected, spread = steps * rate, steps * rate * (1 - rate)
    by_row = ((joined.sum(axis=0) - expected) ** 2 / spread).sum()
    assert stats.chi2.sf(by_row, rows) > LEAST_P
    assert stats.chi2.cdf(by_row, rows) > LEAST_P  # a quota for each row would be too even
    sizes = joined.sum(axis=1)
    edges = stats.binom.ppf(np.linspace(0, 1, 11)[1:-1], rows, rate)
    bins = np.unique(np.concatenate([[-1.0], edges, [float(rows)]]))
    wanted = steps * np.diff(stats.binom.cdf(bins, rows, rate))
    found = np.histogram(sizes, bins + 0.5)[0]
    keep = wanted > 5
    assert stats.chi2.sf(((found - wanted)[keep] ** 2 / wanted[keep]).sum(), keep.sum() - 1) > LEAST_P


def test_rows_and_steps_join_independently_of_each_other() -> None:
    rows, steps, rate = 60, 4000, 0.3
    joined = counts(RowSampler(rows, rate, SecretStream(os.urandom)), rows, steps) - rate
    spread = rate * (1 - rate)
    for pair in (joined[:, :-1] * joined[:, 1:], joined[:-1] * joined[1:]):
        deviation = pair.sum() / (spread * np.sqrt(pair.size))
        assert 2 * stats.norm.sf(abs(deviation)) > LEAST_P


def test_the_draws_are_secret() -> None:
    """They depend on the stream's key alone, and two runs have two keys."""
    same = [counts(RowSampler(50, 0.5, known(1)), 50, 20) for _ in range(2)]
    assert np.array_equal(*same)
    assert not np.array_equal(same[0], counts(RowSampler(50, 0.5, known(2)), 50, 20))
    runs = [counts(RowSampler(50, 0.5, SecretStream(os.urandom)), 50, 20) for _ in range(2)]
    assert not np.array_equal(*runs)


def test_a_rate_of_one_takes_every_row() -> None:
    assert RowSampler(5, 1.0, SecretStream(os.urandom)).draw().tolist() == [0, 1, 2, 3, 4]


def test_a_draw_may_be_empty() -> None:
    assert RowSampler(3, 1e-9, known(1)).draw().tolist() == []


def test_no_row_joins_oftener_than_it_may_and_the_others_are_not_touched() -> None:
    rows, steps = 100, 40
    free = counts(RowSampler(rows, 0.2, known(7)), rows, steps)
    capped = counts(RowSampler(rows, 0.2, known(7), most=3), rows, steps)
    assert free.sum(axis=0).max() > 3
    assert np.array_equal(capped, np.where(free.cumsum(axis=0) <= 3, free, 0))
