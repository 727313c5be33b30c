"""One client's session, frame by frame: decode, validate, call the engine on its thread, encode."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from contract import codec
from contract import trunk_pb2 as pb
from contract.adapter import sha256_hex
from contract.delta import SampleCache
from contract.errors import FrameError
from contract.records import DELTA_CODEC
from contract.wire import CHUNK_BYTES
from server_trunk.adapters import SessionAdapter
from server_trunk.contributions import Contributions
from server_trunk.engine import Engine, Graph
from server_trunk.requests import ForwardInputs, check_backward, read_forward, read_step
from server_trunk.sessions import Session
from server_trunk.stream import FrameStream
from server_trunk.worker import Worker

TrunkSession = Session[SessionAdapter, Graph]


class Conversation:
    """What follows a hello that was accepted. Any error ends it; the caller closes the session."""

    def __init__(
        self,
        session: TrunkSession,
        stream: FrameStream,
        engine: Engine,
        contributions: Contributions,
        *,
        compute: Worker,
        disk: Worker,
        max_tokens: int,
        sample_cache_bytes: int,
    ) -> None:
        self._session = session
        self._stream = stream
        self._engine = engine
        self._contributions = contributions
        self._compute = compute
        self._disk = disk
        self._max_tokens = max_tokens
        self._sample_cache_bytes = sample_cache_bytes if DELTA_CODEC in session.codecs else 0
        self._samples = SampleCache(self._sample_cache_bytes, engine.hidden_size)
        self._answers: dict[str, Callable[[Any], Awaitable[None]]] = {
            "forward": self._forward,
            "backward": self._backward,
            "step": self._step,
            "read_adapter": self._read_adapter,
            "close": self._close,
        }

    async def run(self) -> None:
        """Answer frames until the client closes or hangs up. Raises any TrunklineError that a frame deserves."""
        welcome = pb.Welcome(
            session_id=self._session.session_id,
            adapter_sha256=self._session.base_sha256,
            max_pending=self._session.pending.limit,
            pending_ttl_s=self._session.pending.ttl_s,
            chunk_bytes=CHUNK_BYTES,
            max_tokens=self._max_tokens,
            codecs=self._session.codecs,
            sample_cache_bytes=self._sample_cache_bytes,
        )
        await self._stream.write(pb.ServerFrame(welcome=welcome))
        while (frame := await self._stream.read()) is not None:
            kind = str(frame.WhichOneof("body"))
            if kind not in self._answers:
                raise FrameError(f"a second {kind} frame came; a stream has one session")
            await self._answers[kind](getattr(frame, kind))
            self._tally()
            if kind == "close":
                return

    def _tally(self) -> None:
        counters = self._session.counters
        self._session.count(
            received_bytes=self._stream.received_bytes - counters.received_bytes,
            sent_bytes=self._stream.sent_bytes - counters.sent_bytes,
        )

    async def _forward(self, forward: pb.Forward) -> None:
        session = self._session
        session.pending.drop(forward.dropped)
        inputs = read_forward(
            forward,
            session.codecs,
            hidden_size=self._engine.hidden_size,
            max_tokens=self._max_tokens,
            max_positions=self._engine.max_positions,
        )
        if forward.need_grad:
            session.pending.reserve(forward.microbatch, inputs.tokens)
        if inputs.samples is not None:
            self._samples.admit(inputs.samples, inputs.lengths)
        data = await self._stream.read_data(forward.hidden.size_bytes, "forward.hidden")
        came_s = time.monotonic()
        graph, header, reply = await self._compute.run(self._run_forward, forward, inputs, data)
        if forward.need_grad:
            session.pending.add(forward.microbatch, graph)
            session.count(tokens=inputs.tokens)
        del graph  # a graph that expires while a slow client reads must not live on here
        body = pb.ForwardReply(microbatch=forward.microbatch, hidden=header, held_s=time.monotonic() - came_s)
        await self._stream.write(pb.ServerFrame(forward=body))
        await self._stream.write_data(reply)

    def _run_forward(
        self, forward: pb.Forward, inputs: ForwardInputs, data: memoryview
    ) -> tuple[Graph, pb.TensorHeader, memoryview]:
        mask_BT, samples = inputs.mask_BT, inputs.samples
        if samples is None:
            hidden_BTD = codec.decode(forward.hidden, data, mask_BT)
        else:
            hidden_BTD = self._samples.decode("head", forward.hidden, data, mask_BT, samples)
        graph = self._engine.forward(
            self._session.adapter,
            hidden_BTD,
            inputs.mask_BT,
            inputs.position_ids,
            autocast_dtype=forward.autocast_dtype,
            training=forward.training,
            need_grad=forward.need_grad,
        )
        if samples is None:
            return graph, *codec.encode(graph.output_BTD, forward.reply_codec, mask_BT)
        return graph, *self._samples.encode("tail", graph.output_BTD, mask_BT, samples)

    async def _backward(self, backward: pb.Backward) -> None:
        graph = self._session.pending.pop(backward.microbatch)
        check_backward(backward, graph, self._session.codecs, self._max_tokens)
        data = await self._stream.read_data(backward.grad.size_bytes, "backward.grad")
        came_s = time.monotonic()
        header, reply, norm = await self._compute.run(self._run_backward, backward, graph, data)
        del graph
        self._session.pending.settled(backward.microbatch)
        body = pb.BackwardReply(
            microbatch=backward.microbatch, grad=header, adapter_grad_norm=norm, held_s=time.monotonic() - came_s
        )
        await self._stream.write(pb.ServerFrame(backward=body))
        await self._stream.write_data(reply)

    def _run_backward(
        self, backward: pb.Backward, graph: Graph, data: memoryview
    ) -> tuple[pb.TensorHeader | None, memoryview, float]:
        grad_BTD, norm = self._engine.backward(
            self._session.adapter,
            graph,
            codec.decode(backward.grad, data, graph.mask_BT),
            want_input_grad=backward.want_input_grad,
            reset=backward.reset_gradient,
        )
        if grad_BTD is None:
            return None, memoryview(b""), norm
        return *codec.encode(grad_BTD, backward.reply_codec, graph.mask_BT), norm

    async def _step(self, step: pb.Step) -> None:
        settings, grad_scale = read_step(step)
        self._session.pending.free_all("the session's adapter was stepped after its forward")
        await self._compute.run(self._engine.step, self._session.adapter, settings, grad_scale)
        self._session.count(steps=1)
        await self._stream.write(pb.ServerFrame(step=pb.StepReply(steps=self._session.counters.steps)))

    async def _read_adapter(self, request: pb.ReadAdapter) -> None:
        data = await self._compute.run(self._engine.read, self._session.adapter, gradients=request.gradients)
        await self._stream.write(pb.ServerFrame(adapter=pb.AdapterReply(size_bytes=len(data))))
        await self._stream.write_data(memoryview(data))

    async def _close(self, close: pb.Close) -> None:
        session = self._session
        if close.contribute and session.round_key is None:
            raise FrameError("close.contribute in a session without a round; there is nothing to contribute to")
        if close.contribute:
            await self._compute.run(self._engine.require_finite, session.adapter)
        adapter = await self._compute.run(self._engine.read, session.adapter, gradients=False)
        if close.contribute and session.round_key is not None:
            await self._disk.run(
                self._contributions.add,
                session.round_key,
                session.client_id,
                session.base_sha256,
                close.trained_tokens,
                adapter,
            )
        self._tally()
        reply = pb.CloseReply(
            adapter_sha256=sha256_hex(adapter),
            trained_tokens=close.trained_tokens,
            received_bytes=session.counters.received_bytes,
            sent_bytes=session.counters.sent_bytes,
        )
        await self._stream.write(pb.ServerFrame(close=reply))
