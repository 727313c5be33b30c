"""A client of the trunk that speaks raw gRPC, so that the server is tested without the SDK."""

from __future__ import annotations

import queue
from typing import Any

import grpc
from torch import Tensor

from contract import codec
from contract import trunk_pb2 as pb
from contract.adapter import sha256_hex
from contract.errors import TrunklineError, error_named
from contract.tls import TlsFiles, open_channel
from contract.trunk_pb2_grpc import TrunkStub
from contract.wire import ERROR_KEY, PROTOCOL, chunk_frames, message_limits, parse_server_frame

TIMEOUT_S = 30.0


class Refused(Exception):  # noqa: N818
    """How a call ended: its status, its one line, and the error class that the trunk named."""

    def __init__(self, call: Any) -> None:
        self.status: grpc.StatusCode = call.code()
        self.line: str = call.details()
        named = dict(call.trailing_metadata() or ()).get(ERROR_KEY, "")
        self.error: type[TrunklineError] | None = error_named(named)
        super().__init__(f"{self.status.name} {named}: {self.line}")


class WireClient:
    """One channel; sessions, and the single requests with their errors as Refused."""

    def __init__(self, address: str, tls: TlsFiles | None = None) -> None:
        self.channel = open_channel(address, tls, message_limits())
        self.stub = TrunkStub(self.channel)

    def call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self.stub, method)(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise Refused(error) from None

    def put_adapter(self, sha256: str, data: bytes, size_bytes: int | None = None) -> str:
        size_bytes = len(data) if size_bytes is None else size_bytes
        chunks = [pb.AdapterChunk(data=data[at : at + 1000]) for at in range(0, len(data), 1000)]
        chunks[0].sha256, chunks[0].size_bytes = sha256, size_bytes
        return str(self.call("PutAdapter", iter(chunks)).sha256)

    def get_adapter(self, sha256: str) -> bytes:
        try:
            chunks = list(self.stub.GetAdapter(pb.GetAdapterRequest(sha256=sha256), timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            raise Refused(error) from None
        assert chunks[0].size_bytes == sum(len(chunk.data) for chunk in chunks)
        return b"".join(chunk.data for chunk in chunks)

    def hello(self, lora: pb.Lora, **fields: Any) -> pb.Hello:
        """A hello that the trunk accepts, but for what `fields` changes."""
        model = self.call("Describe", pb.DescribeRequest()).model
        plain: dict[str, Any] = {
            "protocol": PROTOCOL,
            "client_id": "1",
            "model": model,
            "lora": lora,
            "trainable": "AB",
            "codecs": ["identity"],
        }
        if "adapter_sha256" not in fields and "seed" not in fields:
            plain["seed"] = 0
        return pb.Hello(**{**plain, **fields})

    def first_adapter(self, lora: pb.Lora) -> str:
        """An adapter that the trunk holds from here on, by its id."""
        first = self.session(self.hello(lora))
        start = first.read()
        first.close()
        return self.put_adapter(sha256_hex(start), start)

    def session(self, hello: pb.Hello | None) -> WireSession:
        return WireSession(self.channel, hello)

    def close(self) -> None:
        self.channel.close()


class WireSession:
    """One stream. Every frame is sent as it is asked for, right or wrong."""

    def __init__(self, channel: grpc.Channel, hello: pb.Hello | None) -> None:
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.sent_bytes = self.received_bytes = 0
        self._microbatch = self.credits = 0
        self._masks: dict[int, Tensor | None] = {}
        self.codec = "identity" if hello is None else hello.codecs[0]
        stream = channel.stream_stream("/trunkline.v1.Trunk/Session")
        self.call: Any = stream(iter(self._out.get, None), timeout=TIMEOUT_S)
        if hello is not None:
            self.send(hello=hello)
            self.welcome = self.receive("welcome")

    def send(self, **body: Any) -> None:
        self.send_raw(pb.ClientFrame(**body).SerializeToString())

    def send_raw(self, frame: bytes) -> None:
        self.sent_bytes += len(frame)
        self._out.put(frame)

    def send_data(self, data: memoryview) -> None:
        for frame in chunk_frames(data, 4096):
            self.send_raw(frame)

    def receive(self, kind: str) -> Any:
        try:
            raw = next(self.call)
        except grpc.RpcError as error:
            raise Refused(error) from None
        self.received_bytes += len(raw)
        frame = parse_server_frame(raw)
        assert frame.WhichOneof("body") == kind
        return getattr(frame, kind)

    def receive_data(self, size_bytes: int) -> memoryview:
        assembler = codec.Assembler(size_bytes, "reply")
        while not assembler.complete:
            assembler.add(self.receive("chunk").data)
        return assembler.data()

    def forward(
        self, hidden_BTD: Tensor, mask_BT: Tensor | None = None, need_grad: bool = True, **fields: Any
    ) -> Tensor:
        """hidden_BTD at the tail cut; the microbatch's number is `self.microbatch`."""
        self._microbatch += 1
        header, data = codec.encode(hidden_BTD, self.codec, mask_BT)
        self._masks[self._microbatch] = mask_BT
        plain: dict[str, Any] = {
            "microbatch": self._microbatch,
            "hidden": header,
            "has_attention_mask": mask_BT is not None,
            "attention_mask_bits": b"" if mask_BT is None else codec.pack_mask(mask_BT),
            "need_grad": need_grad,
            "reply_codec": self.codec,
        }
        self.send(forward=pb.Forward(**{**plain, **fields}))
        self.send_data(data)
        reply = self.receive("forward")
        self.credits = reply.credits
        return codec.decode(reply.hidden, self.receive_data(reply.hidden.size_bytes), mask_BT)

    @property
    def microbatch(self) -> int:
        return self._microbatch

    def backward(
        self, grad_BTD: Tensor, want_input_grad: bool = True, reset: bool = False, microbatch: int | None = None
    ) -> tuple[Tensor | None, float]:
        mask_BT = self._masks.get(self._microbatch if microbatch is None else microbatch)
        header, data = codec.encode(grad_BTD, self.codec, mask_BT)
        self.send(
            backward=pb.Backward(
                microbatch=self._microbatch if microbatch is None else microbatch,
                grad=header,
                want_input_grad=want_input_grad,
                reset_gradient=reset,
                reply_codec=self.codec,
            )
        )
        self.send_data(data)
        reply = self.receive("backward")
        self.credits = reply.credits
        if not reply.HasField("grad"):
            return None, reply.adapter_grad_norm
        data = self.receive_data(reply.grad.size_bytes)
        return codec.decode(reply.grad, data, mask_BT), reply.adapter_grad_norm

    def step(self, lr: float = 1e-2, weight_decay: float = 0.0, grad_scale: float = 1.0, **fields: Any) -> int:
        plain = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
        self.send(step=pb.Step(**{**plain, "weight_decay": weight_decay, "grad_scale": grad_scale, **fields}))
        return int(self.receive("step").steps)

    def read(self, gradients: bool = False) -> bytes:
        self.send(read_adapter=pb.ReadAdapter(gradients=gradients))
        return bytes(self.receive_data(self.receive("adapter").size_bytes))

    def close(self, trained_tokens: int = 0, contribute: bool = False) -> pb.CloseReply:
        self.send(close=pb.Close(trained_tokens=trained_tokens, contribute=contribute))
        reply: pb.CloseReply = self.receive("close")
        self._out.put(None)
        return reply

    def ending(self) -> Refused:
        """How the trunk ended the stream."""
        try:
            for _ in self.call:
                continue
        except grpc.RpcError as error:
            return Refused(error)
        return Refused(self.call)

    def hang_up(self) -> None:
        self._out.put(None)
