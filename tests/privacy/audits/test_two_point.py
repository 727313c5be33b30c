from fractions import Fraction

import numpy as np
import pytest

from contract.errors import ConfigError
from privacy.audits.two_point import FEWEST_OUTPUTS, audit_gaussian
from privacy.gaussian_curve import gaussian_allowance, gaussian_epsilon

DELTA = 1e-5
OUTPUTS = 20_000


def scores(mu: float, seed: int, outputs: int = OUTPUTS) -> tuple[np.ndarray, np.ndarray]:
    """Of a mechanism that is mu-GDP and no better."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(outputs), rng.standard_normal(outputs) + mu


def mu_of(epsilon: float) -> float:
    return float(gaussian_allowance(epsilon, DELTA)) ** 0.5


@pytest.mark.parametrize("epsilon", [4.0, 8.0])
def test_an_honest_mechanism_is_accused_no_oftener_than_said_and_a_short_one_is_caught(epsilon: float) -> None:
    """Over 2,000 seeds, 0.3 % of honest mechanisms were accused (5 % are allowed), 0 of 2,000 short ones got away."""
    bounds = [audit_gaussian(*scores(mu_of(epsilon), seed), DELTA) for seed in range(100)]
    assert sum(bound > epsilon for bound in bounds) <= 5
    assert np.mean(bounds) > 0.94 * epsilon
    assert all(audit_gaussian(*scores(1.1 * mu_of(epsilon), seed), DELTA) > epsilon for seed in range(100))


@pytest.mark.parametrize("confidence", [0.5, 0.8])
def test_the_bound_is_wrong_no_oftener_than_its_confidence_allows(confidence: float) -> None:
    bounds = [audit_gaussian(*scores(mu_of(4.0), seed, 2000), DELTA, confidence) for seed in range(300)]
    wrong = np.mean([bound > 4.0 for bound in bounds])
    assert 0.0 < wrong <= 1.0 - confidence


def test_more_outputs_and_less_confidence_give_a_sharper_bound() -> None:
    few, many = scores(mu_of(4.0), 1, 2000), scores(mu_of(4.0), 1, 200_000)
    assert audit_gaussian(*few, DELTA) < audit_gaussian(*many, DELTA) < 4.0
    assert audit_gaussian(*few, DELTA, 0.5) > audit_gaussian(*few, DELTA, 0.99)


def test_what_cannot_be_told_apart_has_a_bound_of_zero() -> None:
    assert audit_gaussian(*scores(0.0, 2), DELTA) == 0.0
    assert audit_gaussian(*reversed(scores(1.0, 2)), DELTA) == 0.0


def test_outputs_that_never_overlap_prove_a_large_epsilon_and_not_an_infinite_one() -> None:
    bound = audit_gaussian(np.zeros(OUTPUTS), np.ones(OUTPUTS), DELTA)
    assert 40.0 < bound < 100.0


def test_the_bound_is_that_of_the_rates_that_clopper_and_pearson_allow() -> None:
    """Where none of 18,000 outputs is on the wrong side, either rate is at most 1 - 0.025^(1 / 18,000)."""
    from scipy.special import ndtri

    rate = 1.0 - 0.025 ** (1.0 / 18_000)
    mu = -2.0 * float(ndtri(rate))
    expected = gaussian_epsilon(Fraction(mu) ** 2, DELTA)
    assert audit_gaussian(np.zeros(OUTPUTS), np.ones(OUTPUTS), DELTA) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "side",
    [np.zeros(FEWEST_OUTPUTS - 1), np.zeros((2, FEWEST_OUTPUTS)), np.full(FEWEST_OUTPUTS, np.nan)],
)
def test_too_few_or_broken_scores_are_refused_on_either_side(side: np.ndarray) -> None:
    good = np.zeros(FEWEST_OUTPUTS)
    for pair in ((side, good), (good, side)):
        with pytest.raises(ConfigError, match="an audit needs 1000 finite scores"):
            audit_gaussian(*pair, DELTA)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ConfigError, match="confidence is"):
        audit_gaussian(*scores(1.0, 3), DELTA, confidence)
