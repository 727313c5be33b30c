"""A session's place at the lanes, and the pieces of its work."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from server_trunk.lane import Forward, Graph
from server_trunk.memory import Hold
from server_trunk.session_adapter import SessionAdapter


@dataclass(slots=True, eq=False)
class Seat:
    """One session's place: its adapter, its work in order, and the tokens that it was served.

    A deterministic session shares no pass and always has all threads, so that its bits depend on nobody else.
    """

    adapter: SessionAdapter
    deterministic: bool = False
    jobs: deque[Job] = field(default_factory=deque)
    running: bool = False
    left: bool = False
    served: float = 0.0
    turn: int = 0  # number of its last pass; breaks ties
    active_s: float = float("-inf")
    keeps_graphs: Callable[[], bool] = lambda: False
    quiet: bool = False
    """Whether nobody may be told how much it works."""


@dataclass(slots=True, eq=False)
class Job:
    """One piece of a session's work. `prepare` and `finish` run on a lane's thread, around what the lane does."""

    kind: Literal["forward", "backward", "other"]
    tokens: int
    prepare: Callable[[], Any]
    finish: Callable[[Any], Any]
    done: asyncio.Future[Any]
    adapter: SessionAdapter
    graph: Graph | None = None
    shape: Forward | None = None
    hold: Hold | None = None
    keep: bool = True
    due_s: float = float("-inf")
    """Until then it may wait for what the session asks next."""
    queued_s: float = 0.0
