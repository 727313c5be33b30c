from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.shamir import PRIME, SECRET_BYTES, combine, draw_secret, element, split, weights_at_zero
from contract.errors import SecureSumError

numbers = st.integers(0, PRIME - 1) | st.sampled_from([0, 1, PRIME - 1, 2**255, 189])
points_of_holders = st.lists(st.integers(1, 20_000), min_size=1, max_size=12, unique=True)


def field(number: int) -> bytes:
    return number.to_bytes(SECRET_BYTES, "big")


def value_at_zero(values: dict[int, int]) -> int:
    """Newton's divided differences: another way than the code's to the polynomial through `values`, at 0."""
    xs = list(values)
    table = [values[x] for x in xs]
    for depth in range(1, len(xs)):
        for at in range(len(xs) - 1, depth - 1, -1):
            table[at] = (table[at] - table[at - 1]) * pow(xs[at] - xs[at - depth], -1, PRIME) % PRIME
    total = 0
    for x, coefficient in zip(reversed(xs), reversed(table), strict=True):
        total = (total * -x + coefficient) % PRIME
    return total


@st.composite
def sharings(draw: st.DrawFn) -> tuple[int, int, dict[int, bytes], list[int]]:
    """A secret, its threshold, everybody's shares and the order in which the holders come forward."""
    secret = draw(numbers)
    points = draw(points_of_holders)
    threshold = draw(st.integers(1, len(points)))
    shares = split(field(secret), threshold, points, Random(draw(st.integers(0, 2**32))).randbytes)
    return secret, threshold, shares, draw(st.permutations(points))


def test_the_modulus_is_a_prime() -> None:
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, *(Random(0).randrange(2, PRIME) for _ in range(30))):
        powers = [pow(base, odd << step, PRIME) for step in range(twos)]
        assert powers[0] == 1 or PRIME - 1 in powers


@given(sharings())
@settings(max_examples=150, deadline=None)
def test_any_subset_of_the_threshold_or_more_gives_the_secret_back(
    case: tuple[int, int, dict[int, bytes], list[int]],
) -> None:
    secret, threshold, shares, order = case
    for count in {threshold, len(order)}:
        some = {x: shares[x] for x in order[:count]}
        assert combine(some, weights_at_zero(some)) == field(secret)
        assert value_at_zero({x: int.from_bytes(value, "big") for x, value in some.items()}) == secret


@given(sharings(), numbers)
@settings(max_examples=150, deadline=None)
def test_one_share_fewer_than_the_threshold_fits_every_secret(
    case: tuple[int, int, dict[int, bytes], list[int]], guess: int
) -> None:
    """With the guess as its value at 0 there is one polynomial through the shares; dealing it gives the same shares."""
    _, threshold, shares, order = case
    few = {x: shares[x] for x in order[: threshold - 1]}
    through = {0: guess} | {x: int.from_bytes(value, "big") for x, value in few.items()}
    coefficients = interpolated(through)
    assert coefficients[0] == guess
    drawn = iter(coefficients[1:])
    dealt = split(field(guess), threshold, order, lambda _: field(next(drawn)))
    assert {x: dealt[x] for x in few} == few
    enough = {x: dealt[x] for x in order[:threshold]}
    assert combine(enough, weights_at_zero(enough)) == field(guess)


def interpolated(values: dict[int, int]) -> list[int]:
    """The coefficients, constant first, of the polynomial of least degree through `values`."""
    total = [0] * len(values)
    for x, value in values.items():
        product, below = [1], 1
        for other in values:
            if other != x:
                product = [(a - other * b) % PRIME for a, b in zip([0, *product], [*product, 0], strict=True)]
                below = below * (x - other) % PRIME
        scale = value * pow(below, -1, PRIME)
        total = [(so_far + scale * c) % PRIME for so_far, c in zip(total, product, strict=True)]
    return total


@given(sharings().filter(lambda case: case[1] > 1))
@settings(max_examples=150, deadline=None)
def test_one_share_fewer_than_the_threshold_gives_another_secret_and_no_exception(
    case: tuple[int, int, dict[int, bytes], list[int]],
) -> None:
    secret, threshold, shares, order = case
    few = {x: shares[x] for x in order[: threshold - 1]}
    # It is the secret with probability 2^-256 only.
    assert combine(few, weights_at_zero(few)) != field(secret)


@given(sharings(), st.integers(1, PRIME - 1))
@settings(max_examples=50, deadline=None)
def test_one_false_share_gives_another_secret(case: tuple[int, int, dict[int, bytes], list[int]], shift: int) -> None:
    secret, threshold, shares, order = case
    some = {x: shares[x] for x in order[:threshold]}
    some[order[0]] = field((int.from_bytes(some[order[0]], "big") + shift) % PRIME)
    assert combine(some, weights_at_zero(some)) != field(secret)


@given(numbers, numbers, points_of_holders, st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_shares_of_two_secrets_add_up_to_shares_of_their_sum(
    one: int, other: int, points: list[int], seed: int
) -> None:
    entropy = Random(seed).randbytes
    threshold = (len(points) + 1) // 2
    dealt = [split(field(secret), threshold, points, entropy) for secret in (one, other)]
    added = {x: field(sum(int.from_bytes(shares[x], "big") for shares in dealt) % PRIME) for x in points[:threshold]}
    assert combine(added, weights_at_zero(added)) == field((one + other) % PRIME)


def test_the_same_secret_is_never_dealt_twice_alike() -> None:
    entropy = Random(0).randbytes
    dealt = [split(bytes(32), 3, [1, 2, 3, 4], entropy) for _ in range(50)]
    assert len({share for shares in dealt for share in shares.values()}) == 200


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_a_drawn_secret_is_in_the_field_even_where_most_of_the_entropy_is_not(seed: int) -> None:
    rng = Random(seed)
    drawn = draw_secret(lambda count: b"\xff" * (count - 1) + rng.randbytes(1))
    assert PRIME - 2**8 < int.from_bytes(drawn, "big") < PRIME


@pytest.mark.parametrize(
    ("threshold", "points"),
    [
        (0, [1, 2, 3]),
        (-1, [1, 2, 3]),
        (4, [1, 2, 3]),
        (1, []),
        (2, [1, 2, 2]),
        (2, [0, 1, 2]),
        (2, [-1, 1, 2]),
    ],
)
def test_points_and_a_threshold_that_share_nothing_are_refused(threshold: int, points: list[int]) -> None:
    with pytest.raises(
        SecureSumError, match=f"{len(points)} points cannot share a secret with a threshold of {threshold}"
    ):
        split(bytes(32), threshold, points, Random(0).randbytes)


NO_ELEMENTS = [b"", bytes(31), bytes(33), field(PRIME), field(PRIME + 1), b"\xff" * 32]


@pytest.mark.parametrize("value", NO_ELEMENTS)
def test_a_secret_out_of_the_field_is_refused(value: bytes) -> None:
    with pytest.raises(SecureSumError, match=f"the secret is no element of the field: {len(value)} bytes"):
        split(value, 2, [1, 2, 3], Random(0).randbytes)


@pytest.mark.parametrize("value", NO_ELEMENTS)
def test_a_share_out_of_the_field_is_refused_by_its_point(value: bytes) -> None:
    shares = split(bytes(32), 2, [4, 9], Random(0).randbytes)
    with pytest.raises(SecureSumError, match="the share of point 9 is no element of the field"):
        combine(shares | {9: value}, weights_at_zero([4, 9]))


@given(numbers)
@settings(max_examples=50, deadline=None)
def test_an_element_is_read_as_the_number_it_was_written_as(number: int) -> None:
    assert element(field(number), "it") == number


@pytest.mark.parametrize("points", [[1, 2], [1, 2, 3, 4], [1, 2, 4], []])
def test_shares_with_the_weights_of_other_points_are_refused(points: list[int]) -> None:
    shares = split(bytes(32), 3, [1, 2, 3], Random(0).randbytes)
    with pytest.raises(SecureSumError, match="not those of the same points"):
        combine(shares, weights_at_zero(points))
