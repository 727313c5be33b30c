"""One thread that runs an event loop's slow work, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Calls run one after the other. Its queue is as long as there are callers that wait, each for one call."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer of `function`, or what it raised. A cancelled wait leaves the call itself running."""
        return await asyncio.wrap_future(self._thread.submit(function, *args, **kwargs))

    async def acquire(
        self, function: Callable[P, T], release: Callable[[T], object], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `run`; when the wait is cancelled, `release` is called with the answer that nobody took."""
        future = self._thread.submit(function, *args, **kwargs)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                self._thread.submit(lambda: release(future.result()))
            raise

    def submit(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run `function` after what is queued, with nobody waiting for it."""
        self._thread.submit(function, *args, **kwargs)

    def close(self) -> None:
        """Drop what has not started and end the thread after the call that runs."""
        self._thread.shutdown(wait=True, cancel_futures=True)
