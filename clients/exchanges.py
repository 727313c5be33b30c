"""Requests on one stream: each sent whole, each answered in the order in which they were sent, whoever asks.

A trunk answers a session's requests in their order, so that whoever waits for the next reply can read it itself: no
thread reads ahead, nothing piles up, and gRPC's flow control holds the peer back.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Raw = TypeVar("Raw")
Answer = TypeVar("Answer")


class Gate:
    """Lets threads through one at a time, by the numbers that they hold: 0 first, none left out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = 0
        self._open = False

    @contextmanager
    def passing(self, number: int) -> Iterator[None]:
        """Waits for all smaller numbers to be through. One whose block fails is never through: see `open`.

        Each wait is as long as those before it take, all of which end within the stream's own limits.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._next == number)
        yield
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def open(self) -> None:
        """Nobody waits here any more."""
        with self._changed:
            self._open = True
            self._changed.notify_all()


class Exchanges:
    """The order of the requests on one stream, which `hang_up` ends.

    Whatever goes wrong or interrupts a request, what comes next on the stream would answer the wrong question: it is
    hung up, and every other request, waiting or new, fails as the stream then does.
    """

    def __init__(self, hang_up: Callable[[], object]) -> None:
        self._hang_up = hang_up
        self._numbers = itertools.count()
        self.sending = Gate()
        self.receiving = Gate()
        self.failure: BaseException | None = None
        """What ended the stream, where a request did."""

    def draw(self) -> int:
        """The next number. Whoever draws one must go through both gates with it, or fail within `failing`."""
        return next(self._numbers)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Within, an error hangs up."""
        try:
            yield
        except BaseException as error:
            if self.failure is None:
                self.failure = error
            self._hang_up()
            self.sending.open()
            self.receiving.open()
            raise

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, the stream is the caller's: nobody else sends, and all earlier replies have been read."""
        with self.failing():
            number = self.draw()
            with self.sending.passing(number), self.receiving.passing(number):
                yield


class Exchange(Generic[Raw, Answer]):
    """One request that may be under way beside others: `run` sends it and reads the reply, `answer` makes sense of it.

    `run` computes nothing, so that others may compute meanwhile.
    """

    def __init__(
        self,
        exchanges: Exchanges,
        send: Callable[[], None],
        receive: Callable[[], Raw],
        read: Callable[[Raw], Answer],
    ) -> None:
        self._exchanges = exchanges
        self._send: Callable[[], None] | None = send
        self._receive = receive
        self._read = read
        self._number: int | None = None
        self._raw: list[Raw] = []

    def take_place(self) -> None:
        """Fix this request's place behind all that were made before it. Whoever calls this must call `run`.

        Not for a thread that can be interrupted, such as Python's main one, where `run` alone will do.
        """
        self._number = self._exchanges.draw()

    def run(self) -> None:
        """Raises what the stream raises, and then the stream is over."""
        if self._send is None:
            raise RuntimeError("an exchange runs once")
        with self._exchanges.failing():
            number = self._exchanges.draw() if self._number is None else self._number
            with self._exchanges.sending.passing(number):
                self._send()
            self._send = None  # and with it the bytes that were sent
            with self._exchanges.receiving.passing(number):
                self._raw.append(self._receive())

    def answer(self) -> Answer:
        """The reply, decoded. Raises FrameError, NonFiniteError and the like for a bad one, and the stream is over."""
        with self._exchanges.failing():
            return self._read(self._raw.pop())
