"""Flower's Grid, each call of which ends: with its answer, by a signal, or after a limit.

Flower asks a SuperLink that is gone again and again without end, and waits for that in a way that no signal interrupts:
an orchestrator that lost its SuperLink while it pulled a reply would live on, and keep its run from being resumed.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from typing import TypeVar

from flwr.app import Message

from contract.errors import ConnectionFailedError
from orchestrator.exchange import MessageGrid

LIMIT_S = 600.0
"""What the largest message takes to cross a slow line to the SuperLink, with room to spare."""
_LOOK_S = 0.2

_Answer = TypeVar("_Answer")


class BoundedGrid:
    """`grid`, called beside the thread that waits, which handles signals meanwhile.

    Each call raises what `grid` raises, or ConnectionFailedError after `limit_s` seconds; the call is then given up.
    """

    def __init__(self, grid: MessageGrid, limit_s: float = LIMIT_S) -> None:
        self._grid = grid
        self._limit_s = limit_s

    def get_node_ids(self) -> Collection[int]:
        return self._answer("say which nodes are connected", self._grid.get_node_ids)

    def push_messages(self, messages: list[Message]) -> Collection[str | None]:
        return self._answer("take a message", lambda: self._grid.push_messages(messages))

    def pull_messages(self, message_ids: list[str]) -> Collection[Message]:
        return self._answer("hand over a reply", lambda: self._grid.pull_messages(message_ids))

    def _answer(self, what: str, call: Callable[[], _Answer]) -> _Answer:
        answer: Future[_Answer] = Future()

        def ask() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:  # noqa: BLE001 (raised by who waits)
                answer.set_exception(error)

        context = contextvars.copy_context()  # its log names the run
        # A thread of its own, and a daemon: one that hangs keeps neither a later call nor the process's end waiting.
        threading.Thread(target=context.run, args=(ask,), name="grid", daemon=True).start()
        deadline = time.monotonic() + self._limit_s
        while not wait([answer], _LOOK_S).done:
            if time.monotonic() > deadline:
                raise ConnectionFailedError(f"the SuperLink did not {what} within {self._limit_s:g} s")
        return answer.result()
