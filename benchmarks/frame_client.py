"""Sessions with a trunk that cost their process next to nothing: raw frames from one event loop, no model behind them.

Every session sends the same hidden states and the same gradient, and looks at no more of an answer than its kind and
its size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import torch

from benchmarks.workload import Workload
from clients.split_model import trunk_spec
from contract import codec
from contract import trunk_pb2 as pb
from contract.adapter import adapter_shapes, resolve_lora, split_adapter
from contract.architecture import probe
from contract.errors import TrunklineError
from contract.records import CutLayers
from contract.trunk_pb2_grpc import TrunkStub
from contract.wire import CHUNK_BYTES, PROTOCOL, SESSION_METHOD, chunk_data, chunk_frames, lora_to_wire, message_limits
from contract.wire import parse_server_frame as parsed

CUT = CutLayers(1, 1)
SESSIONS_PER_CHANNEL = 32
_CODEC = "identity"


class Payload:
    """What every session of a workload says, made once. `adapter_bytes` is the size of one trunk half in float32."""

    def __init__(self, model_dir: Path, workload: Workload) -> None:
        spec, found = resolve_lora(model_dir, workload.lora()), probe(model_dir)
        shapes = split_adapter(adapter_shapes(model_dir, spec), found, CUT)[1]
        self.adapter_bytes = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
        self.lora = lora_to_wire(trunk_spec(spec, found, CUT))
        generator = torch.Generator().manual_seed(workload.seed)
        hidden_BTD = torch.randn(workload.batch_size, workload.tokens, workload.hidden_size, generator=generator)
        self.header, data = codec.encode(hidden_BTD, _CODEC)
        self.chunks = [bytes(frame) for frame in chunk_frames(data, CHUNK_BYTES)]


class FrameClient:
    """Channels to one trunk, and sessions on them. Belongs to one event loop."""

    def __init__(self, address: str, payload: Payload) -> None:
        self._address = address
        self._payload = payload
        self._channels: list[
            Any
        ] = []  # the types that gRPC has for its asyncio half ask for arguments that it does not
        self._sessions = 0
        self._model = pb.ModelAgreement()

    async def start(self) -> None:
        self._model.CopyFrom((await self.describe()).model)

    async def describe(self) -> pb.TrunkDescription:
        """What the trunk says of itself. Raises grpc.aio.AioRpcError when it says nothing."""
        told: pb.TrunkDescription = await TrunkStub(self._channel(0)).Describe(pb.DescribeRequest(), timeout=30.0)
        return told

    async def open(self) -> FrameSession:
        """A new session, welcomed. Raises grpc.aio.AioRpcError as the trunk refuses it."""
        number, self._sessions = self._sessions, self._sessions + 1
        call = self._channel(number // SESSIONS_PER_CHANNEL).stream_stream(SESSION_METHOD)()
        session = FrameSession(call, self._payload)
        hello = pb.Hello(protocol=PROTOCOL, model=self._model, lora=self._payload.lora, trainable="AB", seed=number)
        hello.codecs.append(_CODEC)
        await session.send(pb.ClientFrame(hello=hello))
        await session.receive("welcome")
        return session

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def _channel(self, index: int) -> Any:
        while len(self._channels) <= index:
            # A number of its own, or channels with equal settings would share one connection.
            settings = [*message_limits(), ("grpc.enable_http_proxy", 0), ("trunkline.number", len(self._channels))]
            self._channels.append(grpc.aio.insecure_channel(self._address, options=settings))
        return self._channels[index]


class FrameSession:
    """One client. Every method raises grpc.aio.AioRpcError as the trunk ends the session."""

    def __init__(self, call: Any, payload: Payload) -> None:
        self._call = call
        self._payload = payload
        self._microbatch = 0
        self.longest_s = 0.0
        """The longest that an answer of its steps was waited for, from before its request was sent."""

    async def step(self) -> None:
        """Forward, backward and an optimiser step, each waited for."""
        with self._waited():
            await self.ask_forward()
            await self.receive("forward")
        backward = pb.Backward(microbatch=self._microbatch, grad=self._payload.header, want_input_grad=True)
        backward.reply_codec = _CODEC
        with self._waited():
            await self.send(pb.ClientFrame(backward=backward))
            await self._send_tensor()
            await self.receive("backward")
        with self._waited():
            await self.send(pb.ClientFrame(step=pb.Step(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, grad_scale=1.0)))
            await self.receive("step")

    async def ask_forward(self, *, whole: bool = True) -> None:
        """Sends one microbatch, or only announces it."""
        self._microbatch += 1
        forward = pb.Forward(microbatch=self._microbatch, hidden=self._payload.header, training=True, need_grad=True)
        forward.reply_codec = _CODEC
        await self.send(pb.ClientFrame(forward=forward))
        if whole:
            await self._send_tensor()

    async def send(self, frame: pb.ClientFrame) -> None:
        await self._call.write(frame.SerializeToString())

    async def receive(self, kind: str) -> None:
        """The next answer with the tensor that it announces. Raises TrunklineError when it is another's."""
        frame: Any = parsed(await self._next())
        if frame.WhichOneof("body") != kind:
            raise TrunklineError(f"the trunk sent {frame.WhichOneof('body')!r} where {kind!r} was due")
        body = getattr(frame, kind)
        left = {"forward": "hidden", "backward": "grad"}.get(kind)
        left_bytes = getattr(body, left).size_bytes if left else 0
        while left_bytes > 0:
            data = chunk_data(await self._next())
            if data is None:
                raise TrunklineError("the trunk sent another frame where a chunk was due")
            left_bytes -= len(data)

    def hang_up(self) -> None:
        self._call.cancel()

    @contextmanager
    def _waited(self) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.longest_s = max(self.longest_s, time.perf_counter() - began_s)

    async def _send_tensor(self) -> None:
        for chunk in self._payload.chunks:
            await self._call.write(chunk)

    async def _next(self) -> bytes:
        frame = await self._call.read()
        if not isinstance(frame, bytes):  # grpc.aio.EOF
            raise TrunklineError(f"the trunk ended the session: {await self._call.details()}")
        return frame
