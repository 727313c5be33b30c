from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import cache
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation import graph
from aggregation.graph import GraphPlan, full_threshold, is_safe, neighbours, plan_graph
from contract.errors import ConfigError

KEYS = bytes(range(32))
SESSION = bytes(32)


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[int], int, bytes, bytes]:
    members = sorted(draw(st.sets(st.integers(0, 2**14), min_size=2, max_size=60)))
    degree = 2 * draw(st.integers(0, len(members) // 2 + 2))
    return members, degree, draw(st.binary(min_size=32, max_size=32)), draw(st.binary(min_size=32, max_size=32))


@given(rings())
@settings(max_examples=200, deadline=None)
def test_the_graph_is_symmetric_and_regular_and_nobody_is_their_own_neighbour(
    case: tuple[list[int], int, bytes, bytes],
) -> None:
    members, degree, session_id, keys_sha256 = case
    found = neighbours(members, degree, session_id, keys_sha256)
    assert found.keys() == set(members)
    for member, near in found.items():
        assert member not in near
        assert near <= set(members)
        assert all(member in found[other] for other in near)
    due = degree if 0 < degree < len(members) - 1 else len(members) - 1
    assert {len(near) for near in found.values()} == {due}


@given(rings(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_graph_is_the_same_for_everybody_in_whatever_order_the_members_are_listed(
    case: tuple[list[int], int, bytes, bytes], random: Random
) -> None:
    members, degree, session_id, keys_sha256 = case
    listed = random.sample(members, len(members))
    assert neighbours(listed, degree, session_id, keys_sha256) == neighbours(members, degree, session_id, keys_sha256)


@given(rings().filter(lambda case: 0 < case[1] < len(case[0]) - 1), st.data())
@settings(max_examples=100, deadline=None)
def test_the_ring_holds_together_while_fewer_are_gone_than_a_member_has_neighbours(
    case: tuple[list[int], int, bytes, bytes], data: st.DataObject
) -> None:
    members, degree, session_id, keys_sha256 = case
    found = neighbours(members, degree, session_id, keys_sha256)
    gone = data.draw(st.sets(st.sampled_from(members), max_size=degree - 1))
    left = set(members) - gone
    assert reachable(found, left) == left


def reachable(found: dict[int, frozenset[int]], within: set[int]) -> set[int]:
    seen: set[int] = set()
    edge = {min(within)}
    while edge:
        seen |= edge
        edge = {other for member in edge for other in found[member] & within} - seen
    return seen


def test_the_ring_depends_on_the_keys_and_on_the_session() -> None:
    members = list(range(40))
    seeds = [bytes([number]) * 32 for number in range(20)]
    by_keys = [neighbours(members, 4, SESSION, seed) for seed in seeds]
    by_session = [neighbours(members, 4, seed, KEYS) for seed in seeds]
    drawn = [tuple(found[member] for member in members) for found in (*by_keys, *by_session)]
    assert len(set(drawn)) == 40


def test_the_ring_is_the_order_of_the_hashes_and_a_neighbour_is_at_most_half_a_degree_away() -> None:
    def place_in_order(member: int) -> bytes:
        fields = [(b"s", b"order"), (b"b", SESSION), (b"b", KEYS), (b"i", str(member).encode())]
        return hashlib.sha256(b"".join(kind + len(raw).to_bytes(8, "big") + raw for kind, raw in fields)).digest()

    order = sorted(range(11), key=place_in_order)
    found = neighbours(range(11), 6, SESSION, KEYS)
    for place, member in enumerate(order):
        near = {order[(place + step) % 11] for step in (1, 2, 3, 8, 9, 10)}
        assert found[member] == near


def test_every_other_member_is_as_often_a_neighbour() -> None:
    times = dict.fromkeys(range(1, 20), 0)
    for number in range(2000):
        for other in neighbours(range(20), 4, SESSION, number.to_bytes(32, "big"))[0]:
            times[other] += 1
    expected = 2000 * 4 / 19
    # 18 degrees of freedom: 57.7 is exceeded with a probability below 5e-6.
    assert sum((count - expected) ** 2 / expected for count in times.values()) < 57.7


@cache
def tail(population: int, marked: int, drawn: int, least: int) -> Fraction:
    """P(at least `least` marked), drawing one after the other: no binomial coefficient in it."""
    if least <= 0:
        return Fraction(1)
    if drawn == 0 or marked == 0:
        return Fraction(0)
    hit = Fraction(marked, population)
    missed = tail(population - 1, marked, drawn - 1, least) if marked < population else Fraction(0)
    return hit * tail(population - 1, marked - 1, drawn - 1, least - 1) + (1 - hit) * missed


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_tails_are_those_of_drawing_one_after_the_other(data: st.DataObject) -> None:
    population = data.draw(st.integers(1, 25))
    marked = data.draw(st.integers(0, population))
    drawn = data.draw(st.integers(0, population))
    least = data.draw(st.integers(-1, drawn + 2))
    exact = tail(population, marked, drawn, least)
    assert graph._tail_at_least(population, marked, drawn, least) == pytest.approx(float(exact), rel=1e-15)
    assert graph._all_of(population, marked, drawn) == pytest.approx(
        float(tail(population, marked, drawn, drawn)), rel=1e-15
    )


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_ring_is_called_safe_exactly_where_the_independent_tail_is_below_2_to_the_minus_40(
    data: st.DataObject,
) -> None:
    members = data.draw(st.integers(3, 40))
    degree = 2 * data.draw(st.integers(1, (members - 1) // 2))
    threshold = data.draw(st.integers(1, degree + 1))
    traitors = data.draw(st.integers(0, members // 3))
    # Corrupt neighbours give two shares of a member, honest ones one: n + c >= 2t opens it.
    opened = members * tail(members - 1, traitors, degree, 2 * threshold - (degree + 1))
    assert is_safe(GraphPlan(members, degree, threshold), traitors) == (opened <= Fraction(1, 2**40))


@given(st.integers(2, 128), st.floats(0, 0.9), st.floats(0, 0.9))
@settings(max_examples=200, deadline=None)
def test_up_to_128_members_share_with_everybody_and_more_than_two_thirds_must_answer(
    members: int, corrupt: float, dropout: float
) -> None:
    plan = plan_graph(members, corrupt, dropout)
    assert plan == GraphPlan(members, 0, members * 2 // 3 + 1)
    assert plan.neighbourhood == members
    assert 3 * plan.threshold > 2 * members >= 3 * (plan.threshold - 1)


@given(st.integers(2, 128), st.integers(0, 128))
@settings(max_examples=200, deadline=None)
def test_the_full_graph_is_safe_exactly_while_the_corrupt_ones_are_too_few_to_open_two_sets_of_survivors(
    members: int, traitors: int
) -> None:
    traitors = min(traitors, members - 1)
    plan = GraphPlan(members, 0, full_threshold(members))
    assert is_safe(plan, traitors) == (members + traitors < 2 * plan.threshold)
    if 3 * traitors <= members:
        assert is_safe(plan, traitors)


def smallest_threshold(members: int, degree: int, corrupt: Fraction, dropout: Fraction) -> int | None:
    """The smallest that is safe with everybody there, and with the honest ones who drop out never heard."""
    traitors = int(corrupt * members)
    heard = {members, max(members - int(dropout * members), degree + 2)}
    for threshold in range(degree // 2 + 1, degree + 1):
        least = 2 * threshold - (degree + 1)
        if all(present * at_least(present - 1, traitors, degree, least) <= Fraction(1, 2**40) for present in heard):
            return threshold
    return None


@cache
def masses(population: int, marked: int, drawn: int) -> list[Fraction]:
    """P(X = x) for x from 0, each from the one before; for drawn + marked <= population."""
    first = Fraction(1)
    for step in range(drawn):
        first *= Fraction(population - marked - step, population - step)
    found = [first]
    for x in range(min(marked, drawn)):
        ratio = Fraction((marked - x) * (drawn - x), (x + 1) * (population - marked - drawn + x + 1))
        found.append(found[-1] * ratio)
    return found


def at_least(population: int, marked: int, drawn: int, least: int) -> Fraction:
    return sum(masses(population, marked, drawn)[max(least, 0) :], Fraction(0))


def stands(members: int, degree: int, threshold: int, corrupt: Fraction, dropout: Fraction) -> bool:
    """Whether neighbourhoods stay large enough and the ring whole, by the same words with other arithmetic."""
    gone, traitors = int(dropout * members), int(corrupt * members)
    short = members * at_least(members - 1, gone, degree, degree - threshold + 1)
    torn = members * at_least(members, gone + traitors, degree // 2, degree // 2)
    return short <= Fraction(1, 2**20) and torn <= Fraction(1, 2**40)


@pytest.mark.parametrize(
    ("members", "corrupt", "dropout"),
    [
        (200, Fraction(1, 20), Fraction(1, 10)),
        (1000, Fraction(1, 20), Fraction(1, 10)),
        (500, Fraction(0), Fraction(0)),
    ],
)
def test_beyond_128_members_the_plan_is_the_smallest_ring_that_an_independent_computation_finds(
    members: int, corrupt: Fraction, dropout: Fraction
) -> None:
    for degree in range(2, members, 2):
        threshold = smallest_threshold(members, degree, corrupt, dropout)
        if threshold is not None and stands(members, degree, threshold, corrupt, dropout):
            break
    assert plan_graph(members, float(corrupt), float(dropout)) == GraphPlan(members, degree, threshold or 0)


def test_a_thousand_members_with_5_percent_corrupt_and_10_percent_gone_need_80_neighbours() -> None:
    plan = plan_graph(1000, 0.05, 0.1)
    assert plan == GraphPlan(members=1000, degree=80, threshold=54)
    assert plan.neighbourhood == 81
    assert is_safe(plan, 50)
    assert is_safe(GraphPlan(900, 80, 54), 50)
    assert not is_safe(GraphPlan(900, 80, 53), 50)


def test_more_corrupt_or_more_gone_never_need_a_smaller_ring() -> None:
    by_corrupt = [plan_graph(300, corrupt, 0.05).degree for corrupt in (0.0, 0.02, 0.05, 0.08)]
    by_dropout = [plan_graph(300, 0.03, dropout).degree for dropout in (0.0, 0.05, 0.1, 0.15)]
    assert all(one <= next_one for row in (by_corrupt, by_dropout) for one, next_one in pairwise(row))


@pytest.mark.parametrize(
    ("plan", "traitors"),
    [
        pytest.param(GraphPlan(1000, 20, 11), 50, id="a bare majority of a small ring"),
        pytest.param(GraphPlan(1000, 74, 38), 50, id="a bare majority of the right ring"),
        pytest.param(GraphPlan(1000, 74, 50), 200, id="four times as many corrupt as planned for"),
        pytest.param(GraphPlan(30, 0, 16), 3, id="a bare majority of the full graph"),
        pytest.param(GraphPlan(30, 0, 21), 15, id="half of the full graph corrupt"),
    ],
)
def test_a_plan_that_lets_the_corrupt_open_a_member_is_unsafe(plan: GraphPlan, traitors: int) -> None:
    assert not is_safe(plan, traitors)


@pytest.mark.parametrize("value", [-0.01, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["corrupt", "dropout"])
def test_what_is_no_fraction_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be a fraction, at least 0 and below 1"):
        plan_graph(200, **({"corrupt": 0.05, "dropout": 0.05} | {name: value}))


@pytest.mark.parametrize("members", [-1, 0, 1])
def test_fewer_than_two_members_are_refused(members: int) -> None:
    with pytest.raises(ConfigError, match=f"members is {members}; a sum that hides anything needs at least 2"):
        plan_graph(members, 0.05, 0.1)


def test_more_corrupt_and_gone_than_any_ring_stands_is_refused() -> None:
    with pytest.raises(ConfigError, match="no graph of 150 members stands 40% corrupt and 30% dropped out"):
        plan_graph(150, 0.4, 0.3)
