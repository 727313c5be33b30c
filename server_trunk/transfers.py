"""Whole adapters on their way in and out: a few at a time, every wait bounded, none in memory or on the event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors
from google.protobuf.message import DecodeError
from torch import Tensor

from contract import trunk_pb2 as pb
from contract.adapter import from_bytes
from contract.errors import (
    AgreementError,
    CapacityError,
    DeadlineError,
    FrameError,
    FrameTooLargeError,
    IntegrityError,
    ModelError,
    StorageError,
)
from contract.wire import CHUNK_BYTES, SLOWEST_BYTES_S
from server_trunk.contributions import Contributions
from server_trunk.stream import longest_s
from server_trunk.worker import Worker
from storage.artifacts import Receiving

MAX_ADAPTER_BYTES = 1 << 30
CHUNK_TIMEOUT_S = 30.0
_UPLOADS_AT_ONCE = 4  # each holds a chunk and an open file
_LOADS_AT_ONCE = 2  # each holds all of its adapter
_DOWNLOADS_AT_ONCE = 8  # each holds one chunk and an open file
_IN_LINE = 32  # uploads that wait for their turn, each with its first chunk, and as many downloads
_NAMES_BYTES = 1 << 16  # of a file that holds an adapter, beside its values and a line for each of its tensors
_NAME_BYTES = 512

Chunks = AsyncIterator[bytes]


class Turns:
    """A few at a time, a bounded number in line, and nobody for longer than his work may take."""

    def __init__(self, at_once: int, limit_s: float, what: str) -> None:
        """`limit_s` is for the wait and the work together."""
        self._turns = asyncio.Semaphore(at_once)
        self._limit_s = limit_s
        self._what = what
        self._in_line = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Callable[[int | None], None]]:
        """One turn; gives a function that is told how many bytes will move in it, None once none will any more.

        Raises CapacityError where the line is full, DeadlineError.
        """
        if self._in_line >= _IN_LINE:
            raise CapacityError(
                f"{self._in_line} others are in line at this trunk, which is its limit: try again later"
            )
        limit = asyncio.timeout(self._limit_s)
        loop = asyncio.get_running_loop()

        def moves(size_bytes: int | None) -> None:
            if not limit.expired():
                limit.reschedule(None if size_bytes is None else min(ends_s, loop.time() + longest_s(size_bytes)))

        try:
            async with limit:
                ends_s = loop.time() + self._limit_s
                self._in_line += 1
                try:
                    await self._turns.acquire()
                finally:
                    self._in_line -= 1
                try:
                    yield moves
                finally:
                    self._turns.release()
        except TimeoutError:
            raise DeadlineError(f"{self._what} in time: at least {SLOWEST_BYTES_S >> 10} KiB/s must move") from None


class AdapterTransfers:
    """The adapters of one trunk's state directory, for its servicer."""

    def __init__(self, contributions: Contributions, disk: Worker, limit_s: float) -> None:
        """No upload and no download takes longer than `limit_s`, its wait for a turn included."""
        self._contributions = contributions
        self._disk = disk
        self._uploads = Turns(_UPLOADS_AT_ONCE, limit_s, "the adapter did not come")
        self._downloads = Turns(_DOWNLOADS_AT_ONCE, limit_s, "the adapter was not taken")
        self._loads = asyncio.Semaphore(_LOADS_AT_ONCE)

    async def receive(self, first: bytes | None, chunks: Chunks) -> str:
        """Store an uploaded adapter, whose `first` serialised chunk has come; its SHA-256.

        Raises FrameError, FrameTooLargeError, IntegrityError, ModelError, CapacityError, DeadlineError, StorageError.
        """
        if first is None:
            raise FrameError("no adapter came; its first chunk must name sha256 and size_bytes")
        chunk = _parsed(first)
        sha256, size_bytes = chunk.sha256, chunk.size_bytes
        if size_bytes > MAX_ADAPTER_BYTES:
            raise FrameTooLargeError(f"the adapter has {size_bytes} bytes; the limit is {MAX_ADAPTER_BYTES}")
        async with self._uploads.turn() as moves:
            moves(size_bytes)
            file = await self._disk.acquire(self._contributions.adapters.begin, Receiving.abandon)
            try:
                came = 0
                while True:
                    came += len(chunk.data)
                    if not chunk.data:
                        raise FrameError(f"adapter: an empty chunk at byte {came} of {size_bytes}")
                    if came > size_bytes:
                        raise FrameTooLargeError(f"adapter: {came} bytes came; its header announced {size_bytes}")
                    await self._disk.run(file.write, chunk.data)
                    if (data := await _next(chunks)) is None:
                        break
                    chunk = _parsed(data)
                if came < size_bytes:
                    raise FrameError(f"adapter: truncated at byte {came} of {size_bytes}")
                moves(None)  # what has come is stored, whatever is left of the time
                return await self._disk.run(_kept, file, sha256)
            finally:
                self._disk.submit(file.abandon)

    async def send(self, sha256: str, write: Callable[[pb.AdapterChunk], Awaitable[None]]) -> None:
        """`write` an adapter chunk by chunk, once all of it was found whole on the disk.

        Raises FrameError, SessionError, IntegrityError, CapacityError, DeadlineError, StorageError.
        """
        self._contributions.require_adapter(sha256)
        async with self._downloads.turn() as moves:
            file, size_bytes = await self._disk.acquire(self._open_whole, lambda opened: opened[0].close(), sha256)
            moves(size_bytes)
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
    async def loaded(self, sha256: str, values: int, tensors: int) -> AsyncIterator[Mapping[str, Tensor]]:
        """A stored adapter's tensors; they keep others waiting until they are given up at the end of the block.

        Raises AgreementError, before any of it is read, for one larger than `values` float32 in so many `tensors`
        make; FrameError, SessionError, IntegrityError, ModelError, StorageError.
        """
        self._contributions.require_adapter(sha256)
        async with self._loads:
            yield await self._disk.run(self._load, sha256, 4 * values + _NAME_BYTES * tensors + _NAMES_BYTES)

    def _load(self, sha256: str, most_bytes: int) -> Mapping[str, Tensor]:
        path = self._contributions.adapters.path(sha256)
        try:
            size_bytes = path.stat().st_size
        except OSError as error:
            raise StorageError(f"cannot read artifact {path}: {error.strerror}") from error
        if size_bytes > most_bytes:
            raise AgreementError(
                f"adapter {sha256} has {size_bytes} bytes; one of the session's LoRA has {most_bytes} at most"
            )
        self._contributions.adapters.use(sha256)
        return from_bytes(self._contributions.adapters.get(sha256))


def _kept(file: Receiving, sha256: str) -> str:
    """Store what came under its hash. Raises IntegrityError, ModelError for what is no adapter, StorageError."""
    if file.sha256 != sha256:
        raise IntegrityError(f"the adapter hashes to {file.sha256}; its first chunk says {sha256[:80]!r}")
    _require_adapter(file.flushed())
    return file.keep()


def _require_adapter(path: Path) -> None:
    """Raise ModelError unless the file is float32 safetensors, without reading its tensors."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in sorted(file.keys())}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the adapter's bytes are not safetensors: {line}") from error
    for name, dtype in dtypes.items():
        if dtype != "F32":
            raise ModelError(f"{name[:200]} is {dtype}; an adapter is stored as float32")


@asynccontextmanager
async def _patience(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(CHUNK_TIMEOUT_S):
            yield
    except TimeoutError:
        raise DeadlineError(f"{what} for {CHUNK_TIMEOUT_S:g} s") from None


async def _next(chunks: Chunks) -> bytes | None:
    async with _patience("no chunk of the adapter came"):
        return await anext(chunks, None)


def _parsed(data: bytes) -> pb.AdapterChunk:
    try:
        return pb.AdapterChunk.FromString(data)
    except DecodeError:
        raise FrameError(f"{len(data)} bytes are not an AdapterChunk") from None
