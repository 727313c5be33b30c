"""One client's stream of frames: every wait bounded, every byte counted, tensors in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import grpc

from contract import trunk_pb2 as pb
from contract.codec import Assembler
from contract.errors import DeadlineError, FrameError, FrameTooLargeError
from contract.failpoint import failpoint
from contract.wire import SLOWEST_BYTES_S, chunk_data, chunk_frames, parse_client_frame
from server_trunk.memory import Spilled
from server_trunk.worker import Worker

_SLACK_S = 30.0
_HELLO_BYTES = 1 << 20  # some ten thousand LoRA targets by their full names


def longest_s(size_bytes: int) -> float:
    """How long announced data may take to come, or to go."""
    return _SLACK_S + size_bytes / SLOWEST_BYTES_S


class FrameStream:
    """Serialised frames in and out of a gRPC call whose (de)serialisers leave bytes alone."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], idle_timeout_s: float, frame_bytes: int) -> None:
        """`frame_bytes` is the most that a frame may have which is no hello and no chunk: it is parsed whole."""
        self._context = context
        self._idle_timeout_s = idle_timeout_s
        self._frame_bytes = frame_bytes
        self.peer = context.peer()
        self.received_bytes = 0
        self.sent_bytes = 0
        self.on_this_machine = self.peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:"))
        """Whether the client's address is a loopback one, so that it may compute on the same cores."""

    async def read_hello(self, timeout_s: float) -> pb.ClientFrame | None:
        """As `read`, for the first frame, within `timeout_s`."""
        return await self._read_frame(timeout_s, _HELLO_BYTES)

    async def read(self) -> pb.ClientFrame | None:
        """The next frame that is not a chunk, None when the client has hung up.

        Raises FrameError for a chunk that no header announced, FrameTooLargeError, DeadlineError after the idle time.
        """
        return await self._read_frame(self._idle_timeout_s, self._frame_bytes)

    async def _read_frame(self, timeout_s: float, most_bytes: int) -> pb.ClientFrame | None:
        frame = await self._read(timeout_s)
        if frame is None:
            return None
        if chunk_data(frame) is not None:
            raise FrameError("a chunk came that no header announced, or more of them than announced")
        if len(frame) > most_bytes:
            raise FrameTooLargeError(f"a frame of {len(frame)} bytes came; one that is no chunk may have {most_bytes}")
        parsed = parse_client_frame(frame)
        failpoint(f"serve.{parsed.WhichOneof('body')}")
        return parsed

    async def read_data(self, size_bytes: int, what: str) -> memoryview:
        """The `size_bytes` of data that follow their header in chunks, writable.

        Raises FrameError when another frame or the end comes first, FrameTooLargeError when more comes, DeadlineError
        when it takes too long.
        """
        assembler = Assembler(size_bytes, what)
        async with self.in_time(size_bytes, what, "come"):
            while not assembler.complete:
                data = await self._read_chunk()
                if data is None:
                    break
                assembler.add(data)
        return assembler.data()

    async def put_data(self, size_bytes: int, what: str, kept: Spilled, disk: Worker) -> None:
        """As `read_data`, to the disk chunk by chunk: whoever sends it slowly holds no memory. Raises StorageError."""
        came = 0
        async with self.in_time(size_bytes, what, "come"):
            while came < size_bytes:
                data = await self._read_chunk()
                if data is None:
                    raise FrameError(f"{what}: truncated at byte {came} of {size_bytes}")
                if not data:
                    raise FrameError(f"{what}: an empty chunk at byte {came} of {size_bytes}")
                came += len(data)
                if came > size_bytes:
                    raise FrameTooLargeError(f"{what}: {came} bytes came; its header announced {size_bytes}")
                await disk.run(kept.append, data)

    async def _read_chunk(self) -> memoryview | bytes | None:
        """The data of the next chunk; None when something else comes, or the end."""
        frame = await self._read(self._idle_timeout_s)
        if frame is None:
            return None
        data = chunk_data(frame)
        if data is not None:
            return data
        parsed = parse_client_frame(frame)
        return parsed.chunk.data if parsed.WhichOneof("body") == "chunk" else None

    @asynccontextmanager
    async def in_time(self, size_bytes: int, what: str, must: Literal["come", "go"]) -> AsyncIterator[None]:
        """All of `what` comes, or goes, within the block. Raises DeadlineError where that takes too long.

        What a client has begun to send is there; but it takes nothing while it computes, for the idle time at most.
        """
        limit_s = longest_s(size_bytes) + (self._idle_timeout_s if must == "go" else 0.0)
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise DeadlineError(f"{what}: its {size_bytes} bytes did not {must} within {limit_s:.0f} s") from None

    async def write(self, frame: pb.ServerFrame) -> None:
        kind = frame.WhichOneof("body")
        failpoint(f"serve.{kind}.reply")
        await self._write(frame.SerializeToString())
        failpoint(f"serve.{kind}.replied")

    async def write_data(self, data: memoryview) -> None:
        """`data` in chunk frames, after the frame that announced it."""
        for frame in chunk_frames(data):
            await self._write(frame)

    async def _read(self, timeout_s: float) -> bytes | None:
        try:
            async with asyncio.timeout(timeout_s):
                frame = await self._context.read()
        except TimeoutError:
            raise DeadlineError(f"no frame came for {timeout_s:g} s, so the session is closed") from None
        if not isinstance(frame, bytes):  # grpc.aio.EOF
            return None
        self.received_bytes += len(frame)
        return frame

    async def _write(self, frame: bytes) -> None:
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                await self._context.write(frame)
        except TimeoutError:
            raise DeadlineError(
                f"the client took no frame for {self._idle_timeout_s:g} s, so the session is closed"
            ) from None
        self.sent_bytes += len(frame)
