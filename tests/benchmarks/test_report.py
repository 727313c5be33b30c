"""Ratios and the targets that judge them."""

import pytest

from benchmarks.report import Ratio, Target


def test_a_speedup_is_the_ratio_upside_down_and_keeps_its_worse_end() -> None:
    found = Ratio.of_pairs([1.0, 2.0, 4.0], [16.0] * 3, [16.0] * 3)
    speedup = found.inverse()
    assert (speedup.median, speedup.low, speedup.high) == (8.0, 4.0, 16.0)
    assert Target.of_speedup("speedup", speedup, 4.0).ok is True
    assert Target.of_speedup("speedup", speedup, 4.1).ok is False


@pytest.mark.parametrize("again", [14.0, 18.0])
def test_a_yardstick_that_strays_from_itself_judges_no_speedup(again: float) -> None:
    speedup = Ratio.of_pairs([1.0] * 3, [16.0] * 3, [again] * 3).inverse()
    assert Target.of_speedup("speedup", speedup, 2.0).ok == "inconclusive"
