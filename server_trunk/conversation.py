"""One client's session, frame by frame: decode, validate, hand to the scheduler, encode; answers in the frames' order.

Frames are read while earlier ones are computed, as far as the session's graphs have room.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from torch import Tensor

from contract import codec
from contract import trunk_pb2 as pb
from contract.adapter import sha256_hex
from contract.delta import SampleCache
from contract.errors import FrameError, TrunklineError
from contract.records import DELTA_CODEC
from contract.wire import CHUNK_BYTES
from server_trunk.contributions import Contributions
from server_trunk.engine import Engine
from server_trunk.incoming import Incoming, put_aside
from server_trunk.lane import Backward, Forward, Graph
from server_trunk.memory import Hold, MemoryBudget, Spill
from server_trunk.outgoing import Outgoing
from server_trunk.requests import ForwardInputs, check_backward, check_close, read_forward, read_step
from server_trunk.scheduler import Scheduler
from server_trunk.seats import Seat
from server_trunk.session_adapter import SessionAdapter
from server_trunk.sessions import Session
from server_trunk.stream import FrameStream
from server_trunk.worker import Worker

_COPIES = 3
_NEIGHBOURS_STEP_WITHIN_S = 0.05
"""A client on the same cores begins its next batch just then: a step beside its first layer cost both several times
what the step takes. Others' steps are best done at once, while their next batch is made and on its way."""

TrunkSession = Session[SessionAdapter, Graph]
Answer = Callable[[], Awaitable[None]]


class Conversation:
    """What follows a hello that was accepted. Any error ends it; the caller closes the session."""

    def __init__(
        self,
        session: TrunkSession,
        seat: Seat,
        stream: FrameStream,
        engine: Engine,
        scheduler: Scheduler,
        contributions: Contributions,
        *,
        disk: Worker,
        memory: MemoryBudget,
        spill: Spill,
        max_tokens: int,
        patience_s: float,
        sample_cache_bytes: int,
        cache_memory: MemoryBudget,
        closing: asyncio.Semaphore,
    ) -> None:
        """A forward waits for memory no longer than `patience_s`. `cache_memory` is what of it sample caches may take.

        `closing` bounds the sessions that close at once, each with a copy of its adapter.
        """
        self._session = session
        self._seat = seat
        self._stream = stream
        self._engine = engine
        self._scheduler = scheduler
        self._contributions = contributions
        self._disk = disk
        self._memory = memory
        self._spill = spill
        self._max_tokens = max_tokens
        self._patience_s = patience_s
        self._closing = closing
        self._cache_holds = (Hold(cache_memory), Hold(memory))
        wanted = sample_cache_bytes if DELTA_CODEC in session.codecs else 0
        granted = all(hold.grow(wanted) for hold in self._cache_holds)
        if not granted:
            for hold in self._cache_holds:
                hold.release()
        self._sample_cache_bytes = wanted if granted else 0
        self._samples = SampleCache(self._sample_cache_bytes, engine.hidden_size)
        self._passing: set[Hold] = set()  # of replies that no backward will follow
        self._unsent: list[Outgoing] = []
        self._answering: asyncio.Task[None] | None = None  # while it runs
        self._cut_off: TrunklineError | None = None
        self._waiting: list[asyncio.Future[Any]] = []
        self._answers: asyncio.Queue[Answer | None] = asyncio.Queue(maxsize=2 * session.pending.limit)

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
            credits=self._credits(),
            autocast_dtype=self._session.autocast_dtype,
            sample_cache_bytes=self._sample_cache_bytes,
            renewal=b"" if self._session.ticket_use is None else self._session.ticket_use.renewal,
        )
        tasks = [asyncio.create_task(self._answer(welcome)), asyncio.create_task(self._read())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            del task, tasks  # or an error's traceback would hold them, and they what their frames worked on
            self._let_go()

    # ---- room for others -----------------------------------------------------------------------------------------

    def waits_s(self) -> float:
        """How long what this session keeps in memory has waited for its client; 0 where it keeps nothing."""
        made_s = min((out.made_s for out in self._unsent if out.hold.occupies), default=float("inf"))
        return max(time.monotonic() - made_s, self._session.pending.rested_s(), 0.0)

    async def put_aside(self) -> None:
        """Have what waits for this session's client lie on disk, and give its room back.

        Raises CapacityError where the disk has no room, StorageError.
        """
        pending, unsent = self._session.pending, list(self._unsent)
        resting = pending.at_rest()
        coming = [out.graph for out in unsent if out.graph is not None]  # pending, maybe, by the time that it is done

        def work() -> None:
            for out in unsent:
                out.put_aside(self._spill)
            for graph in (*coming, *resting.values()):
                put_aside(graph, self._spill)

        done = self._scheduler.other(self._seat, work)
        await asyncio.wait((done,))
        if done.cancelled():  # the session ended
            return
        done.result()
        for out in unsent:
            out.hold.release()
        for microbatch, graph in resting.items():
            pending.put_aside(microbatch, graph)

    def end(self, error: TrunklineError) -> None:
        """Have the session end with `error`."""
        self._cut_off = error
        if self._answering is not None:
            self._answering.cancel()

    def _let_go(self) -> None:
        """Keep no data, graph or file any more: this conversation and its answers refer to each other, and the
        collector of such cycles would come long after their room was given back."""
        self._answering = None
        for out in self._unsent:
            out.drop()
        self._unsent, self._waiting, self._answers = [], [], asyncio.Queue()
        for hold in (*self._passing, *self._cache_holds):
            hold.release()
        self._samples = SampleCache(0, self._engine.hidden_size)

    async def _read(self) -> None:
        """Hands on what the client asks for until it closes or hangs up."""
        while (frame := await self._stream.read()) is not None:
            kind = str(frame.WhichOneof("body"))
            if kind not in _REQUESTS:
                raise FrameError(f"a second {kind} frame came; a stream has one session")
            await _REQUESTS[kind](self, getattr(frame, kind))
            if kind == "close":
                break
        await self._answers.put(None)

    async def _answer(self, welcome: pb.Welcome) -> None:
        """Sends `welcome`, and then what was asked for, in the order in which it was asked."""
        self._answering = asyncio.current_task()
        try:
            await self._stream.write(pb.ServerFrame(welcome=welcome))
            while self._cut_off is None and (answer := await self._answers.get()) is not None:
                await answer()
                self._tally()
        except asyncio.CancelledError:
            if self._cut_off is None:
                raise
        error, self._cut_off = self._cut_off, None
        if error is not None:
            raise error

    async def _deliver(self, out: Outgoing) -> None:
        """Sends the data of a reply whose frame was sent."""
        async with self._stream.in_time(out.size, "a reply", "go"):
            while data := await out.next(self._disk):
                await self._stream.write_data(data)
        self._unsent.remove(out)

    def _made(self, future: asyncio.Future[Outgoing]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        if self._answering is None:  # it ended meanwhile
            future.result().drop()
        else:
            self._unsent.append(future.result())

    def _credits(self) -> int:
        """Microbatches that the client should have under way: one while memory is short, and all it may otherwise."""
        return 1 if self._memory.scarce else self._session.pending.limit

    def _handed(self, future: asyncio.Future[Any]) -> list[asyncio.Future[Any]]:
        """`future` in a list of its own, from which its one reader takes it: an answer must not keep a graph alive."""
        self._waiting = [one for one in self._waiting if not one.done()]
        self._waiting.append(future)
        return [future]

    async def _caught_up(self) -> None:
        """Wait for all work that was handed on; what fails of it is told by its own answer."""
        if self._waiting:
            await asyncio.wait(self._waiting)
        self._waiting.clear()

    def _tally(self) -> None:
        counters = self._session.counters
        self._session.count(
            received_bytes=self._stream.received_bytes - counters.received_bytes,
            sent_bytes=self._stream.sent_bytes - counters.sent_bytes,
        )

    async def _forward(self, forward: pb.Forward) -> None:
        session = self._session
        inputs = read_forward(
            forward,
            session.codecs,
            hidden_size=self._engine.hidden_size,
            max_tokens=self._max_tokens,
            max_positions=self._engine.max_positions,
        )
        session.pending.drop(forward.dropped)
        hold = Hold(self._memory)
        holds_others = bool(session.pending.reserved)
        if forward.need_grad:
            session.pending.reserve(forward.microbatch, hold)
        else:
            self._passing.add(hold)
        if inputs.samples is not None:
            self._samples.admit(inputs.samples, inputs.lengths)
        incoming = await self._received(forward, inputs, hold, holds_others)
        came_s = time.monotonic()
        by_session = session.autocast_dtype if not forward.autocast_dtype else ""
        modes = (forward.autocast_dtype or by_session, forward.training, forward.need_grad, bool(by_session))

        def asked(hidden_BTD: Tensor) -> Forward:
            return Forward(
                session.adapter,
                hidden_BTD,
                inputs.mask_BT,
                inputs.position_ids,
                *modes,
                own_dropout=self._engine.own_dropout,
                seed=session.seed_of(forward.microbatch),
            )

        def prepare() -> Forward:
            return asked(incoming.values_BTD())

        def finish(answer: tuple[Tensor, Graph]) -> Outgoing:
            output_BTD, graph = answer
            if forward.need_grad:
                incoming.lighten(graph)
            return Outgoing(*incoming.answer(output_BTD), hold, graph=graph if forward.need_grad else None)

        like = asked(torch.empty(list(forward.hidden.shape), dtype=codec.DTYPES[forward.hidden.dtype], device="meta"))
        made = self._scheduler.forward(self._seat, inputs.tokens, like, hold, prepare, finish)
        made.add_done_callback(self._made)
        future = self._handed(made)

        async def answer() -> None:
            out: Outgoing = await future.pop()
            if out.graph is not None:
                session.pending.add(forward.microbatch, out.graph)
                session.count(tokens=inputs.tokens)
            out.graph = None  # a graph that expires while a slow client reads must not live on here
            held_s = time.monotonic() - came_s
            credit = self._credits()
            body = pb.ForwardReply(microbatch=forward.microbatch, hidden=out.header, credits=credit, held_s=held_s)
            await self._stream.write(pb.ServerFrame(forward=body))
            await self._deliver(out)
            if not forward.need_grad:
                self._passing.discard(hold)
                hold.release()

        await self._answers.put(answer)

    async def _received(self, forward: pb.Forward, inputs: ForwardInputs, hold: Hold, holds_others: bool) -> Incoming:
        """The request's data, in memory once there is room for it, its answer and its gradient; or else on disk.

        A session that holds nothing waits for its turn. One that does must not: what would make room may be its own
        backward, which comes behind this request.
        """
        header = forward.hidden
        size = _COPIES * math.prod(header.shape) * codec.DTYPES[header.dtype].itemsize
        made = functools.partial(Incoming, forward, inputs, self._samples)
        if not holds_others:
            await hold.wait(size, self._patience_s)
        elif not hold.grow(size):
            kept = self._spill.place(header.size_bytes)
            await self._stream.put_data(header.size_bytes, "forward.hidden", kept, self._disk)
            return made(memoryview(b""), kept, self._spill)
        return made(await self._stream.read_data(header.size_bytes, "forward.hidden"), None, None)

    async def _backward(self, backward: pb.Backward) -> None:
        session = self._session
        graph = session.pending.pop(backward.microbatch)
        check_backward(backward, graph, session.codecs, self._max_tokens)
        data = await self._stream.read_data(backward.grad.size_bytes, "backward.grad")
        came_s = time.monotonic()
        adapter, mask_BT = session.adapter, graph.mask_BT
        hold = session.pending.hold_of(backward.microbatch)

        def prepare(graph: Graph = graph) -> Backward:
            grad_BTD = codec.decode(backward.grad, data, mask_BT)
            codec.require_finite(grad_BTD, "backward.grad")
            return Backward(adapter, graph, grad_BTD, backward.want_input_grad, backward.reset_gradient)

        def finish(answer: tuple[Tensor | None, float]) -> Outgoing:
            grad_BTD, norm = answer
            if grad_BTD is None:
                return Outgoing(None, memoryview(b""), hold, norm=norm)
            return Outgoing(*codec.encode(grad_BTD, backward.reply_codec, mask_BT), hold, norm=norm)

        tokens = graph.shape[0] * graph.shape[1]
        made = self._scheduler.backward(self._seat, tokens, graph, prepare, finish)
        made.add_done_callback(self._made)
        future = self._handed(made)

        async def answer() -> None:
            out: Outgoing = await future.pop()
            session.pending.answered(backward.microbatch)
            self._passing.add(hold)
            body = pb.BackwardReply(
                microbatch=backward.microbatch,
                grad=out.header,
                adapter_grad_norm=out.norm,
                credits=self._credits(),
                held_s=time.monotonic() - came_s,
            )
            await self._stream.write(pb.ServerFrame(backward=body))
            await self._deliver(out)
            self._passing.discard(hold)
            hold.release()

        await self._answers.put(answer)

    async def _step(self, step: pb.Step) -> None:
        settings, grad_scale = read_step(step)
        await self._caught_up()
        session, adapter = self._session, self._session.adapter
        session.pending.free_all("the session's adapter was stepped after its forward")
        future = self._handed(
            self._scheduler.other(
                self._seat,
                lambda: self._engine.step(adapter, settings, grad_scale),
                within_s=_NEIGHBOURS_STEP_WITHIN_S if self._stream.on_this_machine else 0.0,
            )
        )

        async def answer() -> None:
            await future.pop()
            session.count(steps=1)
            await self._stream.write(pb.ServerFrame(step=pb.StepReply(steps=session.counters.steps)))

        await self._answers.put(answer)

    async def _read_adapter(self, request: pb.ReadAdapter) -> None:
        adapter, hold = self._session.adapter, Hold(self._memory)
        self._passing.add(hold)
        in_memory = hold.grow(4 * adapter.layout.values)

        def read() -> Outgoing:
            data = self._engine.read(adapter, gradients=request.gradients)
            out = Outgoing(None, memoryview(data), hold)
            if not in_memory:
                out.put_aside(self._spill)
            return out

        made = self._scheduler.other(self._seat, read)
        made.add_done_callback(self._made)
        future = self._handed(made)

        async def answer() -> None:
            out: Outgoing = await future.pop()
            await self._stream.write(pb.ServerFrame(adapter=pb.AdapterReply(size_bytes=out.size)))
            await self._deliver(out)
            self._passing.discard(hold)
            hold.release()

        await self._answers.put(answer)

    async def _close(self, close: pb.Close) -> None:
        session = self._session
        check_close(close, session.round_key)

        def last() -> bytes:
            if close.contribute:
                self._engine.require_finite(session.adapter)
            return self._engine.read(session.adapter, gradients=False)

        async def kept() -> str:
            adapter = await self._scheduler.other(self._seat, last)
            self._tally()  # before anything is kept: a ticket may not allow what came
            if close.contribute and (key := session.round_key) is not None:
                owner, base = session.client_id, session.base_sha256
                await self._disk.run(self._contributions.add, key, owner, base, close.trained_tokens, adapter)
            return sha256_hex(adapter)

        async def answer() -> None:
            async with self._closing:  # which no client keeps waiting: each has taken all but this answer
                adapter_sha256 = await kept()
            reply = pb.CloseReply(
                adapter_sha256=adapter_sha256,
                trained_tokens=close.trained_tokens,
                received_bytes=session.counters.received_bytes,
                sent_bytes=session.counters.sent_bytes,
            )
            await self._stream.write(pb.ServerFrame(close=reply))
            session.closed = True

        await self._answers.put(answer)


_REQUESTS: dict[str, Callable[[Conversation, Any], Awaitable[None]]] = {
    "forward": Conversation._forward,
    "backward": Conversation._backward,
    "step": Conversation._step,
    "read_adapter": Conversation._read_adapter,
    "close": Conversation._close,
}
