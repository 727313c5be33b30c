import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from aggregation.noisy_sum import NoisySum, plan_noisy_sum
from aggregation.ring import RingVector
from contract.errors import ConfigError, UpdateError
from privacy.gaussian import clip_rows
from privacy.skellam import SkellamShare, skellam_event
from privacy.stream import SecretStream
from tests.aggregation.secure_sums import cohort_of

SIZE = 100_000


def room(noisy: NoisySum) -> float:
    """The largest coordinate that a sum of all clients may come to, with 8 standard deviations of their noise."""
    noise = noisy.noise_multiplier * noisy.scale * noisy.clip * math.sqrt(noisy.clients / noisy.fewest)
    return noisy.clients * (noisy.scale * noisy.clip + 1) + 8 * noise


@given(
    st.integers(1, 1 << 20),
    st.floats(0.01, 1.0),
    st.floats(2.0**-40, 2.0**40),
    st.floats(2.0**-10, 2.0**12),
)
def test_no_planned_sum_can_wrap_and_no_finer_one_would_fit(
    clients: int, share: float, clip: float, noise_multiplier: float
) -> None:
    fewest = max(1, round(share * clients))
    noisy = plan_noisy_sum(clients, fewest, clip, noise_multiplier)
    assert room(noisy) < 2 ** (noisy.bits - 1)
    assert noisy.scale * clip >= 2**16
    finer = (noisy.bits, noisy.scale * 2, clients, fewest, clip, noise_multiplier)
    with pytest.raises(ConfigError, match=r"do not fit|dp-noise-multiplier"):
        NoisySum(*finer)


def test_the_smaller_ring_is_taken_where_a_clip_keeps_its_steps_there() -> None:
    small, large = plan_noisy_sum(100, 66, 1.0, 1.0), plan_noisy_sum(1 << 16, 1 << 15, 1.0, 1.0)
    assert (small.bits, small.scale) == (32, 2.0**24)
    assert large.bits == 64
    assert large.scale * large.clip <= 2**40


def test_both_sides_of_a_round_plan_the_same() -> None:
    assert plan_noisy_sum(7, 4, 0.3, 1.1) == plan_noisy_sum(7, 4, 0.3, 1.1)


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ((0, 1, 1.0, 1.0), "clients is 0"),
        ((2**20 + 1, 1, 1.0, 1.0), "clients is 1048577"),
        ((5, 0, 1.0, 1.0), r"secagg-threshold less dp-colluders\) are 0"),
        ((5, 6, 1.0, 1.0), "are 6; it must be 1 to 5"),
        ((5, 3, 2.0**41, 1.0), "dp-clip is"),
        ((5, 3, 0.0, 1.0), "dp-clip is 0"),
        ((5, 3, 1.0, 0.0), "dp-noise-multiplier is 0"),
        ((5, 3, 1.0, 1e6), r"dp-noise-multiplier is 1e\+06; .* at most"),
        ((2**14, 2**14, 1.0, 2.0**-20), "dp-noise-multiplier is .* it must be at least"),
        ((5, 3, 1.0, math.nan), "dp-noise-multiplier is nan"),
    ],
)
def test_impossible_settings_are_refused_with_the_number_at_fault(
    numbers: tuple[int, int, float, float], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_noisy_sum(*numbers)


@pytest.mark.parametrize("scale", [3.0, 0.0, math.inf])
def test_a_scale_that_is_no_power_of_two_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        NoisySum(32, scale, 5, 3, 1.0, 1.0)


@pytest.mark.parametrize("numbers", [(10, 6, 1.0, 1.0), (1 << 20, 1 << 19, 0.37, 1.0)])
def test_sums_of_codes_are_exact_in_either_ring_whoever_is_missing(numbers: tuple[int, int, float, float]) -> None:
    noisy = plan_noisy_sum(*numbers)
    reach = int(noisy.scale * noisy.clip)
    codes = np.random.default_rng(0).integers(-reach, reach + 1, (7, 500))
    codes[:, 0], codes[:, 1] = reach, -reach
    total: RingVector = sum(noisy.encode(code) for code in codes)
    assert total.dtype == (np.uint32 if noisy.bits == 32 else np.uint64)
    assert total.shape == (501,)
    mean, survivors = noisy.decode(total)
    assert survivors == 7
    assert np.array_equal(mean, codes.sum(axis=0) / (noisy.scale * noisy.clients))


def test_a_code_that_no_honest_client_has_is_refused() -> None:
    noisy = plan_noisy_sum(10, 6, 1.0, 1.0)
    honest = int(noisy.scale * noisy.clip + 11 * noisy.share_sigma)
    noisy.encode(np.array([honest, -honest]))
    for sign in (1, -1):
        with pytest.raises(UpdateError, match="a client's code has a coordinate of"):
            noisy.encode(np.array([0, sign * (honest + 2 * int(noisy.share_sigma))]))


@pytest.mark.parametrize("codes", [np.zeros((2, 2), np.int64), np.zeros(3, np.int32), np.zeros(3)])
def test_codes_of_another_kind_are_refused(codes: np.ndarray) -> None:
    with pytest.raises(UpdateError, match="must be flat int64"):
        plan_noisy_sum(10, 6, 1.0, 1.0).encode(codes)


def test_a_sum_that_no_clients_give_is_refused() -> None:
    noisy = plan_noisy_sum(10, 6, 1.0, 1.0)
    with pytest.raises(UpdateError, match="holds 11 clients; it must be 1 to 10"):
        noisy.decode(np.array([0, 11], np.uint32))
    with pytest.raises(UpdateError, match="holds 0 clients"):
        noisy.decode(np.array([0, 0], np.uint32))
    with pytest.raises(UpdateError, match="must be flat uint32"):
        noisy.decode(np.array([0, 1], np.uint64))
    with pytest.raises(UpdateError, match="the sum of 1 clients has a coordinate of"):
        noisy.decode(np.array([1 << 31, 1], np.uint32))


def test_a_noisy_sum_of_one_client_decodes_to_its_update_over_the_fixed_denominator() -> None:
    noisy = plan_noisy_sum(4, 2, 1.0, 2.0**-16)
    mean, survivors = noisy.decode(noisy.encode(np.array([int(noisy.scale)])))
    assert (mean.tolist(), survivors) == ([0.25], 1)


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_shares_under_secure_aggregation_add_up_to_the_claimed_noise_whoever_drops_out(gone: int) -> None:
    """Ten clients, of which none, 10 % and 30 % are gone before they upload; the threshold is 7, one may collude.

    False alarms: each of the three p-values falls below 1e-4 for one key in ten thousand; the keys are fixed.
    """
    cohort = cohort_of(10, size=SIZE + 1)
    noisy = plan_noisy_sum(10, 6, 2.0, 0.7)
    event = skellam_event(0.7, 2.0, noisy.scale, SIZE)
    rng = np.random.default_rng(0)
    updates = {client: rng.standard_normal(SIZE) * rng.choice([0.001, 1.0]) for client in sorted(cohort.identities)}
    vectors = {}
    for client, update in updates.items():
        key = hashlib.sha256(f"{client}, {gone} gone".encode()).digest()
        share = SkellamShare(event, 6, SecretStream(lambda count, key=key: key[:count]))
        vectors[client] = noisy.encode(share.apply(update)[0])
    missing = sorted(updates)[:gone]
    total = cohort.play(vectors, [(), (), missing])

    mean, survivors = noisy.decode(total)
    assert survivors == 10 - gone
    clipped = sum(clip_rows(updates[client][np.newaxis], 2.0)[0] for client in updates if client not in missing)
    noise = mean * 10 - clipped
    variance = (0.7 * 2.0) ** 2 * survivors / 6
    assert variance >= (0.7 * 2.0) ** 2
    chi_square = float(np.sum(noise**2)) / variance
    assert 2 * min(stats.chi2.sf(chi_square, SIZE), stats.chi2.cdf(chi_square, SIZE)) > 1e-4
    assert stats.kstest(noise / math.sqrt(variance), "norm").pvalue > 1e-4
    assert 2 * stats.norm.sf(abs(noise.mean()) / math.sqrt(variance / SIZE)) > 1e-4
