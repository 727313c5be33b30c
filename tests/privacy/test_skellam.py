import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import special, stats

from contract.errors import ConfigError, PrivacyError, UpdateError
from contract.privacy_records import PrivacyEvent
from privacy.skellam import (
    ROUNDING_BIAS,
    SkellamShare,
    conditional_round,
    rounded_norm_bound2,
    sample_skellam,
    skellam_event,
)
from tests.privacy.streams import SilentStream, stream_of

DRAWS = 10**6
LEAST_P = 1e-4
ODD_VARIANCES = [1e-3, 0.7, 12.0, 19.99, 20.0, 55.5, 1e3, 1e5]
"""Whose means lie on both sides of 10, where the sampler changes its method."""


def exact_probabilities(edges: np.ndarray, variance: float) -> np.ndarray:
    """Of Skellam(0, variance) within [edges[i], edges[i + 1]), by inverting its characteristic function."""
    sigma = math.sqrt(variance)
    t = (np.arange(4000) + 0.5) * min(math.pi, 12.0 / sigma) / 4000
    decay = np.exp(-2.0 * variance * np.sin(t / 2) ** 2) / np.sin(t / 2)
    below = np.array([np.sum(decay * np.sin(t * (edge - 0.5))) for edge in edges]) * (t[1] - t[0]) / (2 * math.pi)
    return np.diff(below)


@pytest.mark.parametrize("variance", ODD_VARIANCES)
def test_small_and_middle_variances_have_the_exact_probabilities(variance: float) -> None:
    noise = sample_skellam(stream_of(round(variance * 1000)), variance, DRAWS)
    reach = int(8 * math.sqrt(variance)) + 12
    values = np.arange(-reach, reach + 1)
    expected = DRAWS * special.ive(np.abs(values), variance)
    seen = np.bincount(noise + reach, minlength=values.size)
    common = expected > 10
    seen = np.append(seen[common], seen[~common].sum())
    expected = np.append(expected[common], DRAWS - expected[common].sum())
    kept = expected > 1
    assert seen[~kept].sum() <= 5
    assert stats.chisquare(seen[kept], expected[kept] * seen[kept].sum() / expected[kept].sum()).pvalue > LEAST_P


@pytest.mark.parametrize("variance", [20.5, 1e3, 2.0**21 + 0.3, 2.0**42, 2.0**60])
def test_large_variances_fall_into_bins_as_the_characteristic_function_says(variance: float) -> None:
    noise = sample_skellam(stream_of(int(math.log2(variance) * 10)), variance, DRAWS)
    edges = np.unique(np.rint(math.sqrt(variance) * np.concatenate([[-10.0], np.linspace(-4.0, 4.0, 55), [10.0]])))
    seen = np.histogram(noise, edges)[0]
    expected = DRAWS * exact_probabilities(edges, variance)
    assert seen.sum() == DRAWS
    assert expected.sum() == pytest.approx(DRAWS, rel=1e-9)
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > LEAST_P


@pytest.mark.parametrize("variance", [2.0**12, 2.0**42, 2.0**60])
def test_the_lowest_bits_of_large_noise_are_uniform(variance: float) -> None:
    noise = sample_skellam(stream_of(int(math.log2(variance))), variance, DRAWS)
    assert stats.chisquare(np.bincount(noise & 15)).pvalue > LEAST_P
    assert stats.chisquare(np.bincount(noise >> 3 & 15) if variance > 2.0**20 else [1, 1]).pvalue > LEAST_P


@pytest.mark.parametrize("variance", [0.7, 12.0, 20.0, 1e3, 2.0**42, 2.0**60])
def test_the_variance_is_within_one_percent_and_the_mean_is_zero(variance: float) -> None:
    noise = sample_skellam(stream_of(99), variance, DRAWS).astype(np.float64)
    assert abs(noise.var() / variance - 1.0) < 0.01
    assert abs(noise.mean()) < 4.5 * math.sqrt(variance / DRAWS)


def test_draws_from_two_streams_and_from_one_at_two_places_are_independent() -> None:
    first, second = stream_of(1), stream_of(2)
    a, b, later = (sample_skellam(stream, 400.0, 200_000) for stream in (first, second, first))
    for other in (b, later, np.roll(a, 1), np.roll(a, 1 << 15)):
        assert abs(np.corrcoef(a, other)[0, 1]) * math.sqrt(a.size) < 4.0


@pytest.mark.parametrize("variance", [0.0, 9e-4, 2.0**60 * 1.01, math.inf, math.nan])
def test_a_variance_that_is_not_drawn_exactly_is_refused(variance: float) -> None:
    with pytest.raises(ConfigError, match="the variance of Skellam noise is"):
        sample_skellam(SilentStream(), variance, 3)


def test_the_norm_bound_is_the_smaller_of_the_likely_and_the_certain_one() -> None:
    likely = Fraction(300) ** 2 + Fraction(10_000, 4) + (Fraction(300) + Fraction(50))
    assert rounded_norm_bound2(100.0, 3.0, 10_000, math.exp(-0.5)) == pytest.approx(float(likely), rel=1e-14)
    assert rounded_norm_bound2(1.0, 3.0, 1, 1e-9) == 16.0


def test_rounding_is_unbiased_and_never_longer_than_its_bound() -> None:
    stream = stream_of(3)
    scaled_d = np.random.default_rng(0).standard_normal(50)
    scaled_d *= 6.0 / np.linalg.norm(scaled_d)
    roomy = rounded_norm_bound2(1.0, 6.0, 50, 1e-9)
    rounded = np.array([conditional_round(stream, scaled_d, roomy) for _ in range(4000)])
    assert rounded.dtype == np.int64
    assert set(np.unique(rounded - np.floor(scaled_d))) <= {0.0, 1.0}
    error_d = (rounded.mean(axis=0) - scaled_d) * math.sqrt(4000) / 0.5
    assert np.abs(error_d).max() < 4.5

    tight = rounded_norm_bound2(1.0, 6.0, 50, ROUNDING_BIAS)
    assert all(np.sum(conditional_round(stream, scaled_d, tight) ** 2) <= tight for _ in range(2000))
    assert np.mean(np.sum(rounded**2, axis=1) > tight) < ROUNDING_BIAS
    assert np.mean(np.sum(rounded**2, axis=1) > tight) > 0.0


def test_a_vector_that_no_rounding_makes_short_enough_is_refused() -> None:
    with pytest.raises(PrivacyError, match="could not be rounded"):
        conditional_round(stream_of(4), np.full(10, 3.0), 80.0)


def test_the_event_holds_every_number_exactly() -> None:
    event = skellam_event(0.1, 0.3, 2.0**20, 12)
    assert [event.number(name) for name in ("noise_multiplier", "clip", "scale", "size", "rounding_bias")] == [
        0.1,
        0.3,
        2.0**20,
        12.0,
        math.exp(-0.5),
    ]


@pytest.mark.parametrize("fewest", [1, 6])
def test_a_share_is_the_clipped_update_in_steps_with_its_part_of_the_noise(fewest: int) -> None:
    size = 100_000
    event = skellam_event(0.5, 3.0, 2.0**16, size)
    update_d = np.random.default_rng(1).standard_normal(size)
    codes_d, told = SkellamShare(event, fewest, stream_of(5)).apply(update_d)
    assert told is event
    assert codes_d.dtype == np.int64
    noise_d = codes_d - update_d * 3.0 / np.linalg.norm(update_d) * 2.0**16
    variance = (0.5 * 2.0**16 * 3.0) ** 2 / fewest
    assert stats.kstest(noise_d / math.sqrt(variance), "norm").pvalue > LEAST_P
    assert abs(noise_d.var() / variance - 1.0) < 5 * math.sqrt(2 / size)


def test_an_update_within_the_clip_keeps_its_length() -> None:
    event = skellam_event(2.0**-16, 1.0, 2.0**24, 64)
    update_d = np.full(64, 0.01)
    codes_d, _ = SkellamShare(event, 1, stream_of(6)).apply(update_d)
    assert codes_d.mean() == pytest.approx(0.01 * 2.0**24, abs=6 * 2.0**8 / 8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_or_of_another_shape_is_refused_before_anything_is_drawn(bad: float) -> None:
    share = SkellamShare(skellam_event(1.0, 1.0, 2.0**16, 4), 1, SilentStream())
    with pytest.raises(UpdateError, match="coordinate 2 of the update is"):
        share.apply(np.array([0.0, 1.0, bad, bad]))
    with pytest.raises(UpdateError, match=r"shape \(5,\); its noise was priced for \(4,\)"):
        share.apply(np.zeros(5))


@pytest.mark.parametrize(
    ("event", "fewest", "complaint"),
    [
        (skellam_event(1.0, 1.0, 2.0**31, 4), 1, "one share of the noise has variance"),
        (skellam_event(1e-6, 1.0, 2.0**10, 4), 1, "one share of the noise has variance"),
        (skellam_event(1e-8, 1.0, 2.0**53, 4), 1, "steps of the fixed point"),
        (skellam_event(1.0, 1.0, 2.0**16, 4), 0, "fewest honest clients"),
    ],
)
def test_a_share_out_of_range_is_refused_when_it_is_made(event: PrivacyEvent, fewest: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SkellamShare(event, fewest, SilentStream())


@pytest.mark.parametrize("name", ["noise_multiplier", "clip", "scale", "size"])
def test_an_event_with_a_number_that_hides_nothing_is_refused(name: str) -> None:
    numbers = {"noise_multiplier": 1.0, "clip": 1.0, "scale": 1.0, "size": 4}
    with pytest.raises(ConfigError, match=name.replace("_", " ")):
        skellam_event(**(numbers | {name: 0}))  # type: ignore[arg-type]
