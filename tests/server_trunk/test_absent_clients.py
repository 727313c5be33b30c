"""Clients that ask and do not take, or never come back: what is kept for them makes room while others wait."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch

from contract import errors
from contract import trunk_pb2 as pb
from contract.adapter import sha256_hex
from server_trunk import stream
from server_trunk.memory import Spill, Spilled
from tests.server_trunk.conftest import HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import Refused, WireClient, WireSession

ROWS, LENGTH = 4, 10
ONE_FORWARD = 3 * 4 * ROWS * LENGTH * HIDDEN
LIMIT_S = 60.0


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two forwards that wait, and no patience with who keeps it."""
    monkeypatch.setattr("server_trunk.server.choose_budget", lambda asked, device: 10 * ONE_FORWARD * 2 // 3)
    monkeypatch.setattr("server_trunk.server._FOR_PASSES", 100.0)
    monkeypatch.setattr("server_trunk.server._FOR_ADAPTERS", 100.0)
    monkeypatch.setattr("server_trunk.residents.Residents.require_room", lambda residents, values: None)
    monkeypatch.setattr("server_trunk.servicer._RELIEF_S", 0.2)
    monkeypatch.setattr("server_trunk.server._RELIEF_POLL_S", 0.05)


def hidden(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def train(session: WireSession, seed: int) -> bytes:
    session.backward(session.forward(hidden(seed)))
    session.step()
    return session.read()


def memory(trunk: RunningTrunk) -> Any:
    servicer: Any = trunk.server._servicer
    return servicer._memory


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_graphs_whose_backward_does_not_come_make_room_and_keep_their_bits(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, scarce: None
) -> None:
    trunk = start_trunk(lanes=1)
    client = WireClient(trunk.address)
    hoarder = client.session(client.hello(lora, seed=1, deterministic=True))
    kept = [hoarder.forward(hidden(number)) for number in range(2)]
    assert memory(trunk).taken > ONE_FORWARD
    honest = client.session(client.hello(lora, seed=2, deterministic=True))
    began_s = time.monotonic()
    adapter = train(honest, 7)
    assert time.monotonic() - began_s < 15, "nobody waits for a backward that may never come"
    wait_until(lambda: memory(trunk).taken == 0)
    for microbatch, output in enumerate(kept, 1):
        hoarder.backward(output, microbatch=microbatch)
    late = hoarder.read(gradients=True)

    calm = WireClient(start_trunk(lanes=1).address)
    assert train(calm.session(calm.hello(lora, seed=2, deterministic=True)), 7) == adapter
    alone = calm.session(calm.hello(lora, seed=1, deterministic=True))
    for number in range(2):
        alone.forward(hidden(number))
        alone.backward(kept[number], microbatch=number + 1)
    assert alone.read(gradients=True) == late


def test_replies_that_nobody_reads_make_room_and_are_read_later_as_they_were(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, scarce: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside: list[int] = []
    place = Spill.place

    def noted(spill: Spill, size: int) -> Any:
        aside.append(size)
        return place(spill, size)

    monkeypatch.setattr(Spill, "place", noted)
    trunk = start_trunk(lanes=1, max_pending=8)
    client = WireClient(trunk.address)
    expected = client.session(client.hello(lora, seed=1)).read()
    unread = client.session(client.hello(lora, seed=1))
    for _ in range(400):
        unread.send(read_adapter=pb.ReadAdapter())
    honest = client.session(client.hello(lora, seed=2))
    train(honest, 3)
    assert aside, "what nobody reads is on the disk, where it is more than memory has room for"
    for _ in range(400):
        assert bytes(unread.receive_data(unread.receive("adapter").size_bytes)) == expected
    unread.close()
    honest.close()
    wait_until(lambda: memory(trunk).taken == 0)


def test_a_client_that_hangs_up_leaves_nothing_on_disk_even_before_garbage_is_collected(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, scarce: None
) -> None:
    trunk = start_trunk(lanes=1, max_pending=8)
    client = WireClient(trunk.address)
    unread = client.session(client.hello(lora, seed=1))
    for _ in range(400):
        unread.send(read_adapter=pb.ReadAdapter())
    folder, honest = trunk.server._spill.folder, client.session(client.hello(lora, seed=2))

    def is_put_aside_for_another() -> bool:
        train(honest, 3)
        return bool(list(folder.glob("request-*")))

    wait_until(is_put_aside_for_another)
    honest.close()
    gc.disable()
    try:
        unread.call.cancel()
        wait_until(lambda: memory(trunk).taken == 0 and not list(folder.glob("request-*")))
    finally:
        gc.enable()


def test_a_client_that_hangs_up_while_its_reply_is_read_from_disk_leaves_nothing_there(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, scarce: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, plain = threading.Event(), Spilled.read

    def slow(spilled: Spilled, *place: int) -> memoryview:
        reads.set()
        time.sleep(0.5)
        return plain(spilled, *place)

    monkeypatch.setattr(Spilled, "read", slow)
    trunk = start_trunk(lanes=1, max_pending=8)
    client = WireClient(trunk.address)
    unread = client.session(client.hello(lora, seed=1))
    for _ in range(400):
        unread.send(read_adapter=pb.ReadAdapter())
    honest = client.session(client.hello(lora, seed=2))
    wait_until(lambda: bool(train(honest, 3)) and bool(list(trunk.server._spill.folder.glob("request-*"))))
    honest.close()
    while not reads.is_set():
        unread.receive_data(unread.receive("adapter").size_bytes)
    gc.disable()
    try:
        unread.call.cancel()
        wait_until(lambda: memory(trunk).taken == 0 and trunk.server._spill.taken == 0)
    finally:
        gc.enable()


def test_a_session_for_which_the_disk_has_no_room_ends_with_the_reason(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, scarce: None
) -> None:
    trunk = start_trunk(lanes=1, spill_budget="1")
    client = WireClient(trunk.address)
    hoarder = client.session(client.hello(lora, seed=1))
    for number in range(2):
        hoarder.forward(hidden(number))
    honest = client.session(client.hello(lora, seed=2))
    train(honest, 7)
    refused = hoarder.ending()
    assert refused.error is errors.CapacityError
    assert refused.line.startswith("others waited for the memory that this session kept: ")
    wait_until(lambda: memory(trunk).taken == 0)


def test_a_tensor_that_comes_too_slowly_is_given_up(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stream.longest_s(0) == 30.0
    assert stream.longest_s(1 << 20) == 46.0
    monkeypatch.setattr(stream, "_SLACK_S", 0.3)
    client = WireClient(start_trunk().address)
    session = client.session(client.hello(lora))
    header = pb.TensorHeader(dtype="float32", codec="identity", shape=[1, 4, HIDDEN], size_bytes=4 * 4 * HIDDEN)
    session.send(forward=pb.Forward(microbatch=1, hidden=header, reply_codec="identity"))
    for _ in range(5):
        session.send_data(memoryview(b"x"))
        time.sleep(0.1)
    refused = session.ending()
    assert refused.error is errors.DeadlineError
    assert refused.line == "forward.hidden: its 512 bytes did not come within 0 s"


def test_a_reply_that_is_taken_too_slowly_is_given_up(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second for all of a reply, and more than that for a frame, so that it is not the idle time that ends it.
    monkeypatch.setattr(stream, "longest_s", lambda size_bytes: -29.0)
    monkeypatch.setattr("server_trunk.outgoing.CHUNK_BYTES", 1024)
    client = WireClient(start_trunk(max_pending=8, idle_timeout_s=30.0).address)
    slow = client.session(client.hello(lora))
    for _ in range(400):  # more than gRPC takes unasked
        slow.send(read_adapter=pb.ReadAdapter())
    slow.hang_up()
    until = time.monotonic() + LIMIT_S
    while client.call("Describe", pb.DescribeRequest()).open_sessions:
        assert time.monotonic() < until
        time.sleep(0.05)
    refused = slow.ending()
    assert refused.error is errors.DeadlineError
    assert re.fullmatch(r"a reply: its \d+ bytes did not go within 1 s", refused.line)


def test_a_client_may_take_nothing_for_the_idle_time_while_it_computes_but_not_send_so_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def takes_long(must: Literal["come", "go"]) -> None:
        frames = stream.FrameStream(cast(Any, SimpleNamespace(peer=str)), idle_timeout_s=60.0, frame_bytes=1024)
        async with frames.in_time(512, "a tensor", must):
            await asyncio.sleep(0.1)

    monkeypatch.setattr(stream, "longest_s", lambda size_bytes: 0.01)
    asyncio.run(takes_long("go"))
    with pytest.raises(errors.DeadlineError, match="a tensor: its 512 bytes did not come within 0 s"):
        asyncio.run(takes_long("come"))


def test_a_slow_tensor_on_its_way_to_the_disk_keeps_nobody_else_from_it(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, scarce: None
) -> None:
    client = WireClient(start_trunk(lanes=1, max_sessions=16).address)
    slow = []
    for seed in range(4):
        session = client.session(client.hello(lora, seed=seed))
        session.forward(hidden(seed))
        header = pb.TensorHeader(
            dtype="float32", codec="identity", shape=[ROWS, LENGTH, HIDDEN], size_bytes=4 * ROWS * LENGTH * HIDDEN
        )
        session.send(forward=pb.Forward(microbatch=9, hidden=header, reply_codec="identity", need_grad=True))
        session.send_data(memoryview(b"x"))
        slow.append(session)
    honest = client.session(client.hello(lora, seed=9))
    outputs = [honest.forward(hidden(number)) for number in range(3)]
    for microbatch, output in enumerate(outputs, 1):
        honest.backward(output, microbatch=microbatch)
    honest.close()
    for session in slow:
        session.call.cancel()


def test_sample_caches_take_a_part_of_the_memory_and_no_more(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    trunk = start_trunk(memory_budget="256M", sample_cache_mib=20)
    client = WireClient(trunk.address)
    sessions = [client.session(client.hello(lora, codecs=["int4-delta", "int8"])) for _ in range(3)]
    granted = [session.welcome.sample_cache_bytes for session in sessions]
    assert granted == [20 << 20, 0, 0], "a tenth of the budget is 25.6 MiB"
    assert memory(trunk).taken == 20 << 20
    sessions[0].close()
    sessions[0].ending()
    wait_until(lambda: memory(trunk).taken == 0)


def test_an_adapter_that_is_larger_than_its_structure_is_refused_unread(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    from contract.adapter import to_bytes

    client = WireClient(start_trunk().address)
    large = to_bytes({"x": torch.zeros(1 << 20)})
    client.put_adapter(sha256_hex(large), large)
    with pytest.raises(Refused) as caught:
        client.session(client.hello(lora, adapter_sha256=sha256_hex(large)))
    assert caught.value.error is errors.AgreementError
    assert "bytes; one of the session's LoRA has" in caught.value.line


def test_an_adapter_over_the_whole_memory_is_refused(start_trunk: Callable[..., RunningTrunk], lora: pb.Lora) -> None:
    client = WireClient(start_trunk(memory_budget="64M").address)
    client.session(client.hello(lora))
    trunk = start_trunk(memory_budget="64M")
    residents: Any = trunk.server._scheduler.residents
    residents._most = 1000
    client = WireClient(trunk.address)
    with pytest.raises(Refused) as caught:
        client.session(client.hello(lora))
    assert caught.value.error is errors.CapacityError
    assert "this trunk's memory-budget is 1000" in caught.value.line
