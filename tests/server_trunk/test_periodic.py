"""What a trunk does every so often is done again after it failed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from server_trunk.heap import Heap
from server_trunk.periodic import PeriodicTask
from server_trunk.servicer import TrunkServicer
from server_trunk.sessions import SessionTable
from tests.server_trunk.conftest import RunningTrunk


def test_a_failure_is_told_once_and_the_work_done_again(caplog: pytest.LogCaptureFixture) -> None:
    turns: list[int] = []

    async def play() -> None:
        done = asyncio.Event()

        async def work() -> None:
            turns.append(len(turns))
            if len(turns) <= 3:
                raise MemoryError("not now")
            done.set()

        task = PeriodicTask("the sweep", 0.01, work)
        await asyncio.wait_for(done.wait(), 10)
        task.cancel()

    asyncio.run(play())
    assert caplog.text.count("the sweep failed; it is tried again every 0.01 s") == 1
    assert caplog.text.count("MemoryError: not now") == 1
    assert "the sweep is well again after 3 failures" in caplog.text


@pytest.mark.parametrize(
    ("owner", "work"), [(SessionTable, "sweep"), (TrunkServicer, "relieve"), (Heap, "trim")], ids="srt"
)
def test_a_trunk_goes_on_with_what_failed(
    start_trunk: Callable[..., RunningTrunk], monkeypatch: pytest.MonkeyPatch, owner: type, work: str
) -> None:
    """Nothing else would: /healthz stays green while graphs are kept for ever."""
    monkeypatch.setattr("server_trunk.server._RELIEF_POLL_S", 0.05)
    again, turns, real = threading.Event(), [], getattr(owner, work)

    def fails_first(self: Any) -> Any:
        turns.append(work)
        if len(turns) == 1:
            raise RuntimeError("nobody thought of it")
        again.set()
        return real(self)

    monkeypatch.setattr(owner, work, fails_first)
    start_trunk(pending_ttl_s=0.4)
    assert again.wait(10)
