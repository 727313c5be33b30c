"""One client's stream of frames: every wait bounded, every byte counted, tensors in chunks."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from contract import trunk_pb2 as pb
from contract.codec import Assembler
from contract.errors import DeadlineError, FrameError
from contract.failpoint import failpoint
from contract.wire import chunk_data, chunk_frames, parse_client_frame


class FrameStream:
    """Serialised frames in and out of a gRPC call whose (de)serialisers leave bytes alone."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], idle_timeout_s: float) -> None:
        self._context = context
        self._idle_timeout_s = idle_timeout_s
        self.received_bytes = 0
        self.sent_bytes = 0
        self.on_this_machine = context.peer().startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:"))
        """Whether the client's address is a loopback one, so that it may compute on the same cores."""

    async def read(self, timeout_s: float | None = None) -> pb.ClientFrame | None:
        """The next frame that is not a chunk, None when the client has hung up.

        Raises FrameError for a chunk that no header announced, DeadlineError after `timeout_s`, or the idle time.
        """
        frame = await self._read(self._idle_timeout_s if timeout_s is None else timeout_s)
        if frame is None:
            return None
        if chunk_data(frame) is not None:
            raise FrameError("a chunk came that no header announced, or more of them than announced")
        parsed = parse_client_frame(frame)
        failpoint(f"serve.{parsed.WhichOneof('body')}")
        return parsed

    async def read_data(self, size_bytes: int, what: str) -> memoryview:
        """The `size_bytes` of data that follow their header in chunks, writable.

        Raises FrameError when another frame or the end comes first, FrameTooLargeError when more comes.
        """
        assembler = Assembler(size_bytes, what)
        while not assembler.complete:
            frame = await self._read(self._idle_timeout_s)
            if frame is None:
                break
            data: memoryview | bytes | None = chunk_data(frame)
            if data is None:
                parsed = parse_client_frame(frame)
                if parsed.WhichOneof("body") != "chunk":
                    break
                data = parsed.chunk.data
            assembler.add(data)
        return assembler.data()

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
