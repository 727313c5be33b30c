"""Places before and after what must be durable, and what is sent, at which a test has the process killed.

TRUNKLINE_FAILPOINT=kill:NAME#N ends it by SIGKILL the Nth time that it comes by the place NAME; trace:FILE appends
NAME#N to FILE each time. Where the variable is not set a place costs the look at two names.
A simulation, whose processes are all in one, is told of each place by `watch`, and ends the one that came by itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable

VARIABLE = "TRUNKLINE_FAILPOINT"

_order = os.environ.get(VARIABLE, "")
_passed: Counter[str] = Counter()
_counting = threading.Lock()
_visit: Callable[[str], None] | None = None


def arm(order: str) -> None:
    """Take `order` for the variable's value, and count anew; "" disarms."""
    global _order
    with _counting:
        _order = order
        _passed.clear()


def watch(visit: Callable[[str], None] | None) -> None:
    """Have `visit` called with each place's name; what it raises is raised there. None ends that."""
    global _visit
    _visit = visit


def failpoint(name: str) -> None:
    """Come by the place `name`."""
    if _order:
        _come_by(name)
    if _visit is not None:
        _visit(name)


def _come_by(name: str) -> None:
    with _counting:
        what, _, where = _order.partition(":")
        _passed[name] += 1
        here = f"{name}#{_passed[name]}"
        if what == "kill" and here == where:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "trace":
            with open(where, "a", encoding="utf-8") as file:
                file.write(f"{here}\n")
