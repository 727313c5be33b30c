"""Memory that the C library keeps after PyTorch freed it: given back to the system where the process has too much.

glibc keeps what large tensors leave behind in the heap of each thread, two to three times of what a pass needs at once.
Mapping each tensor apart instead would halve a pass's speed, so that the heap is trimmed only above a limit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import psutil


class Heap:
    """This process's heap."""

    def __init__(self, limit: int) -> None:
        """`limit` is the resident size, in bytes, above which to give back what is free."""
        self.limit = limit
        self._process = psutil.Process()
        self._trim = _trimmer()

    @property
    def resident_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def trim(self) -> None:
        """Give back what is free, where there is too much; for tens of milliseconds others cannot allocate."""
        if self._trim is not None and self.resident_bytes > self.limit:
            self._trim(0)


def _trimmer() -> Callable[[int], int] | None:
    """glibc's malloc_trim; other C libraries have none."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found
