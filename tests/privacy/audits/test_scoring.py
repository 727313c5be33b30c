"""Intervals hold what they must, scores are what a slow reckoning gives, and linear models find what made the data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.audits.intervals import difference_of_rows, rate_of_rows, wilson
from privacy.audits.linear import Whitening, fit_linear, log_likelihoods
from privacy.audits.scoring import auc, caught_at, exposures, guessed_exposure, mean_exposure

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)
ROWS = st.lists(
    st.integers(1, 9).flatmap(lambda size: st.tuples(st.integers(0, size), st.integers(0, size), st.just(size))),
    min_size=1,
    max_size=12,
)


@given(SCORES, SCORES)
@settings(deadline=None, max_examples=25)
def test_auc_is_the_share_of_pairs_won(members: list[float], others: list[float]) -> None:
    won = sum((a > b) + 0.5 * (a == b) for a in members for b in others) / (len(members) * len(others))
    found = auc(members, others, seed=0)
    assert found.value == pytest.approx(won)
    assert 0.0 <= found.lower <= found.value <= found.upper <= 1.0 + 1e-12
    assert auc(others, members, seed=0).value == pytest.approx(1.0 - won)


def test_auc_draws_both_groups_anew() -> None:
    draw = np.random.default_rng(0)
    members, others = draw.normal(0.5, 1.0, 60), draw.normal(0.0, 1.0, 80)
    found = auc(members, others, seed=1)
    # Hanley and McNeil (1982), formula 1: another way to the same standard error.
    area = found.value
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + 59 * (q1 - area**2) + 79 * (q2 - area**2)
    half = 1.96 * math.sqrt(variance / (60 * 80))
    assert (found.upper - found.lower) / 2 == pytest.approx(half, rel=0.25)


@given(SCORES, SCORES, st.sampled_from([0.0, 0.1, 0.5]))
@settings(deadline=None, max_examples=25)
def test_no_more_others_are_accused_than_allowed(members: list[float], others: list[float], share: float) -> None:
    found = caught_at(members, others, share, seed=0)
    best = max(
        sum(score > threshold for score in members) / len(members)
        for threshold in others
        if sum(score > threshold for score in others) <= share * len(others)
    )
    assert found.value == pytest.approx(best)
    assert found.lower <= found.value <= found.upper


@given(SCORES, SCORES)
@settings(deadline=None, max_examples=25)
def test_exposure_counts_ties_against_the_attacker(canaries: list[float], unseen: list[float]) -> None:
    for bits, score in zip(exposures(canaries, unseen), canaries, strict=True):
        rank = 1 + sum(other >= score for other in unseen)
        assert bits == pytest.approx(math.log2(len(unseen) + 1) - math.log2(rank))


def test_a_canary_that_nothing_tells_apart_has_the_guessed_exposure() -> None:
    draw = np.random.default_rng(0)
    found = mean_exposure(draw.normal(size=4000), draw.normal(size=500), seed=0)
    assert found.value == pytest.approx(guessed_exposure(500), abs=0.15)
    assert guessed_exposure(10**6) == pytest.approx(1 / math.log(2), abs=1e-4)
    assert found.lower < found.value < found.upper


@given(st.integers(1, 200).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_wilson_holds_the_rate_and_lies_within_0_and_1(case: tuple[int, int]) -> None:
    hits, trials = case
    found = wilson(hits, trials)
    assert 0.0 <= found.lower <= hits / trials <= found.upper <= 1.0
    assert found.lower < found.upper
    assert wilson(trials - hits, trials).upper == pytest.approx(1.0 - found.lower)


def test_wilson_is_the_known_interval() -> None:
    found = wilson(8, 10)  # Agresti and Coull (1998)
    assert (found.lower, found.upper) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@given(ROWS)
@settings(deadline=None, max_examples=25)
def test_differences_of_rows_are_differences_of_rates(rows: list[tuple[int, int, int]]) -> None:
    ones, others, sizes = zip(*rows, strict=True)
    found = difference_of_rows(ones, others, sizes, seed=0)
    rates = rate_of_rows(ones, sizes, seed=0), rate_of_rows(others, sizes, seed=0)
    assert found.value == pytest.approx(rates[0].value - rates[1].value)
    assert found.lower - 1e-12 <= found.value <= found.upper + 1e-12
    turned = difference_of_rows(others, ones, sizes, seed=0)
    assert (turned.lower, turned.upper) == pytest.approx((-found.upper, -found.lower))
    for rate in rates:
        assert 0.0 <= rate.lower <= rate.value <= rate.upper <= 1.0


def test_the_interval_of_a_rate_is_as_wide_as_rows_differ() -> None:
    """Rows that are right or wrong as a whole count once each; a token is no trial of its own."""
    sizes = [100] * 40
    alike = rate_of_rows([50] * 40, sizes, seed=0)
    apart = rate_of_rows([100, 0] * 20, sizes, seed=0)
    assert alike == wilson(2000, 4000)
    assert apart.upper - apart.lower == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.1)


def test_intervals_of_rows_hold_the_truth_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(7)
    held = 0
    for number in range(300):
        sizes = draw.integers(5, 40, size=40)
        chances = draw.beta(2.0, 6.0, size=40)
        found = rate_of_rows(draw.binomial(sizes, chances), sizes, seed=number)
        held += found.lower <= 0.25 <= found.upper
    assert 0.90 <= held / 300 <= 0.98


@pytest.mark.parametrize("rows", [([], []), ([1], []), ([2], [1]), ([0], [0]), ([-1], [1])])
def test_rows_that_cannot_be_are_refused(rows: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rate_of_rows(*rows, seed=0)


@pytest.mark.parametrize("scores", [[], [math.nan], [math.inf]])
def test_scores_that_are_none_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        auc(scores, [0.0], seed=0)


def test_a_linear_model_finds_slope_offset_and_noise() -> None:
    draw = np.random.default_rng(3)
    slope, offset = draw.normal(size=(3, 4)), draw.normal(size=4)
    mixing = draw.normal(size=(4, 4))
    causes = draw.normal(2.0, 1.0, size=(50_000, 3))
    seen = causes @ slope + offset + draw.normal(size=(50_000, 4)) @ mixing
    found = fit_linear(causes, seen)
    assert found.slope_CD == pytest.approx(slope, abs=0.05)
    assert found.offset_D == pytest.approx(offset, abs=0.15)
    assert found.covariance_DD == pytest.approx(mixing.T @ mixing, abs=0.2)


def test_whitened_likelihoods_are_the_gaussian_ones() -> None:
    from scipy.stats import multivariate_normal

    draw = np.random.default_rng(4)
    mixing = draw.normal(size=(3, 3))
    covariance, means, seen = mixing @ mixing.T, draw.normal(size=(5, 3)), draw.normal(size=(7, 3))
    white = Whitening.of(covariance)
    found = log_likelihoods(white.apply(seen), white.apply(means))
    wanted = np.array([[multivariate_normal.logpdf(row, mean, covariance) for mean in means] for row in seen])
    assert found - found[:, :1] == pytest.approx(wanted - wanted[:, :1])
