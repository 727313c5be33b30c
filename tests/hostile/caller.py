"""Raw calls of a trunk, for clients that keep no rules. No torch, so that a process of them starts at once."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from contract import trunk_pb2 as pb
from contract.wire import ERROR_KEY, PROTOCOL, SESSION_METHOD, chunk_frames

OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
]
_SERVICE = "/trunkline.v1.Trunk/"
_OWN_FAULTS = ("INTERNAL", "UNKNOWN")
_STATUS_LOST = "Internal error from Core"  # what this client says of a call that ended while it was still writing


@dataclass(frozen=True)
class Target:
    """A trunk, as a hostile client knows it: whatever Describe tells, and one adapter that it holds.

    `keys` is the folder of who issues certificates for it, "" where it takes whoever comes.
    """

    address: str
    hidden_size: int
    max_tokens: int
    base_sha256: str
    lora: pb.Lora
    model: pb.ModelAgreement
    keys: str = ""

    def write(self, path: Path) -> None:
        told = {
            "address": self.address,
            "hidden_size": self.hidden_size,
            "max_tokens": self.max_tokens,
            "base_sha256": self.base_sha256,
            "lora": self.lora.SerializeToString().hex(),
            "model": self.model.SerializeToString().hex(),
            "keys": self.keys,
        }
        path.write_text(json.dumps(told))

    @classmethod
    def read(cls, path: Path) -> Target:
        told = json.loads(path.read_text())
        lora, model = (bytes.fromhex(told.pop(name)) for name in ("lora", "model"))
        return cls(**told, lora=pb.Lora.FromString(lora), model=pb.ModelAgreement.FromString(model))

    def hello(self, **fields: Any) -> pb.Hello:
        plain: dict[str, Any] = {
            "protocol": PROTOCOL,
            "client_id": "hostile",
            "model": self.model,
            "lora": self.lora,
            "trainable": "AB",
            "codecs": ["identity"],
        }
        if "seed" not in fields:
            plain["adapter_sha256"] = self.base_sha256
        return pb.Hello(**{**plain, **fields})

    def forward(self, microbatch: int, rows: int, length: int, data: bytes | None = None, **fields: Any) -> list[bytes]:
        """The frames of a forward of `rows` times `length` tokens."""
        size_bytes = 4 * rows * length * self.hidden_size
        header = pb.TensorHeader(
            dtype="float32", shape=[rows, length, self.hidden_size], size_bytes=size_bytes, codec="identity"
        )
        forward = pb.Forward(
            **{"microbatch": microbatch, "hidden": header, "reply_codec": "identity", "need_grad": True, **fields}
        )
        frame = pb.ClientFrame(forward=forward).SerializeToString()
        return [frame, *chunk_frames(memoryview(bytes(size_bytes) if data is None else data))]


@dataclass
class Outcomes:
    """How calls ended, by name; and those that no trunk may end so."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, end: str, fault: str = "") -> None:
        self.ends[end] += 1
        if fault and len(self.faults) < 20:
            self.faults.append(fault)

    async def of(self, call: Any, what: str) -> None:
        """Note how `call`, a coroutine, ended; a bound of our own is an end too."""
        try:
            await call
        except grpc.aio.AioRpcError as error:
            if error.details() == _STATUS_LOST:
                self.add("over")
            else:
                self.note(error.code(), error.details(), error.trailing_metadata(), what)
        except (asyncio.InvalidStateError, grpc.aio.UsageError, asyncio.CancelledError, EOFError):
            self.add("over")
        else:
            self.add("answered")

    def note(self, code: grpc.StatusCode, details: str | None, metadata: Any, what: str) -> None:
        """Note a call that the trunk, or gRPC for it, ended with an error."""
        named = next((value for key, value in metadata or () if key == ERROR_KEY), "")
        self.add(str(named) or code.name, f"{what}: {code.name}: {details}" if code.name in _OWN_FAULTS else "")


class Caller:
    """Some connections to the target."""

    def __init__(self, target: Target, connections: int = 1, **options: Any) -> None:
        self.target = target
        self.channels = [
            grpc.aio.insecure_channel(target.address, [*OPTIONS, *options.items()]) for _ in range(connections)
        ]

    def channel(self, number: int) -> Any:
        return self.channels[number % len(self.channels)]

    def session(self, number: int = 0) -> Any:
        return self.channel(number).stream_stream(SESSION_METHOD)()

    async def opened(self, number: int = 0, **hello: Any) -> Any:
        """A session that the trunk has welcomed."""
        stream = self.session(number)
        await stream.write(pb.ClientFrame(hello=self.target.hello(**hello)).SerializeToString())
        if await stream.read() is grpc.aio.EOF:
            raise await ending(stream)
        return stream

    @staticmethod
    async def send(stream: Any, frames: Sequence[bytes]) -> None:
        """Raises how the trunk ended the stream, if it did so meanwhile: gRPC itself speaks of its own core then."""
        try:
            for frame in frames:
                await stream.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await ending(stream) from None

    def raw(self, method: str, number: int = 0) -> Any:
        """A call whose requests are a stream of bytes, whatever the method takes."""
        return self.channel(number).stream_unary(_SERVICE + method)

    def unary(self, method: str, number: int = 0) -> Any:
        return self.channel(number).unary_unary(_SERVICE + method)

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()


async def ending(stream: Any) -> grpc.aio.AioRpcError:
    """How the trunk ended a stream."""
    trailing = await stream.trailing_metadata() or grpc.aio.Metadata()
    return grpc.aio.AioRpcError(await stream.code(), grpc.aio.Metadata(), trailing, await stream.details())


def drawing(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{name}")
