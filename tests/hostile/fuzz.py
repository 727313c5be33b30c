"""Hostile conversations against a trunk's servicer in this process, for volume: no network between, all else is real.

Every conversation must end well or by a named error, none may hang, and none may leave anything behind. Beside the
hostile ones go honest ones, whose answers must stay the bits that they were before.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from contract import trunk_pb2 as pb
from contract.errors import FrameError, error_named
from contract.wire import ERROR_KEY, chunk_data, parse_client_frame, parse_server_frame
from server_trunk.server import TrunkServer
from tests.hostile.conversations import FUZZED_RUN, Served
from tests.hostile.mutations import INTEGERS, STRINGS, honest_frames, hostile_frames

LIMIT_S = 60.0
"""A conversation whose frames are all there waits for nobody: it ends long before."""
_AT_ONCE = 6
_HONEST = 8
_MOST_LINE_BYTES = 1000
_PATIENCE = 1000  # looks whether an answer has come
_BACKWARD, _CHUNK = b"\x1a", b"\x3a"  # how such frames begin


class Aborted(Exception):  # noqa: N818
    """How a call was ended by the trunk."""

    def __init__(self, status: grpc.StatusCode, line: str, named: str) -> None:
        self.status, self.line, self.named = status, line, named
        super().__init__(f"{status.name} {named}: {line[:300]}")


class Spoken:
    """A call's other end: frames that are all there, and what was answered.

    A patient one sends a backward only once all before it was answered, as a client must.
    """

    def __init__(self, frames: Sequence[bytes], peer: str = "ipv4:127.0.0.1:1", *, patient: bool = True) -> None:
        self._frames = list(reversed(frames))
        self._peer = peer
        self._patient = patient
        self._owed = 0
        self.taken = 0
        self.answers: list[Any] = []

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def read(self) -> Any:
        await asyncio.sleep(0)
        if not self._frames:
            return grpc.aio.EOF
        for _ in range(_PATIENCE if self._patient and self._frames[-1][:1] == _BACKWARD else 0):
            if self._owed <= 0:
                break
            await asyncio.sleep(0.0005)
        self.taken += 1
        self._owed += self._frames[-1][:1] != _CHUNK
        return self._frames.pop()

    async def write(self, frame: Any) -> None:
        await asyncio.sleep(0)
        self._owed -= isinstance(frame, bytes) and frame[:1] != _CHUNK
        self.answers.append(frame)

    async def abort(self, status: grpc.StatusCode, line: str, trailing_metadata: Any = ()) -> None:
        raise Aborted(status, line, dict(trailing_metadata).get(ERROR_KEY, ""))


@dataclass
class Tally:
    """What came of all conversations; `faults` are one text each, with the seed that shows it."""

    frames: int = 0
    conversations: int = 0
    honest: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def fault_of(error: BaseException | None) -> str:
    """Why a call's end is not one that a trunk may give; empty for a good end or a named error."""
    if error is None:
        return ""
    if not isinstance(error, Aborted):
        told = "".join(traceback.format_exception(error)[-6:])
        return f"it ended with {type(error).__name__} and no named error: {told}"
    cls = error_named(error.named)
    if cls is None or cls.grpc_status != error.status.name:
        return f"{error} is no error of the tree"
    if error.status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        return f"{error}: the trunk's own fault"
    if not error.line or len(error.line.encode()) > _MOST_LINE_BYTES:
        return f"{error} has a line of {len(error.line.encode())} bytes"
    return ""


def answers_fault(frames: Sequence[bytes], answers: Sequence[bytes]) -> str:
    """Why the answers are not one each to the requests, in their order; for a conversation that ended well."""
    asked = []
    for frame in frames:
        if chunk_data(frame) is None and (kind := str(parse_client_frame(frame).WhichOneof("body"))) != "chunk":
            asked.append({"hello": "welcome", "read_adapter": "adapter"}.get(kind, kind))
            if kind == "close":
                break
    told = [kind for frame in answers if (kind := str(parse_server_frame(frame).WhichOneof("body"))) != "chunk"]
    return "" if told == asked else f"{asked} was asked and {told} answered"


def digest(answers: Sequence[bytes]) -> str:
    """Of what an honest client gets that follows from what it asked: tensors, norms, adapters."""
    found = hashlib.sha256()
    for frame in answers:
        if (data := chunk_data(frame)) is not None:
            found.update(data)
            continue
        parsed = parse_server_frame(frame)
        found.update(parsed.close.adapter_sha256.encode() + repr(parsed.backward.adapter_grad_norm).encode())
    return found.hexdigest()


class Fuzz:
    """Conversations from one seed against one server, which has started."""

    def __init__(self, server: TrunkServer, served: Served, seed: int) -> None:
        self._server = server
        self._servicer: Any = server._servicer
        self._served = served
        self._seed = seed
        self._expected: dict[int, str] = {}
        self.tally = Tally()
        self.patience_s = 10.0
        """How long what ended conversations leave to a thread may take."""

    async def run(self, frames: int, say: Callable[[str], None]) -> Tally:
        """At least so many frames that the trunk took; stops at the tenth fault."""
        for number in range(_HONEST):
            self._expected[number] = await self._honest(number)
        batch, told = 0, 0
        while self.tally.frames < frames and len(self.tally.faults) < 10:
            await self.batch(batch)
            batch += 1
            if self.tally.frames - told >= 20_000:
                told = self.tally.frames
                say(f"{told} frames, {self.tally.conversations} conversations, {len(self.tally.faults)} faults")
        return self.tally

    async def batch(self, number: int) -> None:
        """Some hostile conversations and calls at once, and an honest one beside them."""
        names = [f"{self._seed}/{number}/{one}" for one in range(_AT_ONCE)]
        honest = number % _HONEST
        came, *_ = await asyncio.gather(self._honest(honest), *(self._hostile(name) for name in names))
        self.tally.honest += 1
        if came != self._expected[honest]:
            self._fault(names[0], f"the honest conversation {honest} beside it got other bits")
        if left := await self._left():
            self._fault(names[0], f"after the batch {left}")

    async def _hostile(self, name: str) -> None:
        draw = random.Random(name)
        if draw.random() < 0.1:
            await self._single(name, draw)
            return
        frames = hostile_frames(draw, self._served)
        context = Spoken(frames, f"ipv4:127.0.0.1:{draw.randrange(4)}", patient=draw.random() < 0.9)
        error = await _ended(self._servicer.session(None, context))
        self.tally.conversations += 1
        self.tally.frames += context.taken
        self._end(error)
        if fault := fault_of(error) or (error is None and answers_fault(frames, context.answers)):
            self._fault(name, str(fault))

    async def _single(self, name: str, draw: random.Random) -> None:
        """One of the calls that are no session, with a request that is wrong."""
        context = Spoken([])
        kind = draw.choice(("put", "get", "commit", "progress", "end"))
        key = pb.RoundId(run=draw.choice((FUZZED_RUN, *STRINGS))[:2000], round=draw.choice(INTEGERS[:9]), attempt=1)
        sha256 = draw.choice((*self._served.bases, "0" * 64, *STRINGS))
        call: Any
        if kind == "put":
            call = self._servicer.put_adapter(_each(_chunks(draw, sha256)), context)
        elif kind == "get":
            call = self._servicer.get_adapter(pb.GetAdapterRequest(sha256=sha256), context)
        elif kind == "commit":
            survivors = draw.choice(
                (["client-0"], ["client-0", "client-1"], [], ["x"] * 2, list(map(str, range(20_000))))
            )
            request = pb.CommitRoundRequest(
                round=key, base_sha256=sha256, survivors=survivors, partial=draw.random() < 0.5
            )
            call = self._servicer.commit_round(request, context)
        elif kind == "progress":
            call = self._servicer.progress(key, context)
        else:
            call = self._servicer.end_before(key, context)
        error = await _ended(call)
        if kind == "end":  # who comes from here on is of an attempt that goes on
            await self._servicer.end_before(pb.RoundId(run=FUZZED_RUN), context)
        self.tally.frames += 1
        self._end(error)
        if fault := fault_of(error):
            self._fault(name, f"{kind}: {fault}")

    async def _honest(self, number: int) -> str:
        draw = random.Random(f"honest {number}")
        frames = honest_frames(draw, self._served)
        hello = parse_client_frame(frames[0])
        hello.hello.deterministic = True
        hello.hello.ClearField("round")
        if hello.hello.WhichOneof("start") is None:
            raise FrameError("an honest hello has a start")
        close = parse_client_frame(frames[-1])
        close.close.contribute = False
        frames[0], frames[-1] = hello.SerializeToString(), close.SerializeToString()
        context = Spoken(frames, "ipv4:127.0.0.1:9")
        error = await _ended(self._servicer.session(None, context))
        self.tally.frames += context.taken
        if error is not None:
            self._fault(f"honest {number}", f"an honest conversation ended: {error}")
        return digest(context.answers)

    def _end(self, error: BaseException | None) -> None:
        self.tally.ends[error.named if isinstance(error, Aborted) else "well" if error is None else "fault"] += 1

    def _fault(self, name: str, what: str) -> None:
        self.tally.faults.append(f"{name}: {what}")

    async def _left(self) -> str:
        """What the conversations that ended have left behind; what ends with a thread's work gets a moment."""
        ends_s = asyncio.get_running_loop().time() + self.patience_s
        while left := self._leftovers():
            if asyncio.get_running_loop().time() > ends_s:
                return left
            await asyncio.sleep(0.01)
        return ""

    def _leftovers(self) -> str:
        servicer = self._servicer
        counts = {
            "sessions": servicer._table.taken,
            "bytes of memory": servicer._memory.taken,
            "bytes of sample caches": servicer._cache_memory.taken,
            "bytes on disk": servicer._spill.taken,
            "seats": len(servicer._scheduler._seats),
            "adapters in memory": servicer._scheduler.residents.taken,
            "calls at the door": servicer._door.waiting,
        }
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


async def _ended(call: Any) -> BaseException | None:
    """How a call ended: None for well."""
    try:
        async with asyncio.timeout(LIMIT_S):
            await call
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (judged by who asked)
        return error
    return None


async def _each(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk


def _chunks(draw: random.Random, sha256: str) -> list[bytes]:
    data = draw.randbytes(draw.choice((0, 1, 300, 70_000)))
    claimed = draw.choice((sha256, hashlib.sha256(data).hexdigest()))
    first = pb.AdapterChunk(sha256=claimed, size_bytes=draw.choice((len(data), *INTEGERS)), data=data[:1000])
    rest = [pb.AdapterChunk(data=data[at : at + 4096]) for at in range(1000, len(data), 4096)]
    chunks = [chunk.SerializeToString() for chunk in (first, *rest)]
    if draw.random() < 0.3:
        chunks[draw.randrange(len(chunks))] = draw.randbytes(20)
    return chunks
