"""A lock on an open file or directory, which ends with the process that holds it, whatever becomes of that."""

from __future__ import annotations

import fcntl
import time

_POLL_S = 0.05


def take_lock(descriptor: int, wait_s: float) -> bool:
    """Whether the lock was had within `wait_s`: another may hold it. Raises OSError where there are no locks."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        else:
            return True
        time.sleep(_POLL_S)
