"""What a stage of some work costs: seconds of CPU and wall, or bytes of memory. One interface for both."""

from __future__ import annotations

import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Meter(Protocol):
    """Reads what happens within `running`; a stage may run many times."""

    def running(self, stage: str) -> AbstractContextManager[None]: ...


class Stopwatch:
    """Seconds by stage: CPU of the whole process, all its threads, and wall."""

    def __init__(self) -> None:
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.wall: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.cpu[stage] += time.process_time() - cpu
        self.wall[stage] += time.perf_counter() - wall

    @property
    def cpu_seconds(self) -> float:
        return sum(self.cpu.values())

    @property
    def wall_seconds(self) -> float:
        return sum(self.wall.values())


class MemoryMeter:
    """Bytes by stage, by tracemalloc, which sees Python's and numpy's: the highest above the start, and what stayed.

    A stage that runs many times: the highest of all its runs, and the sum of what they left.
    """

    def __init__(self) -> None:
        self.peak: defaultdict[str, int] = defaultdict(int)
        self.kept: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        yield
        after, peak = tracemalloc.get_traced_memory()
        self.peak[stage] = max(self.peak[stage], peak - before)
        self.kept[stage] += after - before


@contextmanager
def traced() -> Iterator[MemoryMeter]:
    """Tracing slows Python, so nothing is timed within."""
    tracemalloc.start()
    try:
        yield MemoryMeter()
    finally:
        tracemalloc.stop()
