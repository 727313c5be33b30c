"""Who is served next, who shares a pass, and what becomes of those that fail or leave; arithmetic is stood in for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from contract.errors import CapacityError, NonFiniteError, SessionError
from server_trunk.lane import Forward, Gang, Graph
from server_trunk.memory import Hold, MemoryBudget
from server_trunk.residents import Residents
from server_trunk.scheduler import ACTIVE_S, Scheduler
from server_trunk.seats import Seat
from server_trunk.worker import Worker


class Adapter:
    def __init__(self, name: str, *, batches: bool = True, values: int = 0) -> None:
        self.name = name
        self.layout = SimpleNamespace(batches=batches, values=values, key="lora", spec=SimpleNamespace(dropout=0.0))
        self.size_bytes = 100
        self.evicted = self.released = False

    def evict(self, folder: Path) -> None:
        self.evicted = True

    def restore(self) -> None:
        self.evicted = False

    def release(self) -> None:
        self.released = True


class Lane:
    """Notes who was in each pass, and waits for `go` in each."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, list[str]]] = []
        self.threads: list[int] = []
        self.kept: list[bool] = []
        self.go = threading.Event()
        self.go.set()
        self.room = 99
        self.slots = SimpleNamespace(close=lambda adapter: None)

    def use_threads(self, threads: int) -> None:
        self.threads.append(threads)

    def forward(self, asked: Sequence[Forward], *, keep: bool) -> list[tuple[torch.Tensor, Graph]]:
        self.go.wait(10)
        self.kept.append(keep)
        self.passes.append(("forward", [one.adapter.name for one in asked]))  # type: ignore[attr-defined]
        if len(asked) > self.room:
            raise CapacityError("no room")
        answers = [(one.hidden_BTD, Graph(one, one.hidden_BTD)) for one in asked]
        if len(asked) > 1:
            rows = {graph: slice(index, index + 1) for index, (_, graph) in enumerate(answers)}
            gang = Gang(asked[0].hidden_BTD, asked[0].hidden_BTD, [], rows)
            for graph in rows:
                graph.gang = gang
        return answers

    def backward(self, asked: Sequence[Any]) -> list[tuple[None, float]]:
        self.go.wait(10)
        self.passes.append(("backward", [one.adapter.name for one in asked]))
        if asked[0].graph.gang is not None:
            asked[0].graph.gang.release()
        return [(None, 0.0)] * len(asked)


class Bench:
    """A scheduler over lanes that stand in, and what sessions do with it."""

    def __init__(self, lanes: int = 1, batch_tokens: int = 32, threads: int = 4, resident_bytes: int = 999) -> None:
        self.lanes = [Lane() for _ in range(lanes)]
        self.workers = [Worker(f"lane-{number}") for number in range(lanes)]
        self.now_s = 0.0
        pairs: Any = list(zip(self.lanes, self.workers, strict=True))
        self.memory = MemoryBudget(1000)
        self.scheduler = Scheduler(
            pairs,
            threads=threads,
            batch_tokens=batch_tokens,
            graph_bytes=lambda kind, tokens: 10 * tokens,
            transient_bytes=lambda kind, tokens: 2 * tokens,
            pass_bytes=500,
            residents=Residents(resident_bytes, Path("nowhere")),
            clock=lambda: self.now_s,
        )

    @property
    def passes(self) -> list[tuple[str, list[str]]]:
        return [one for lane in self.lanes for one in lane.passes]

    def seat(self, name: str, **options: Any) -> Seat:
        deterministic = options.pop("deterministic", False)
        adapter: Any = Adapter(name, **options)
        return self.scheduler.enter(adapter, deterministic=deterministic)

    def forward(
        self,
        seat: Seat,
        tokens: int = 8,
        error: Exception | None = None,
        *,
        need_grad: bool = True,
        hold: Hold | None = None,
    ) -> asyncio.Future[Graph]:
        asked = Forward(seat.adapter, torch.zeros(1, tokens, 2), None, None, need_grad=need_grad)

        def prepare() -> Forward:
            if error is not None:
                raise error
            return asked

        return self.scheduler.forward(seat, tokens, asked, hold or Hold(self.memory), prepare, lambda answer: answer[1])

    def backward(self, seat: Seat, graph: Graph) -> asyncio.Future[None]:
        asked: Any = SimpleNamespace(adapter=seat.adapter, graph=graph)
        return self.scheduler.backward(seat, graph.shape[1], graph, lambda: asked, lambda answer: None)

    def hold(self) -> None:
        for lane in self.lanes:
            lane.go.clear()

    def let_go(self) -> None:
        for lane in self.lanes:
            lane.go.set()


def run(play: Callable[[Bench], Awaitable[None]], **options: Any) -> Bench:
    benches: list[Bench] = []

    async def main() -> None:
        benches.append(bench := Bench(**options))
        try:
            await asyncio.wait_for(play(bench), 20)
        finally:
            bench.let_go()
            await bench.scheduler.close()
            for worker in bench.workers:
                worker.close()

    asyncio.run(main())
    return benches[0]


async def begun(bench: Bench) -> None:
    """Until the first pass is on its lane."""
    await asyncio.sleep(0.05)


def test_a_sessions_work_keeps_its_order() -> None:
    seen: list[str] = []

    async def play(bench: Bench) -> None:
        seat = bench.seat("a")
        waits = [bench.scheduler.other(seat, lambda n=n: seen.append(str(n))) for n in range(5)]
        waits.insert(2, bench.forward(seat))
        await asyncio.gather(*waits)

    run(play, lanes=3)
    assert seen == ["0", "1", "2", "3", "4"]


def test_a_session_with_much_queued_keeps_nobody_waiting_for_more_than_one_piece() -> None:
    async def play(bench: Bench) -> None:
        greedy, modest = bench.seat("greedy"), bench.seat("modest")
        bench.hold()
        waits = [bench.forward(greedy, 32) for _ in range(10)]
        await begun(bench)
        waits += [bench.forward(modest, 32) for _ in range(3)]
        bench.let_go()
        await asyncio.gather(*waits)

    names = [who for _, (who,) in run(play).passes]
    assert names[:7] == ["greedy", "modest", "greedy", "modest", "greedy", "modest", "greedy"]


def test_passes_of_all_threads_are_the_first_lanes_whoever_worked_before() -> None:
    """OpenMP keeps the threads of each lane that ever had them all, and spins less the more it keeps."""

    async def play(bench: Bench) -> None:
        one, other = bench.seat("one"), bench.seat("other")
        bench.hold()
        waits = [bench.forward(seat) for seat in (one, other) for _ in range(3)]
        await begun(bench)
        bench.let_go()
        await asyncio.gather(*waits)
        bench.now_s += 2 * ACTIVE_S
        for _ in range(4):
            await bench.forward(one)

    first, second = run(play, lanes=2, threads=4, batch_tokens=8).lanes
    assert set(first.threads) == {2, 4}
    assert set(second.threads) == {2}
    assert first.threads[-4:] == [4] * 4


def test_turns_are_counted_in_tokens() -> None:
    async def play(bench: Bench) -> None:
        long, short = bench.seat("long"), bench.seat("short")
        bench.hold()
        waits = [bench.forward(long, 32) for _ in range(3)]
        await begun(bench)
        waits += [bench.forward(short, 16) for _ in range(6)]
        bench.let_go()
        await asyncio.gather(*waits)

    names = [who for _, (who,) in run(play, batch_tokens=1).passes]
    assert names == ["long", "short", "short", "long", "short", "short", "long", "short", "short"]


def test_who_comes_back_from_a_pause_has_saved_up_no_turns() -> None:
    async def play(bench: Bench) -> None:
        idle, busy = bench.seat("idle"), bench.seat("busy")
        for _ in range(5):
            await bench.forward(busy, 32)
        bench.hold()
        waits = [bench.forward(busy, 32) for _ in range(3)]
        await begun(bench)
        waits += [bench.forward(idle, 32) for _ in range(3)]
        bench.let_go()
        await asyncio.gather(*waits)

    names = [who for _, (who,) in run(play).passes[6:]]
    assert names == ["idle", "busy", "idle", "busy", "idle"]


def test_forwards_that_wait_together_share_a_pass_up_to_its_tokens() -> None:
    async def play(bench: Bench) -> None:
        seats = [bench.seat(name) for name in "abcdef"]
        bench.hold()
        waits = [bench.forward(seat) for seat in seats]
        await begun(bench)
        bench.let_go()
        await asyncio.gather(*waits)

    assert [len(names) for _, names in run(play, batch_tokens=24).passes] == [1, 3, 2]


def test_deterministic_sessions_and_methods_that_cannot_batch_have_a_pass_of_their_own() -> None:
    async def play(bench: Bench) -> None:
        seats = [bench.seat("first"), bench.seat("sure", deterministic=True), bench.seat("dora", batches=False)]
        seats += [bench.seat("a"), bench.seat("b")]
        bench.hold()
        waits = [bench.forward(seat) for seat in seats]
        await begun(bench)
        bench.let_go()
        await asyncio.gather(*waits)

    bench = run(play)
    assert sorted(sorted(names) for _, names in bench.passes) == [["a", "b"], ["dora"], ["first"], ["sure"]]
    sure = [names for _, names in bench.passes].index(["sure"])
    assert bench.lanes[0].threads[sure] == 4


def test_one_bad_request_fails_alone() -> None:
    async def play(bench: Bench) -> None:
        seats = [bench.seat(name) for name in "abc"]
        bench.hold()
        waits = [bench.forward(seats[0])]
        await begun(bench)
        waits += [bench.forward(seats[1], error=NonFiniteError("bad")), bench.forward(seats[2])]
        bench.let_go()
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Graph, NonFiniteError, Graph]

    run(play)


def test_where_memory_is_short_for_all_each_is_served_alone() -> None:
    async def play(bench: Bench) -> None:
        bench.lanes[0].room = 1
        seats = [bench.seat(name) for name in "abc"]
        bench.hold()
        waits = [bench.forward(seat) for seat in seats]
        await begun(bench)
        bench.let_go()
        await asyncio.gather(*waits)

    assert [sorted(names) for _, names in run(play).passes] == [["a"], ["b", "c"], ["b"], ["c"]]


def test_who_leaves_takes_what_was_queued_along_and_is_released_after_what_runs() -> None:
    async def play(bench: Bench) -> None:
        seat = bench.seat("a")
        bench.hold()
        running, queued = bench.forward(seat), bench.forward(seat)
        await begun(bench)
        bench.scheduler.leave(seat)
        assert queued.cancelled()
        assert not seat.adapter.released  # type: ignore[attr-defined]
        bench.let_go()
        await asyncio.sleep(0.05)
        assert seat.adapter.released  # type: ignore[attr-defined]
        assert running.cancelled() or running.done()
        with pytest.raises(SessionError, match="the session is closed"):
            bench.forward(seat)

    run(play)


def test_a_session_alone_has_all_threads_and_two_have_a_lanes_share_each() -> None:
    async def play(bench: Bench) -> None:
        a, b = bench.seat("a"), bench.seat("b")
        await bench.forward(a)
        bench.hold()
        waits = [bench.forward(a), bench.forward(b)]
        await begun(bench)
        bench.let_go()
        await asyncio.gather(*waits)
        bench.now_s = 60.0
        await bench.forward(a)

    bench = run(play, lanes=2, batch_tokens=1)
    told = sorted(lane.threads for lane in bench.lanes)
    assert told in ([[2], [4, 2, 4]], [[2, 4], [4, 2]], [[4, 2], [4, 2]], [[2], [4, 4, 4]], [[2, 4], [4, 4]]), told


def test_a_step_that_may_wait_is_done_before_the_sessions_next_request_or_when_its_time_is_up() -> None:
    seen: list[str] = []

    async def play(bench: Bench) -> None:
        seat, other = bench.seat("a"), bench.seat("b")
        step = bench.scheduler.other(seat, lambda: seen.append("step"), within_s=0.2)
        await bench.forward(other)
        assert not seen, "nobody waits for it yet"
        await bench.forward(seat)
        assert seen == ["step"]
        assert step.done()
        step = bench.scheduler.other(seat, lambda: seen.append("late"), within_s=0.2)
        bench.now_s += 0.3
        await asyncio.wait_for(step, 5)

    assert run(play).passes == [("forward", ["b"]), ("forward", ["a"])]
    assert seen == ["step", "late"]


def test_adapters_used_longest_ago_are_put_aside_and_come_back_for_their_next_turn() -> None:
    async def play(bench: Bench) -> None:
        seats = [bench.seat(name) for name in "abc"]
        seats[0].keeps_graphs = lambda: True
        for seat in seats:
            await bench.forward(seat)
        await begun(bench)
        aside = [seat.adapter.evicted for seat in seats]  # type: ignore[attr-defined]
        assert aside == [False, True, False]
        await bench.forward(seats[1])
        assert not seats[1].adapter.evicted  # type: ignore[attr-defined]

    run(play, resident_bytes=250)
