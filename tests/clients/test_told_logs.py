"""A real round's log, of orchestrator, clients and trunk, line by line: JSON, and nothing of the text."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest

from clients.trainer import train
from contract import logs
from tests.clients.real_run import conducted, settings
from tests.clients.sites import WORDS, Site, write_texts
from tests.conftest import TrunkProcess

pytestmark = pytest.mark.usefixtures("flower_task")

PLANTED = " ".join(WORDS[7:13])
"""Six words that stand in every row, in this order and in no line of a program."""


@pytest.fixture(scope="module")
def talking_trunk(trunk_process: Callable[..., TrunkProcess], llama_dir: Path) -> Iterator[TrunkProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(logs.VARIABLE, "json")
        started = trunk_process(llama_dir, 1, 1)
    yield started
    started.kill()


class Captured:
    """The test process's own log in both formats."""

    def __init__(self) -> None:
        self.as_json, self.as_text = StringIO(), StringIO()

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.as_json.getvalue().splitlines()]


@pytest.fixture
def captured() -> Iterator[Captured]:
    made, logger = Captured(), logging.getLogger("trunkline")
    handlers = [logging.StreamHandler(made.as_json), logging.StreamHandler(made.as_text)]
    handlers[0].setFormatter(logs.JsonFormatter())
    level = logger.level
    logger.setLevel(logging.DEBUG)
    for handler in handlers:
        logger.addHandler(handler)
    yield made
    for handler in handlers:
        logger.removeHandler(handler)
    logger.setLevel(level)


def planted_sites(llama_dir: Path, trunk: TrunkProcess, folder: Path) -> list[Site]:
    sites = []
    for number in (1, 2):
        data = write_texts(folder / f"site {number}.jsonl", rows=12, seed=number)
        rows = [json.loads(line)["text"] for line in data.read_text().splitlines()]
        data.write_text("".join(json.dumps({"text": f"{PLANTED} {row}"}) + "\n" for row in rows))
        config = {"model": str(llama_dir), "data": str(data), "trunk-address": trunk.address, "name": f"site-{number}"}
        sites.append(Site(number, dict(config)))
    return sites


def trunk_lines(trunk: TrunkProcess, run_id: str) -> list[dict[str, object]]:
    found = [json.loads(line) for line in trunk.log.read_text().splitlines()]
    return [line for line in found if line.get("run") == run_id]


def test_a_rounds_lines_name_what_they_are_about_and_quote_no_text(
    llama_dir: Path, talking_trunk: TrunkProcess, tmp_path: Path, captured: Captured
) -> None:
    config = settings(llama_dir, talking_trunk.address, num_rounds=2, quorum=2)
    run_id = conducted(tmp_path / "home", config, planted_sites(llama_dir, talking_trunk, tmp_path)).run_id
    lines, at_trunk = captured.lines(), trunk_lines(talking_trunk, run_id)
    by_orchestrator = [line for line in lines if line["logger"] == "trunkline.orchestrator"]
    assert {line.get("run") for line in by_orchestrator} == {run_id}
    assert {line.get("round") for line in by_orchestrator} == {None, 1, 2}
    by_clients = {
        (line.get("run"), line.get("round"), line.get("client"))
        for line in lines
        if "wire round" in str(line["message"])
    }
    assert {(run_id, number, f"site-{site}") for number in (1, 2) for site in (1, 2)} <= by_clients
    # Each round's training and judging, one session each of both clients, and the last adapter's judgement.
    assert {(line["round"], line["client"]) for line in at_trunk} >= {
        (number, site) for number in (1, 2) for site in "12"
    }
    for line in (*lines, *at_trunk):
        assert {"time", "level", "logger", "message"} <= line.keys() <= {
            *("time", "level", "logger", "message", "error", "reason", "trace"), *logs.FIELDS
        }  # fmt: skip
    everything = captured.as_json.getvalue() + captured.as_text.getvalue() + talking_trunk.log.read_text()
    nothing_of_the_text(everything)


def test_a_fault_that_quotes_a_row_is_logged_without_it(
    llama_dir: Path, talking_trunk: TrunkProcess, tmp_path: Path, captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def faulty(*given: object) -> object:
        calls.append(given)
        if len(calls) == 1:
            raise ValueError(f"cannot use the row {PLANTED}")
        return train(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("clients.participation.train", faulty)
    config = settings(llama_dir, talking_trunk.address)
    conducted(tmp_path / "home", config, planted_sites(llama_dir, talking_trunk, tmp_path))
    (line,) = [line for line in captured.lines() if "error" in line]
    assert (line["error"], line["message"]) == ("ValueError", "round failed")
    assert (line["round"], line["attempt"], line["client"]) == (1, 1, "site-1")
    assert "clients/participation.py" in str(line["trace"])
    nothing_of_the_text(captured.as_json.getvalue() + talking_trunk.log.read_text())
    assert PLANTED in captured.as_text.getvalue(), "the search finds what stands there"


def nothing_of_the_text(log: str) -> None:
    assert PLANTED not in log
    words = PLANTED.split()
    assert not [start for start in range(len(words) - 2) if " ".join(words[start : start + 3]) in log]
    assert not re.search(r"tensor\(|array\(|\[-?[0-9.e-]+, -?[0-9.e-]+, ", log), "no values"
    assert "PRIVATE KEY" not in log
    assert not re.search(r"[0-9a-f]{65}|[A-Za-z0-9+/]{100}", log), "nothing longer than a SHA-256"
