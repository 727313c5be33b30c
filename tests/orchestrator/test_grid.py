"""Calls of Flower's Grid that never come back: they end all the same, and leave a signal its way."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading
from collections.abc import Collection
from pathlib import Path

import pytest
from flwr.app import Message

from contract.errors import ConnectionFailedError
from orchestrator.grid import BoundedGrid

REPOSITORY = Path(__file__).resolve().parents[2]
ROUND = contextvars.ContextVar[int]("ROUND")


class Grid:
    """Answers, fails, or hangs as a pull does whose SuperLink is gone: in a wait that no signal interrupts."""

    def __init__(self, error: BaseException | None = None, hangs: bool = False) -> None:
        self.error, self.hangs = error, hangs
        self.rounds: list[int | None] = []

    def _come_to(self, answer: list[int]) -> list[int]:
        self.rounds.append(ROUND.get(None))
        if self.hangs:
            threading.Event().wait()
        if self.error is not None:
            raise self.error
        return answer

    def get_node_ids(self) -> Collection[int]:
        return self._come_to([7])

    def push_messages(self, messages: list[Message]) -> Collection[str | None]:
        return [f"sent {number}" for number in self._come_to([len(messages)])]

    def pull_messages(self, message_ids: list[str]) -> Collection[Message]:
        self._come_to([])
        return []


def test_what_the_grid_answers_or_raises_comes_through() -> None:
    grid = BoundedGrid(Grid())
    assert (grid.get_node_ids(), grid.push_messages([]), grid.pull_messages(["m"])) == ([7], ["sent 0"], [])
    for error in (ValueError("no"), TimeoutError("its own"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            BoundedGrid(Grid(error)).pull_messages(["m"])


def test_a_call_knows_what_its_caller_logs_about() -> None:
    grid = Grid()
    token = ROUND.set(3)
    try:
        BoundedGrid(grid).get_node_ids()
    finally:
        ROUND.reset(token)
    assert grid.rounds == [3]


def test_a_call_that_never_comes_back_is_given_up() -> None:
    grid = BoundedGrid(Grid(hangs=True), limit_s=0.3)
    with pytest.raises(ConnectionFailedError, match=r"the SuperLink did not hand over a reply within 0\.3 s"):
        grid.pull_messages(["m"])
    with pytest.raises(ConnectionFailedError, match="did not take a message"):
        grid.push_messages([])


def test_a_signal_that_another_thread_takes_ends_a_call_that_hangs() -> None:
    """So Flower ends a ServerApp whose SuperLink is gone: a thread that watches has the signal delivered to itself."""
    code = (
        "import signal, threading\n"
        "from orchestrator.grid import BoundedGrid\n"
        "from tests.orchestrator.test_grid import Grid\n"
        "grid = BoundedGrid(Grid(hangs=True), limit_s=600)\n"
        "threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT)).start()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        "    grid.pull_messages(['m'])\n"
        "except KeyboardInterrupt:\n"
        "    print('told to end')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout == "told to end\n"
