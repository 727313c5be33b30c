"""One computes at a time, the one furthest along first, each part in the order of the microbatches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from clients.baton import Baton, CancelledError, Part

WAIT_S = 10.0


class Taker:
    """A thread that takes the baton for one part and notes that it has it."""

    def __init__(self, baton: Baton, order: list[tuple[int, Part]], microbatch: int, part: Part) -> None:
        self.error: Exception | None = None

        def take() -> None:
            try:
                baton.take(microbatch, part)
                order.append((microbatch, part))
                baton.give()
            except CancelledError as error:
                self.error = error

        self.thread = threading.Thread(target=take, daemon=True)
        self.thread.start()

    def join(self) -> None:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


def all_waiting(baton: Baton, count: int) -> None:
    until(lambda: len(baton._waiting) == count)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_whoever_is_furthest_along_goes_first_and_parts_keep_their_order() -> None:
    baton, order = Baton(4), list[tuple[int, Part]]()
    for microbatch in (0, 1):
        baton.take(microbatch, Part.HEAD)
        baton.give()
    baton.take(0, Part.TAIL)
    takers = [
        Taker(baton, order, *wanted)
        for wanted in ((3, Part.HEAD), (2, Part.HEAD), (1, Part.TAIL), (0, Part.HEAD_BACKWARD))
    ]
    all_waiting(baton, 4)
    assert order == []
    baton.give()
    for taker in takers:
        taker.join()
    assert order == [(0, Part.HEAD_BACKWARD), (1, Part.TAIL), (2, Part.HEAD), (3, Part.HEAD)]


def test_an_answer_that_came_early_waits_for_the_one_before_it() -> None:
    baton, order = Baton(2), list[tuple[int, Part]]()
    for microbatch in (0, 1):
        baton.take(microbatch, Part.HEAD)
        baton.give()
    early = Taker(baton, order, 1, Part.TAIL)
    all_waiting(baton, 1)
    late = Taker(baton, order, 0, Part.TAIL)
    early.join()
    late.join()
    assert order == [(0, Part.TAIL), (1, Part.TAIL)]


def test_a_microbatch_that_ends_early_holds_up_nobody() -> None:
    baton, order = Baton(3), list[tuple[int, Part]]()
    baton.take(0, Part.HEAD)
    waiting = Taker(baton, order, 1, Part.HEAD)
    baton.end(0)
    waiting.join()
    Taker(baton, order, 1, Part.TAIL).join()
    Taker(baton, order, 1, Part.HEAD_BACKWARD).join()
    assert len(order) == 3


def test_nobody_gets_a_cancelled_baton() -> None:
    baton, order = Baton(2), list[tuple[int, Part]]()
    baton.take(0, Part.HEAD)
    waiting = Taker(baton, order, 1, Part.HEAD)
    all_waiting(baton, 1)
    baton.cancel()
    waiting.join()
    assert isinstance(waiting.error, CancelledError)
    assert order == []
    with pytest.raises(CancelledError):
        baton.take(0, Part.TAIL)


def test_a_wait_counts_only_while_a_microbatch_is_left_to_begin() -> None:
    baton = Baton(2)
    baton.take(0, Part.HEAD)
    baton.give()
    time.sleep(0.05)
    baton.take(1, Part.HEAD)
    begun = baton.waited_s
    assert begun >= 0.05
    baton.give()
    time.sleep(0.05)
    baton.take(0, Part.TAIL)
    assert baton.waited_s == begun
