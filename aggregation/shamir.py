"""Shamir's secret sharing over the prime field of 2^256 - 189 (Shamir, "How to share a secret", CACM 1979).

A secret and each share are 32 bytes, big-endian. A share belongs to a point x >= 1 of the field.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from contract.errors import SecureSumError

Entropy = Callable[[int], bytes]
"""As many bytes as asked for, from a cryptographic source."""

PRIME = 2**256 - 189
SECRET_BYTES = 32


def draw_secret(entropy: Entropy) -> bytes:
    """A uniform element of the field, by rejection."""
    while True:
        drawn = entropy(SECRET_BYTES)
        if int.from_bytes(drawn, "big") < PRIME:
            return drawn


def split(secret: bytes, threshold: int, points: Sequence[int], entropy: Entropy) -> dict[int, bytes]:
    """A share for each of `points`; any `threshold` of them give `secret` back, fewer tell nothing.

    Raises SecureSumError where the secret is no element or the points are not as many distinct ones as needed.
    """
    if (
        not 1 <= threshold <= len(points)
        or len(set(points)) != len(points)
        or not 1 <= min(points) <= max(points) < PRIME
    ):
        raise SecureSumError(f"{len(points)} points cannot share a secret with a threshold of {threshold}")
    coefficients = [element(secret, "the secret")]
    coefficients += [int.from_bytes(draw_secret(entropy), "big") for _ in range(threshold - 1)]
    coefficients.reverse()
    shares = {}
    for x in points:
        value = 0
        for coefficient in coefficients:
            value = (value * x + coefficient) % PRIME
        shares[x] = value.to_bytes(SECRET_BYTES, "big")
    return shares


def weights_at_zero(points: Collection[int]) -> dict[int, int]:
    """Lagrange's weights: the secret is the sum of weight times share, for any secret shared over `points`."""
    weights = {}
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        weights[x] = above * pow(below, -1, PRIME) % PRIME
    return weights


def combine(shares: Mapping[int, bytes], weights: Mapping[int, int]) -> bytes:
    """The secret from `shares` and `weights_at_zero` of exactly their points."""
    if shares.keys() != weights.keys():
        raise SecureSumError("the shares and the weights are not those of the same points")
    total = sum(weights[x] * element(value, f"the share of point {x}") for x, value in shares.items())
    return (total % PRIME).to_bytes(SECRET_BYTES, "big")


def element(value: bytes, what: str) -> int:
    """`value` as a number; raises SecureSumError unless it is one of the field."""
    number = int.from_bytes(value, "big")
    if len(value) != SECRET_BYTES or number >= PRIME:
        raise SecureSumError(f"{what} is no element of the field: {len(value)} bytes")
    return number
