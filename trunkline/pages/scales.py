"""Axes: round numbers to mark them with, and units that people read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_MARKS = 6
_S, _MIN, _H, _DAY = 1, 60, 3600, 86400
_CLOCK_STEPS_S = (
    *(_S, 2, 5, 10, 15, 30, _MIN, 2 * _MIN, 5 * _MIN, 10 * _MIN, 15 * _MIN, 30 * _MIN),
    *(_H, 2 * _H, 3 * _H, 6 * _H, 12 * _H, _DAY, 2 * _DAY, 7 * _DAY, 14 * _DAY, 28 * _DAY),
)


@dataclass(frozen=True, slots=True)
class Unit:
    """What an axis is in: `size` is how many base units (bytes, seconds) one of it is."""

    name: str
    size: float


BYTE_UNITS = (Unit("B", 1), Unit("kB", 1e3), Unit("MB", 1e6), Unit("GB", 1e9), Unit("TB", 1e12))
SECOND_UNITS = (Unit("s", 1), Unit("min", _MIN), Unit("h", _H))


def unit_for(largest: float, units: Sequence[Unit]) -> Unit:
    """The largest of `units` (smallest first) of which `largest` is at least two, or else the first one."""
    fitting = [unit for unit in units if largest >= 2 * unit.size]
    return fitting[-1] if fitting else units[0]


def marks(low: float, high: float, most: int = _MOST_MARKS) -> list[float]:
    """At most `most` round numbers, evenly spaced, the first at or below `low` and the last at or above `high`."""
    if math.isclose(low, high, rel_tol=1e-6, abs_tol=1e-9):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    for step in _round_steps((high - low) / most):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            return [number * step for number in range(first, last + 1)]
    return [low, high]


def whole_marks(low: int, high: int, most: int = _MOST_MARKS) -> list[int]:
    """At most `most` whole numbers from `low` to `high`, evenly spaced at a round distance; `low` itself is one."""
    step = 1
    for step in (size * 10**power for power in range(10) for size in (1, 2, 5)):
        if (high - low) // step < most:
            break
    return list(range(low, high + 1, step))


def clock_marks(length_s: float, most: int = _MOST_MARKS) -> list[float]:
    """At most `most` moments in seconds from 0 to `length_s`, at a distance that clocks show."""
    step: float = next((step for step in _CLOCK_STEPS_S if length_s / step < most), 0.0) or length_s / (most - 1)
    return [number * step for number in range(int(length_s / step + 1e-9) + 1)]


def mark_text(value: float, step: float) -> str:
    """A mark's number with just the digits that tell it from its neighbours at distance `step`."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if step > 0 and round(step, digits) != step and not math.isclose(round(step, digits), step, rel_tol=1e-6):
        digits += 1
    return f"{value + 0.0:,.{digits}f}"


def length_text(seconds: float) -> str:
    """A length of time for people: 0.42 s, 4.2 s, 42 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for large, small, names in ((_DAY, _H, ("d", "h")), (_H, _MIN, ("h", "min")), (_MIN, _S, ("min", "s"))):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    return f"{whole} s"


def _round_steps(least: float) -> list[float]:
    """Steps of 1, 2, 2.5 and 5 times a power of ten, from about `least` on."""
    power = math.floor(math.log10(least)) if least > 0 else 0
    return [size * 10.0**exponent for exponent in range(power, power + 4) for size in (1, 2, 2.5, 5)]
