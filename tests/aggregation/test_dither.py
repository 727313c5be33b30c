"""Stochastic rounding: the mean is the value itself, and nobody can tell which way a coordinate went."""

from __future__ import annotations

import os

import numpy as np
import pytest

from aggregation.dither import SecretDither
from aggregation.ring import plan
from contract.errors import UpdateError


def test_numbers_are_uniform_and_never_one() -> None:
    numbers = SecretDither(os.urandom)(1 << 18)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=256, range=(0, 1))
    chi_square = float(((counts - 1024.0) ** 2 / 1024).sum())
    assert 120 < chi_square < 420  # 255 degrees of freedom: six standard deviations


def test_a_key_is_drawn_for_each() -> None:
    assert not (SecretDither(os.urandom)(64) == SecretDither(os.urandom)(64)).any()


def test_a_stream_does_not_repeat() -> None:
    dither = SecretDither(lambda count: bytes(count))
    assert not (dither(1 << 12) == dither(1 << 12)).any()


@pytest.mark.parametrize("clients", [10, 40_000])
def test_rounding_by_chance_is_unbiased_and_within_a_step(clients: int) -> None:
    fixed = plan(clients, 50, 1.0)
    assert fixed.bits == (32 if clients == 10 else 64)
    delta = np.full(1 << 16, 0.3 / (fixed.scale * 7) + 0.25)
    codes = fixed.encode(delta, 7, SecretDither(os.urandom))[:-1].view(f"i{fixed.bits // 8}").astype(np.float64)
    exact = delta[0] * fixed.scale * 7
    assert np.abs(codes - exact).max() < 1
    spread = np.sqrt((exact % 1) * (1 - exact % 1) / codes.size)
    assert abs(codes.mean() - exact) < 6 * spread + 1e-9


def test_a_clip_still_bounds_what_is_encoded() -> None:
    fixed = plan(2, 10, 1.0)
    with pytest.raises(UpdateError, match="at most"):
        fixed.encode(np.array([1.0001]), 1, SecretDither(os.urandom))
    total = sum(fixed.encode(np.array([1.0]), 10, lambda count: np.full(count, 1 - 2**-32)) for _ in range(2))
    mean, _ = fixed.decode(total)  # type: ignore[arg-type]
    assert mean[0] == pytest.approx(1.0)
