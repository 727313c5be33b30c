"""Which rows are kept: the client's plan never breaks a rule of the cache that both ends keep."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.sample_places import SamplePlaces
from contract.delta import SampleCache, Samples, place_bytes

HIDDEN = 8
ROOM_FOR_2 = 2 * place_bytes(4, HIDDEN)


def test_a_row_goes_in_full_first_and_as_a_difference_again() -> None:
    places = SamplePlaces(ROOM_FOR_2, HIDDEN)
    assert places.plan([10, 11], [4, 4]) == Samples((1, 2), (False, False))
    assert places.plan([11, 10], [4, 4]) == Samples((2, 1), (True, True))


def test_the_row_that_was_sent_longest_ago_gives_way() -> None:
    places = SamplePlaces(ROOM_FOR_2, HIDDEN)
    for row in (10, 11, 10):
        places.answered(places.plan([row], [4]))
    assert places.plan([12], [4]) == Samples((2,), (False,), (2,))
    assert places.plan([10], [4]) == Samples((1,), (True,))


def test_no_place_is_freed_before_its_answer_was_read() -> None:
    places = SamplePlaces(ROOM_FOR_2, HIDDEN)
    first, second = places.plan([10], [4]), places.plan([11], [4])
    assert places.plan([12], [4]) == Samples((0,), (False,))
    places.answered(second)
    assert places.plan([12], [4]) == Samples((2,), (False,), (2,))
    places.answered(first)


def test_a_row_of_another_length_and_a_second_copy_are_no_difference() -> None:
    places = SamplePlaces(ROOM_FOR_2, HIDDEN)
    places.answered(places.plan([10, 10], [4, 4]))
    assert places.plan([10], [3]) == Samples((1,), (False,), (1,))


@pytest.mark.parametrize("rows", [[], [1], [1, 2, 3]])
def test_nothing_is_kept_of_rows_that_were_not_announced(rows: list[int]) -> None:
    assert SamplePlaces(ROOM_FOR_2, HIDDEN).plan(rows, [4, 4]) == Samples((0, 0), (False, False))


@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=4), min_size=1, max_size=30
    ),
    room=st.integers(0, 40),
    late=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_plan_is_one_that_the_other_end_admits(
    batches: list[list[tuple[int, int]]], room: int, late: int
) -> None:
    limit = room * place_bytes(1, HIDDEN)
    places, cache = SamplePlaces(limit, HIDDEN), SampleCache(limit, HIDDEN)
    waiting: list[Samples] = []
    for batch in batches:
        rows, lengths = [row for row, _ in batch], [length for _, length in batch]
        samples = places.plan(rows, lengths)
        cache.admit(samples, lengths)
        waiting.append(samples)
        if len(waiting) > late:
            places.answered(waiting.pop(0))
