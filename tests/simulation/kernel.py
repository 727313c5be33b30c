"""Virtual time: one event after the other on one thread, in an order that follows from the seed alone.

Code that waits, such as an orchestrator's, runs in a greenlet: its wait is an event, and meanwhile others go on. What
is killed or stands still as one is a Process. Nothing here sleeps.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from greenlet import getcurrent, greenlet

from contract.failpoint import watch


class KilledError(BaseException):
    """A simulated process was killed: no `except Exception` takes it for an error."""


class StuckError(Exception):
    """Nothing happens any more, or the time is up."""


@dataclass(eq=False)
class Process:
    """`visit` is called with each failpoint's name that the process comes by; it may sleep, and may raise a kill."""

    name: str
    visit: Callable[[str], None] = lambda place: None
    alive: bool = True
    still_until_s: float = 0.0
    tasks: list[greenlet] = field(default_factory=list)


class Kernel:
    """The events that are to come, and what came of the run so far: `trace`, a line each."""

    def __init__(self, limit_s: float) -> None:
        self.now_s = 0.0
        self.limit_s = limit_s
        self.trace: list[str] = []
        self.current: Process | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._fault: Exception | None = None
        self._hub = getcurrent()

    def say(self, line: str) -> None:
        self.trace.append(f"{self.now_s:10.3f} {line}")

    def trace_sha256(self) -> str:
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    def at(self, after_s: float, act: Callable[[], None]) -> None:
        """Have `act`, which must not sleep, done after so many seconds."""
        self._count += 1
        heapq.heappush(self._events, (self.now_s + max(after_s, 0.0), self._count, act))

    def spawn(self, process: Process, work: Callable[[], None], after_s: float = 0.0) -> None:
        """Have `work`, which may sleep, done by `process`, if it is alive by then."""

        def begin() -> None:
            if process.alive:
                task = greenlet(lambda: self._live(process, work), self._hub)
                process.tasks.append(task)
                self._switch(process, task.switch)

        self.at(after_s, begin)

    def sleep(self, seconds: float) -> None:
        """Let the calling task's process wait."""
        process, task = self.current, getcurrent()
        if process is None:
            raise RuntimeError("who sleeps must be a task of a process")
        if not process.alive:
            raise KilledError(process.name)
        self.at(seconds, lambda: self._wake(process, task))
        self._hub.switch()

    def stand_still(self, process: Process, seconds: float) -> None:
        """Let no task of a process go on for so long, as where its machine sleeps; the calling one is its own."""
        process.still_until_s = max(process.still_until_s, self.now_s + seconds)
        self.sleep(seconds)

    def kill(self, process: Process) -> None:
        """End a process at once. Nothing that it still does on its way out has an effect."""
        process.alive = False
        self.at(0.0, lambda: self._throw(process))

    def die_at(self, place: str) -> None:
        """Kill the process whose task is calling, and has come by `place`."""
        process = self.current
        if process is not None:
            self.say(f"{process.name} is killed at {place}")
            self.kill(process)
            raise KilledError(process.name)

    def visit(self, place: str) -> None:
        """What every failpoint calls."""
        process = self.current
        if process is None:
            return
        if not process.alive:
            raise KilledError(process.name)
        process.visit(place)

    @contextmanager
    def acting_as(self, process: Process | None) -> Iterator[None]:
        """The block is another process's doing: a call that it serves. It must not sleep."""
        before, self.current = self.current, process
        try:
            yield
        finally:
            self.current = before

    def run(self, done: Callable[[], bool]) -> None:
        """Let things happen until `done`. Raises StuckError, and what a task or an event raised."""
        watch(self.visit)
        try:
            while not done():
                if not self._events:
                    raise StuckError("nothing is left that could happen")
                at_s, _, act = heapq.heappop(self._events)
                if at_s > self.limit_s:
                    raise StuckError(f"it has not ended after {self.limit_s:g} s")
                self.now_s = at_s
                act()
                if self._fault is not None:
                    raise self._fault
        finally:
            watch(None)

    def end(self, processes: list[Process]) -> None:
        """Unwind what still waits."""
        watch(self.visit)
        try:
            for process in processes:
                process.alive = False
                self._throw(process)
        finally:
            watch(None)

    def _live(self, process: Process, work: Callable[[], None]) -> None:
        try:
            work()
        except KilledError:
            pass
        except Exception as error:  # noqa: BLE001 - raised again by run, in the hub
            self._fault = self._fault or error
        finally:
            process.tasks.remove(getcurrent())

    def _wake(self, process: Process, task: greenlet) -> None:
        if not process.alive or task.dead:
            return
        if process.still_until_s > self.now_s:
            self.at(process.still_until_s - self.now_s, lambda: self._wake(process, task))
            return
        self._switch(process, task.switch)

    def _throw(self, process: Process) -> None:
        for task in list(process.tasks):
            self._switch(process, lambda task=task: task.throw(KilledError(process.name)))  # type: ignore[misc]

    def _switch(self, process: Process, switch: Callable[[], object]) -> None:
        before, self.current = self.current, process
        switch()
        self.current = before


class VirtualClock:
    """A machine's clock (orchestrator.exchange.Clock)."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def monotonic(self) -> float:
        return self._kernel.now_s

    def sleep(self, seconds: float) -> None:
        self._kernel.sleep(seconds)
