"""A session with the trunk: the absent layers as calls over one gRPC stream.

One request is under way at a time. The reply to a Step is not waited for: it is read before the next reply, so that the
trunk's optimiser works while the client's own next batch begins. A session cannot be resumed: when its stream ends, the
trunk forgets the adapter and the optimiser, and a new session must be opened.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.connection import FrameStream, TrunkConnection
from clients.link import DELTA_START, EXACT, CodecPolicy, Exchange, WireCodecs
from clients.sample_places import SamplePlaces
from contract import codec, wire
from contract.adapter import from_bytes
from contract.delta import SampleCache, Samples
from contract.errors import AgreementError, ConfigError, FrameError, FrameTooLargeError, NonFiniteError, SessionError
from contract.privacy_records import Channel, PrivacyEvent
from contract.records import DELTA_CODEC, AdamWSettings
from contract.trunk_pb2 import (
    Backward,
    ClientFrame,
    Close,
    CloseReply,
    Forward,
    Hello,
    ReadAdapter,
    Step,
    TensorHeader,
    Welcome,
)
from privacy.wire import Off, WireMechanism


class PendingGraph:
    """The trunk's half of one forward pass, kept there until its backward comes or this object is forgotten."""

    __slots__ = ("__weakref__", "batch_shape", "forget", "mask_BT", "microbatch", "rows")

    def __init__(
        self, microbatch: int, batch_shape: tuple[int, ...], rows: tuple[int, ...], mask_BT: Tensor | None
    ) -> None:
        self.microbatch = microbatch
        self.batch_shape = batch_shape
        self.rows = rows
        self.mask_BT = mask_BT
        self.forget: weakref.finalize[..., PendingGraph] | None = None


@dataclass(frozen=True, slots=True)
class Crossing:
    """What goes with hidden_BTD over the cut: the caller's own mask and positions, and how the layers run."""

    attention_mask_BT: Tensor | None
    position_ids: Tensor | None
    autocast_dtype: torch.dtype | None
    training: bool


class RemoteTrunk:
    """One client's session. Safe to use from several threads: they take turns.

    Every method raises the trunk's own error, rebuilt as its class, ConnectionFailedError when the stream is lost and
    DeadlineError after `timeout_s` without a reply; the session is over after any error.
    """

    def __init__(
        self,
        connection: TrunkConnection,
        hello: Hello,
        *,
        hidden_size: int,
        adapter_bytes: int,
        timeout_s: float = 300.0,
        mechanism: WireMechanism | None = None,
        codecs: WireCodecs = EXACT,
    ) -> None:
        """Opens the session. `adapter_bytes` is the size of the trunk's part of the adapter as safetensors.

        Every value passes `mechanism` on its way out; one that is not Off needs `announce` before each forward.
        Raises AgreementError when the two sides do not hold the same model, the trunk does not take the codecs that
        are named, or names an unexpected adapter.
        """
        self.address = connection.address
        self.wire_log = connection.wire_log
        self._connection = connection  # a channel that nobody holds closes itself
        self._hidden_size = hidden_size
        self._adapter_bytes = adapter_bytes
        self._mechanism: WireMechanism = mechanism or Off()
        if codecs.forward == DELTA_CODEC and not isinstance(self._mechanism, Off):
            raise ConfigError(f"codec is {DELTA_CODEC}, but the wire's noise is drawn anew each time: name another")
        self._rows: tuple[int, ...] = ()
        self._microbatches = 0
        self._owed_step_replies = 0
        self._dropped: deque[int] = deque()
        self._lock = threading.Lock()
        self._stream: FrameStream = connection.open_stream(timeout_s)
        self._hang_up = weakref.finalize(self, self._stream.cancel)
        with self._exchange() as stream:
            stream.send(ClientFrame(hello=_offering(hello, codecs)))
            self.welcome: Welcome = stream.receive("welcome")
            codecs.require_accepted(self.welcome.codecs, self.address)
        self._codecs = CodecPolicy(codecs, self.welcome.codecs, connection.round_trip_s)
        self._places = SamplePlaces(self.welcome.sample_cache_bytes, hidden_size)
        self._samples = SampleCache(self.welcome.sample_cache_bytes, hidden_size)
        if hello.adapter_sha256 and self.welcome.adapter_sha256 != hello.adapter_sha256:
            self.abandon()
            raise AgreementError(
                f"the trunk at {self.address} starts from adapter {self.welcome.adapter_sha256}; "
                f"{hello.adapter_sha256} was asked for"
            )

    @property
    def events(self) -> Mapping[Channel, PrivacyEvent]:
        """What one pass over the wire costs each of its rows, by channel."""
        return self._mechanism.events

    def announce(self, rows: Sequence[int]) -> None:
        """Say which of the site's rows the next forward holds, in the batch's order: their privacy is what is spent."""
        self._rows = tuple(rows)

    def forward(self, hidden_BTD: Tensor, crossing: Crossing, *, need_grad: bool) -> tuple[Tensor, PendingGraph | None]:
        """hidden_BTD at the head cut -> hidden_BTD at the tail cut, and the graph to call `backward` with.

        Raises NonFiniteError, FrameError or FrameTooLargeError, before anything is sent, for activations that are not
        finite, a mask that is not 0/1 [B, T], and more tokens than the trunk takes.
        """
        batch, tokens, _ = hidden_BTD.shape
        if batch * tokens > self.welcome.max_tokens:
            raise FrameTooLargeError(
                f"a batch of {batch} x {tokens} tokens is over the trunk's limit of {self.welcome.max_tokens}"
            )
        request = _forward_request(hidden_BTD, crossing, need_grad)
        rows, mask_BT = self._rows, crossing.attention_mask_BT
        released = self._released(
            hidden_BTD,
            "the hidden states at the head cut",
            lambda values: self._mechanism.forward(_without_padding(values, mask_BT), rows),
        )
        request.reply_codec = self._codecs.now.forward
        samples = None
        if request.reply_codec == DELTA_CODEC and not need_grad:
            request.reply_codec = DELTA_START
        if request.reply_codec != DELTA_CODEC:
            header, data = codec.encode(released, request.reply_codec, mask_BT)
        with self._exchange():
            if request.reply_codec == DELTA_CODEC:
                samples, header, data = self._as_difference(request, released, mask_BT, rows)
            request.hidden.CopyFrom(header)
            self._microbatches += 1
            request.microbatch = self._microbatches
            while self._dropped:
                request.dropped.append(self._dropped.popleft())
            timing = _Timing(header, mask_BT)
            self._send(ClientFrame(forward=request), data)
            reply = self._reply("forward")
            timing.answered(reply.held_s, reply.hidden.size_bytes)
            output_BTD = self._tensor(
                reply.hidden,
                request.reply_codec,
                tuple(hidden_BTD.shape),
                mask_BT,
                "the hidden states from the trunk",
                samples,
            )
            if need_grad:
                self._codecs.observe("forward", timing.exchange())
        graph = self._pending(request.microbatch, tuple(output_BTD.shape), rows, mask_BT) if need_grad else None
        return output_BTD.to(hidden_BTD.device), graph

    def backward(
        self, graph: PendingGraph, grad_BTD: Tensor, *, want_input_grad: bool, reset_gradient: bool
    ) -> tuple[Tensor | None, float]:
        """grad_BTD at the tail cut -> (grad_BTD at the head cut if wanted, L2 norm of the adapter's gradient so far).

        Raises NonFiniteError, before anything is sent, for gradients that are not finite, and SessionError for a graph
        whose backward was already called.
        """
        if graph.forget is None or not graph.forget.alive:
            raise SessionError(
                f"backward a second time through microbatch {graph.microbatch}: the trunk frees its graph at the first "
                "(retain_graph is not supported)"
            )
        codec.require_no_loss_on_padding(grad_BTD, graph.mask_BT)
        released = self._released(
            grad_BTD, "the gradient at the tail cut", lambda values: self._mechanism.backward(values, graph.rows)
        )
        reply_codec = self._codecs.now.backward
        header, data = codec.encode(released, reply_codec, graph.mask_BT)
        request = Backward(
            microbatch=graph.microbatch,
            grad=header,
            want_input_grad=want_input_grad,
            reset_gradient=reset_gradient,
            reply_codec=reply_codec,
        )
        graph.forget.detach()
        input_grad_BTD = None
        with self._exchange():
            timing = _Timing(header, graph.mask_BT)
            self._send(ClientFrame(backward=request), data)
            reply = self._reply("backward")
            timing.answered(reply.held_s, reply.grad.size_bytes)
            if want_input_grad:
                input_grad_BTD = self._tensor(
                    reply.grad, reply_codec, graph.batch_shape, graph.mask_BT, "the gradient from the trunk"
                )
                input_grad_BTD = input_grad_BTD.to(grad_BTD.device)
            if not 0.0 <= reply.adapter_grad_norm < math.inf:
                raise NonFiniteError(f"the norm of the trunk adapter's gradient is {reply.adapter_grad_norm}")
            self._codecs.observe("backward", timing.exchange())
        return input_grad_BTD, reply.adapter_grad_norm

    def step(self, settings: AdamWSettings, grad_scale: float) -> None:
        """One AdamW step of the trunk's half with its gradient times `grad_scale`; an error shows at the next call."""
        request = Step(
            lr=settings.lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            grad_scale=grad_scale,
        )
        with self._exchange() as stream:
            stream.send(ClientFrame(step=request))
            self._owed_step_replies += 1

    def read_adapter(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """The trunk's half of the adapter, or its accumulated gradients, by canonical name, float32."""
        with self._exchange() as stream:
            stream.send(ClientFrame(read_adapter=ReadAdapter(gradients=gradients)))
            size = self._reply("adapter").size_bytes
            if size > self._adapter_bytes:
                raise FrameTooLargeError(
                    f"the trunk announced an adapter of {size} bytes; this session's has {self._adapter_bytes}"
                )
            return from_bytes(bytes(self._collect(size, "the trunk's adapter")))

    def close(self, *, trained_tokens: int = 0, contribute: bool = False) -> CloseReply:
        """Ends the session; with `contribute` the trunk keeps the adapter, weighted by `trained_tokens`, for its round.

        When this returns, the trunk has acknowledged both.
        """
        with self._exchange() as stream:
            stream.send(ClientFrame(close=Close(trained_tokens=trained_tokens, contribute=contribute)))
            reply: CloseReply = self._reply("close")
            stream.finish()
        self._hang_up.detach()
        if reply.trained_tokens != trained_tokens:
            # Neither number: under a secure sum the orchestrator is told this text, and the weight is masked.
            raise AgreementError(
                f"the trunk at {self.address} acknowledged another number of trained tokens than it was told"
            )
        return reply

    def abandon(self) -> None:
        """Drops the session without a word; safe to call more than once, and after `close`."""
        self._hang_up()

    @contextmanager
    def _exchange(self) -> Iterator[FrameStream]:
        """The stream for one request. Whatever goes wrong or interrupts in between, what comes next on the stream
        would answer the wrong question, so that the session ends."""
        with self._lock:
            try:
                yield self._stream
            except BaseException:
                self._stream.cancel()
                raise

    def _released(
        self,
        value_BTD: Tensor,
        what: str,
        mechanism: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]],
    ) -> Tensor:
        """What may leave in place of `value_BTD`; it was paid for when the round was reserved in the site's ledger."""
        value_BTD = value_BTD.detach()
        codec.require_finite(value_BTD, what)
        if isinstance(self._mechanism, Off):  # bit for bit what was computed, on whatever device it is
            return value_BTD
        released = torch.from_numpy(mechanism(value_BTD.to("cpu", torch.float32).numpy())).to(value_BTD.dtype)
        codec.require_finite(released, what)
        return released

    def _as_difference(
        self, request: Forward, released: Tensor, mask_BT: Tensor | None, rows: Sequence[int]
    ) -> tuple[Samples, TensorHeader, memoryview]:
        """Both ends' caches move with what is sent: the session is over if this fails."""
        lengths = codec.sent_lengths(mask_BT, released.shape)
        samples = self._places.plan(rows, lengths)
        self._samples.admit(samples, lengths)
        samples.write(request)
        return samples, *self._samples.encode("head", released, mask_BT, samples)

    def _send(self, frame: ClientFrame, data: memoryview) -> None:
        self._stream.send(frame)
        chunk_bytes = min(self.welcome.chunk_bytes or wire.CHUNK_BYTES, wire.CHUNK_BYTES)
        self._stream.send_chunks(wire.chunk_frames(data, chunk_bytes))

    def _reply(self, kind: str) -> Any:
        """The reply to the request just sent, after those that are still due before it."""
        while self._owed_step_replies:
            self._stream.receive("step")
            self._owed_step_replies -= 1
        return self._stream.receive(kind)

    def _tensor(
        self,
        header: TensorHeader,
        codec_name: str,
        shape: tuple[int, ...],
        mask_BT: Tensor | None,
        what: str,
        samples: Samples | None = None,
    ) -> Tensor:
        codec.check_header(
            header,
            codecs=(codec_name,),
            mask_BT=mask_BT,
            hidden_size=self._hidden_size,
            max_tokens=self.welcome.max_tokens,
            what=what,
            shape=shape,
            differences=None if samples is None else samples.differences,
        )
        data = self._collect(header.size_bytes, what)
        if samples is None:
            tensor_BTD = codec.decode(header, data, mask_BT)
        else:
            tensor_BTD = self._samples.decode("tail", header, data, mask_BT, samples)
            self._places.answered(samples)
        codec.require_finite(tensor_BTD, what)
        return tensor_BTD

    def _collect(self, size_bytes: int, what: str) -> memoryview:
        assembler = codec.Assembler(size_bytes, what)
        while not assembler.complete:
            assembler.add(self._stream.receive_chunk())
        return assembler.data()

    def _pending(
        self, microbatch: int, shape: tuple[int, ...], rows: tuple[int, ...], mask_BT: Tensor | None
    ) -> PendingGraph:
        graph = PendingGraph(microbatch, shape, rows, mask_BT)
        graph.forget = weakref.finalize(graph, self._dropped.append, microbatch)
        graph.forget.atexit = False
        return graph


class _Timing:
    """The times of one exchange, from the moment that its request goes out."""

    def __init__(self, header: TensorHeader, mask_BT: Tensor | None) -> None:
        self._header, self._mask_BT = header, mask_BT
        self._started_s = time.monotonic()

    def answered(self, held_s: float, size_bytes: int) -> None:
        """The reply's first frame has come, before its tensor of `size_bytes`."""
        self._answered_s, self._held_s, self._received_bytes = time.monotonic(), held_s, size_bytes

    def exchange(self) -> Exchange:
        """The reply's tensor has come, where one was due."""
        return Exchange(
            sizes=codec.sizes(self._header, self._mask_BT),
            sent_bytes=self._header.size_bytes,
            received_bytes=self._received_bytes,
            started_s=self._started_s,
            answered_s=self._answered_s,
            ended_s=time.monotonic(),
            held_s=self._held_s,
        )


def _offering(hello: Hello, codecs: WireCodecs) -> Hello:
    offer = Hello()
    offer.CopyFrom(hello)
    offer.codecs[:] = codecs.offered()
    return offer


def _without_padding(hidden_BTD: npt.NDArray[np.float32], mask_BT: Tensor | None) -> npt.NDArray[np.float32]:
    """Zeros where the mask says that nothing stands: a row's norm should be that of its text."""
    return hidden_BTD if mask_BT is None else hidden_BTD * mask_BT.to("cpu", torch.float32).numpy()[:, :, None]


def _forward_request(hidden_BTD: Tensor, crossing: Crossing, need_grad: bool) -> Forward:
    """Everything of a Forward but the tensor and its number. Raises FrameError for a mask that is not 0/1 [B, T]."""
    request = Forward(training=crossing.training, need_grad=need_grad)
    mask_BT, position_ids = crossing.attention_mask_BT, crossing.position_ids
    if mask_BT is not None:
        if mask_BT.shape != hidden_BTD.shape[:2]:
            raise FrameError(
                f"attention_mask has shape {list(mask_BT.shape)}; the hidden states are {list(hidden_BTD.shape)}"
            )
        request.has_attention_mask = True
        request.attention_mask_bits = codec.pack_mask(mask_BT)
    if position_ids is not None:
        request.position_ids.extend(codec.pack_positions(position_ids))
    if crossing.autocast_dtype is not None:
        request.autocast_dtype = codec.dtype_name(crossing.autocast_dtype)
    return request
