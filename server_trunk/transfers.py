"""Whole adapters on their way in and out: a few at a time, every wait bounded, none read on the event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import BinaryIO

from torch import Tensor

from contract import trunk_pb2 as pb
from contract.adapter import from_bytes, sha256_hex
from contract.codec import Assembler
from contract.errors import DeadlineError, FrameError, FrameTooLargeError, IntegrityError, StorageError
from contract.wire import CHUNK_BYTES
from server_trunk.contributions import Contributions
from server_trunk.worker import Worker

MAX_ADAPTER_BYTES = 1 << 30
CHUNK_TIMEOUT_S = 30.0
_UPLOADS_AT_ONCE = 2  # each holds all of its adapter
_LOADS_AT_ONCE = 2  # as does each of these
_DOWNLOADS_AT_ONCE = 8  # each holds one chunk and an open file


class AdapterTransfers:
    """The adapters of one trunk's state directory, for its servicer."""

    def __init__(self, contributions: Contributions, disk: Worker, limit_s: float) -> None:
        """No upload and no download takes longer than `limit_s`, its wait for a turn included."""
        self._contributions = contributions
        self._disk = disk
        self._limit_s = limit_s
        self._uploads = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        self._loads = asyncio.Semaphore(_LOADS_AT_ONCE)
        self._downloads = asyncio.Semaphore(_DOWNLOADS_AT_ONCE)

    async def receive(self, chunks: AsyncIterator[pb.AdapterChunk]) -> str:
        """Store an uploaded adapter; its SHA-256. Its bytes keep others waiting until they are on the disk.

        Raises FrameError, FrameTooLargeError, IntegrityError, ModelError, DeadlineError, StorageError.
        """
        async with self._turn(self._uploads, "the adapter did not come") as limit:
            sha256, data = await _received(chunks)
            limit.reschedule(None)  # what has come is stored, whatever is left of the time
            return await self._disk.run(self._store, sha256, data)

    def _store(self, sha256: str, data: bytes) -> str:
        found = sha256_hex(data)
        if found != sha256:
            raise IntegrityError(f"the adapter hashes to {found}; its first chunk says {sha256[:80]!r}")
        from_bytes(data)  # refuses what is no adapter
        return self._contributions.adapters.put(data)

    async def send(self, sha256: str, write: Callable[[pb.AdapterChunk], Awaitable[None]]) -> None:
        """`write` an adapter chunk by chunk, once all of it was found whole on the disk.

        Raises FrameError, SessionError, IntegrityError, DeadlineError, StorageError.
        """
        self._contributions.require_adapter(sha256)
        async with self._turn(self._downloads, "the adapter was not taken"):
            file, size_bytes = await self._disk.acquire(self._open_whole, lambda opened: opened[0].close(), sha256)
            try:
                chunk = pb.AdapterChunk(sha256=sha256, size_bytes=size_bytes)
                while data := await self._disk.run(file.read, CHUNK_BYTES):
                    chunk.data = data
                    async with _patience("the client took no chunk of the adapter"):
                        await write(chunk)
                    chunk = pb.AdapterChunk()
            except OSError as error:
                raise StorageError(f"cannot read artifact {sha256}: {error.strerror}") from error
            finally:
                self._disk.submit(file.close)

    def _open_whole(self, sha256: str) -> tuple[BinaryIO, int]:
        """The file, at its start, and its size. Raises IntegrityError when it does not hash to its name."""
        path = self._contributions.adapters.path(sha256)
        try:
            file = path.open("rb")
            try:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != sha256:
                    raise IntegrityError(f"artifact {path} hashes to {found}: it was changed or cut short")
                size_bytes = file.tell()
                file.seek(0)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise StorageError(f"cannot read artifact {path}: {error.strerror}") from error
        return file, size_bytes

    @asynccontextmanager
    async def loaded(self, sha256: str) -> AsyncIterator[Mapping[str, Tensor]]:
        """A stored adapter's tensors; they keep others waiting until they are given up at the end of the block.

        Raises FrameError, SessionError, IntegrityError, ModelError, StorageError.
        """
        self._contributions.require_adapter(sha256)
        async with self._loads:
            yield await self._disk.run(self._load, sha256)

    def _load(self, sha256: str) -> Mapping[str, Tensor]:
        return from_bytes(self._contributions.adapters.get(sha256))

    @asynccontextmanager
    async def _turn(self, turns: asyncio.Semaphore, what: str) -> AsyncIterator[asyncio.Timeout]:
        try:
            async with asyncio.timeout(self._limit_s) as limit, turns:
                yield limit
        except TimeoutError:
            raise DeadlineError(f"{what} within {self._limit_s:g} s") from None


@asynccontextmanager
async def _patience(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(CHUNK_TIMEOUT_S):
            yield
    except TimeoutError:
        raise DeadlineError(f"{what} for {CHUNK_TIMEOUT_S:g} s") from None


async def _next(chunks: AsyncIterator[pb.AdapterChunk]) -> pb.AdapterChunk | None:
    async with _patience("no chunk of the adapter came"):
        return await anext(chunks, None)


async def _received(chunks: AsyncIterator[pb.AdapterChunk]) -> tuple[str, bytes]:
    """(claimed SHA-256, bytes) of an uploaded adapter, its size checked before memory is taken."""
    assembler: Assembler | None = None
    sha256 = ""
    while (chunk := await _next(chunks)) is not None:
        if assembler is None:
            sha256 = chunk.sha256
            if chunk.size_bytes > MAX_ADAPTER_BYTES:
                raise FrameTooLargeError(f"the adapter has {chunk.size_bytes} bytes; the limit is {MAX_ADAPTER_BYTES}")
            assembler = Assembler(chunk.size_bytes, "adapter")
        assembler.add(chunk.data)
    if assembler is None:
        raise FrameError("no adapter came; its first chunk must name sha256 and size_bytes")
    return sha256, bytes(assembler.data())
