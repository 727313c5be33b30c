"""What the throughput benchmark makes of its readings, and what it takes for arguments."""

from __future__ import annotations

import json

import pytest

from benchmarks import throughput
from benchmarks.report import Report


def readings(unsplit_s: float, split_s: float, clients: int) -> throughput.Readings:
    """Walls of one un-split step and of one step of all `clients` clients together."""
    found = throughput.Readings()
    for _ in range(5):
        found.add("unsplit", (unsplit_s, 2 * unsplit_s), 1, 1)
        found.add("split", (split_s, 2 * split_s), clients, 1)
        found.add("naive", (2 * split_s, split_s), clients, 1)
        found.add("unsplit again", (unsplit_s, unsplit_s), 1, 1)
    return found


def test_a_ratio_is_the_tokens_a_second_of_all_clients_over_unsplits(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("throughput", "made up")
    throughput.add(report, readings(0.5, 4.0, 4), throughput.BATCHES["1x64"], 4, "")
    throughput.add(report, readings(0.5, 2.0, 4), throughput.BATCHES["4x128"], 4, "")
    assert report.finish(as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert {name: ratio["median"] for name, ratio in told["ratios"].items()} == {
        "small_ratio_n4": 0.5,
        "naive_small_ratio_n4": 0.25,
        "ratio_n4": 1.0,
        "naive_ratio_n4": 0.5,
    }
    assert [(target["name"], target["limit"], target["ok"]) for target in told["targets"]] == [
        ("small_ratio_n4", 1.0, False),
        ("ratio_n4", 0.95, True),
    ]
    split = next(row for row in told["results"] if (row["batch"], row["side"]) == ("4x128", "split"))
    assert (split["tokens_per_s"], split["cpu_s_per_step"], split["pairs"]) == (1024.0, 1.0, 5)


def test_a_lone_client_of_a_small_batch_has_a_limit_of_its_own() -> None:
    report = Report("throughput", "made up")
    throughput.add(report, readings(0.9, 1.0, 1), throughput.BATCHES["1x64"], 1, "")
    assert (report.targets[0].name, report.targets[0].limit, report.targets[0].ok) == ("small_ratio_n1", 0.85, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clients", "0"], "a reading needs a client"),
        (["--batch", "2x2"], "invalid choice"),
        (["--shape", "13b"], "invalid choice"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_starts(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        throughput.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
