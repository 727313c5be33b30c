import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from contract.errors import ConfigError, NonFiniteError
from privacy.gaussian import GaussianRows, GaussianSum, clip_rows
from privacy.stream import grid_step
from tests.privacy.streams import SilentStream, stream_of

LEAST_P = 1e-4


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_no_row_is_longer_than_the_norm_and_shorter_ones_stay_as_they_are(
    seed: int, kind: type[np.float32 | np.float64], length: float, norm: float
) -> None:
    rows = (np.random.default_rng(seed).standard_normal((3, 5, 4)) * length).astype(kind)
    rows[1] = 0.0
    clipped = clip_rows(rows, norm)
    assert clipped.dtype == kind
    assert clipped.shape == rows.shape
    before = np.linalg.norm(rows.astype(np.float64), axis=(1, 2))
    after = np.linalg.norm(clipped.astype(np.float64), axis=(1, 2))
    assert (after <= norm).all()
    for place in range(3):
        if before[place] <= norm * (1 - 1e-6):
            assert np.array_equal(clipped[place], rows[place])
        else:
            assert after[place] == pytest.approx(norm, rel=2e-6)
            assert np.allclose(clipped[place] * before[place], rows[place] * after[place], rtol=1e-5)


def test_a_row_whose_norm_no_float_holds_is_still_within_the_norm() -> None:
    assert np.linalg.norm(clip_rows(np.full((1, 4), 1e300), 1.0)) <= 1.0


def test_the_noise_on_rows_is_gaussian_with_the_standard_deviation_that_its_event_tells() -> None:
    rows = np.random.default_rng(0).standard_normal((1000, 1000))
    noised, event = GaussianRows(2.0, 3.0, stream_of(1)).apply(rows)
    noise = (noised - clip_rows(rows, 2.0)).reshape(-1)
    sigma = event.number("noise_multiplier") * event.number("clip")
    assert (event.mechanism, sigma) == ("gaussian", 6.0)
    assert stats.kstest(noise / sigma, "norm").pvalue > LEAST_P
    assert abs(np.var(noise) / sigma**2 - 1.0) < 0.01


def test_the_noise_on_a_sum_is_gaussian_with_the_standard_deviation_that_its_event_tells() -> None:
    total = np.random.default_rng(0).standard_normal(10**6)
    before = total.copy()
    noised, event = GaussianSum(0.5, 1.5, stream_of(2)).apply(total)
    sigma = event.number("noise_multiplier") * event.number("clip")
    assert (event.mechanism, sigma) == ("gaussian", 0.75)
    assert np.array_equal(total, before)
    assert stats.kstest((noised - total) / sigma, "norm").pvalue > LEAST_P
    assert abs(np.var(noised - total) / sigma**2 - 1.0) < 0.01


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_what_leaves_lies_on_the_grid_so_that_low_bits_tell_nothing(kind: type[np.float32 | np.float64]) -> None:
    rows = np.random.default_rng(1).standard_normal((50, 400)).astype(kind) * kind(1e-3)
    noised, _ = GaussianRows(1.0, 0.3, stream_of(3)).apply(rows)
    steps = noised.astype(np.float64) / grid_step(0.3)
    assert noised.dtype == kind
    assert np.array_equal(steps, np.rint(steps))
    summed, _ = GaussianSum(1.0, 0.3, stream_of(3)).apply(rows[0].astype(np.float64))
    assert np.array_equal(summed / grid_step(0.3), np.rint(summed / grid_step(0.3)))


def test_every_row_has_noise_of_its_own_and_every_call_too() -> None:
    mechanism = GaussianRows(1.0, 1.0, stream_of(4))
    rows = np.zeros((2, 3000))
    (first, second), (third, _) = mechanism.apply(rows)[0], mechanism.apply(rows)[0]
    for other in (second, third):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.08


def test_batches_of_more_than_one_chunk_and_rows_larger_than_one_are_noised_throughout() -> None:
    mechanism = GaussianRows(1.0, 1.0, stream_of(5))
    for shape in ((1000, 600), (2, 1 << 19)):
        noised, _ = mechanism.apply(np.zeros(shape, dtype=np.float32))
        assert np.allclose(noised.std(axis=1), 1.0, atol=0.15)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_before_anything_is_drawn(bad: float) -> None:
    rows = np.zeros((3, 2, 2), dtype=np.float32)
    rows[2, 0, 1] = bad
    with pytest.raises(NonFiniteError, match=r"\[2, 0, 1\]"):
        GaussianRows(1.0, 1.0, SilentStream()).apply(rows)
    with pytest.raises(NonFiniteError, match=r"\[9\]"):
        GaussianSum(1.0, 1.0, SilentStream()).apply(rows.reshape(-1).astype(np.float64))


@pytest.mark.parametrize(("clip", "multiplier"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (1.0, np.nan), (np.inf, 1.0)])
def test_a_clip_or_multiplier_that_hides_nothing_is_refused(clip: float, multiplier: float) -> None:
    for mechanism in (GaussianRows, GaussianSum):
        with pytest.raises(ConfigError, match="Gaussian mechanism is"):
            mechanism(clip, multiplier, SilentStream())
