"""Every mark of a picture lies within it, in proportion to its number; what is no number is left out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.pages.charts import (
    LARGEST,
    LINE_WIDTH,
    PLOT_HEIGHT,
    SMALLEST,
    Column,
    Span,
    column_chart,
    line_chart,
    timeline,
)
from trunkline.pages.scales import BYTE_UNITS

ANY = st.floats(allow_nan=True, allow_infinity=True)
LOSSES = st.dictionaries(st.integers(0, 500), ANY, max_size=80)
AMOUNTS = st.floats(min_value=0, max_value=LARGEST)


@settings(max_examples=200, deadline=None)
@given(LOSSES, LOSSES)
def test_lines_stay_within_the_plot_whatever_the_numbers(
    held_out: dict[int, float], training: dict[int, float]
) -> None:
    chart = line_chart({"held-out": held_out, "training": training})
    finite = [value for value in (*held_out.values(), *training.values()) if abs(value) <= LARGEST]
    assert (chart is None) == (not finite)
    if chart is None:
        return
    points = [tuple(map(float, point.split(","))) for line in chart.lines for point in line.points.split()]
    assert len(points) == len(finite)
    assert all(0 <= x <= LINE_WIDTH and -0.01 <= y <= PLOT_HEIGHT + 0.01 for x, y in points)
    assert all(0 <= mark.at <= 100 for mark in chart.x_marks)
    assert all(-0.01 <= mark.at <= PLOT_HEIGHT + 0.01 for mark in chart.y_marks)


def test_a_line_is_in_proportion_to_its_numbers_and_its_marks() -> None:
    chart = line_chart({"held-out": {0: 4.0, 1: 3.5, 3: 3.0}})
    assert chart is not None
    (line,) = chart.lines
    (x0, y0), (x1, y1), (x3, y3) = line.dots
    assert (x3 - x0) == pytest.approx(3 * (x1 - x0))
    assert (y3 - y0) == pytest.approx(2 * (y1 - y0))
    at = {mark.text: mark.at for mark in chart.y_marks}
    assert (at["4.0"], at["3.0"]) == (pytest.approx(y0), pytest.approx(y3))
    assert {mark.text: mark.at for mark in chart.x_marks}["1"] == pytest.approx(x1)


def test_one_round_alone_is_a_dot_in_the_middle() -> None:
    chart = line_chart({"held-out": {7: 3.25}, "training": {}})
    assert chart is not None
    assert [mark.text for mark in chart.x_marks] == ["7"]
    assert chart.lines[0].dots[0][0] == pytest.approx(50)


def test_many_rounds_are_a_line_without_dots() -> None:
    chart = line_chart({"held-out": {number: 1.0 / (number + 1) for number in range(200)}})
    assert chart is not None
    assert chart.lines[0].dots == ()
    assert len(chart.lines[0].points.split()) == 200


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(AMOUNTS, AMOUNTS), min_size=1, max_size=250))
def test_columns_are_stacked_side_by_side_and_in_proportion(amounts: list[tuple[float, float]]) -> None:
    columns = [Column(str(at), (("up", up), ("down", down))) for at, (up, down) in enumerate(amounts)]
    chart = column_chart(columns, BYTE_UNITS)
    drawable = [value for both in amounts for value in both if value >= SMALLEST]
    assert (chart is None) == (not drawable)
    if chart is None:
        return
    for box in chart.boxes:
        assert 0 <= box.left <= box.left + box.width <= 100.0001
        assert -0.01 <= box.top <= box.top + box.height <= PLOT_HEIGHT + 0.01
    unit = {unit.name: unit.size for unit in BYTE_UNITS}[chart.unit]
    top = {float(mark.text.replace(",", "")): mark.at for mark in chart.y_marks}
    pixels = (top[0.0] - chart.y_marks[-1].at) / max(top) / unit
    drawn = sum(box.height for box in chart.boxes)
    assert drawn == pytest.approx(pixels * sum(drawable), rel=1e-6, abs=1e-6)


def test_what_is_no_number_adds_nothing_to_a_column() -> None:
    chart = column_chart([Column("1", (("up", math.nan), ("down", 5.0))), Column("2", (("up", math.inf),))], BYTE_UNITS)
    assert chart is not None
    assert [box.kind for box in chart.boxes] == ["down"]


def test_columns_of_attempts_that_came_to_nothing_are_told_apart() -> None:
    chart = column_chart([Column("1.1", (("up", 5.0),), whole=False), Column("1.2", (("up", 5.0),))], BYTE_UNITS)
    assert chart is not None
    assert (len(chart.boxes), len(chart.faded)) == (1, 1)


def test_a_timeline_keeps_lengths_and_cuts_off_what_lies_outside() -> None:
    found = timeline([Span("training", 10, 30), Span("open", 90, 120), Span("cohort", -5, 5)], 100, [50, 101])
    assert found is not None
    assert [(box.left, box.width) for box in found.boxes] == [(10, 20), (90, 10), (0, 5)]
    assert found.moments == [50]
    assert [mark.text for mark in found.x_marks] == ["0", "30 s", "1 min", "1 min 30 s"]


@pytest.mark.parametrize("length_s", [0.0, math.nan, -1.0])
def test_no_time_is_no_timeline(length_s: float) -> None:
    assert timeline([Span("training", 0, 1)], length_s, []) is None
    assert timeline([], 10.0, []) is None
