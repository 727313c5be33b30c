"""What sessions may hold, who waits for it, and what goes to disk and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from contract import trunk_pb2 as pb
from contract.adapter import to_bytes
from contract.errors import CapacityError, ConfigError, DeadlineError
from contract.records import AdamWSettings
from server_trunk.engine import Engine
from server_trunk.lane import Backward, Forward
from server_trunk.memory import Hold, MemoryBudget, Spill, choose_budget, parse_size
from server_trunk.session_adapter import SessionAdapter
from tests.server_trunk.conftest import CUT, HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import WireClient

SETTINGS = AdamWSettings(1e-2, 0.9, 0.999, 1e-8, 0.1)


@pytest.mark.parametrize(("text", "size"), [("7", 7), ("8G", 8 << 30), ("1.5k", 1536), ("512MiB", 512 << 20)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size("memory-budget", text) == size


@pytest.mark.parametrize("text", ["", "many", "8X", "G", "-"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"memory-budget is '{text}'; it must be bytes, such as 8G"):
        parse_size("memory-budget", text)


def test_a_budget_in_which_nothing_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory-budget is '1M'; it must be at least 64M"):
        choose_budget("1M", "cpu")
    assert choose_budget("auto", "cpu") > 64 << 20


def test_who_waits_gets_memory_in_the_order_of_asking_and_nobody_overtakes() -> None:
    async def main() -> list[str]:
        budget, got = MemoryBudget(10), []

        async def ask(name: str, size: int) -> None:
            await budget.take(size, 5)
            got.append(name)

        assert budget.try_take(8)
        tasks = [asyncio.create_task(ask("large", 9)), asyncio.create_task(ask("small", 1))]
        await asyncio.sleep(0)
        assert not budget.try_take(1)
        budget.give_back(8)
        await asyncio.gather(*tasks)
        return got

    assert asyncio.run(main()) == ["large", "small"]


def test_a_wait_ends_and_what_can_never_fit_does_not_wait() -> None:
    async def main() -> None:
        budget = MemoryBudget(10)
        assert budget.try_take(6)
        with pytest.raises(CapacityError, match="needs 11 bytes at the trunk while it waits"):
            await budget.take(11, 5)
        waits = [asyncio.create_task(budget.take(6, 0.05)), asyncio.create_task(budget.take(4, 5))]
        with pytest.raises(DeadlineError, match="no memory to spare for 0.05 s"):
            await waits[0]
        await waits[1]  # it had waited behind the one that gave up
        assert budget.taken == 10
        cancelled = asyncio.create_task(budget.take(5, 5))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        budget.give_back(10)
        assert budget.taken == 0

    asyncio.run(main())


def test_memory_that_comes_free_as_a_wait_is_cancelled_goes_to_the_next() -> None:
    async def main() -> None:
        budget = MemoryBudget(10)
        assert budget.try_take(10)
        cancelled, patient = (asyncio.create_task(budget.take(6, 5)) for _ in range(2))
        await asyncio.sleep(0)
        cancelled.cancel()
        budget.give_back(10)
        await patient
        assert budget.taken == 6
        await asyncio.gather(cancelled, return_exceptions=True)
        assert budget.taken == 6
        assert budget.try_take(4)

    asyncio.run(main())


def test_a_hold_gives_everything_back_once() -> None:
    budget = MemoryBudget(10)
    hold = Hold(budget)
    assert hold.grow(4)
    assert hold.keep_graph(5)
    assert hold.keeps_graph
    assert not hold.grow(2)
    hold.release()
    hold.release()
    assert (budget.taken, hold.keeps_graph) == (0, False)
    assert not hold.grow(1)


def test_what_is_put_aside_is_bounded_and_gone_with_its_owner(tmp_path: Path) -> None:
    async def main() -> None:
        spill = Spill(tmp_path, 10)
        kept = spill.put(memoryview(b"12345678"))
        assert bytes(kept.read()) == b"12345678"
        with pytest.raises(CapacityError, match="3 more are over its spill-budget of 10"):
            spill.put(memoryview(b"123"))
        del kept
        assert list(spill.folder.iterdir()) == []
        spill.put(memoryview(b"123"))
        spill.close()
        assert list(tmp_path.iterdir()) == []

    asyncio.run(main())


def test_what_a_killed_trunk_put_aside_is_removed_and_what_a_living_one_did_is_not(tmp_path: Path) -> None:
    left = tmp_path / "spill-of-one-that-was-killed"
    left.mkdir()
    (left / "request-1").write_bytes(b"somebody's activations")

    async def main() -> None:
        living = Spill(tmp_path, 10)
        assert not left.exists()
        kept = living.put(memoryview(b"1234"))
        beside = Spill(tmp_path, 10)
        assert bytes(kept.read()) == b"1234"
        del kept
        for spill in (living, beside, beside):
            spill.close()
        assert list(tmp_path.iterdir()) == []

    asyncio.run(main())


# ---- adapters on disk ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Engine:
    return Engine(model_dir, CUT, dtype="float32", attn_implementation="sdpa", device="cpu", lanes=1)


def opened(engine: Engine, lora: pb.Lora) -> SessionAdapter:
    from contract.wire import lora_from_wire

    adapter = engine.open(lora_from_wire(lora), 3, "AB")
    adapter.values_P.add_(0.01)
    return adapter


def train(engine: Engine, adapter: SessionAdapter, between: Callable[[], Any]) -> bytes:
    for step in range(3):
        for microbatch in range(2):
            generator = torch.Generator().manual_seed(10 * step + microbatch)
            asked = Forward(adapter, torch.randn(2, 5, HIDDEN, generator=generator), None, None)
            graph = engine.lanes[0].forward([asked], keep=False)[0][1]
            between()
            grad_BTD = torch.ones(2, 5, HIDDEN)
            engine.lanes[0].backward([Backward(adapter, graph, grad_BTD, want_input_grad=False, reset=False)])
            between()
        engine.step(adapter, SETTINGS, 0.5)
        between()
    return to_bytes(adapter.parameters)


def test_an_adapter_that_was_on_disk_trains_on_as_if_it_had_not_been(
    engine: Engine, lora: pb.Lora, tmp_path: Path
) -> None:
    adapter = opened(engine, lora)

    def away_and_back() -> None:
        adapter.evict(tmp_path)
        assert adapter.evicted
        assert adapter.values_P.numel() == 0
        assert len(list(tmp_path.iterdir())) == 1
        adapter.evict(tmp_path)
        adapter.restore()
        assert not adapter.evicted

    expected = train(engine, opened(engine, lora), lambda: None)
    assert train(engine, adapter, away_and_back) == expected
    assert list(tmp_path.iterdir()) == []
    adapter.evict(tmp_path)
    adapter.release()
    assert list(tmp_path.iterdir()) == []


def test_a_backward_without_a_kept_graph_gives_the_same_bits(engine: Engine, lora: pb.Lora) -> None:
    answers = []
    for keep in (True, False):
        adapter = opened(engine, lora)
        generator = torch.Generator().manual_seed(1)
        asked = Forward(adapter, torch.randn(2, 5, HIDDEN, generator=generator), None, None)
        output, graph = engine.lanes[0].forward([asked], keep=keep)[0]
        assert (graph.output_BTD is not None) == keep
        back = engine.lanes[0].backward([Backward(adapter, graph, torch.ones_like(output), True, True)])[0]
        answers.append((output, *back, to_bytes(adapter.gradients())))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
    assert answers[0][2:] == answers[1][2:]


# ---- a whole trunk with little memory ------------------------------------------------------------------------------


def session_bytes(tokens: int) -> int:
    return 3 * 4 * tokens * HIDDEN


def test_many_clients_with_little_memory_slow_down_and_all_get_their_bits(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two requests of twelve clients with two microbatches each: some wait, some go to disk, none fails."""
    monkeypatch.setattr("server_trunk.server.choose_budget", lambda asked, device: 10 * session_bytes(40) * 2 // 3)
    monkeypatch.setattr("server_trunk.server._FOR_PASSES", 100.0)
    spilled: list[int] = []
    place = Spill.place

    def noted(spill: Spill, size: int) -> Any:
        spilled.append(size)
        return place(spill, size)

    monkeypatch.setattr(Spill, "place", noted)
    trunk = start_trunk(max_sessions=16, lanes=1)

    def work(seed: int) -> list[bytes]:
        client = WireClient(trunk.address)
        session = client.session(client.hello(lora, seed=seed, deterministic=True))
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(3):
            outputs = [session.forward(torch.randn(4, 10, HIDDEN, generator=generator)) for _ in range(2)]
            last = session.microbatch
            for microbatch, output in zip((last - 1, last), outputs, strict=True):
                session.backward(output, microbatch=microbatch)
            session.step()
            found.append(session.read())
        session.close()
        client.close()
        return found

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(work, range(12)))
    assert spilled, "nothing had to go to disk"
    assert together == [work(seed) for seed in range(12)]


def test_idle_adapters_go_to_disk_and_come_back(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    evicted: list[int] = []
    evict = SessionAdapter.evict

    def noted(adapter: SessionAdapter, folder: Path) -> None:
        evicted.append(id(adapter))
        evict(adapter, folder)

    monkeypatch.setattr(SessionAdapter, "evict", noted)
    monkeypatch.setattr("server_trunk.server._FOR_ADAPTERS", 0.0)
    trunk = start_trunk(max_sessions=16, lanes=1)
    client = WireClient(trunk.address)
    hidden = torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(1))
    sessions = [client.session(client.hello(lora, seed=seed)) for seed in range(4)]
    for _ in range(3):
        for session in sessions:
            session.backward(session.forward(hidden))
            session.step()
    assert len(set(evicted)) == 4
    alone = client.session(client.hello(lora, seed=2))
    for _ in range(3):
        alone.backward(alone.forward(hidden))
        alone.step()
    assert sessions[2].read() == alone.read()


def test_clients_are_told_to_have_less_under_way_while_memory_is_short(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_trunk.server.choose_budget", lambda asked, device: 10 * session_bytes(40))
    monkeypatch.setattr("server_trunk.server._FOR_PASSES", 100.0)
    client = WireClient(start_trunk(max_pending=4).address)
    session = client.session(client.hello(lora))
    assert session.welcome.credits == 4
    hidden = torch.zeros(4, 10, HIDDEN)
    told = []
    for _ in range(3):
        session.forward(hidden)
        told.append(session.credits)
    assert told == [4, 4, 1]
    session.backward(hidden, microbatch=1)
    session.backward(hidden, microbatch=2)
    assert session.credits == 4
