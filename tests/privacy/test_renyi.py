"""Renyi prices are at least what the distributions really diverge by, and convert as dp-accounting converts."""

from __future__ import annotations

import math
from itertools import accumulate

import mpmath
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from scipy.special import ive

from contract.errors import UnpricedError
from privacy.renyi import SampledGaussian, SkellamSum, conversion, renyi_allowance, renyi_epsilon
from privacy.skellam import rounded_norm_bound2

ORDERS = (2, 3, 4, 8, 16, 32, 64)
SHIFTS = (1, 2, 5, 20, 100)
VARIANCES = (0.05, 0.5, 2.0, 10.0, 100.0, 2500.0, 1e5)


def log_skellam(variance: float, most: int) -> list[float]:
    """log P(k) of Skellam noise for k = 0..most: P(k) = exp(-v) I_k(v), by the backward recurrence of its ratios."""
    ratios = [0.0] * (most + 2)
    for k in range(most + 1, 0, -1):
        ratios[k - 1] = 1.0 / (2.0 * k / variance + ratios[k])
    return list(accumulate((math.log(ratio) for ratio in ratios[:most]), initial=math.log(ive(0, variance))))


def exact_divergence(order: int, shift: int, variance: float) -> float:
    """Of Skellam noise shifted by `shift` from Skellam noise, by its sum; P^a Q^(1-a) is centred at about a * shift."""
    reach = (order + 1) * shift + int(60 * math.sqrt(variance)) + 200
    logs = np.array(log_skellam(variance, reach + shift))
    k = np.arange(-reach, reach + 1)
    terms = order * logs[np.abs(k - shift)] + (1 - order) * logs[np.abs(k)]
    top = terms.max()
    assert terms[0] < top - 40, "the sum was cut off"
    assert terms[-1] < top - 40, "the sum was cut off"
    return float((top + math.log(np.exp(terms - top).sum())) / (order - 1))


def test_the_yardstick_is_the_exact_divergence() -> None:
    mpmath.mp.dps = 40
    p = {k: mpmath.exp(-10) * mpmath.besseli(k, 10) for k in range(140)}
    total = sum(p[abs(k - 3)] ** 4 * p[abs(k)] ** -3 for k in range(-120, 121))
    assert exact_divergence(4, 3, 10.0) == pytest.approx(float(mpmath.log(total) / 3), rel=1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_skellam_bound_is_at_least_the_exact_divergence_and_near_it_where_noise_is_fine(variance: float) -> None:
    for order in ORDERS:
        for shift in SHIFTS:
            if order * shift > 1e4 * variance:  # nothing that anybody would release
                continue
            bound = SkellamSum(variance, float(shift * shift), float(shift)).at(order)
            exact = exact_divergence(order, shift, variance)
            assert exact <= bound, (order, shift, variance)
            if variance >= 1e5:
                assert bound == pytest.approx(exact, rel=2e-3, abs=1e-9)


def test_a_skellam_sum_of_fine_steps_costs_what_a_gaussian_does() -> None:
    fine = SkellamSum.rounded(1.5, 0.7, 2.0**24 / 0.7, 1_000_000, math.exp(-0.5))
    for order in (2, 5, 64):
        assert fine.at(order) == pytest.approx(order / (2 * 1.5**2), rel=1e-4)


def test_rounding_makes_a_coarse_sum_dearer() -> None:
    size, scale, beta = 10_000, 100.0, math.exp(-0.5)
    coarse = SkellamSum.rounded(2.0, 1.0, scale, size, beta)
    assert coarse.l2_squared == rounded_norm_bound2(scale, 1.0, size, beta)
    assert coarse.l2_squared == pytest.approx(100**2 + size / 4 + 100 + 50)
    assert coarse.l1 == pytest.approx(100 * math.sqrt(coarse.l2_squared))
    assert coarse.variance == 200.0**2
    assert coarse.at(4) > 1.2 * 4 / (2 * 2.0**2)
    few = SkellamSum.rounded(2.0, 1.0, 1.0, size, beta)
    assert few.l1 == few.l2_squared < math.sqrt(size * few.l2_squared)


@pytest.mark.parametrize("order", [1, 1.5, 2.5, 0.0])
def test_a_skellam_sum_has_no_price_where_the_theorem_is_silent(order: float) -> None:
    with pytest.raises(UnpricedError, match="whole orders from 2 on"):
        SkellamSum(1.0, 1.0, 1.0).at(order)


@pytest.mark.parametrize(
    ("multiplier", "scale", "bias"), [(1.0, 1.0, 1.0), (1e200, 1e200, 0.5), (1e-200, 1.0, 0.5), (1.0, 1e200, 0.5)]
)
def test_sums_that_no_float_holds_have_no_price(multiplier: float, scale: float, bias: float) -> None:
    with pytest.raises(UnpricedError):
        SkellamSum.rounded(multiplier, 1.0, scale, 10, bias)


# ---- Poisson-sampled Gaussians ---------------------------------------------------------------------------------------


def exact_sampled(order: int, multiplier: float, rate: float) -> float:
    """Of (1-q) N(0, z^2) + q N(1, z^2) from N(0, z^2), the larger of both directions, at a whole order."""
    z, q = mpmath.mpf(multiplier), mpmath.mpf(rate)
    total = sum(
        mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp((k * k - k) / (2 * z * z))
        for k in range(order + 1)
    )
    return float(mpmath.log(total) / (order - 1))


@pytest.mark.parametrize("order", [2, 5, 32, 256])
@pytest.mark.parametrize(("multiplier", "rate"), [(1.0, 0.01), (0.7, 0.3), (4.0, 1e-5), (20.0, 0.9), (60.0, 1e-7)])
def test_a_sampled_gaussian_costs_at_least_its_exact_divergence(order: int, multiplier: float, rate: float) -> None:
    mpmath.mp.dps = 60
    exact, told = exact_sampled(order, multiplier, rate), SampledGaussian(multiplier, rate, 1).at(order)
    assert exact <= told <= exact * (1 + 1e-8) + 2e-12


def test_a_plan_costs_what_dp_accounting_says() -> None:
    for order, delta in ((2.5, 1e-5), (4.0, 1e-6), (24.0, 1e-9)):
        ours = SampledGaussian(1.1, 0.04, 500).at(order)
        event = PoissonSampledDpEvent(0.04, GaussianDpEvent(1.1))
        theirs = RdpAccountant([order]).compose(event, 500).get_epsilon(delta)
        assert renyi_epsilon(ours, order, delta) == pytest.approx(theirs, rel=1e-8)


def test_a_series_that_does_not_converge_costs_everything(caplog: pytest.LogCaptureFixture) -> None:
    assert SampledGaussian(0.26, 0.05, 1).at(1.25) == math.inf
    assert not caplog.records


def test_what_the_library_cannot_price_is_refused() -> None:
    with pytest.raises(UnpricedError, match="has no price"):
        SampledGaussian(1e-200, 0.5, 1).at(4.0)


# ---- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1.25, 2, 3.75, 40, 1024])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
def test_converting_is_dp_accountings_and_filter_and_report_agree(order: float, delta: float) -> None:
    for price in (0.3, 2.0, 50.0):
        ours = renyi_epsilon(price, order, delta)
        assert ours == pytest.approx(compute_epsilon([order], [price], delta)[0], rel=1e-14, abs=1e-15)
    allowed = renyi_allowance(60.0, order, delta)
    assert renyi_epsilon(allowed, order, delta) == pytest.approx(60.0, rel=1e-14)
    assert allowed == pytest.approx(60.0 - conversion(order, delta))
    assert renyi_epsilon(0.0, order, delta) == 0.0
