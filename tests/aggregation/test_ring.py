from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aggregation.ring import RING, FixedPoint, plan, zeros
from contract.errors import ConfigError, UpdateError

Floats = npt.NDArray[np.float64]


@st.composite
def contributions(draw: st.DrawFn) -> tuple[FixedPoint, list[int], list[Floats]]:
    """A plan with some of its clients' weights and updates, the plan's very limits among them."""
    clients = draw(st.integers(1, 12))
    max_weight = draw(st.integers(1, min(10**7, (RING - 1) // clients)))
    clip = draw(st.sampled_from([2.0**-40, 1e-4, 0.1, 1.0, 3.7, 1e6]) | st.floats(1e-6, 1e6))
    fixed = plan(clients, max_weight, clip)
    present = draw(st.integers(1, clients))
    weights = [draw(st.integers(1, max_weight) | st.just(max_weight)) for _ in range(present)]
    size = draw(st.integers(0, 5))
    edges = st.sampled_from([-clip, clip, 0.0, -0.0, clip / 3])
    deltas = [
        np.array([draw(edges | st.floats(-clip, clip)) for _ in range(size)], dtype=np.float64) for _ in range(present)
    ]
    return fixed, weights, deltas


@given(contributions())
@settings(max_examples=300, deadline=None)
def test_sum_of_encodings_is_the_encoding_of_the_sum_and_never_wraps(
    case: tuple[FixedPoint, list[int], list[Floats]],
) -> None:
    fixed, weights, deltas = case
    total = zeros(deltas[0].size + 1, fixed.bits)
    exact = [0] * deltas[0].size
    for weight, delta in zip(weights, deltas, strict=True):
        total += fixed.encode(delta, weight)
        steps = [int(np.rint(x * (fixed.scale * weight))) for x in delta]
        exact = [so_far + step for so_far, step in zip(exact, steps, strict=True)]
    assert all(abs(value) < 2 ** (fixed.bits - 1) for value in exact), "an honest sum left the signed half of the ring"
    assert [int(value) for value in total[:-1].view(f"i{fixed.bits // 8}")] == exact
    assert int(total[-1]) == sum(weights)


@given(contributions())
@example((FixedPoint(2.0**43, 1e-4, 9, 10_000_000, 64), [1, 10_000_000], [np.array([-1e-4]), np.array([-1e-4])]))
@settings(max_examples=300, deadline=None)
def test_decoded_mean_is_within_the_documented_bound_of_the_exact_mean(
    case: tuple[FixedPoint, list[int], list[Floats]],
) -> None:
    fixed, weights, deltas = case
    total = zeros(deltas[0].size + 1, fixed.bits)
    for weight, delta in zip(weights, deltas, strict=True):
        total += fixed.encode(delta, weight)
    mean, weight_sum = fixed.decode(total)
    bound = Fraction(fixed.error_bound(len(weights), weight_sum))
    for index, decoded in enumerate(mean):
        terms = (weight * Fraction(float(delta[index])) for weight, delta in zip(weights, deltas, strict=True))
        exact = sum(terms, Fraction(0)) / weight_sum
        assert abs(Fraction(float(decoded)) - exact) <= bound


@given(contributions())
@settings(max_examples=50, deadline=None)
def test_the_sum_is_the_same_in_every_order(case: tuple[FixedPoint, list[int], list[Floats]]) -> None:
    fixed, weights, deltas = case
    encodings = [fixed.encode(delta, weight) for weight, delta in zip(weights, deltas, strict=True)]
    forward = np.add.reduce(encodings, dtype=encodings[0].dtype)
    backward = np.add.reduce(encodings[::-1], dtype=encodings[0].dtype)
    np.testing.assert_array_equal(forward, backward)


@given(st.integers(1, 2000), st.integers(1, 10**6), st.floats(1e-9, 1e9))
@settings(max_examples=300, deadline=None)
def test_plan_is_the_finest_power_of_two_that_cannot_wrap(clients: int, max_weight: int, clip: float) -> None:
    fixed = plan(clients, max_weight, clip)
    assert clients * (fixed.scale * max_weight * clip + 0.5) < 2 ** (fixed.bits - 1)
    assert fixed.scale * clip >= 16, "a client of weight 1 still has an update"
    if fixed.bits == 32:
        with pytest.raises(ConfigError, match="wrap"):
            FixedPoint(scale=fixed.scale * 2, clip=clip, clients=clients, max_weight=max_weight)


def test_a_generous_bound_on_tokens_loses_no_update() -> None:
    fixed = plan(4, 10**9, 1.0)
    total = sum(fixed.encode(np.full(3, 2e-4), 5000) for _ in range(4))
    mean, weight = fixed.decode(total)  # type: ignore[arg-type]
    assert (fixed.bits, weight) == (64, 20_000)
    np.testing.assert_allclose(mean, 2e-4, rtol=1e-6)


def test_an_update_of_which_nothing_would_be_left_is_refused() -> None:
    fixed = FixedPoint(scale=0.5, clip=1.0, clients=4, max_weight=10**9)
    fixed.require_resolved(np.zeros(3), 1)
    fixed.require_resolved(np.array([0.0, 2e-3]), 1000)
    with pytest.raises(UpdateError, match="would be lost: its largest change, 0.0002, is 0.1 steps"):
        fixed.require_resolved(np.array([0.0, -2e-4]), 1000)


def test_every_client_at_the_limit_does_not_wrap_and_one_client_too_many_would() -> None:
    fixed = FixedPoint(scale=2.0**20, clip=1.0, clients=16, max_weight=127)
    total = np.zeros(3, dtype=np.uint32)
    for _ in range(16):
        total += fixed.encode(np.array([1.0, -1.0]), 127)
    mean, weight_sum = fixed.decode(total)
    np.testing.assert_array_equal(mean, [1.0, -1.0])
    assert weight_sum == 16 * 127
    wrapped = total + fixed.encode(np.array([1.0, -1.0]), 127)
    assert int(wrapped[:1].view(np.int32)[0]) < 0


def test_vectors_longer_than_a_chunk_encode_as_their_pieces_do() -> None:
    fixed = plan(3, 1000, 1.0)
    delta = np.random.default_rng(0).uniform(-1, 1, 3 * 65536 + 17).astype(np.float32)
    whole = fixed.encode(delta, 77)
    pieces = [fixed.encode(part, 77)[:-1] for part in np.array_split(delta, 11)]
    np.testing.assert_array_equal(whole[:-1], np.concatenate(pieces))
    assert whole[-1] == 77


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.nan, "is nan; it must be finite"),
        (np.inf, "is inf"),
        (-np.inf, "is -inf"),
        (1.5, "is 1.5"),
        (-2.0, "is -2.0"),
    ],
)
def test_an_unusable_coordinate_is_refused_by_its_place_and_value(value: float, named: str) -> None:
    delta = np.zeros(70000, dtype=np.float32)
    delta[66000] = value
    with pytest.raises(UpdateError, match=named) as caught:
        plan(2, 10, 1.0).encode(delta, 1)
    assert "coordinate 66000 " in str(caught.value)


@pytest.mark.parametrize("weight", [0, -1, 11])
def test_a_weight_out_of_range_is_refused(weight: int) -> None:
    with pytest.raises(UpdateError, match=f"the weight is {weight} trained tokens; this round takes 1 to 10"):
        plan(2, 10, 1.0).encode(np.zeros(1), weight)


def test_a_matrix_is_refused() -> None:
    with pytest.raises(UpdateError, match=r"shape \(2, 2\)"):
        plan(2, 10, 1.0).encode(np.zeros((2, 2)), 1)


@pytest.mark.parametrize(
    ("total", "named"),
    [
        (np.array([0, 0], dtype=np.uint32), "the weights sum to 0"),
        (np.array([0, 21], dtype=np.uint32), "the weights sum to 21; it must be 1 to 20"),
        (np.array([2**31 - 1, 1], dtype=np.uint32), "the mean update has a coordinate of size"),
        (np.array([0, 5], dtype=np.int64), "it must be flat uint32"),
        (np.zeros(0, dtype=np.uint32), "it must be flat uint32"),
    ],
)
def test_a_sum_that_honest_clients_cannot_give_is_refused(total: npt.NDArray[np.uint32], named: str) -> None:
    with pytest.raises(UpdateError, match=named):
        plan(2, 10, 1.0).decode(total)


@pytest.mark.parametrize(
    ("clients", "max_weight", "clip", "named"),
    [
        (0, 10, 1.0, "clients is 0"),
        (2, 0, 1.0, "max_weight is 0"),
        (2, 2**32, 1.0, f"max_weight is {2**32}"),
        (2, 10, 0.0, "update-clip is 0.0"),
        (2, 10, float("nan"), "update-clip is nan"),
        (2, 10, float("inf"), "update-clip is inf"),
        (4, 2**30, 1.0, "for 4 clients at most 1073741823 tokens each fit"),
    ],
)
def test_an_impossible_plan_names_the_number_at_fault(clients: int, max_weight: int, clip: float, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        plan(clients, max_weight, clip)


@pytest.mark.parametrize("scale", [0.0, 3.0, float("nan"), float("inf"), -2.0])
def test_a_scale_that_is_no_power_of_two_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="scale is"):
        FixedPoint(scale=scale, clip=1.0, clients=2, max_weight=10)
