"""Which of several threads computes: one at a time, so that what each computes adds up in a fixed order."""

from __future__ import annotations

import threading
import time
from enum import IntEnum


class Part(IntEnum):
    """The parts of a microbatch between which it waits for the trunk."""

    HEAD = 0
    TAIL = 1
    """The tail's forward, the loss, and the backward down to the tail cut."""
    HEAD_BACKWARD = 2


class CancelledError(Exception):
    """Another microbatch failed; this one is not to go on. Meant for nobody but whoever runs the microbatches."""


class Baton:
    """Given to one microbatch at a time, to the one furthest along, and each part in the order of the microbatches.

    The furthest first, so that as few microbatches as possible are held in memory. In order, so that every sum over
    microbatches is the one that a plain loop makes, bit for bit.
    """

    def __init__(self, microbatches: int) -> None:
        self.waited_s = 0.0
        """How long nothing could be computed although a microbatch was left that nobody had begun."""
        self._microbatches = microbatches
        self._changed = threading.Condition()
        self._next = dict.fromkeys(Part, 0)
        self._ended: set[int] = set()
        self._waiting: set[tuple[Part, int]] = set()
        self._holder: int | None = None
        self._cancelled = False
        self._idle_since: float | None = None

    def take(self, microbatch: int, part: Part) -> None:
        """Waits for the baton. Raises CancelledError when it will not come any more."""
        wanted = (part, microbatch)
        with self._changed:
            self._waiting.add(wanted)
            self._changed.wait_for(lambda: self._cancelled or self._turn() == wanted)
            self._waiting.remove(wanted)
            if self._cancelled:
                raise CancelledError(f"microbatch {microbatch} is not gone on with: another one failed")
            self._holder = microbatch
            self._next[part] = microbatch + 1
            self._skip_ended()
            if self._idle_since is not None:
                self.waited_s += time.monotonic() - self._idle_since
                self._idle_since = None

    def give(self) -> None:
        """For its holder: lets the next one compute."""
        with self._changed:
            self._holder = None
            if self._turn() is None and self._next[Part.HEAD] < self._microbatches:
                self._idle_since = time.monotonic()
            self._changed.notify_all()

    def end(self, microbatch: int) -> None:
        """`microbatch` wants the baton no more; it gives it up if it has it."""
        with self._changed:
            self._ended.add(microbatch)
            self._skip_ended()
            if self._holder == microbatch:
                self.give()
            self._changed.notify_all()

    def cancel(self) -> None:
        """Nobody gets the baton any more."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def _turn(self) -> tuple[Part, int] | None:
        """Whose turn it is, of those that wait."""
        if self._holder is not None:
            return None
        return max((wanted for wanted in self._waiting if self._next[wanted[0]] == wanted[1]), default=None)

    def _skip_ended(self) -> None:
        """Not every microbatch has every part."""
        for part in Part:
            while self._next[part] in self._ended:
                self._next[part] += 1
