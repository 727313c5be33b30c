"""Calls that say nothing: a bounded number, for seconds, and none of them keeps out who speaks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from contract import errors
from contract import trunk_pb2 as pb
from server_trunk import door as door_module
from server_trunk.door import Door
from tests.server_trunk.conftest import HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import Refused, WireClient

HIDDEN_BTD = torch.zeros(1, 4, HIDDEN)
FOREVER_S = 60.0


class Crowd:
    """Strangers at a door, each in a task; `ends` has how each that is gone went."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self.ends: dict[str, str] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *peers: str) -> None:
        for peer in peers:
            name = f"{peer}{len(self._tasks)}"
            self._tasks[name] = asyncio.create_task(self._wait(name, peer))
            await asyncio.sleep(0)
            await asyncio.sleep(0.01)

    async def go(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _wait(self, name: str, peer: str) -> None:
        try:
            async with self._door.stranger(peer, FOREVER_S):
                await asyncio.sleep(FOREVER_S)
        except errors.CapacityError:
            self.ends[name] = "turned away"


@pytest.mark.parametrize(
    ("came", "newcomer", "gone"),
    [
        (("a", "b", "c"), "d", "a0"),  # of one each the oldest
        (("a", "b", "b"), "c", "b1"),  # of who has most the oldest
        (("a", "b", "c"), "c", "c2"),  # the newcomer counts
        (("b", "a", "a"), "b", "b0"),  # of equals the one whose oldest is oldest
    ],
)
def test_at_a_full_door_the_oldest_of_who_has_the_most_makes_room(
    came: tuple[str, ...], newcomer: str, gone: str
) -> None:
    async def main() -> None:
        door = Door(3)
        crowd = Crowd(door)
        await crowd.come(*came)
        assert crowd.ends == {}
        await crowd.come(newcomer)
        assert crowd.ends == {gone: "turned away"}
        assert door.waiting == 3
        await crowd.go()
        assert door.waiting == 0

    asyncio.run(main())


def test_who_says_nothing_for_its_time_is_told_so_and_who_spoke_has_left() -> None:
    async def main() -> None:
        door = Door(1)
        async with door.stranger("a", 5.0):
            assert door.waiting == 1
        assert door.waiting == 0
        with pytest.raises(errors.DeadlineError, match="no message came for 0.05 s, so the call is closed"):
            async with door.stranger("a", 0.05):
                await asyncio.sleep(5)
        assert door.waiting == 0

    asyncio.run(main())


def test_silent_streams_do_not_keep_out_a_session(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_trunk.server._STRANGERS", 4)
    trunk = start_trunk(max_sessions=2)
    client, crowd = WireClient(trunk.address), WireClient(trunk.address)
    silent = [crowd.session(None) for _ in range(12)]
    deadline = time.monotonic() + 20
    while len(gone := [one for one in silent if one.call.done()]) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {one.ending().error for one in gone} == {errors.CapacityError}
    assert {one.call.code() for one in gone} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    session = client.session(client.hello(lora))
    session.forward(HIDDEN_BTD)
    for one in silent:
        one.call.cancel()


def test_a_single_request_that_never_comes_is_ended_and_one_that_is_none_is_refused(
    start_trunk: Callable[..., RunningTrunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert door_module.FIRST_WORD_S <= 10
    monkeypatch.setattr(door_module, "FIRST_WORD_S", 0.3)
    monkeypatch.setattr("server_trunk.servicer.FIRST_WORD_S", 0.3)
    channel, over = grpc.insecure_channel(start_trunk().address), threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(20)
        yield b""

    for method in ("Describe", "Progress", "CommitRound", "GetAdapter", "PutAdapter"):
        call: Any = channel.stream_unary(f"/trunkline.v1.Trunk/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(nothing(), timeout=20)
        refused = Refused(caught.value)
        assert (refused.error, refused.line) == (
            errors.DeadlineError,
            "no message came for 0.3 s, so the call is closed",
        )
    over.set()
    for method in ("Progress", "CommitRound", "PutAdapter"):
        call = channel.stream_unary(f"/trunkline.v1.Trunk/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(iter([b"\xff\xff\xff"]), timeout=20)
        assert Refused(caught.value).error is errors.FrameError
    call = channel.stream_unary("/trunkline.v1.Trunk/Describe")
    with pytest.raises(grpc.RpcError) as caught:
        call(iter(()), timeout=20)
    assert Refused(caught.value).line == "the call ended without a request"


def test_watches_of_the_health_are_counted_and_checks_go_on(start_trunk: Callable[..., RunningTrunk]) -> None:
    channel = grpc.insecure_channel(start_trunk().address)
    stub = health_pb2_grpc.HealthStub(channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(16)]
    for watch in watches:
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    one_more: Any = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    with pytest.raises(grpc.RpcError):
        next(one_more)
    assert one_more.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status == health_pb2.HealthCheckResponse.SERVING
    watches.pop().cancel()
    deadline = time.monotonic() + 20
    while True:
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        try:
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            break
        except grpc.RpcError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_compressed_message_is_refused_before_it_unfolds(start_trunk: Callable[..., RunningTrunk]) -> None:
    channel = grpc.insecure_channel(start_trunk().address, [("grpc.max_send_message_length", -1)])
    call: Any = channel.unary_unary("/trunkline.v1.Trunk/Describe")
    with pytest.raises(grpc.RpcError) as caught:
        call(bytes(32 << 20), compression=grpc.Compression.Gzip, timeout=20)
    refused = Refused(caught.value)
    assert refused.status is grpc.StatusCode.UNIMPLEMENTED
    assert "'gzip' is disabled" in refused.line
