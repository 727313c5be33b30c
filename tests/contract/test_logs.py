"""One JSON object a line, with what the line is about, and nothing of what a fault choked on."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO

import pytest

from contract import logs
from contract.errors import ConfigError, QuorumError

logger = logging.getLogger("trunkline.tested")


class Log:
    def __init__(self) -> None:
        self.stream = StringIO()

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log()
    handler = logging.StreamHandler(made.stream)
    handler.setFormatter(logs.JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield made
    logger.removeHandler(handler)


def test_a_line_has_its_time_in_utc_its_level_its_logger_and_its_message(log: Log) -> None:
    before = datetime.now(UTC)
    logger.warning('two\nlines of "%s"', "text")
    (line,) = log.lines()
    at = str(line.pop("time"))
    assert at.endswith("Z")
    assert abs((datetime.fromisoformat(at) - before).total_seconds()) < 60
    assert line == {"level": "WARNING", "logger": "trunkline.tested", "message": 'two\nlines of "text"'}


def test_a_line_names_what_it_is_about(log: Log) -> None:
    def beside() -> None:
        with logs.about(run="r1"):
            logs.note(round=3)
            with logs.about(client="north"):
                logger.info("inside")
            logger.info("after")

    contextvars.copy_context().run(beside)
    logger.info("outside")
    inside, after, outside = log.lines()
    assert (inside["run"], inside["round"], inside["client"]) == ("r1", 3, "north")
    assert (after["run"], after["round"], "client" in after) == ("r1", 3, False)
    assert not set(outside) & set(logs.FIELDS)


def test_tasks_and_threads_do_not_name_each_others_work(log: Log) -> None:
    async def session(number: int) -> None:
        logs.note(client=f"c{number}")
        for _ in range(3):
            await asyncio.sleep(0)
            logger.info("%d", number)

    async def all_of_them() -> None:
        await asyncio.gather(*(session(number) for number in range(4)))

    asyncio.run(all_of_them())
    thread = threading.Thread(target=lambda: logger.info("thread"))
    thread.start()
    thread.join()
    *tasks, beside = log.lines()
    assert len(tasks) == 12
    assert all(line["client"] == f"c{line['message']}" for line in tasks)
    assert "client" not in beside


def test_of_a_fault_its_kind_and_places_are_told_and_not_its_words(log: Log) -> None:
    try:
        int("the patient's own words")
    except ValueError:
        logger.exception("round failed")
    text = log.stream.getvalue()
    (line,) = log.lines()
    assert "patient" not in text
    assert line["error"] == "ValueError"
    assert str(line["trace"]).startswith("['tests/contract/test_logs.py:")


def test_an_error_of_ours_is_told_in_its_words(log: Log) -> None:
    try:
        raise QuorumError("2 of 3 clients")
    except QuorumError:
        logger.exception("round failed")
    (line,) = log.lines()
    assert (line["error"], line["reason"]) == ("QuorumError", "2 of 3 clients")


def test_the_format_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    assert not isinstance(logs.handler("%(message)s").formatter, logs.JsonFormatter)
    monkeypatch.setenv(logs.VARIABLE, "json")
    assert isinstance(logs.handler("%(message)s").formatter, logs.JsonFormatter)
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(ConfigError, match="TRUNKLINE_LOG_FORMAT is 'xml'; it must be json or text"):
        logs.handler("%(message)s")
