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
from contract.errors import CapacityError, ConnectionFailedError, SessionError, StorageError, TrunklineError
from contract.failpoint import failpoint
from contract.tls import peer_certificate
from contract.version import VERSION
from contract.wire import ERROR_KEY, MAX_MESSAGE_BYTES, PROTOCOL, model_agreement, round_from_wire
from server_trunk.contributions import Contributions
from server_trunk.conversation import Conversation
from server_trunk.door import FIRST_WORD_S, Door
from server_trunk.engine import Engine
from server_trunk.lane import Graph
from server_trunk.memory import MemoryBudget, Spill
from server_trunk.requests import Opening, read_hello, read_round, read_survivors
from server_trunk.scheduler import Scheduler
from server_trunk.seats import Seat
from server_trunk.session_adapter import SessionAdapter
from server_trunk.sessions import Session, SessionTable
from server_trunk.stream import FrameStream
from server_trunk.tickets import Admission, Asked, TicketBook, TicketUse
from server_trunk.transfers import AdapterTransfers
from server_trunk.watch import SessionSeen, Watch
from server_trunk.worker import Worker

logger = logging.getLogger("trunkline.server_trunk")

SERVICE = "trunkline.v1.Trunk"
_OPENS_WITHIN_S = 120.0  # sooner than a client gives up, so that it is told why
HELLO_TIMEOUT_S = 10.0  # no session is counted before its hello, but its call takes a place already
_REASON_BYTES = 1000  # what a peer sent may be quoted, and a status must fit the HTTP/2 headers that carry it
_CLOSES_AT_ONCE = 4
_REST = 3
"""How many times as long as a LoRA structure took that is new here the thread is left to passes before the next."""
_RELIEF_S = 3.0
"""Who waits for memory waits so long before what others keep there for absent clients is put on disk."""
_FRAME_BYTES, _TOKEN_BYTES = 1 << 16, 8
"""What a frame that is no chunk may have, in all and for each token of the largest forward."""

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


async def abort(context: Context, error: TrunklineError) -> None:
    """End the call with the error's status, its one line, and its class for the peer to rebuild."""
    status = grpc.StatusCode[error.grpc_status]
    line = " ".join(str(error).split()).encode("ascii", "backslashreplace")[:_REASON_BYTES].decode("ascii")
    await context.abort(status, line, trailing_metadata=((ERROR_KEY, type(error).__name__),))


class _Refusals:
    """What calls are refused for, in the log: a flood of them must not fill the disk."""

    def __init__(self, most: int, every_s: float) -> None:
        self._most = most
        self._every_s = every_s
        self._since_s = float("-inf")
        self._told = 0

    def tell(self, method: str, error: TrunklineError) -> None:
        now_s = time.monotonic()
        if now_s - self._since_s > self._every_s:
            if self._told > self._most:
                logger.info("%d more calls were refused", self._told - self._most)
            self._since_s, self._told = now_s, 0
        self._told += 1
        if self._told <= self._most:
            logger.info("%s refused: %.1000s", method, error)


_refusals = _Refusals(most=100, every_s=10.0)


def _answers_errors(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Lets an RPC's TrunklineErrors end the call with their own status."""

    @functools.wraps(method)
    async def guarded(self: TrunkServicer, request: Any, context: Context) -> T:
        failpoint(f"serve.{method.__name__}")
        try:
            answer = await method(self, request, context)
        except TrunklineError as error:
            _refusals.tell(method.__name__, error)
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
        cache_memory: MemoryBudget,
        spill: Spill,
        door: Door,
        watch: Watch,
        tickets: TicketBook | None = None,
    ) -> None:
        """`cache_memory` is what of `memory` the sessions' sample caches may take.

        With `tickets` sessions are admitted by those alone.
        """
        self._engine = engine
        self._table = table
        self._contributions = contributions
        self._limits = limits
        self._scheduler = scheduler
        self._first_lane = first_lane
        self._memory = memory
        self._cache_memory = cache_memory
        self._spill = spill
        self._door = door
        self._closing = asyncio.Semaphore(_CLOSES_AT_ONCE)
        self._opening = asyncio.Semaphore(1)
        self._next_structure_s = float("-inf")
        self._conversations: dict[Session[SessionAdapter, Graph], Conversation] = {}
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
                    self.put_adapter, None, pb.AdapterReceipt.SerializeToString
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
                "EndBefore": grpc.unary_unary_rpc_method_handler(
                    self.end_before, pb.RoundId.FromString, pb.EndBeforeReply.SerializeToString
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
        frame_bytes = _FRAME_BYTES + _TOKEN_BYTES * self._limits.max_tokens
        with self._watch.session(context.invocation_metadata()) as seen:
            try:
                await self._serve(FrameStream(context, self._limits.idle_timeout_s, frame_bytes), context, seen)
            except asyncio.CancelledError:
                if not self._hanging_up:
                    raise
                raise ConnectionFailedError("this trunk is shutting down; the session is lost") from None
            finally:
                self._streams.discard(task)

    async def _serve(self, stream: FrameStream, context: Context, seen: SessionSeen) -> None:
        patience_s = min(HELLO_TIMEOUT_S, self._limits.idle_timeout_s)
        async with self._door.stranger(stream.peer, 2 * patience_s):
            frame = await stream.read_hello(patience_s)
        if frame is None:
            return
        kind = frame.WhichOneof("body")
        if kind != "hello":
            raise SessionError(f"a {kind} frame came before hello; there is no session to use it in")
        opening = read_hello(frame.hello, self._agreement)
        self._engine.check_lora(opening.spec)
        if opening.deterministic:
            self._engine.check_deterministic()
        admission = None if self._tickets is None else _admission(self._tickets, frame.hello, opening, context)
        self._table.require_going_on(opening.round_key)
        self._scheduler.require_room(self._engine.adapter_values(opening.spec))
        with self._table.place():
            use = None if self._tickets is None or admission is None else self._tickets.enter(admission)
            adapter = await self._first_adapter_in_time(opening)
            seat = self._scheduler.enter(adapter, deterministic=opening.deterministic, quiet=opening.quiet)
            try:
                await self._converse(opening, seat, stream, seen, use)
            finally:
                self._scheduler.leave(seat)

    async def _first_adapter_in_time(self, opening: Opening) -> SessionAdapter:
        """Raises CapacityError where other hellos, each of a new structure, keep this one waiting for too long."""
        try:
            async with asyncio.timeout(_OPENS_WITHIN_S):
                return await self._first_adapter(opening)
        except TimeoutError:
            raise CapacityError(
                f"this hello did not get its turn within {_OPENS_WITHIN_S:g} s: the trunk is busy with others"
            ) from None

    async def _first_adapter(self, opening: Opening) -> SessionAdapter:
        if isinstance(opening.start, int):
            return await self._opened(opening, opening.start)
        values = self._engine.adapter_values(opening.spec)
        targets = len(opening.spec.target_modules) + len(opening.spec.target_parameters)
        async with self._transfers.loaded(opening.start, values, 3 * targets) as tensors:
            return await self._opened(opening, tensors)

    async def _opened(self, opening: Opening, start: Mapping[str, Tensor] | int) -> SessionAdapter:
        if self._engine.knows(opening.spec):
            return await self._open(opening, start)
        async with self._opening:
            await asyncio.sleep(max(0.0, self._next_structure_s - time.monotonic()))
            began_s = time.monotonic()
            try:
                return await self._open(opening, start)
            finally:
                now_s = time.monotonic()
                self._next_structure_s = now_s + _REST * (now_s - began_s)

    async def _open(self, opening: Opening, start: Mapping[str, Tensor] | int) -> SessionAdapter:
        return await self._first_lane.acquire(
            self._engine.open, SessionAdapter.release, opening.spec, start, opening.trainable
        )

    async def _converse(
        self, opening: Opening, seat: Seat, stream: FrameStream, seen: SessionSeen, use: TicketUse | None
    ) -> None:
        base_sha256, adapter = opening.start, seat.adapter
        if isinstance(base_sha256, str):
            await self._scheduler.other(seat, lambda: None)  # after which what is too much for memory is on disk
        else:
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
        try:
            seat.keeps_graphs = lambda: session.pending.keeps_graphs
            seen.admit(session)
            self._conversations[session] = conversation = Conversation(
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
                cache_memory=self._cache_memory,
                closing=self._closing,
            )
            await conversation.run()
        finally:
            self._conversations.pop(session, None)
            self._table.close(session)

    async def relieve(self) -> None:
        """While others wait for memory, put on disk what is kept there for clients that keep the trunk waiting.

        The longest waiting goes first. A session for which the disk has no room ends.
        """
        while self._memory.waited_s > _RELIEF_S and self._conversations:
            conversation = max(self._conversations.values(), key=Conversation.waits_s)
            if conversation.waits_s() < _RELIEF_S:
                return
            try:
                await conversation.put_aside()
            except (CapacityError, StorageError) as error:
                logger.warning("a session ends that kept others waiting for memory: %s", error)
                conversation.end(CapacityError(f"others waited for the memory that this session kept: {error}"))
                return
            except SessionError:
                return  # it ended meanwhile

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
    async def put_adapter(self, chunks: AsyncIterator[bytes], context: Context) -> pb.AdapterReceipt:
        rest = aiter(chunks)
        async with self._door.stranger(context.peer(), FIRST_WORD_S):
            first = await anext(rest, None)
        return pb.AdapterReceipt(sha256=await self._transfers.receive(first, rest))

    @_answers_errors
    async def get_adapter(self, request: pb.GetAdapterRequest, context: Context) -> None:
        await self._transfers.send(request.sha256, context.write)

    @_answers_errors
    async def commit_round(self, request: pb.CommitRoundRequest, context: Context) -> pb.CommitRoundReply:
        key, survivors = round_from_wire(request.round), read_survivors(request)
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
        if averaged:
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

    @_answers_errors
    async def end_before(self, request: pb.RoundId, context: Context) -> pb.EndBeforeReply:
        key = read_round(request)
        ended = self._table.end_before(key)
        for session, error in ended:
            self._conversations[session].end(error)
        if ended:
            logger.info("run %s: %d sessions of attempts that are over end", key.run, len(ended))
        return pb.EndBeforeReply(sessions=len(ended))


def _admission(tickets: TicketBook, hello: pb.Hello, opening: Opening, context: Context) -> Admission:
    """Raises TicketError, before anything is taken for the session."""
    asked = None
    if opening.round_key is not None and isinstance(opening.start, str):
        asked = Asked(opening.client_id, opening.round_key, opening.start, opening.trainable)
    certificate = peer_certificate(context.auth_context())
    return tickets.checked(hello, asked, "" if certificate is None else key_sha256(certificate))
