"""Marks on an axis are round, few, in order, and hold what they are to hold."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.pages.scales import (
    BYTE_UNITS,
    SECOND_UNITS,
    clock_marks,
    length_text,
    mark_text,
    marks,
    unit_for,
    whole_marks,
)

NUMBERS = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS)
def test_marks_hold_both_ends_and_are_at_most_six(one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = marks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-300)
    assert 2 <= len(found) <= 6
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert all(before < after for before, after in itertools.pairwise(found))


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS)
def test_no_two_marks_have_the_same_text(one: float, other: float) -> None:
    found = marks(min(one, other), max(one, other))
    step = found[1] - found[0]
    if step > 1e-9 * max(map(abs, found)):
        assert len({mark_text(value, step) for value in found}) == len(found)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 100, ["0", "20", "40", "60", "80", "100"]),
        (3.91, 4.2, ["3.9", "4.0", "4.1", "4.2"]),
        (0, 1234, ["0", "250", "500", "750", "1,000", "1,250"]),
        (-0.5, 0.5, ["-0.50", "-0.25", "0.00", "0.25", "0.50"]),
        (0, 6.1, ["0", "2", "4", "6", "8"]),
    ],
)
def test_marks_are_round(low: float, high: float, texts: list[str]) -> None:
    found = marks(low, high)
    assert [mark_text(value, found[1] - found[0]) for value in found] == texts


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), st.integers(0, 100_000))
def test_whole_marks_begin_at_the_first_and_stay_within(low: int, more: int) -> None:
    found = whole_marks(low, low + more)
    assert found[0] == low
    assert found[-1] <= low + more
    assert len(found) <= 6


@settings(max_examples=200, deadline=None)
@given(st.floats(min_value=0.001, max_value=1e9))
def test_clock_marks_begin_at_zero_and_stay_within(length_s: float) -> None:
    found = clock_marks(length_s)
    assert found[0] == 0
    assert found[-1] <= length_s * (1 + 1e-9)
    assert len(found) <= 6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0421, "0.042 s"), (4.25, "4.2 s"), (59.4, "59 s"), (59.6, "1 min"), (125, "2 min 5 s"), (3599.7, "1 h"),
        (7260, "2 h 1 min"), (90_000, "1 d 1 h"), (86_400 * 400, "400 d"),
    ],
)  # fmt: skip
def test_lengths_of_time_are_for_people(seconds: float, text: str) -> None:
    assert length_text(seconds) == text


@pytest.mark.parametrize(
    ("largest", "units", "name"),
    [(0, BYTE_UNITS, "B"), (1999, BYTE_UNITS, "B"), (2000, BYTE_UNITS, "kB"), (3e15, BYTE_UNITS, "TB"),
     (119, SECOND_UNITS, "s"), (120, SECOND_UNITS, "min"), (7200, SECOND_UNITS, "h")],
)  # fmt: skip
def test_the_largest_unit_that_fits_is_taken(largest: float, units: tuple[object, ...], name: str) -> None:
    assert unit_for(largest, units).name == name  # type: ignore[arg-type]
