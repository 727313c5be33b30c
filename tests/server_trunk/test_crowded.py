"""More adapters with work than memory is for, and a pass that one of its members makes fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contract.errors import CapacityError
from server_trunk.residents import Residents
from server_trunk.seats import Seat
from tests.server_trunk.test_scheduler import Adapter, Bench, run


def seats(count: int) -> list[Seat]:
    adapters: list[Any] = [Adapter(str(number)) for number in range(count)]
    return [Seat(adapter) for adapter in adapters]


def names(found: list[Seat]) -> list[str]:
    adapters: list[Any] = [seat.adapter for seat in found]
    return [adapter.name for adapter in adapters]


def test_adapters_whose_sessions_wait_for_a_turn_go_to_disk_only_where_there_are_far_too_many() -> None:
    residents, present = Residents(200, Path("nowhere")), seats(5)
    for seat in present:
        seat.jobs.append(SimpleNamespace())  # type: ignore[arg-type]
    for seat in present[:4]:
        residents.used(seat)
    assert not residents.crowded
    assert residents.surplus() == []
    residents.used(present[4])
    assert residents.crowded
    present[0].running = True
    present[1].keeps_graphs = lambda: True
    assert names(residents.surplus()) == ["2"]
    assert not residents.crowded


def test_an_adapter_counts_from_the_sessions_start_on() -> None:
    async def play(bench: Bench) -> None:
        bench.seat("a")
        assert bench.scheduler.residents.taken == 100

    run(play)


def test_no_graph_is_kept_where_adapters_are_far_too_many() -> None:
    async def play(bench: Bench) -> None:
        first = bench.seat("a")
        for name in "bcd":
            bench.seat(name)
        await bench.forward(first)

    assert run(play, resident_bytes=100).lanes[0].kept == [False]
    assert run(play, resident_bytes=999).lanes[0].kept == [True]


def test_an_adapter_that_is_too_large_for_the_trunk_is_refused_by_its_size() -> None:
    residents = Residents(100, Path("nowhere"), 16_000)
    residents.require_room(1000)
    with pytest.raises(CapacityError, match="takes 16016 bytes; this trunk's memory-budget is 16000: use a lower rank"):
        residents.require_room(1001)


def test_a_pass_that_fails_for_all_together_fails_only_for_who_made_it_fail() -> None:
    async def play(bench: Bench) -> None:
        lane = bench.lanes[0]
        forward = lane.forward

        def failing(asked: Any, *, keep: bool) -> Any:
            if any(one.adapter.name == "bad" for one in asked):
                raise RuntimeError("value cannot be converted to type float without overflow")
            return forward(asked, keep=keep)

        lane.forward = failing  # type: ignore[method-assign]
        lane.go.clear()
        bench.forward(bench.seat("first"))
        good, bad = bench.seat("good"), bench.seat("bad")
        waiting = [bench.forward(good), bench.forward(bad)]
        lane.go.set()
        await waiting[0]
        with pytest.raises(RuntimeError, match="without overflow"):
            await waiting[1]

    run(play)
