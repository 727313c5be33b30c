"""What clients can hold at a trunk is bounded: memory of graphs, places of calls, adapters on their way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from contract import errors
from contract import trunk_pb2 as pb
from contract.adapter import from_bytes, sha256_hex, to_bytes
from server_trunk import servicer, transfers
from storage.artifacts import ArtifactStore, Receiving
from tests.server_trunk.conftest import HIDDEN, RunningTrunk
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
