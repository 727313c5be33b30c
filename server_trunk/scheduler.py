"""Which of the waiting work each lane does next: fair by tokens, in order within a session, many sessions in one pass.

Fairness is start-time fair queueing (Goyal, Vin and Cheng 1996, section 2) with tokens for packet lengths: the session
that was served the least goes first, and one that comes back from a pause starts where the others are. So a session
waits for at most one piece of each other session's work, whatever those have queued.

A shared forward is one graph, so its members' backwards are best taken in one pass too. Those that are there wait for
the others as long as computing their own forward again would take, and no longer. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from contract.errors import CapacityError, SessionError
from server_trunk.graph_meter import PassKind
from server_trunk.lane import Backward, Forward, Graph, Lane, pads_little
from server_trunk.memory import Hold
from server_trunk.passes import work
from server_trunk.residents import Residents
from server_trunk.seats import Job, Seat
from server_trunk.session_adapter import SessionAdapter
from server_trunk.worker import Worker

logger = logging.getLogger("trunkline.server_trunk")

ACTIVE_S = 1.0
"""A session that worked within this time is expected back, so that a lane does not take all threads for another."""


@dataclass(frozen=True, slots=True)
class PassSeen:
    """One pass as it went. `waited_s` has each session's wait, those of quiet ones left out: `whole` is without any."""

    kind: str
    waited_s: tuple[float, ...]
    tokens: int
    seconds: float
    whole: bool


class Scheduler:
    """Work for lanes, from the event loop that makes it."""

    def __init__(
        self,
        lanes: Sequence[tuple[Lane, Worker]],
        *,
        threads: int,
        batch_tokens: int,
        graph_bytes: Callable[[PassKind, int], int],
        transient_bytes: Callable[[PassKind, int], int],
        pass_bytes: int,
        residents: Residents,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[PassSeen], None] = lambda seen: None,
    ) -> None:
        """`threads` are all of PyTorch's; `batch_tokens` is B * T above which a pass takes in no more sessions.

        `graph_bytes` estimates what the graph of a kind of pass holds for so many tokens, `transient_bytes` what a pass
        without one holds while it runs; all that run at once may hold `pass_bytes`. `observe` is told of each pass once
        it is done.
        """
        self._lanes = tuple(lanes)
        self._free = list(lanes)
        self._threads = threads
        self._batch_tokens = batch_tokens
        self._graph_bytes = graph_bytes
        self._transient_bytes = transient_bytes
        self.pass_bytes = pass_bytes
        self.running_bytes = 0
        self.residents = residents
        self._observe = observe
        self._clock = clock
        self._seats: dict[Seat, None] = {}  # in the order of their coming
        self._turns = 0
        self._time = 0.0  # the fair queue's own: what the session served last had been served
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None

    # ---- what a session calls ------------------------------------------------------------------------------------

    def enter(self, adapter: SessionAdapter, *, deterministic: bool = False, quiet: bool = False) -> Seat:
        seat = Seat(adapter, deterministic, served=self._time, quiet=quiet)
        self._seats[seat] = None
        self.residents.used(seat)
        return seat

    def require_room(self, values: int) -> None:
        """Raise CapacityError for an adapter of so many values that this trunk would not hold it in memory once."""
        self.residents.require_room(values)

    def leave(self, seat: Seat) -> None:
        """Drop what `seat` has queued and, after what it has running, its adapter."""
        seat.left = True
        for job in seat.jobs:
            job.done.cancel()
        seat.jobs.clear()
        if not seat.running:
            self._forget(seat)
        self._dispatch()

    def forward(
        self,
        seat: Seat,
        tokens: int,
        shape: Forward,
        hold: Hold,
        prepare: Callable[[], Forward],
        finish: Callable[[tuple[Tensor, Graph]], Any],
    ) -> asyncio.Future[Any]:
        """`shape` is the request without its values: what may share a pass is decided before they are decoded.

        The graph is kept where `hold` finds room for it.
        """
        needed = self._bytes_of(shape, tokens)
        if shape.need_grad and needed > self.pass_bytes:
            raise CapacityError(
                f"a microbatch of {tokens} tokens needs about {needed} bytes at this trunk, whose memory-budget leaves "
                f"{self.pass_bytes} for a pass: use a smaller one"
            )
        job = Job("forward", tokens, prepare, finish, _future(), seat.adapter, shape=shape, hold=hold)
        return self._queue(seat, job)

    def backward(
        self,
        seat: Seat,
        tokens: int,
        graph: Graph,
        prepare: Callable[[], Backward],
        finish: Callable[[tuple[Tensor | None, float]], Any],
    ) -> asyncio.Future[Any]:
        return self._queue(seat, Job("backward", tokens, prepare, finish, _future(), seat.adapter, graph=graph))

    def other(self, seat: Seat, do: Callable[[], Any], *, within_s: float = 0.0) -> asyncio.Future[Any]:
        """Anything else that must keep its place in the session's order: a step, or reading the adapter.

        It is begun before the session's next request, or `within_s`.
        """
        job = Job("other", 0, do, lambda answer: answer, _future(), seat.adapter, due_s=self._clock() + within_s)
        return self._queue(seat, job)

    async def close(self) -> None:
        """Wait for what runs; nothing more is begun."""
        if self._alarm is not None:
            self._alarm.cancel()
        for seat in list(self._seats):
            self.leave(seat)
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ---- choosing ------------------------------------------------------------------------------------------------

    def _queue(self, seat: Seat, job: Job) -> asyncio.Future[Any]:
        if seat.left:
            raise SessionError("the session is closed; it takes no more work")
        if not seat.jobs and not seat.running:
            seat.served = max(seat.served, self._time)
        seat.jobs.append(job)
        seat.active_s = job.queued_s = self._clock()
        self._dispatch()
        return job.done

    def _dispatch(self) -> None:
        while self._free and (batch := self._next()):
            threads = self._threads_for(batch)
            lane, worker = self._take_lane(threads)
            for seat, _ in batch:
                seat.running = True
            self._time = max(self._time, min(seat.served for seat, _ in batch))
            room = self._room_for_graph([job for _, job in batch])
            self._turns += 1
            for seat, job in batch:
                seat.served += max(job.tokens, 1)
                seat.turn = self._turns
            needed = self._needed([job for _, job in batch])
            self.running_bytes += needed
            task = asyncio.create_task(self._drive(lane, worker, threads, batch, needed, room))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> list[tuple[Seat, Job]]:
        """The seats to serve together in one pass, each with its first job; none when nothing can be done yet."""
        waiting = sorted(
            (seat for seat in self._seats if seat.jobs and not seat.running), key=lambda one: (one.served, one.turn)
        )
        soonest = float("inf")
        for seat in waiting:
            first = seat.jobs[0]
            if len(seat.jobs) == 1 and self._clock() < first.due_s:
                soonest = min(soonest, first.due_s)
                continue
            gang = None if first.graph is None else first.graph.gang
            if first.graph is not None and gang is not None:
                present = [one for one in waiting if one.jobs[0].graph in gang.rows]
                if len(present) < len(gang.rows) and self._clock() < gang.due_s:
                    soonest = min(soonest, gang.due_s)
                    continue
                if not gang.worth_it(one.jobs[0].graph for one in present):
                    gang.part_from(first.graph)
                    gang, present = None, [seat]
            else:
                present = self._with_others(seat, waiting) if first.kind == "forward" else [seat]
            batch = [(one, one.jobs[0]) for one in present]
            if self.running_bytes and self.running_bytes + self._needed([job for _, job in batch]) > self.pass_bytes:
                return []  # it is their turn all the same: the next pass to end looks again
            for one in present:
                one.jobs.popleft()
            if gang is not None:
                gang.keep_only([job.graph for _, job in batch])
            return batch
        self._wake_at(soonest)
        return []

    def _needed(self, jobs: Sequence[Job]) -> int:
        """Bytes that a pass may hold while it runs: its graph's, which a backward may have to make again.

        Where several share it their rows are padded to the longest, and their adapters are in it a second time.
        """
        shapes = [shape for job in jobs if (shape := job.shape or (job.graph and job.graph.forward))]
        if not shapes:
            return 0
        tokens = sum(shape.rows for shape in shapes) * max(shape.length for shape in shapes)
        stacked = 4 * sum(job.adapter.layout.values for job in jobs) if len(jobs) > 1 else 0
        return max(self._bytes_of(shape, tokens) for shape in shapes) + stacked

    def _bytes_of(self, shape: Forward, tokens: int) -> int:
        return (self._graph_bytes if shape.need_grad else self._transient_bytes)(shape.kind, tokens)

    def _with_others(self, leader: Seat, waiting: Sequence[Seat]) -> list[Seat]:
        """The leader and those whose forwards fit into its pass: up to a free lane's even share of what waits."""
        shape = leader.jobs[0].shape
        if shape is None or leader.deterministic or not leader.adapter.layout.batches:
            return [leader]
        fitting = [
            seat
            for seat in waiting
            if (other := seat.jobs[0].shape) is not None
            and not seat.deterministic
            and seat.adapter.layout.batches
            and shape.shares_with(other)
        ]
        in_all = sum(seat.jobs[0].tokens for seat in fitting)
        room = min(self._batch_tokens, max(-(-in_all // len(self._free)), leader.jobs[0].tokens))
        taken, rows, lengths = [leader], shape.rows, {shape.length}
        stacked = 4 * leader.adapter.layout.values
        for seat in fitting:
            if seat is leader or (other := seat.jobs[0].shape) is None or not pads_little(*lengths, other.length):
                continue
            together = (rows + other.rows) * max(*lengths, other.length)
            if together > room:
                continue
            adapters = stacked + 4 * seat.adapter.layout.values
            needed = max(self._bytes_of(shape, together), self._bytes_of(other, together)) + adapters
            if needed <= self.pass_bytes // len(self._lanes):
                taken.append(seat)
                rows, stacked = rows + other.rows, adapters
                lengths.add(other.length)
        return taken

    def _room_for_graph(self, jobs: Sequence[Job]) -> Hold | None:
        """Whether a pass keeps its graph: where there is room for all of it.

        A graph of its own takes its session's room. Answers the room of one that several share: it is held as long as
        the graph is, which goes with the last of them, and so is no session's.
        """
        holds = [job.hold for job in jobs if job.hold is not None]
        shapes = [job.shape for job in jobs if job.shape is not None and job.shape.need_grad]
        if len(holds) < len(jobs) or len(shapes) < len(jobs):
            return None
        size = self._needed(jobs)
        room = None if len(jobs) == 1 else holds[0].beside()
        # A kept graph would keep its adapter in memory too.
        keep = not self.residents.crowded and (holds[0].keep_graph(size) if room is None else room.grow(size))
        for job, hold in zip(jobs, holds, strict=True):
            job.keep = hold.keeps_graph = keep
        return room

    def _wake_at(self, when_s: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if when_s < float("inf"):
            delay_s = max(0.0, when_s - self._clock())
            self._alarm = asyncio.get_running_loop().call_later(delay_s, self._dispatch)

    def _threads_for(self, batch: Sequence[tuple[Seat, Job]]) -> int:
        """All threads for a pass that nobody else is about to work beside; else the lane's own share.

        One for a step that nothing waits for: the session's next batch is being made on the same cores, maybe.
        """
        if batch[0][1].kind == "other" and not batch[0][0].jobs:
            return 1
        inside = {seat for seat, _ in batch}
        if any(seat.deterministic for seat in inside):
            return self._threads
        now_s = self._clock()
        beside = any(
            seat.running or seat.jobs or now_s - seat.active_s < ACTIVE_S for seat in self._seats if seat not in inside
        )
        return max(1, self._threads // len(self._lanes)) if beside else self._threads

    def _take_lane(self, threads: int) -> tuple[Lane, Worker]:
        """A free lane: the first for all threads, if it can be had; else the one that worked last, whose heap has room.

        Each lane that ever had all threads keeps them. OpenMP counts them all, and once they are more than there are
        cores none of them spins any longer for what comes next, so that passes of all threads took up to half as long
        again.
        """
        first = self._lanes[0]
        if threads > 1 and first in self._free:
            self._free.remove(first)
            return first
        return self._free.pop()

    # ---- doing ---------------------------------------------------------------------------------------------------

    async def _drive(
        self,
        lane: Lane,
        worker: Worker,
        threads: int,
        batch: list[tuple[Seat, Job]],
        needed: int,
        room: Hold | None,
    ) -> None:
        began_s = self._clock()
        try:
            outcomes = await worker.run(work, lane, threads, [job for _, job in batch])
        except Exception as error:  # noqa: BLE001 (told to everybody in the pass)
            outcomes = [error] * len(batch)
        try:  # a lane that is not given back, whatever fails here, would never compute again
            if room is not None:
                _hold_for_gang(room, [job for _, job in batch])
            self._tell(batch, outcomes, began_s)
            await self._make_room(worker)
        except Exception:
            logger.exception("what follows a pass could not be done")
        finally:
            self.running_bytes -= needed
            self._free.append((lane, worker))
            self._dispatch()

    def _tell(self, batch: Sequence[tuple[Seat, Job]], outcomes: Sequence[Any], began_s: float) -> None:
        now_s = self._clock()
        for seat, _ in batch:
            self._settle(seat, now_s)
        for (_, job), outcome in zip(batch, outcomes, strict=True):
            if job.kind == "forward" and job.graph is not None and job.graph.gang is not None:
                job.graph.gang.due_s = now_s + (now_s - began_s)
            if job.done.done():
                continue
            if isinstance(outcome, BaseException):
                job.done.set_exception(outcome)
            else:
                job.done.set_result(outcome)
        self._report(batch, began_s, now_s)

    def _report(self, batch: Sequence[tuple[Seat, Job]], began_s: float, now_s: float) -> None:
        told = [job for seat, job in batch if not seat.quiet]
        if told:
            waited_s = tuple(began_s - job.queued_s for job in told)
            tokens, whole = sum(job.tokens for job in told), len(told) == len(batch)
            self._observe(PassSeen(told[0].kind, waited_s, tokens, now_s - began_s, whole))

    def _settle(self, seat: Seat, now_s: float) -> None:
        seat.running = False
        seat.active_s = now_s
        try:
            if seat.left:
                self._forget(seat)
            elif not seat.adapter.evicted:
                self.residents.used(seat)
        except Exception:  # which the other sessions of its pass have nothing to do with
            logger.exception("a session's place could not be put in order")

    async def _make_room(self, worker: Worker) -> None:
        """Put idle sessions' adapters aside, now: behind the work that waits they would be in memory all the while."""
        idle = self.residents.surplus()
        for seat in idle:
            seat.running = True
        for seat in idle:
            try:
                await worker.run(self.residents.put_aside, seat.adapter)
            except Exception as error:  # noqa: BLE001 (a full disk, no memory for a copy: the lane has others to serve)
                logger.warning("an idle session's adapter stays in memory: %s: %s", type(error).__name__, error)
            self._settle(seat, seat.active_s)

    def _forget(self, seat: Seat) -> None:
        self._seats.pop(seat, None)
        self.residents.gone(seat)
        for lane, worker in self._lanes:
            worker.submit(lane.slots.close, seat.adapter)
        seat.adapter.release()


def _hold_for_gang(room: Hold, jobs: Sequence[Job]) -> None:
    """Give `room` back when the graph that `jobs` came to share is gone; at once where they share none."""
    gang = None
    for job in jobs:
        if job.graph is not None and job.graph.gang is not None:
            gang = job.graph.gang
        elif job.hold is not None:
            job.hold.keeps_graph = False
    if gang is None:
        room.release()
        return
    weakref.finalize(gang, _release_on, asyncio.get_running_loop(), room).atexit = False


def _release_on(loop: asyncio.AbstractEventLoop, room: Hold) -> None:
    with suppress(RuntimeError):  # the loop is closed, and with it whoever waited for room
        loop.call_soon_threadsafe(room.release)


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()
