"""Where the marks of a picture lie: a plot as wide as its page, so that x is in percent, and y in pixels from the top.

Lines cannot be drawn in percent: they are points of a box LINE_WIDTH by PLOT_HEIGHT, which is stretched over the plot.
What is not finite, or beyond LARGEST, is left out: a client may tell any number. Each function answers None where
nothing is left to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trunkline.pages.scales import Unit, clock_marks, length_text, mark_text, marks, unit_for, whole_marks

PLOT_HEIGHT = 180
LINE_WIDTH = 1000
LARGEST = 1e15
SMALLEST = 1e-6
MOST_DOTS = 60
_WIDEST = 12.0  # percent: one column alone is no wall
_SIDE = 2.5  # percent of the plot left free on both sides, so that a dot at an end is whole


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark on an axis: percent from the left, or pixels from the top."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line: `points` in the stretched box, as SVG wants them, and `dots` as (percent, pixels)."""

    kind: str
    points: str
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class LineChart:
    x_marks: Sequence[Mark]
    y_marks: Sequence[Mark]
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle: left and width in percent, top and height in pixels."""

    kind: str
    left: float
    width: float
    top: float = 0.0
    height: float = PLOT_HEIGHT


@dataclass(frozen=True, slots=True)
class Column:
    """What one attempt adds to a chart of columns: its heading, and parts by kind, from the bottom up."""

    heading: str
    parts: Sequence[tuple[str, float]]
    whole: bool = True


@dataclass(frozen=True, slots=True)
class ColumnChart:
    """`faded` are the columns of attempts that came to nothing."""

    unit: str
    x_marks: Sequence[Mark]
    y_marks: Sequence[Mark]
    boxes: Sequence[Box]
    faded: Sequence[Box]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time in seconds from the timeline's beginning."""

    kind: str
    begins_s: float
    ends_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    x_marks: Sequence[Mark]
    boxes: Sequence[Box]
    moments: Sequence[float]


def line_chart(lines: Mapping[str, Mapping[int, float]]) -> LineChart | None:
    """Numbers by round, one line a kind."""
    told = {kind: _drawable(numbers) for kind, numbers in lines.items()}
    told = {kind: numbers for kind, numbers in told.items() if numbers}
    if not told:
        return None
    first, last = min(map(min, told.values())), max(map(max, told.values()))
    scale = marks(
        min(min(numbers.values()) for numbers in told.values()), max(max(numbers.values()) for numbers in told.values())
    )

    def place(number: int, value: float) -> tuple[float, float]:
        return _across(number - first, last - first), _down(value, scale)

    found = []
    for kind, numbers in told.items():
        places = [place(number, numbers[number]) for number in sorted(numbers)]
        points = " ".join(f"{_short(x * LINE_WIDTH / 100)},{_short(y)}" for x, y in places)
        found.append(Line(kind, points, places if len(places) <= MOST_DOTS else ()))
    x_marks = [Mark(_across(number - first, last - first), str(number)) for number in whole_marks(first, last)]
    return LineChart(x_marks, _y_marks(scale), found)


def column_chart(columns: Sequence[Column], units: Sequence[Unit]) -> ColumnChart | None:
    """Parts stacked in one column an attempt, in the largest of `units` that fits."""
    sums = [sum(value for _, value in _parts(column)) for column in columns]
    if not sums or max(sums) <= 0:
        return None
    unit = unit_for(max(sums), units)
    scale = marks(0.0, max(sums) / unit.size)
    share = 100 / len(columns)
    width = min(share * 0.8, _WIDEST) if len(columns) <= 100 else share
    boxes: list[Box] = []
    faded: list[Box] = []
    for place, column in enumerate(columns):
        below = 0.0
        for kind, value in _parts(column):
            top, bottom = _down((below + value) / unit.size, scale), _down(below / unit.size, scale)
            box = Box(kind, (place + 0.5) * share - width / 2, width, top, bottom - top)
            (boxes if column.whole else faded).append(box)
            below += value
    shown = whole_marks(0, len(columns) - 1)
    x_marks = [Mark((place + 0.5) * share, columns[place].heading) for place in shown]
    return ColumnChart(unit.name, x_marks, _y_marks(scale), boxes, faded)


def timeline(spans: Sequence[Span], length_s: float, moments_s: Sequence[float]) -> Timeline | None:
    """Stretches and moments of `length_s` seconds; what lies outside of them is cut off."""
    if not spans or not length_s > 0:
        return None
    boxes = []
    for span in spans:
        left, right = (100 * min(max(at_s, 0.0), length_s) / length_s for at_s in (span.begins_s, span.ends_s))
        boxes.append(Box(span.kind, left, max(right - left, 0.0)))
    x_marks = [Mark(100 * at_s / length_s, length_text(at_s) if at_s else "0") for at_s in clock_marks(length_s)]
    return Timeline(x_marks, boxes, [100 * at_s / length_s for at_s in moments_s if 0 <= at_s <= length_s])


def _drawable(numbers: Mapping[int, float]) -> dict[int, float]:
    return {number: value for number, value in numbers.items() if abs(value) <= LARGEST}


def _parts(column: Column) -> list[tuple[str, float]]:
    return [(kind, value) for kind, value in column.parts if SMALLEST <= value <= LARGEST]


def _across(done: float, whole: float) -> float:
    """Percent from the left; in the middle where there is one place only."""
    return _SIDE + (100 - 2 * _SIDE) * (done / whole if whole else 0.5)


def _down(value: float, scale: Sequence[float]) -> float:
    """Pixels from the top."""
    return PLOT_HEIGHT * (scale[-1] - value) / (scale[-1] - scale[0])


def _y_marks(scale: Sequence[float]) -> list[Mark]:
    return [Mark(_down(value, scale), mark_text(value, scale[1] - scale[0])) for value in scale]


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")
