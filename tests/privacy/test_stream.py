import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import special, stats

from privacy.stream import SecretStream, grid_step
from tests.privacy.streams import ConstantStream, stream_of

DRAWS = 10**6
LEAST_P = 1e-4
ALL_ONES = (1 << 64) - 1


def test_bits_are_aes_256_of_a_counter_from_zero() -> None:
    key = bytes(range(32))
    blocks = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    expected = b"".join(blocks.update(counter.to_bytes(16, "big")) for counter in range(3))
    stream = SecretStream(lambda count: key[:count])
    first, second = stream.bits(1), stream.bits(5)
    assert first.tobytes() + second.tobytes() == expected


def test_entropy_is_asked_once_and_for_a_whole_key() -> None:
    asked: list[int] = []

    def entropy(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    stream = SecretStream(entropy)
    stream.standard_normal(1000)
    stream.uniform(1000)
    assert asked == [32]


def test_uniform_numbers_are_uniform() -> None:
    assert stats.kstest(stream_of(1).uniform(DRAWS), "uniform").pvalue > LEAST_P


def test_uniform_numbers_are_never_zero_or_one() -> None:
    assert ConstantStream(0).uniform(3).tolist() == [2.0**-53] * 3
    assert ConstantStream(ALL_ONES).uniform(3).tolist() == [1.0 - 2.0**-53] * 3


def test_fine_uniform_numbers_are_uniform_and_reach_far_below_a_plain_ones_step() -> None:
    assert stats.kstest(stream_of(2).fine_uniform(DRAWS), "uniform").pvalue > LEAST_P
    assert ConstantStream(0).fine_uniform(1)[0] == 2.0**-129
    assert ConstantStream(5).fine_uniform(1)[0] == pytest.approx((5 + 5 * 2.0**-64) * 2.0**-64, rel=1e-15)


def test_normal_numbers_are_normal() -> None:
    normal = stream_of(3).standard_normal(DRAWS)
    assert stats.kstest(normal, "norm").pvalue > LEAST_P
    assert abs(np.var(normal) - 1.0) < 0.01


def test_normal_numbers_fill_their_tails() -> None:
    normal = stream_of(4).standard_normal(4 * DRAWS)
    edges = np.concatenate([[-np.inf], np.linspace(-4.5, 4.5, 37), [np.inf]])
    seen = np.histogram(normal, edges)[0]
    expected = normal.size * np.diff(special.ndtr(edges))
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > LEAST_P


@pytest.mark.parametrize("word", [0, 1, 12345, 1 << 40, (1 << 53) + 1, (1 << 63) - (1 << 20)])
def test_a_normal_number_is_the_quantile_of_its_word_on_either_side(word: int) -> None:
    # ConstantStream gives the same word for the fraction, and for the side too.
    for side in (0, 1 << 63):
        fraction = ((word | side) + 0.5) * 2.0**-64 if word < 1 << 53 else 0.5
        number = ConstantStream(word | side).standard_normal(1)[0]
        assert np.signbit(number) == (side == 0)
        assert special.log_ndtr(-abs(number)) == pytest.approx(math.log((word + fraction) * 2.0**-64), rel=1e-13)


def test_normal_numbers_reach_thirteen_standard_deviations_and_no_infinity() -> None:
    assert ConstantStream(0).standard_normal(1)[0] == pytest.approx(-13.1, abs=0.1)


def test_numbers_come_in_the_shape_that_was_asked_for_and_are_not_repeated() -> None:
    numbers = stream_of(5).standard_normal((7, 3, 10_000))
    assert numbers.shape == (7, 3, 10_000)
    assert np.unique(numbers).size == numbers.size


def test_streams_of_two_keys_and_of_one_key_at_two_places_are_independent() -> None:
    first, second = stream_of(6), stream_of(7)
    a, b, later = first.standard_normal(DRAWS), second.standard_normal(DRAWS), first.standard_normal(DRAWS)
    for other in (b, later, np.roll(a, 1)):
        assert abs(np.corrcoef(a, other)[0, 1]) * math.sqrt(DRAWS) < 4.0
        assert abs(np.corrcoef(np.abs(a), np.abs(other))[0, 1]) * math.sqrt(DRAWS) < 4.0


@pytest.mark.parametrize("sigma", [1.0, 3.7, 2.0**-30 * 1.001, 1e9])
def test_the_grid_is_a_power_of_two_some_four_thousandths_of_the_noise(sigma: float) -> None:
    step = grid_step(sigma)
    assert math.frexp(step)[0] == 0.5
    assert sigma * 2.0**-13 < step <= sigma * 2.0**-12
