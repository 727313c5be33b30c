"""Sessions whose forwards shared a pass: who of them waits for whom with the backward, and for how long."""

from __future__ import annotations

import asyncio

import pytest

from server_trunk.lane import Graph
from server_trunk.seats import Seat
from tests.server_trunk.test_scheduler import Bench, begun, run


async def ganged(bench: Bench, names: str) -> tuple[list[Seat], list[Graph]]:
    """Sessions whose forwards shared a pass."""
    first = [bench.seat("first") for _ in bench.lanes]
    seats = [bench.seat(name) for name in names]
    bench.hold()
    waits = [bench.forward(seat) for seat in (*first, *seats)]
    await begun(bench)
    bench.let_go()
    graphs = (await asyncio.gather(*waits))[len(first) :]
    assert graphs[0].gang is not None
    assert len(graphs[0].gang.members) == len(names)
    return seats, graphs


def test_a_gangs_backwards_wait_for_each_other_and_share_a_pass() -> None:
    async def play(bench: Bench) -> None:
        seats, graphs = await ganged(bench, "abc")
        graphs[0].gang.due_s = 5.0  # type: ignore[union-attr]
        waits = [bench.backward(seat, graph) for seat, graph in zip(seats[:2], graphs[:2], strict=True)]
        await begun(bench)
        assert not any(wait.done() for wait in waits)
        await asyncio.gather(*waits, bench.backward(seats[2], graphs[2]))

    assert run(play).passes[-1][1] == ["a", "b", "c"]


@pytest.mark.parametrize(("there", "passes"), [(2, [["a", "b"], ["c"]]), (1, [["a"], ["b"], ["c"]])])
def test_a_straggler_holds_nobody_up_beyond_the_time_of_a_forward(there: int, passes: list[list[str]]) -> None:
    async def play(bench: Bench) -> None:
        seats, graphs = await ganged(bench, "abc")
        graphs[0].gang.due_s = 0.05  # type: ignore[union-attr]
        waits = [bench.backward(seat, graph) for seat, graph in zip(seats[:there], graphs[:there], strict=True)]
        bench.now_s = 0.05
        await asyncio.gather(*waits)
        await asyncio.gather(
            *(bench.backward(seat, graph) for seat, graph in zip(seats[there:], graphs[there:], strict=True))
        )

    assert [names for kind, names in run(play).passes if kind == "backward"] == passes


@pytest.mark.parametrize(("names", "there"), [("ab", 1), ("abc", 2)])
def test_a_straggler_that_comes_beside_the_gangs_backward_finds_no_gang(names: str, there: int) -> None:
    """Two lanes in one graph at once: one finds it used up, and what the other adds up may be lost."""

    async def play(bench: Bench) -> None:
        seats, graphs = await ganged(bench, names)
        graphs[0].gang.due_s = 0.05  # type: ignore[union-attr]
        bench.hold()
        waits = [bench.backward(seat, graph) for seat, graph in zip(seats[:there], graphs[:there], strict=True)]
        bench.now_s = 0.05
        while not seats[0].running:
            await begun(bench)
        assert all(graph.gang is not None for graph in graphs[:there])
        waits += [bench.backward(seat, graph) for seat, graph in zip(seats[there:], graphs[there:], strict=True)]
        assert all(graph.gang is None for graph in graphs[there:])
        bench.let_go()
        await asyncio.gather(*waits)

    bench = run(play, lanes=2)
    backwards = sorted(len(told) for kind, told in bench.passes if kind == "backward")
    assert backwards == sorted([there] + [1] * (len(names) - there))


def test_a_gang_whose_straggler_leaves_waits_no_longer() -> None:
    async def play(bench: Bench) -> None:
        seats, graphs = await ganged(bench, "ab")
        graphs[0].gang.due_s = 1e9  # type: ignore[union-attr]
        wait = bench.backward(seats[0], graphs.pop(0))
        graphs.clear()
        await begun(bench)  # what asyncio holds of the last pass is let go
        bench.scheduler.leave(seats[1])
        await wait

    assert run(play).passes[-1] == ("backward", ["a"])
