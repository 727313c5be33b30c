"""The pictures of docs/performance.md show each reading that is kept, where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import pictures

PREFIXES = ("", "small_")
RATIO = {"median": 0.9, "low": 0.8, "high": 1.1, "self_ratio": 1.0}
THROUGHPUT = {
    "results": [
        {"batch": batch, "clients": clients, "side": "split"} for batch in ("4x128", "1x64") for clients in (16, 1, 2)
    ],
    "ratios": {
        **{f"{prefix}ratio_n{clients}": RATIO for prefix in PREFIXES for clients in (1, 2, 16)},
        **{
            f"naive_{prefix}ratio_n{clients}": RATIO | {"median": 0.81}
            for prefix in ("", "small_")
            for clients in (1, 2)
        },
    },
}
WAN = {
    "results": [
        {"mbit": mbit, "rtt_ms": rtt_ms, "naive_s": 90.0 / mbit, "step_s": 40.0 / mbit, "bound_s": 20.0 / mbit}
        for mbit in (100, 5, 20)
        for rtt_ms in (80, 20)
    ]
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures, which stay open while the test looks at them."""
    figures: list[Figure] = []
    with monkeypatch.context() as patched:
        patched.setattr(plt, "close", figures.append)
        yield figures
    for figure in figures:
        plt.close(figure)


def test_throughput_has_a_point_for_each_number_of_clients_in_order(tmp_path: Path, drawn: list[Figure]) -> None:
    pictures.draw_throughput(THROUGHPUT, tmp_path / "throughput.png")
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    for panel in figure.axes:
        assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "2", "16"]
        ours, naive = panel.containers
        assert ours[0].get_ydata().tolist() == [0.9, 0.9, 0.9]
        assert naive[0].get_xdata().tolist() == [0, 1]
        assert naive[0].get_ydata().tolist() == [0.81, 0.81]


def test_slow_links_have_a_panel_for_each_round_trip_and_a_line_for_each_side(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    pictures.draw_slow_links(WAN, tmp_path / "slow-links.png")
    (figure,) = drawn
    assert [panel.get_title() for panel in figure.axes] == ["round trip of 20 ms", "round trip of 80 ms"]
    for panel in figure.axes:
        lines: dict[str, Any] = {str(line.get_label()): line for line in panel.lines}
        assert list(lines["pipelined, codec auto"].get_xdata()) == [5, 20, 100]
        assert list(lines["naive: blocking, float32"].get_ydata()) == [18.0, 4.5, 0.9]
