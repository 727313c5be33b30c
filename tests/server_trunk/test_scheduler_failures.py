"""A pass after which something fails that nobody thought of: its sessions are told, and its lane computes again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from torch import Tensor

from server_trunk.lane import Forward, Graph
from tests.server_trunk.test_scheduler import Bench, begun, run


async def all_is_given_back(bench: Bench) -> None:
    """Every lane computes again, and no session counts as served."""
    await begun(bench)
    assert bench.scheduler.running_bytes == 0
    assert not any(seat.running for seat in bench.scheduler._seats)
    for seat in list(bench.scheduler._seats):
        await asyncio.wait_for(bench.forward(seat), 5)
    await begun(bench)


def test_an_adapter_that_cannot_be_put_aside_costs_no_lane(caplog: pytest.LogCaptureFixture) -> None:
    def full() -> None:
        raise MemoryError("no room for a copy")

    async def play(bench: Bench) -> None:
        seats = [bench.seat(name) for name in "abcd"]
        for seat in seats:
            seat.adapter.evict = lambda folder: full()  # type: ignore[method-assign]
        for seat in seats:
            await asyncio.wait_for(bench.forward(seat), 5)
        await all_is_given_back(bench)
        assert bench.scheduler.residents.taken == 400, "all of them are still in memory"

    run(play, resident_bytes=150)
    assert "an idle session's adapter stays in memory: MemoryError: no room for a copy" in caplog.text


def test_what_fails_after_a_pass_costs_no_lane_and_no_session_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    def fails(*told: object) -> None:
        raise RuntimeError("nobody thought of it")

    async def play(bench: Bench) -> None:
        bench.scheduler._observe = fails
        bench.scheduler.residents.surplus = fails  # type: ignore[method-assign, assignment]
        seats = [bench.seat(name) for name in "abc"]
        bench.hold()
        waits = [bench.forward(seat) for seat in seats]
        await begun(bench)
        bench.let_go()
        await asyncio.wait_for(asyncio.gather(*waits), 5)
        await all_is_given_back(bench)

    run(play)
    assert "RuntimeError: nobody thought of it" in caplog.text


def test_a_session_that_cannot_be_forgotten_keeps_no_other_of_its_pass_from_its_answer() -> None:
    def fails() -> None:
        raise OSError("the disk is gone")

    async def play(bench: Bench) -> None:
        shared, plain = threading.Event(), bench.lanes[0].forward

        def forward(asked: Sequence[Forward], *, keep: bool) -> list[tuple[Tensor, Graph]]:
            if len(asked) == 2:
                shared.wait(10)
            return plain(asked, keep=keep)

        bench.lanes[0].forward = forward  # type: ignore[method-assign]
        seats = [bench.seat(name) for name in "abc"]
        bench.hold()
        waits = [bench.forward(seat) for seat in seats]
        await begun(bench)
        bench.let_go()
        await waits[0]
        seats[1].adapter.release = fails  # type: ignore[method-assign]
        bench.scheduler.leave(seats[1])
        shared.set()
        await asyncio.wait_for(asyncio.gather(waits[1], waits[2]), 5)
        await all_is_given_back(bench)

    assert ("forward", ["b", "c"]) in run(play).passes
