import mpmath
import numpy as np
import pytest

from privacy.poisson import SURE_FROM, Proposal, log_probability, poisson_offsets
from tests.privacy.streams import stream_of

MEANS = np.concatenate([np.linspace(10.0, 30.0, 101), np.geomspace(30.0, 2.0**59, 60)])


@pytest.mark.parametrize("mean", [10.0, 10.7, 33.3, 1e3, 2.0**20 + 0.3, 2.0**42 + 0.5, 2.0**59])
def test_the_log_probability_is_exact_to_some_last_bits_at_every_mean(mean: float) -> None:
    whole = int(mean)
    deviations = np.array([-12.0, -6.1, -3.0, -1.0, -0.01, 0.0, 0.3, 2.0, 5.5, 14.0, 40.0])
    offsets = np.unique(np.maximum(np.rint(deviations * np.sqrt(mean)), -whole))
    if mean < 50:
        offsets = np.arange(-whole, 40.0)
    found = log_probability(whole, mean - whole, offsets)
    with mpmath.workdps(50):
        for offset, value in zip(offsets, found, strict=True):
            count, exact_mean = mpmath.mpf(whole) + mpmath.mpf(float(offset)), mpmath.mpf(mean)
            exact = count * mpmath.log(exact_mean) - exact_mean - mpmath.loggamma(count + 1)
            assert abs(float(mpmath.mpf(float(value)) - exact)) < 1e-14 * max(1.0, abs(float(exact)))


def test_no_count_below_zero_has_a_probability() -> None:
    assert log_probability(12, 0.5, np.array([-13.0, -40.0])).tolist() == [-np.inf, -np.inf]


def test_no_probability_sticks_out_of_the_hat_and_the_sure_region_is_sure() -> None:
    us = np.concatenate([np.geomspace(1e-14, SURE_FROM, 800), np.linspace(SURE_FROM, 0.5, 2500)])
    u = np.concatenate([0.5 - us, us - 0.5])
    us = np.concatenate([us, us])
    for mean in MEANS:
        proposal = Proposal(float(mean))
        log_ratio = proposal.log_ratio(us, proposal.offsets(u))
        assert log_ratio.max() < 0.0, mean
        assert np.exp(log_ratio[us >= SURE_FROM].min()) > proposal.sure, mean


@pytest.mark.parametrize("mean", [0.3, 9.9, 10.0, 70.5])
@pytest.mark.parametrize("size", [0, 1, 2, 17])
def test_as_many_numbers_come_as_were_asked_for(mean: float, size: int) -> None:
    stream = stream_of(1)
    numbers = np.concatenate([poisson_offsets(stream, mean, size) for _ in range(40)]) + int(mean)
    assert numbers.shape == (40 * size,)
    assert (numbers >= 0).all()
    assert np.array_equal(numbers, np.rint(numbers))
