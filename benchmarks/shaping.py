"""A slow link between two processes of one machine: a TCP proxy that delays and paces what passes, in both directions.

Kernel shaping needs rights that are not available everywhere. What is modelled, for each direction apart: a rate at
which bytes are serialised, a queue of bounded size before it (first in, first out; when it is full the sender waits, as
by TCP's flow control, and nothing is lost), and a constant delay after it. What is not: TCP's own congestion control,
loss, jitter, and the headers of TCP and IP, which would add 3 % to a full frame of 1500 bytes.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SMALLEST_SEGMENT = 1500
SEGMENT_S = 0.002
"""A link's segments last so long, so that pacing is fine and the proxy has hundreds of them a second, not thousands."""
SMALLEST_QUEUE = 65536
_SOCKET_BYTES = 65536
_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """Bits a second of each direction, and the round trip's seconds, half of them each way."""

    rate_bps: float
    rtt_s: float

    @property
    def segment_bytes(self) -> int:
        return max(SMALLEST_SEGMENT, int(self.rate_bps / 8 * SEGMENT_S))

    @property
    def queue_bytes(self) -> int:
        """A router's buffer by the old rule: what one round trip carries, and some segments at least."""
        return max(SMALLEST_QUEUE, int(self.rate_bps / 8 * self.rtt_s))


class Pipe:
    """One direction's schedule. Knows no sockets and no clock: every call is told the time, in seconds, never less."""

    def __init__(self, rate_bps: float, delay_s: float, queue_bytes: int) -> None:
        self.passed_bytes = 0
        self._rate_bps = rate_bps
        self._delay_s = delay_s
        self._queue_bytes = queue_bytes
        self._busy_until_s = float("-inf")

    def wait_s(self, now_s: float, size_bytes: int) -> float:
        """How long until `size_bytes` fit into the queue; what is larger than the queue waits until it is empty."""
        room_bytes = max(self._queue_bytes - size_bytes, 0)
        return max(0.0, self._busy_until_s - now_s - room_bytes * 8 / self._rate_bps)

    def send(self, now_s: float, size_bytes: int) -> float:
        """When the last of `size_bytes`, which enter the queue now, comes out at the other end."""
        self._busy_until_s = max(self._busy_until_s, now_s) + size_bytes * 8 / self._rate_bps
        self.passed_bytes += size_bytes
        return self._busy_until_s + self._delay_s


@dataclass(frozen=True, slots=True)
class Passed:
    """Bytes that went through a link so far."""

    up_bytes: int
    down_bytes: int

    def __sub__(self, earlier: Passed) -> Passed:
        return Passed(self.up_bytes - earlier.up_bytes, self.down_bytes - earlier.down_bytes)


@dataclass(slots=True)
class _Flight:
    """What is under way in one direction of one connection: (when it is due, data); b"" is the sender's end."""

    segments: deque[tuple[float, bytes]] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Link:
    """A proxy on a free loopback port that passes every connection on to `target` (HOST:PORT) over one shaped link.

    All its connections share the link. `address` is where clients connect.
    """

    def __init__(self, target: str, spec: LinkSpec) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._spec = spec
        delay_s = spec.rtt_s / 2
        self._up, self._down = (Pipe(spec.rate_bps, delay_s, spec.queue_bytes) for _ in range(2))
        self.address = ""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def passed(self) -> Passed:
        return Passed(self._up.passed_bytes, self._down.passed_bytes)

    async def start(self) -> None:
        listening = socket.socket()
        # A kernel buffer beside the modelled queue would take in megabytes before the sender felt the link.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        listening.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._accept, sock=listening, limit=_SOCKET_BYTES)
        self.address = f"127.0.0.1:{listening.getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._pass_on(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connecting = asyncio.open_connection(*self._target, limit=_SOCKET_BYTES)
        try:
            far_reader, far_writer = await asyncio.wait_for(connecting, _CONNECT_TIMEOUT_S)
        except (OSError, TimeoutError):
            writer.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as group:
                for pipe, source, sink in ((self._up, reader, far_writer), (self._down, far_reader, writer)):
                    flight = _Flight()
                    group.create_task(self._take(pipe, source, flight))
                    group.create_task(self._deliver(sink, flight))
        except* OSError:
            pass  # one end has gone: both are dropped below, which is what its peer would see
        finally:
            for each in (writer, far_writer):
                each.transport.abort()

    async def _take(self, pipe: Pipe, source: asyncio.StreamReader, flight: _Flight) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            data = await source.read(self._spec.segment_bytes)
            while (wait_s := pipe.wait_s(clock(), len(data))) > 0:
                await asyncio.sleep(wait_s)
            flight.segments.append((pipe.send(clock(), len(data)), data))
            flight.changed.set()
            if not data:
                return

    async def _deliver(self, sink: asyncio.StreamWriter, flight: _Flight) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            while not flight.segments:
                flight.changed.clear()
                await flight.changed.wait()
            due_s, data = flight.segments.popleft()
            if (early_s := due_s - clock()) > 0:
                await asyncio.sleep(early_s)
            if not data:
                sink.write_eof()
                return
            sink.write(data)
            await sink.drain()


@contextmanager
def links(targets: dict[str, str], spec: LinkSpec) -> Iterator[dict[str, Link]]:
    """A link to each of `targets` by name, served by a thread of this process until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="shaping", daemon=True)
    thread.start()
    made = {name: Link(target, spec) for name, target in targets.items()}

    def run(coroutine: Callable[[], Any]) -> None:
        done: Future[None] = asyncio.run_coroutine_threadsafe(coroutine(), loop)
        done.result(_CONNECT_TIMEOUT_S)

    try:
        for link in made.values():
            run(link.start)
        yield made
    finally:
        for link in made.values():
            run(link.stop)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CONNECT_TIMEOUT_S)
