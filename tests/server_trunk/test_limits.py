"""What clients can hold at a trunk is bounded: memory of graphs, places of calls, adapters on their way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from contract import errors
from contract import trunk_pb2 as pb
from contract.adapter import from_bytes, sha256_hex, to_bytes
from contract.wire import lora_from_wire
from server_trunk import port, servicer, transfers
from server_trunk.engine import Engine
from server_trunk.graph_meter import PassKind
from storage.artifacts import ArtifactStore, Receiving
from tests.server_trunk.conftest import CUT, HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import Refused, WireClient

HIDDEN_BTD = torch.zeros(1, 4, HIDDEN)


def test_a_stream_that_says_no_hello_is_closed_long_before_the_idle_time(
    start_trunk: Callable[..., RunningTrunk], monkeypatch: pytest.MonkeyPatch, lora: pb.Lora
) -> None:
    assert servicer.HELLO_TIMEOUT_S <= 10
    monkeypatch.setattr(servicer, "HELLO_TIMEOUT_S", 0.3)
    client = WireClient(start_trunk(idle_timeout_s=20.0).address)
    talker = client.session(client.hello(lora))
    started = time.monotonic()
    refused = client.session(None).ending()
    assert refused.error is errors.DeadlineError
    assert refused.line == "no frame came for 0.3 s, so the session is closed"
    assert time.monotonic() - started < 10
    talker.forward(HIDDEN_BTD)


# ---- adapters on their way -----------------------------------------------------------------------------------------


def artifact(seed: int, rows: int = 8) -> bytes:
    return to_bytes({"x": torch.randn(rows, 1024, generator=torch.Generator().manual_seed(seed))})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transfers.CHUNK_TIMEOUT_S <= 30
    monkeypatch.setattr(transfers, "CHUNK_TIMEOUT_S", 0.3)


def test_an_upload_that_stops_is_ended_and_makes_room(
    start_trunk: Callable[..., RunningTrunk], impatient: None
) -> None:
    client = WireClient(start_trunk(idle_timeout_s=20.0).address)
    data, over = artifact(1), threading.Event()

    def stalling() -> Iterator[pb.AdapterChunk]:
        yield pb.AdapterChunk(sha256=sha256_hex(data), size_bytes=len(data), data=data[:10])
        over.wait(20)

    def upload(_: int) -> Refused:
        with pytest.raises(Refused) as caught:
            client.call("PutAdapter", stalling())
        return caught.value

    started = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        refusals = list(threads.map(upload, range(4)))
        over.set()
    assert {refused.error for refused in refusals} == {errors.DeadlineError}
    assert {refused.line for refused in refusals} == {"no chunk of the adapter came for 0.3 s"}
    assert client.put_adapter(sha256_hex(data), data) == sha256_hex(data)
    assert time.monotonic() - started < 10


def test_an_upload_is_on_the_disk_before_the_next_of_its_chunks_is_taken(
    start_trunk: Callable[..., RunningTrunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, writable, written = WireClient(start_trunk().address), threading.Event(), []
    write = Receiving.write

    def slow(file: Receiving, data: bytes) -> None:
        writable.wait(20)
        written.append(len(data))
        write(file, data)

    monkeypatch.setattr(Receiving, "write", slow)
    adapters = [artifact(seed) for seed in range(5)]
    with ThreadPoolExecutor(5) as threads:
        stored = [threads.submit(client.put_adapter, sha256_hex(data), data) for data in adapters]
        time.sleep(0.5)
        assert written == []
        writable.set()
        assert [one.result(20) for one in stored] == [sha256_hex(data) for data in adapters]
    assert max(written) <= 1000, "what is written is a chunk and never a whole adapter"


def test_a_download_never_holds_the_whole_adapter(
    start_trunk: Callable[..., RunningTrunk], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = WireClient(start_trunk().address)
    data = artifact(1, rows=1024)
    sha256 = ArtifactStore(tmp_path / "state" / "artifacts").put(data)

    def whole(store: ArtifactStore, sha256: str) -> bytes:
        raise AssertionError("the whole file was read")

    monkeypatch.setattr(ArtifactStore, "get", whole)
    assert client.get_adapter(sha256) == data


def test_a_download_of_a_changed_file_sends_nothing_of_it(
    start_trunk: Callable[..., RunningTrunk], tmp_path: Path
) -> None:
    client = WireClient(start_trunk().address)
    store = ArtifactStore(tmp_path / "state" / "artifacts")
    sha256 = store.put(artifact(1))
    store.path(sha256).write_bytes(artifact(2))
    call: Any = client.stub.GetAdapter(pb.GetAdapterRequest(sha256=sha256), timeout=20)
    with pytest.raises(Exception, match="hashes to"):
        next(call)
    assert Refused(call).error is errors.IntegrityError


def test_a_download_that_nobody_takes_is_ended_and_makes_room(
    start_trunk: Callable[..., RunningTrunk], impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transfers, "_DOWNLOADS_AT_ONCE", 1)
    client = WireClient(start_trunk(idle_timeout_s=20.0).address)
    sha256 = ArtifactStore(tmp_path / "state" / "artifacts").put(artifact(1, rows=12 * 1024))
    call: Any = client.stub.GetAdapter(pb.GetAdapterRequest(sha256=sha256), timeout=20)
    next(call)
    small = artifact(2)
    client.put_adapter(sha256_hex(small), small)
    assert client.get_adapter(sha256_hex(small)) == small
    with pytest.raises(Exception, match="the client took no chunk of the adapter for 0.3 s"):
        list(call)


def test_a_first_adapter_is_not_parsed_on_the_event_loop(
    start_trunk: Callable[..., RunningTrunk], monkeypatch: pytest.MonkeyPatch, lora: pb.Lora
) -> None:
    client = WireClient(start_trunk().address)
    data = bytes(client.session(client.hello(lora)).read())
    sha256 = client.put_adapter(sha256_hex(data), data)
    parsers: list[str] = []

    def noted(data: bytes) -> dict[str, torch.Tensor]:
        parsers.append(threading.current_thread().name)
        return from_bytes(data)

    for module in (servicer, transfers):
        if hasattr(module, "from_bytes"):
            monkeypatch.setattr(module, "from_bytes", noted)
    assert client.session(client.hello(lora, adapter_sha256=sha256)).read() == data
    assert [name.rpartition("_")[0] for name in parsers] == ["trunk-disk"]


def test_the_line_of_those_who_wait_for_a_turn_is_bounded_and_moves() -> None:
    async def main() -> None:
        turns, over = transfers.Turns(1, 20.0, "it did not come"), asyncio.Event()

        async def one() -> None:
            async with turns.turn():
                await over.wait()

        waiting = [asyncio.create_task(one()) for _ in range(1 + transfers._IN_LINE)]
        await asyncio.sleep(0.05)
        with pytest.raises(errors.CapacityError, match="32 others are in line at this trunk, which is its limit"):
            await one()
        over.set()
        await asyncio.gather(*waiting)
        await one()

    asyncio.run(main())


def test_a_turn_ends_when_too_little_moves_in_it() -> None:
    async def main() -> None:
        turns = transfers.Turns(1, 0.05, "it did not come")

        async def slowly() -> None:
            async with turns.turn() as moves:
                moves(1 << 30)
                await asyncio.sleep(5)

        with pytest.raises(errors.DeadlineError, match="it did not come in time: at least 64 KiB/s must move"):
            await slowly()
        async with turns.turn() as moves:
            moves(None)
            await asyncio.sleep(0.1)

    asyncio.run(main())


def test_a_flood_of_refusals_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    refusals = servicer._Refusals(most=3, every_s=0.2)
    with caplog.at_level("INFO", "trunkline.server_trunk"):
        for _ in range(50):
            refusals.tell("session", errors.FrameError("no"))
        time.sleep(0.25)
        refusals.tell("session", errors.FrameError("again"))
    told = [record.getMessage() for record in caplog.records]
    assert told == ["session refused: no"] * 3 + ["47 more calls were refused", "session refused: again"]


def test_between_new_structures_the_thread_is_left_to_passes_and_known_ones_open_at_once(
    start_trunk: Callable[..., RunningTrunk], monkeypatch: pytest.MonkeyPatch, lora: pb.Lora
) -> None:
    trunk: Any = start_trunk()
    client = WireClient(trunk.address)

    def structure(alpha: float) -> pb.Hello:
        changed = pb.Lora()
        changed.CopyFrom(lora)
        changed.alpha = alpha
        return client.hello(changed)

    monkeypatch.setattr(servicer, "_REST", 1e6)
    client.session(structure(1.0)).close()
    new = client.session(None)
    new.send(hello=structure(2.0))
    for _ in range(2):
        known = client.session(structure(1.0))
        known.close()
        known.ending()
    assert trunk.server._table.taken == 1, "the new one waits, and the others came and went"
    new.call.cancel()


def test_a_hello_does_not_wait_for_its_turn_for_ever(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk: Any = start_trunk()
    client = WireClient(trunk.address)
    monkeypatch.setattr(servicer, "_REST", 1e6)
    monkeypatch.setattr(servicer, "_OPENS_WITHIN_S", 0.5)
    client.session(client.hello(lora)).close()
    other = pb.Lora()
    other.CopyFrom(lora)
    other.rank += 1
    with pytest.raises(Refused) as caught:
        client.session(client.hello(other))
    assert caught.value.error is errors.CapacityError
    assert "this hello did not get its turn within 0.5 s" in caught.value.line
    assert trunk.server._table.taken == 0


def test_the_same_bits_twice_are_not_promised_on_a_gpu(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = WireClient(start_trunk().address)
    monkeypatch.setattr("server_trunk.engine.Engine.check_deterministic", on_a_gpu(Engine.check_deterministic))
    with pytest.raises(Refused) as caught:
        client.session(client.hello(lora, deterministic=True))
    assert caught.value.error is errors.AgreementError
    assert "deterministic is asked for, and this trunk computes on cuda" in str(caught.value)


def on_a_gpu(check: Callable[[Engine], None]) -> Callable[[Engine], None]:
    return lambda engine: check(cast(Engine, SimpleNamespace(device="cuda")))


def test_a_structure_takes_no_memory_of_its_own(model_dir: Path, lora: pb.Lora) -> None:
    engine = Engine(model_dir, CUT, dtype="float32", attn_implementation="sdpa", device="cpu", lanes=1)
    spec = lora_from_wire(lora)
    adapter = engine.open(spec, 1, "AB")
    slot = engine.lanes[0].slots._slot(spec)
    assert {parameter.device.type for parameter in slot.placeholders.values()} == {"meta"}
    assert engine.adapter_values(spec) == adapter.layout.values


def test_kinds_of_passes_are_remembered_up_to_a_number(model_dir: Path) -> None:
    engine = Engine(model_dir, CUT, dtype="float32", attn_implementation="sdpa", device="cpu", lanes=1)
    for number in range(300):
        with engine.meter.measuring(PassKind(f"layout {number}", "", False, 8), 8):
            pass
    assert not engine.meter.knows(PassKind("layout 0", "", False, 8))
    assert engine.meter.knows(PassKind("layout 299", "", False, 8))
    assert len(engine.meter._per_token) == 256


@pytest.mark.parametrize(
    ("soft", "hard", "connections"),
    [(1024, 4096, 4096 - 256), (1024, 1024, 1024 - 256), (300, 300, 256), (1 << 20, 1 << 20, 1 << 14)],
)
def test_connections_leave_descriptors_for_adapters_and_requests(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, connections: int
) -> None:
    limits = [soft, hard]

    def set_limits(which: int, wanted: tuple[int, int]) -> None:
        assert wanted[0] <= hard
        limits[:] = wanted

    monkeypatch.setattr("resource.getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr("resource.setrlimit", set_limits)
    assert port._connections() == connections
    assert limits[0] >= soft, "what this process had is not taken from it"
