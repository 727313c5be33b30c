"""A session with the trunk: the absent layers as calls over one gRPC stream.

Several requests may be under way at once (`begin_forward`, `begin_backward`); the trunk answers them in order. The
reply to a Step is not waited for: it is read before the next reply, so that the trunk's optimiser works while the
client's own next batch begins. A session cannot be resumed: when its stream ends, the trunk forgets the adapter and
the optimiser, and a new session must be opened.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.admission import Admission
from clients.connection import FrameStream, TrunkConnection
from clients.crossing import Crossing, forward_request, without_padding
from clients.exchanges import Exchange, Exchanges
from clients.link import DELTA_START, EXACT, CodecPolicy, Timing, WireCodecs
from clients.sample_places import SamplePlaces
from contract import codec, wire
from contract.adapter import from_bytes
from contract.delta import SampleCache, Samples
from contract.errors import AgreementError, ConfigError, FrameError, FrameTooLargeError, NonFiniteError, SessionError
from contract.privacy_records import Channel, PrivacyEvent
from contract.records import DELTA_CODEC, AdamWSettings
from contract.trunk_arithmetic import PLAIN, TRUNK_AUTOCAST, TrunkArithmetic
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

logger = logging.getLogger("trunkline.clients")


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


Told = tuple[Any, memoryview | None]
"""A reply, and the bytes of the tensor that it announced, if it did."""


class RemoteTrunk:
    """One client's session. Safe to use from several threads: requests take turns on the stream.

    Every method raises the trunk's own error, rebuilt as its class, ConnectionFailedError when the stream is lost and
    DeadlineError after `timeout_s` without a reply, or where a tensor takes longer than that and 64 KiB/s; the session
    is over after any error.
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
        arithmetic: TrunkArithmetic = PLAIN,
        admission: Admission | None = None,
    ) -> None:
        """Opens the session. `adapter_bytes` is the size of the trunk's part of the adapter as safetensors.

        With an `admission` the trunk is asked for a challenge first, and shown what answers it.

        Every value passes `mechanism` on its way out; one that is not Off needs `announce` before each forward.
        Raises AgreementError when the two sides do not hold the same model, the trunk does not take the codecs that
        are named, computes otherwise than `arithmetic` asks, or names an unexpected adapter.
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
        self._held: set[int] = set()  # microbatches whose graph waits at the trunk for a backward that may yet come
        if admission is not None:  # a description that is older than a minute has a challenge that is too old
            hello = admission.presented(hello, self.address, connection.describe().challenge)
        self._stream: FrameStream = connection.open_stream(timeout_s)
        self._exchanges = Exchanges(self._stream.cancel)
        self._hang_up = weakref.finalize(self, self._stream.cancel)
        with self._exchanges.alone():
            self._stream.send(ClientFrame(hello=_offering(hello, codecs, arithmetic)))
            self.welcome: Welcome = self._stream.receive("welcome")
            codecs.require_accepted(self.welcome.codecs, self.address)
            told = arithmetic.told(self.welcome.autocast_dtype, self.address)
        if admission is not None:
            admission.keep(self.address, self.welcome.renewal)
        if told:
            logger.info(told)
        self._codecs = CodecPolicy(codecs, self.welcome.codecs, connection.round_trip_s)
        self._places = SamplePlaces(self.welcome.sample_cache_bytes, hidden_size)
        self._samples = SampleCache(self.welcome.sample_cache_bytes, hidden_size)
        self.credits: int = self.welcome.credits
        """The trunk's latest advice: how many microbatches should be under way at once; 0 for none."""
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

    @property
    def failure(self) -> BaseException | None:
        """What ended the session, where a request did: requests beside it only learn that the session is over."""
        return self._exchanges.failure

    @property
    def room(self) -> int:
        """Microbatches that may be begun now and be under way at once, by the trunk's limit and its latest advice."""
        room = self.welcome.max_pending - len(self._held)
        return max(1, min(room, self.credits) if self.credits else room)

    @property
    def alone(self) -> int:
        """How many microbatches should be sent one by one now, so that the link can be measured."""
        return self._codecs.wanted_alone

    def announce(self, rows: Sequence[int]) -> None:
        """Say which of the site's rows the next forward holds, in the batch's order: their privacy is what is spent."""
        self._rows = tuple(rows)

    def forward(self, hidden_BTD: Tensor, crossing: Crossing, *, need_grad: bool) -> tuple[Tensor, PendingGraph | None]:
        """hidden_BTD at the head cut -> hidden_BTD at the tail cut, and the graph to call `backward` with.

        Raises NonFiniteError, FrameError or FrameTooLargeError, before anything is sent, for activations that are not
        finite, a mask that is not 0/1 [B, T], and more tokens than the trunk takes.
        """
        exchange = self.begin_forward(hidden_BTD, crossing, need_grad=need_grad)
        exchange.run()
        return exchange.answer()

    def begin_forward(
        self, hidden_BTD: Tensor, crossing: Crossing, *, need_grad: bool
    ) -> Exchange[Told, tuple[Tensor, PendingGraph | None]]:
        """A forward that is ready to be sent, of the rows that were announced last. Raises as `forward` does."""
        batch, tokens, _ = hidden_BTD.shape
        if batch * tokens > self.welcome.max_tokens:
            raise FrameTooLargeError(
                f"a batch of {batch} x {tokens} tokens is over the trunk's limit of {self.welcome.max_tokens}"
            )
        request = forward_request(hidden_BTD, crossing, need_grad)
        rows, mask_BT = self._rows, crossing.attention_mask_BT
        shape, device, what = tuple(hidden_BTD.shape), hidden_BTD.device, "the hidden states from the trunk"
        released = self._released(
            hidden_BTD,
            "the hidden states at the head cut",
            lambda values: self._mechanism.forward(without_padding(values, mask_BT), rows),
        )
        reply_codec = self._codecs.now.forward
        if reply_codec == DELTA_CODEC and not need_grad:
            reply_codec = DELTA_START
        request.reply_codec = reply_codec
        encoded = None if reply_codec == DELTA_CODEC else codec.encode(released, reply_codec, mask_BT)
        graph: PendingGraph | None = None
        samples: Samples | None = None
        timing = Timing(self._codecs)

        def send() -> None:
            nonlocal graph, samples
            if encoded is None:
                samples, header, data = self._as_difference(request, released, mask_BT, rows)
            else:
                header, data = encoded
            request.hidden.CopyFrom(header)
            timing.begins(lambda: codec.sizes(header, mask_BT), header.size_bytes)
            self._microbatches += 1
            request.microbatch = self._microbatches
            while self._dropped:
                request.dropped.append(self._dropped.popleft())
            graph = self._pending(request.microbatch, shape, rows, mask_BT) if need_grad else None
            self._send(ClientFrame(forward=request), data)

        def receive() -> Told:
            reply = self._reply("forward")
            self.credits = reply.credits or self.credits
            timing.answered(reply.held_s, reply.hidden.size_bytes)
            data = self._tensor_bytes(reply.hidden, reply_codec, shape, mask_BT, what, samples)
            timing.ends("forward" if need_grad else None)
            return reply, data

        def read(told: Told) -> tuple[Tensor, PendingGraph | None]:
            reply, data = told
            return self._decoded(reply.hidden, data, mask_BT, what, samples).to(device), graph

        return Exchange(self._exchanges, send, receive, read)

    def backward(
        self, graph: PendingGraph, grad_BTD: Tensor, *, want_input_grad: bool, reset_gradient: bool
    ) -> tuple[Tensor | None, float]:
        """grad_BTD at the tail cut -> (grad_BTD at the head cut if wanted, L2 norm of the adapter's gradient so far).

        Raises NonFiniteError, before anything is sent, for gradients that are not finite, and SessionError for a graph
        whose backward was already called.
        """
        exchange = self.begin_backward(graph, grad_BTD, want_input_grad=want_input_grad, reset_gradient=reset_gradient)
        exchange.run()
        return exchange.answer()

    def begin_backward(
        self, graph: PendingGraph, grad_BTD: Tensor, *, want_input_grad: bool, reset_gradient: bool
    ) -> Exchange[Told, tuple[Tensor | None, float]]:
        """A backward that is ready to be sent, and takes `graph`. Raises as `backward` does."""
        if graph.forget is None or not graph.forget.alive:
            raise SessionError(
                f"backward a second time through microbatch {graph.microbatch}: the trunk frees its graph at the first "
                "(retain_graph is not supported)"
            )
        mask_BT, device, what = graph.mask_BT, grad_BTD.device, "the gradient from the trunk"
        codec.require_no_loss_on_padding(grad_BTD, mask_BT)
        released = self._released(
            grad_BTD, "the gradient at the tail cut", lambda values: self._mechanism.backward(values, graph.rows)
        )
        reply_codec = self._codecs.now.backward
        header, data = codec.encode(released, reply_codec, mask_BT)
        request = Backward(
            microbatch=graph.microbatch,
            grad=header,
            want_input_grad=want_input_grad,
            reset_gradient=reset_gradient,
            reply_codec=reply_codec,
        )
        timing = Timing(self._codecs)
        graph.forget.detach()
        self._held.discard(graph.microbatch)

        def send() -> None:
            timing.begins(lambda: codec.sizes(header, mask_BT), header.size_bytes)
            self._send(ClientFrame(backward=request), data)

        def receive() -> Told:
            reply = self._reply("backward")
            self.credits = reply.credits or self.credits
            timing.answered(reply.held_s, reply.grad.size_bytes)
            answer = None
            if want_input_grad:
                answer = self._tensor_bytes(reply.grad, reply_codec, graph.batch_shape, mask_BT, what)
            timing.ends("backward")
            return reply, answer

        def read(told: Told) -> tuple[Tensor | None, float]:
            reply, data = told
            input_grad_BTD = None if data is None else self._decoded(reply.grad, data, mask_BT, what).to(device)
            if not 0.0 <= reply.adapter_grad_norm < math.inf:
                raise NonFiniteError(f"the norm of the trunk adapter's gradient is {reply.adapter_grad_norm}")
            return input_grad_BTD, reply.adapter_grad_norm

        return Exchange(self._exchanges, send, receive, read)

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
        with self._exchanges.alone():
            self._stream.send(ClientFrame(step=request))
            self._owed_step_replies += 1

    def read_adapter(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """The trunk's half of the adapter, or its accumulated gradients, by canonical name, float32."""
        with self._exchanges.alone():
            self._stream.send(ClientFrame(read_adapter=ReadAdapter(gradients=gradients)))
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
        with self._exchanges.alone():
            self._stream.send(ClientFrame(close=Close(trained_tokens=trained_tokens, contribute=contribute)))
            reply: CloseReply = self._reply("close")
            self._stream.finish()
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

    def _send(self, frame: ClientFrame, data: memoryview) -> None:
        self._stream.send(frame)
        chunk_bytes = min(self.welcome.chunk_bytes or wire.CHUNK_BYTES, wire.CHUNK_BYTES)
        self._stream.send_chunks(wire.chunk_frames(data, chunk_bytes), len(data))

    def _reply(self, kind: str) -> Any:
        """The reply to the request just sent, after those that are still due before it."""
        while self._owed_step_replies:
            self._stream.receive("step")
            self._owed_step_replies -= 1
        return self._stream.receive(kind)

    def _as_difference(
        self, request: Forward, released: Tensor, mask_BT: Tensor | None, rows: Sequence[int]
    ) -> tuple[Samples, TensorHeader, memoryview]:
        """Both ends' caches move with what is sent: the session is over if this fails."""
        lengths = codec.sent_lengths(mask_BT, released.shape)
        samples = self._places.plan(rows, lengths)
        self._samples.admit(samples, lengths)
        samples.write(request)
        return samples, *self._samples.encode("head", released, mask_BT, samples)

    def _tensor_bytes(
        self,
        header: TensorHeader,
        codec_name: str,
        shape: tuple[int, ...],
        mask_BT: Tensor | None,
        what: str,
        samples: Samples | None = None,
    ) -> memoryview:
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
        return self._collect(header.size_bytes, what)

    def _decoded(
        self,
        header: TensorHeader,
        data: memoryview | None,
        mask_BT: Tensor | None,
        what: str,
        samples: Samples | None = None,
    ) -> Tensor:
        if data is None:
            raise FrameError(f"{what} did not come")
        if samples is None:
            tensor_BTD = codec.decode(header, data, mask_BT)
        else:
            tensor_BTD = self._samples.decode("tail", header, data, mask_BT, samples)
            self._places.answered(samples)
        codec.require_finite(tensor_BTD, what)
        return tensor_BTD

    def _collect(self, size_bytes: int, what: str) -> memoryview:
        assembler = codec.Assembler(size_bytes, what)
        chunks = self._stream.receive_chunks(size_bytes, what)
        while not assembler.complete:
            assembler.add(next(chunks))
        return assembler.data()

    def _pending(
        self, microbatch: int, shape: tuple[int, ...], rows: tuple[int, ...], mask_BT: Tensor | None
    ) -> PendingGraph:
        graph = PendingGraph(microbatch, shape, rows, mask_BT)
        self._held.add(microbatch)
        graph.forget = weakref.finalize(graph, _forgotten, microbatch, self._held, self._dropped)
        graph.forget.atexit = False
        return graph


def _forgotten(microbatch: int, held: set[int], dropped: deque[int]) -> None:
    held.discard(microbatch)
    dropped.append(microbatch)


def _offering(hello: Hello, codecs: WireCodecs, arithmetic: TrunkArithmetic) -> Hello:
    offer = Hello()
    offer.CopyFrom(hello)
    offer.codecs[:] = codecs.offered()
    offer.trunk_autocast = TRUNK_AUTOCAST[arithmetic.autocast]
    offer.deterministic = arithmetic.deterministic
    return offer
