"""What the benchmark of slow links makes of its readings."""

from __future__ import annotations

import pytest

from benchmarks import wan
from benchmarks.report import Report
from benchmarks.shaping import Passed

SLOW = wan.PLACES["5x80"]
MEGABYTE = 10**6


def test_the_bound_is_the_slower_of_link_and_computing_and_one_microbatchs_way() -> None:
    passed = Passed(5 * MEGABYTE, 3 * MEGABYTE)
    fill_s = 2 * 0.08 + 1 * 8 / 5  # a megabyte of both directions for each of 8 microbatches
    assert wan.bound_s(1.0, passed, SLOW, 8) == pytest.approx(8.0 + fill_s)
    assert wan.bound_s(10.0, passed, SLOW, 8) == pytest.approx(10.0 + fill_s)


def test_a_naive_step_waits_for_all_its_bytes_and_every_requests_round_trip() -> None:
    assert wan.naive_link_s(Passed(2 * MEGABYTE, 3 * MEGABYTE), SLOW, 8) == pytest.approx(8.0 + 17 * 0.08)


def readings(ours_s: float, naive_s: float) -> wan.Readings:
    return wan.Readings(
        ours_s=[ours_s] * 3,
        naive_s=[naive_s] * 4,
        compute_s=[2.0] * 4,
        cpu_s=[1.0] * 3,
        ours_bytes=[Passed(5 * MEGABYTE, 3 * MEGABYTE)] * 3,
        naive_bytes=[Passed(16 * MEGABYTE, 16 * MEGABYTE)] * 4,
    )


def test_a_cell_is_held_to_its_bound_and_to_the_naive_step_where_that_is_mostly_link() -> None:
    report = Report("wan", "made up")
    wan.add(report, SLOW, readings(ours_s=10.0, naive_s=55.0), 8)
    assert report.results[0]["naive_link_share"] == pytest.approx((51.2 + 1.36) / 55)
    assert [(target.name, target.ok) for target in report.targets] == [
        ("bound_ratio_5mbit_80ms", True),
        ("speedup_5mbit_80ms", True),
    ]
    assert report.ratios["bound_ratio_5mbit_80ms"].median == pytest.approx(10.0 / 9.76)
    assert report.ratios["speedup_5mbit_80ms"].median == pytest.approx(5.5)


def test_where_computing_is_much_of_the_naive_step_no_speedup_is_asked_for() -> None:
    report = Report("wan", "made up")
    wan.add(report, SLOW, readings(ours_s=20.0, naive_s=80.0), 8)
    assert [(target.name, target.ok) for target in report.targets] == [("bound_ratio_5mbit_80ms", False)]


def test_there_are_the_six_cells_that_were_promised() -> None:
    assert [place.name for place in wan.PLACES.values()] == [
        f"{mbit}mbit_{rtt_ms}ms" for mbit in (5, 20, 100) for rtt_ms in (20, 80)
    ]


def test_an_unknown_codec_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        wan.main(["--codec", "int3"])
    assert "codec is 'int3'" in capsys.readouterr().err
