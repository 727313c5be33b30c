"""Attacks on a trunk that takes whoever comes, over its port."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import grpc

from contract import trunk_pb2 as pb
from contract.wire import chunk_frame
from tests.hostile import sockets
from tests.hostile.caller import Caller, Outcomes, Target, ending

_SESSIONS = 10
"""How many sessions an attack opens that has them: the trunk under attack has places for 16."""


@dataclass
class Attack:
    """What an attack works with; `scale` is a share of its full size."""

    target: Target
    draw: random.Random
    seconds: float
    scale: float
    outcomes: Outcomes

    def __post_init__(self) -> None:
        self._ends_s = time.monotonic() + self.seconds

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self._ends_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._ends_s - time.monotonic())

    def count(self, full: int) -> int:
        return max(1, round(full * self.scale))

    async def all(self, work: Callable[[int], Awaitable[None]], count: int) -> None:
        """`work` of so many at once, each over again until the time is up."""

        async def again(number: int) -> None:
            while self.goes_on:
                await self.outcomes.of(work(number), f"call {number}")
                await asyncio.sleep(0)

        tasks = [asyncio.ensure_future(again(number)) for number in range(count)]
        await asyncio.wait(tasks, timeout=self.left_s + 1.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ---- who says nothing ----------------------------------------------------------------------------------------------


async def silent_streams(attack: Attack) -> None:
    """1,000 session streams at once, without a hello; one that ends is opened again."""
    caller = Caller(attack.target, 20)

    async def wait(number: int) -> None:
        stream = caller.session(number)
        await stream.read()
        raise await ending(stream)

    await attack.all(wait, attack.count(1000))
    await caller.close()


async def silent_calls(attack: Attack) -> None:
    """Describe, CommitRound, GetAdapter and PutAdapter whose request never comes, and watches of its health."""
    caller = Caller(attack.target, 8)

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(attack.left_s + 60)
        yield b""

    async def wait(number: int) -> None:
        if number % 5 == 4:
            watch = caller.channel(number).unary_stream("/grpc.health.v1.Health/Watch")(b"")
            async for _ in watch:
                continue
            return
        method = ("Describe", "CommitRound", "GetAdapter", "PutAdapter")[number % 5]
        await caller.raw(method, number)(nothing())

    await attack.all(wait, attack.count(500))
    await caller.close()


async def drip(attack: Attack) -> None:
    """Forwards of which a byte comes at a time, and uploads likewise."""
    caller = Caller(attack.target, 4)

    async def slowly(number: int) -> None:
        stream = await caller.opened(number)
        await caller.send(stream, attack.target.forward(1, 4, 256)[:1])
        while attack.goes_on:
            await caller.send(stream, [chunk_frame(memoryview(b"\0"))])
            await asyncio.sleep(0.1)

    async def upload(number: int) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield pb.AdapterChunk(sha256="0" * 64, size_bytes=1 << 30, data=b"x").SerializeToString()
            while attack.goes_on:
                await asyncio.sleep(0.1)
                yield pb.AdapterChunk(data=b"x").SerializeToString()

        await caller.raw("PutAdapter", number)(chunks())

    async def either(number: int) -> None:
        await (slowly(number) if number < _SESSIONS else upload(number))

    await attack.all(either, _SESSIONS + attack.count(20))
    await caller.close()


async def unread(attack: Attack) -> None:
    """Sessions that ask for large forwards and adapters, and never read an answer."""
    caller = Caller(attack.target, _SESSIONS, **{"grpc.http2.lookahead_bytes": 1 << 16, "grpc.http2.bdp_probe": 0})
    rows = attack.target.max_tokens // 256

    async def ask(number: int) -> None:
        stream = await caller.opened(number)
        for microbatch in range(1, 40):
            need_grad = microbatch <= 8
            await caller.send(stream, attack.target.forward(microbatch, rows, 256, need_grad=need_grad))
            await caller.send(stream, [pb.ClientFrame(read_adapter=pb.ReadAdapter()).SerializeToString()])
        await asyncio.sleep(attack.left_s)
        stream.cancel()

    await attack.all(ask, _SESSIONS)
    await caller.close()


async def hoard(attack: Attack) -> None:
    """Sessions with as many graphs as they may have, whose backward never comes."""
    caller = Caller(attack.target, 4)
    rows = attack.target.max_tokens // 128

    async def keep(number: int) -> None:
        stream = await caller.opened(number, codecs=["identity", "int4-delta"])
        for microbatch in range(1, 9):
            await caller.send(stream, attack.target.forward(microbatch, rows, 128))
        while await stream.read() is not grpc.aio.EOF:
            continue
        raise await ending(stream)

    await attack.all(keep, _SESSIONS)
    await caller.close()


# ---- who says too much ---------------------------------------------------------------------------------------------


async def oversized(attack: Attack) -> None:
    """Messages over the limit, lists without end, tensors that are larger or smaller than announced."""
    caller = Caller(attack.target, 4, **{"grpc.max_send_message_length": 64 << 20})
    target = attack.target

    def frames(kind: int) -> list[bytes]:
        if kind == 0:
            return [chunk_frame(memoryview(bytes(8 << 20)))]
        if kind == 1:
            return [pb.ClientFrame(forward=pb.Forward(dropped=range(400_000))).SerializeToString()]
        if kind == 2:
            return [*target.forward(1, 4, 64)[:1], *target.forward(1, 8, 64)[1:]]
        if kind == 3:
            return [*target.forward(1, 8, 64)[:1], *target.forward(1, 4, 64)[1:], *target.forward(2, 4, 64)]
        if kind == 4:
            header = pb.TensorHeader(dtype="float32", shape=[1, 1, 1 << 30], size_bytes=1 << 40, codec="identity")
            return [pb.ClientFrame(forward=pb.Forward(hidden=header, reply_codec="identity")).SerializeToString()]
        return [pb.ClientFrame(forward=pb.Forward(position_ids=range(300_000))).SerializeToString()]

    hellos = (
        {"client_id": "x" * (3 << 20)},
        {"codecs": ["identity"] * 400_000},
        {"trainable": "😀" * 100_000},
        {"lora": pb.Lora(rank=4, alpha=1, target_modules=["model.layers.1.self_attn.q_proj"] * 60_000)},
        {"lora": pb.Lora(rank=4, alpha=1, target_modules=["x"] * 1_000_000)},
    )

    async def send(number: int) -> None:
        kind = attack.draw.randrange(12)
        if kind == 11:
            commit = pb.CommitRoundRequest(survivors=["x"] * 1_300_000).SerializeToString()
            await caller.unary("CommitRound", number)(commit, timeout=60)
            return
        if kind > 5:
            await caller.opened(number, **hellos[kind - 6])
            return
        stream = await caller.opened(number)
        await caller.send(stream, frames(kind))
        while await stream.read() is not grpc.aio.EOF:
            continue
        raise await ending(stream)

    await attack.all(send, 4)
    await caller.close()


async def bombs(attack: Attack) -> None:
    """Messages of which a few hundred kB unfold to 128 MiB."""
    caller = Caller(attack.target, 2, **{"grpc.max_send_message_length": 1 << 30})
    zeros = bytes(128 << 20)

    async def throw(number: int) -> None:
        method = ("Describe", "CommitRound", "Progress", "EndBefore")[number % 4]
        await caller.unary(method, number)(zeros, compression=grpc.Compression.Gzip, timeout=60)

    await attack.all(throw, 4)
    await caller.close()


async def floods(attack: Attack) -> None:
    """Every call that is no session, as fast as it goes: unknown adapters, wrong hashes, rounds that nobody trains."""
    caller = Caller(attack.target, 4)
    junk = attack.draw.randbytes(1 << 18)

    async def put() -> AsyncIterator[bytes]:
        first = pb.AdapterChunk(sha256=hashlib.sha256(b"other").hexdigest(), size_bytes=len(junk) * 4, data=junk)
        yield first.SerializeToString()
        for _ in range(3):
            yield pb.AdapterChunk(data=junk).SerializeToString()

    async def call(number: int) -> None:
        draw = attack.draw
        round_id = pb.RoundId(run=f"run{draw.randrange(1 << 30)}", round=draw.randrange(1 << 32), attempt=1)
        kind = number % 7
        if kind == 0:
            await caller.unary("Describe", number)(b"", timeout=30)
        elif kind == 1:
            await caller.unary("Progress", number)(round_id.SerializeToString(), timeout=30)
        elif kind == 2:
            await caller.raw("PutAdapter", number)(put(), timeout=30)
        elif kind == 3:
            request = pb.GetAdapterRequest(sha256=draw.randbytes(32).hex()).SerializeToString()
            async for _ in caller.channel(number).unary_stream("/trunkline.v1.Trunk/GetAdapter")(request, timeout=30):
                continue
        elif kind == 4:
            await caller.unary("EndBefore", number)(round_id.SerializeToString(), timeout=30)
        else:
            commit = pb.CommitRoundRequest(
                round=round_id,
                base_sha256=attack.target.base_sha256,
                survivors=[f"client{draw.randrange(9)}"],
                partial=kind == 5,
            )
            await caller.unary("CommitRound", number)(commit.SerializeToString(), timeout=30)

    await attack.all(call, attack.count(48))
    await caller.close()


async def structures(attack: Attack) -> None:
    """Hellos of ever other LoRA structures, of the highest ranks, in ever other rounds, from several connections."""
    caller = Caller(attack.target, 4)
    names = list(attack.target.lora.target_modules)
    made = 0

    async def greet(number: int) -> None:
        nonlocal made
        made += 1
        if number % 2:
            key = pb.RoundId(run=f"squat{made}", round=1, attempt=1)
            stream = await caller.opened(number, round=key)
        else:
            lora = pb.Lora(rank=attack.target.hidden_size, alpha=1.0 + made, target_modules=names)
            stream = await caller.opened(number, lora=lora, seed=made)
        stream.cancel()

    await attack.all(greet, 4)
    await caller.close()


ATTACKS: dict[str, Callable[[Attack], Awaitable[None]]] = {
    "silent-streams": silent_streams,
    "silent-calls": silent_calls,
    "drip": drip,
    "unread": unread,
    "hoard": hoard,
    "oversized": oversized,
    "bombs": bombs,
    "floods": floods,
    "structures": structures,
    "garbage": sockets.garbage,
    "connections": sockets.connections,
}
