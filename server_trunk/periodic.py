"""What a trunk does every so often beside its sessions, for as long as it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger("trunkline.server_trunk")


class PeriodicTask:
    """One such work. What it fails of is told and does not end it: the trunk would serve on without, unnoticed."""

    def __init__(self, name: str, every_s: float, work: Callable[[], Awaitable[None]]) -> None:
        """Begins on the running event loop; `work` is first done after `every_s`, and again that long after its end."""
        self._name = name
        self._every_s = every_s
        self._work = work
        self._failures = 0
        self._task = asyncio.create_task(self._go_on())

    def cancel(self) -> None:
        self._task.cancel()

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._work()
            except Exception:
                if not self._failures:  # one that fails each time would fill the disk
                    logger.exception("%s failed; it is tried again every %g s", self._name, self._every_s)
                self._failures += 1
            else:
                if self._failures:
                    logger.warning("%s is well again after %d failures", self._name, self._failures)
                self._failures = 0
