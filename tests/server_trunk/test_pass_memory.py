"""What passes and their graphs hold: kept while there is room, given back when they are gone, and refused beyond."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from contract.errors import CapacityError, NonFiniteError
from server_trunk.lane import Graph
from server_trunk.memory import Hold
from server_trunk.sessions import PendingGraphs
from tests.server_trunk.test_scheduler import Bench, begun, run


async def behind(bench: Bench, ask: Callable[[], Sequence[asyncio.Future[Any]]]) -> list[Any]:
    """What comes of all that `ask` asks for while a pass of session a, whose graph stays at 80, has the lane."""
    bench.hold()
    first = bench.forward(bench.seat("a"))
    await begun(bench)
    waits = ask()
    bench.let_go()
    await first
    outcomes = list(await asyncio.gather(*waits, return_exceptions=True))
    await begun(bench)
    return outcomes


def test_graphs_are_kept_while_there_is_room_and_a_pass_keeps_all_or_none() -> None:
    async def play(bench: Bench) -> None:
        seats = [bench.seat(name) for name in "bcd"]
        bench.memory.try_take(650)  # of the 350 that are left a takes 80, b and c want 160 each
        graphs = await behind(
            bench, lambda: [bench.forward(seat, size) for seat, size in zip(seats, (16, 16, 20), strict=True)]
        )
        assert [type(one) for one in graphs] == [Graph] * 3

    bench = run(play)
    assert bench.lanes[0].kept == [True, False, True]
    assert bench.memory.taken <= 1000


def test_a_graph_that_several_share_takes_its_room_until_the_last_of_them_is_gone() -> None:
    async def play(bench: Bench) -> None:
        seats = [bench.seat(name, values=5) for name in "bc"]
        graphs = await behind(bench, lambda: [bench.forward(seat) for seat in seats])
        taken = [bench.memory.taken]
        while graphs:
            graphs.pop()
            await begun(bench)
            taken.append(bench.memory.taken)
        assert taken == [280, 280, 80], "80 each, and the adapters of both once more: 2 * 5 values of 4 bytes"

    assert run(play).lanes[0].kept == [True, True]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is only garbage to the collector of cycles stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_who_fails_in_a_shared_pass_keeps_nothing_of_the_others_in_memory() -> None:
    async def play(bench: Bench) -> None:
        seats = [bench.seat(name) for name in "bcd"]
        errors = (None, None, NonFiniteError("nan"))
        graphs = await behind(
            bench, lambda: [bench.forward(seat, error=error) for seat, error in zip(seats, errors, strict=True)]
        )
        assert [type(one) for one in graphs] == [Graph, Graph, NonFiniteError]
        assert bench.memory.taken == 80 + 3 * 80
        del graphs[:2]
        await begun(bench)
        assert bench.memory.taken == 80

    assert run(play).lanes[0].kept == [True, True]


def test_who_is_left_alone_of_a_shared_pass_keeps_no_graph() -> None:
    async def play(bench: Bench) -> None:
        left, fails, hold = bench.seat("b"), bench.seat("c"), Hold(bench.memory)
        outcomes = await behind(
            bench, lambda: [bench.forward(left, hold=hold), bench.forward(fails, error=NonFiniteError("nan"))]
        )
        assert [type(one) for one in outcomes] == [Graph, NonFiniteError]
        assert (bench.memory.taken, hold.occupies) == (80, False)

    assert run(play).lanes[0].kept == [True, False]


def test_a_session_whose_only_memory_is_its_part_of_a_shared_graph_is_found_when_others_need_room() -> None:
    async def play(bench: Bench) -> None:
        seats, holds = [bench.seat(name) for name in "bc"], [Hold(bench.memory), Hold(bench.memory)]
        graphs = await behind(
            bench, lambda: [bench.forward(seat, hold=hold) for seat, hold in zip(seats, holds, strict=True)]
        )
        pending: PendingGraphs[Graph] = PendingGraphs(2, 10.0, lambda: 0.0)
        for number, (graph, hold) in enumerate(zip(graphs, holds, strict=True)):
            pending.reserve(number, hold)
            pending.add(number, graph)
        assert [hold.size for hold in holds] == [0, 0]
        assert list(pending.at_rest().values()) == list(graphs)
        for number, graph in enumerate(graphs):
            graph.drop()
            pending.put_aside(number, graph)
        assert pending.at_rest() == {}
        await begun(bench)
        assert bench.memory.taken == 80

    run(play)


def test_no_row_of_a_shared_pass_is_padded_by_more_than_a_fourth_and_padding_takes_room_too() -> None:
    async def play(bench: Bench) -> None:
        seats = [bench.seat(name) for name in "bcd"]
        graphs = await behind(
            bench, lambda: [bench.forward(seat, size) for seat, size in zip(seats, (10, 8, 12), strict=True)]
        )
        assert [type(one) for one in graphs] == [Graph] * 3
        assert bench.memory.taken == 80 + 2 * 100 + 120

    assert [sorted(who) for _, who in run(play).passes] == [["a"], ["b", "c"], ["d"]]


def test_what_a_shared_graph_took_is_free_once_its_backward_is_done() -> None:
    async def play(bench: Bench) -> None:
        seats = [bench.seat(name) for name in "bc"]
        graphs = await behind(bench, lambda: [bench.forward(seat) for seat in seats])
        assert bench.memory.taken == 80 + 160
        done = await behind(
            bench, lambda: [bench.backward(seat, graph) for seat, graph in zip(seats, graphs, strict=True)]
        )
        assert done == [None, None]
        assert bench.memory.taken == 80 + 80, "of both passes that had the lane"

    assert [sorted(who) for _, who in run(play).passes] == [["a"], ["b", "c"], ["a"], ["b", "c"]]


def test_a_shared_pass_that_is_done_one_by_one_keeps_no_graph_and_takes_no_room() -> None:
    async def play(bench: Bench) -> None:
        bench.lanes[0].room = 1
        seats = [bench.seat(name) for name in "bc"]
        graphs = await behind(bench, lambda: [bench.forward(seat) for seat in seats])
        assert [type(one) for one in graphs] == [Graph] * 2
        assert bench.memory.taken == 80

    assert run(play).lanes[0].kept == [True, True, False, False]


def test_a_microbatch_that_no_pass_could_hold_is_refused_at_once() -> None:
    async def play(bench: Bench) -> None:
        with pytest.raises(CapacityError, match="a microbatch of 51 tokens needs about 510 bytes .* leaves 500"):
            bench.forward(bench.seat("a"), 51)

    run(play)


def test_a_forward_without_a_gradient_that_is_larger_than_a_pass_may_be_runs_alone() -> None:
    async def play(bench: Bench) -> None:
        bench.hold()
        waits = [bench.forward(bench.seat(name), 251, need_grad=False) for name in "ab"]
        await begun(bench)
        assert sum(seat.running for seat in bench.scheduler._seats) == 1
        bench.let_go()
        await asyncio.gather(*waits)

    assert sorted(who for _, (who,) in run(play, lanes=2, batch_tokens=1).passes) == ["a", "b"]


@pytest.mark.parametrize(
    ("need_grad", "tokens", "at_once"), [(True, 24, 2), (True, 26, 1), (False, 124, 2), (False, 126, 1)]
)
def test_passes_that_would_not_fit_into_memory_together_run_one_after_the_other(
    need_grad: bool, tokens: int, at_once: int
) -> None:
    async def play(bench: Bench) -> None:
        bench.hold()
        waits = [bench.forward(bench.seat(name), tokens, need_grad=need_grad) for name in "ab"]
        await begun(bench)
        assert sum(seat.running for seat in bench.scheduler._seats) == at_once
        bench.let_go()
        await asyncio.gather(*waits)

    assert sorted(who for _, (who,) in run(play, lanes=2, batch_tokens=1).passes) == ["a", "b"]
