"""The trunk's RPCs. Each session's frames are a Conversation's work; the arithmetic is the engine's."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from torch import Tensor

from contract import trunk_pb2 as pb
from contract.adapter import sha256_hex
from contract.certificates import key_sha256
from contract.codec import SESSION_CODECS
from contract.errors import (
    ConnectionFailedError,
    SessionError,
    TrunklineError,
)
from contract.failpoint import failpoint
from contract.tls import peer_certificate
from contract.version import VERSION
from contract.wire import ERROR_KEY, MAX_MESSAGE_BYTES, PROTOCOL, model_agreement, round_from_wire
from server_trunk.contributions import Contributions
from server_trunk.conversation import Conversation
from server_trunk.engine import Engine
from server_trunk.lane import Graph
from server_trunk.memory import MemoryBudget, Spill
from server_trunk.requests import Opening, read_hello
from server_trunk.scheduler import Scheduler
from server_trunk.seats import Seat
from server_trunk.session_adapter import SessionAdapter
from server_trunk.sessions import SessionTable
from server_trunk.stream import FrameStream
from server_trunk.tickets import Admission, Asked, TicketBook, TicketUse
from server_trunk.transfers import AdapterTransfers
from server_trunk.watch import SessionSeen, Watch
from server_trunk.worker import Worker

logger = logging.getLogger("trunkline.server_trunk")

SERVICE = "trunkline.v1.Trunk"
HELLO_TIMEOUT_S = 10.0  # no session is counted before its hello, but its call takes a place already
_REASON_LETTERS = 1000  # what a peer sent may be quoted, and a status must fit the HTTP/2 headers that carry it

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


async def abort(context: Context, error: TrunklineError) -> None:
    """End the call with the error's status, its one line, and its class for the peer to rebuild."""
    status = grpc.StatusCode[error.grpc_status]
    line = " ".join(str(error).split())[:_REASON_LETTERS]
    await context.abort(status, line, trailing_metadata=((ERROR_KEY, type(error).__name__),))


def _answers_errors(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Lets an RPC's TrunklineErrors end the call with their own status."""

    @functools.wraps(method)
    async def guarded(self: TrunkServicer, request: Any, context: Context) -> T:
        failpoint(f"serve.{method.__name__}")
        try:
            answer = await method(self, request, context)
        except TrunklineError as error:
            logger.info("%s refused: %.1000s", method.__name__, error)
            await abort(context, error)
            raise
        failpoint(f"serve.{method.__name__}.reply")
        return answer

    return guarded


@dataclass(frozen=True, slots=True)
class Limits:
    """What one session may ask of this trunk: B * T of one forward, seconds between two frames, samples to keep.

    `autocast_dtype` is what it gets where it leaves the choice to the trunk.
    """

    max_tokens: int
    idle_timeout_s: float
    sample_cache_bytes: int = 0
    autocast_dtype: str = ""


class TrunkServicer:
    """Serves trunkline.v1.Trunk from one event loop."""

    def __init__(
        self,
        engine: Engine,
        table: SessionTable[SessionAdapter, Graph],
        contributions: Contributions,
        limits: Limits,
        *,
        scheduler: Scheduler,
        first_lane: Worker,
        disk: Worker,
        memory: MemoryBudget,
        spill: Spill,
        watch: Watch,
        tickets: TicketBook | None = None,
    ) -> None:
        """With `tickets` sessions are admitted by those alone."""
        self._engine = engine
        self._table = table
        self._contributions = contributions
        self._limits = limits
        self._scheduler = scheduler
        self._first_lane = first_lane
        self._memory = memory
        self._spill = spill
        self._disk = disk
        self._tickets = tickets
        self._watch = watch
        self._agreement = model_agreement(engine.fingerprint, engine.cut, engine.dtype, engine.attn_implementation)
        self._transfers = AdapterTransfers(contributions, disk, limits.idle_timeout_s)
        self._streams: set[asyncio.Task[Any]] = set()
        self._hanging_up = False

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The RPCs for a server. A session's frames stay bytes, so that tensors are not copied by the parser."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Session": grpc.stream_stream_rpc_method_handler(self.session),
                "Describe": grpc.unary_unary_rpc_method_handler(
                    self.describe, pb.DescribeRequest.FromString, pb.TrunkDescription.SerializeToString
                ),
                "PutAdapter": grpc.stream_unary_rpc_method_handler(
                    self.put_adapter, pb.AdapterChunk.FromString, pb.AdapterReceipt.SerializeToString
                ),
                "GetAdapter": grpc.unary_stream_rpc_method_handler(
                    self.get_adapter, pb.GetAdapterRequest.FromString, pb.AdapterChunk.SerializeToString
                ),
                "CommitRound": grpc.unary_unary_rpc_method_handler(
                    self.commit_round, pb.CommitRoundRequest.FromString, pb.CommitRoundReply.SerializeToString
                ),
                "Progress": grpc.unary_unary_rpc_method_handler(
                    self.progress, pb.RoundId.FromString, pb.ProgressReply.SerializeToString
                ),
            },
        )

    def hang_up(self) -> None:
        """End every open session with UNAVAILABLE."""
        self._hanging_up = True
        for task in self._streams:
            task.cancel()

    # ---- sessions ------------------------------------------------------------------------------------------------

    @_answers_errors
    async def session(self, _: object, context: Context) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("gRPC runs every call in a task of its own")
        self._streams.add(task)
        with self._watch.session(context.invocation_metadata()) as seen:
            try:
                await self._serve(FrameStream(context, self._limits.idle_timeout_s), context, seen)
            except asyncio.CancelledError:
                if not self._hanging_up:
                    raise
                raise ConnectionFailedError("this trunk is shutting down; the session is lost") from None
            finally:
                self._streams.discard(task)

    async def _serve(self, stream: FrameStream, context: Context, seen: SessionSeen) -> None:
        frame = await stream.read(min(HELLO_TIMEOUT_S, self._limits.idle_timeout_s))
        if frame is None:
            return
        kind = frame.WhichOneof("body")
        if kind != "hello":
            raise SessionError(f"a {kind} frame came before hello; there is no session to use it in")
        opening = read_hello(frame.hello, self._agreement)
        self._engine.check_lora(opening.spec)
        admission = None if self._tickets is None else _admission(self._tickets, frame.hello, opening, context)
        with self._table.place():
            use = None if self._tickets is None or admission is None else self._tickets.enter(admission)
            adapter = await self._first_adapter(opening)
            seat = self._scheduler.enter(adapter, deterministic=opening.deterministic, quiet=opening.quiet)
            try:
                await self._converse(opening, seat, stream, seen, use)
            finally:
                self._scheduler.leave(seat)

    async def _first_adapter(self, opening: Opening) -> SessionAdapter:
        if isinstance(opening.start, int):
            return await self._opened(opening, opening.start)
        async with self._transfers.loaded(opening.start) as tensors:
            return await self._opened(opening, tensors)

    async def _opened(self, opening: Opening, start: Mapping[str, Tensor] | int) -> SessionAdapter:
        return await self._first_lane.acquire(
            self._engine.open, SessionAdapter.release, opening.spec, start, opening.trainable
        )

    async def _converse(
        self, opening: Opening, seat: Seat, stream: FrameStream, seen: SessionSeen, use: TicketUse | None
    ) -> None:
        base_sha256, adapter = opening.start, seat.adapter
        if not isinstance(base_sha256, str):
            read = functools.partial(self._engine.read, adapter, gradients=False)
            base_sha256 = sha256_hex(await self._scheduler.other(seat, read))
        auto = opening.trunk_autocast == "auto"
        session = self._table.open(
            opening.client_id,
            opening.round_key,
            base_sha256,
            opening.codecs,
            adapter,
            deterministic=opening.deterministic,
            quiet=opening.quiet,
            autocast_dtype=self._limits.autocast_dtype if auto else opening.trunk_autocast,
            ticket_use=use,
        )
        seat.keeps_graphs = lambda: session.pending.keeps_graphs
        seen.admit(session)
        try:
            await Conversation(
                session,
                seat,
                stream,
                self._engine,
                self._scheduler,
                self._contributions,
                disk=self._disk,
                memory=self._memory,
                spill=self._spill,
                max_tokens=self._limits.max_tokens,
                patience_s=self._limits.idle_timeout_s,
                sample_cache_bytes=self._limits.sample_cache_bytes,
            ).run()
        finally:
            self._table.close(session)

    # ---- single requests -----------------------------------------------------------------------------------------

    @_answers_errors
    async def describe(self, request: pb.DescribeRequest, context: Context) -> pb.TrunkDescription:
        return pb.TrunkDescription(
            protocol=PROTOCOL,
            model=self._agreement,
            layers=self._engine.layers,
            hidden_size=self._engine.hidden_size,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_tokens=self._limits.max_tokens,
            open_sessions=self._table.taken,
            max_sessions=self._table.max_sessions,
            codecs=SESSION_CODECS,
            weights=self._engine.weights,
            version=VERSION,
            clock_unix_s=time.time(),
            challenge=b"" if self._tickets is None else self._tickets.challenge(),
            ticket_signer="" if self._tickets is None else self._tickets.signers,
        )

    @_answers_errors
    async def put_adapter(self, chunks: AsyncIterator[pb.AdapterChunk], context: Context) -> pb.AdapterReceipt:
        return pb.AdapterReceipt(sha256=await self._transfers.receive(aiter(chunks)))

    @_answers_errors
    async def get_adapter(self, request: pb.GetAdapterRequest, context: Context) -> None:
        await self._transfers.send(request.sha256, context.write)

    @_answers_errors
    async def commit_round(self, request: pb.CommitRoundRequest, context: Context) -> pb.CommitRoundReply:
        key, survivors = round_from_wire(request.round), list(request.survivors)
        if request.partial:
            part = await self._disk.run(self._contributions.commit_part, key, request.base_sha256, survivors)
            reply = pb.CommitRoundReply(
                adapter_sha256=part.adapter_sha256, trained_tokens=part.trained_tokens, clients=part.clients
            )
            averaged = len(part.clients)
        else:
            whole = await self._disk.run(self._contributions.commit, key, request.base_sha256, survivors)
            reply = pb.CommitRoundReply(adapter_sha256=whole.adapter_sha256, trained_tokens=whole.trained_tokens)
            averaged = len(survivors)
        self._watch.committed()
        logger.info(
            "run %s round %d attempt %d: adapter %s averages %d of %d clients",
            *(key.run, key.round, key.attempt, reply.adapter_sha256 or "-", averaged, len(survivors)),
        )
        return reply

    @_answers_errors
    async def progress(self, request: pb.RoundId, context: Context) -> pb.ProgressReply:
        done = self._table.progress(round_from_wire(request))
        return pb.ProgressReply(
            sessions=done.sessions,
            steps=done.steps,
            tokens=done.tokens,
            received_bytes=done.received_bytes,
            sent_bytes=done.sent_bytes,
        )


def _admission(tickets: TicketBook, hello: pb.Hello, opening: Opening, context: Context) -> Admission:
    """Raises TicketError, before anything is taken for the session."""
    asked = None
    if opening.round_key is not None and isinstance(opening.start, str):
        asked = Asked(opening.client_id, opening.round_key, opening.start, opening.trainable)
    certificate = peer_certificate(context.auth_context())
    return tickets.checked(hello, asked, "" if certificate is None else key_sha256(certificate))
