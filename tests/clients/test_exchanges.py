"""Requests on one stream keep their order in both directions, and the end of one is the end of all."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from clients.exchanges import Exchange, Exchanges, Gate
from contract.errors import FrameError, SessionError

WAIT_S = 10.0


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_gate_lets_through_by_number_and_one_at_a_time() -> None:
    gate, order, inside = Gate(), list[int](), threading.Lock()

    def pass_as(number: int) -> None:
        with gate.passing(number):
            assert inside.acquire(blocking=False)
            order.append(number)
            inside.release()

    threads = [in_thread(lambda number=number: pass_as(number)) for number in (3, 1, 2)]  # type: ignore[misc]
    assert order == []
    pass_as(0)
    for thread in threads:
        thread.join(WAIT_S)
    assert order == [0, 1, 2, 3]


class Peer:
    """Answers requests in their order, each once it is let."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.answered = 0
        self.over = threading.Event()
        self.exchanges = Exchanges(self.over.set)

    def exchange(self, name: str, let: threading.Event, read: Callable[[str], str] = str.upper) -> Exchange[str, str]:
        def receive() -> str:
            let.wait(WAIT_S)
            if self.over.is_set():
                raise SessionError("over")
            self.answered += 1
            return self.sent[self.answered - 1]

        return Exchange(self.exchanges, lambda: self.sent.append(name), receive, read)


def test_requests_are_sent_and_answered_in_the_order_of_their_places() -> None:
    peer, let = Peer(), threading.Event()
    first, second = peer.exchange("first", let), peer.exchange("second", let)
    first.take_place()
    second.take_place()
    late = in_thread(second.run)
    early = in_thread(first.run)
    let.set()
    late.join(WAIT_S)
    early.join(WAIT_S)
    assert peer.sent == ["first", "second"]
    assert (first.answer(), second.answer()) == ("FIRST", "SECOND")


def test_a_request_alone_waits_for_all_earlier_replies() -> None:
    peer, let = Peer(), threading.Event()
    first = peer.exchange("first", let)
    first.take_place()
    in_thread(first.run)
    seen: list[int] = []

    def step() -> None:
        with peer.exchanges.alone():
            seen.append(peer.answered)

    waiting = in_thread(step)
    assert seen == []
    let.set()
    waiting.join(WAIT_S)
    assert seen == [1]


def test_one_that_fails_ends_those_that_wait_and_is_remembered() -> None:
    peer, let, never = Peer(), threading.Event(), threading.Event()
    first = peer.exchange("first", let, read=lambda _: raise_(FrameError("nonsense")))
    second = peer.exchange("second", never)
    first.take_place()
    second.take_place()
    errors: list[BaseException] = []

    def run_second() -> None:
        try:
            second.run()
        except SessionError as error:
            errors.append(error)

    waiting = in_thread(run_second)
    let.set()
    first.run()
    with pytest.raises(FrameError, match="nonsense"):
        first.answer()
    assert peer.over.is_set()
    never.set()
    waiting.join(WAIT_S)
    assert [str(error) for error in errors] == ["over"]
    assert isinstance(peer.exchanges.failure, FrameError)
    with pytest.raises(SessionError, match="over"):
        peer.exchange("third", let).run()


def test_an_interrupt_on_the_way_hangs_up_and_blocks_nobody() -> None:
    peer, let = Peer(), threading.Event()
    let.set()

    def interrupted() -> None:
        raise KeyboardInterrupt

    broken: Exchange[str, str] = Exchange(peer.exchanges, interrupted, str, str)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    with pytest.raises(SessionError):
        peer.exchange("next", let).run()


def raise_(error: Exception) -> str:
    raise error
