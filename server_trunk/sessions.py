"""Who is working with this trunk: admission, graphs that wait for their backward, and what each round has done.

A graph and an adapter are whatever the engine made. Everything here is bounded. Not safe to use from several threads;
the servicer's event loop owns it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from contract.errors import (
    CapacityError,
    ConnectionFailedError,
    ExpiredGraphError,
    FrameError,
    RoundError,
    SessionError,
)
from contract.named_clients import NamedClients
from contract.records import OUTSIDE_ROUNDS, RoundKey, RoundProgress
from server_trunk.memory import Hold
from server_trunk.tickets import TicketUse

Clock = Callable[[], float]
Graph = TypeVar("Graph")
Adapter = TypeVar("Adapter")

_REMEMBERED_GRAPHS = 64
_REMEMBERED_ROUNDS = 256
_REMEMBERED_RUNS = 256
SIGN_OF_LIFE_S = 5.0
"""How often a quiet session shows that it goes on: more seldom than a round may be without progress."""


class PendingGraphs(Generic[Graph]):
    """Graphs by microbatch, at most `limit` of them, each for at most `ttl_s` seconds of `clock`.

    A forward keeps its hold on memory from `reserve` until its graph is freed or its backward is `settled`.
    """

    def __init__(self, limit: int, ttl_s: float, clock: Clock) -> None:
        self.limit = limit
        self.ttl_s = ttl_s
        self._clock = clock
        self._reserved: dict[int, Hold] = {}  # by microbatch, from before its forward to after its backward
        self._graphs: OrderedDict[int, tuple[float, Graph]] = OrderedDict()
        self._expired: OrderedDict[int, str] = OrderedDict()  # microbatch -> why, for the error of a late backward

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def reserved(self) -> int:
        """Forwards that were asked for and whose backward is not done."""
        return len(self._reserved)

    @property
    def keeps_graphs(self) -> bool:
        """Whether the graph of any of them is held, and not only its input."""
        return any(hold.keeps_graph for hold in self._reserved.values())

    def reserve(self, microbatch: int, hold: Hold) -> None:
        """A place for a graph that is not computed yet; what `hold` holds is given back with it.

        Raises CapacityError when this session is full, FrameError when `microbatch` is pending already.
        """
        if microbatch in self._reserved:
            raise FrameError(f"microbatch {microbatch} waits for its backward already; each forward needs a new number")
        if len(self._reserved) >= self.limit:
            raise CapacityError(
                f"{len(self._reserved)} forwards wait for their backward, which is this trunk's limit: "
                "run backward on them, or run forwards that need none under torch.no_grad()"
            )
        self._reserved[microbatch] = hold

    def add(self, microbatch: int, graph: Graph) -> None:
        """Keep the graph of a forward that was reserved."""
        self._graphs[microbatch] = (self._clock(), graph)

    def pop(self, microbatch: int) -> Graph:
        """The graph, no longer pending; its memory is held until it is `settled`.

        Raises ExpiredGraphError when it was freed, SessionError when it never was.
        """
        if microbatch in self._graphs:
            return self._graphs.pop(microbatch)[1]
        if microbatch in self._expired:
            raise ExpiredGraphError(f"the graph of microbatch {microbatch} is gone: {self._expired[microbatch]}")
        raise SessionError(f"no forward of microbatch {microbatch} waits for a backward")

    def settled(self, microbatch: int) -> None:
        """The backward of a graph that was popped is done, and its memory given back."""
        if (hold := self.answered(microbatch)) is not None:
            hold.release()

    def answered(self, microbatch: int) -> Hold | None:
        """The backward of a graph that was popped is done; its memory is the caller's to give back."""
        return self._reserved.pop(microbatch, None)

    def hold_of(self, microbatch: int) -> Hold:
        """What the forward of a graph holds."""
        return self._reserved[microbatch]

    def at_rest(self) -> dict[int, Graph]:
        """By microbatch, the graphs that wait for their backward and take memory, the oldest first."""
        held = self._reserved
        return {microbatch: graph for microbatch, (_, graph) in self._graphs.items() if held[microbatch].occupies}

    def rested_s(self) -> float:
        """How long the oldest of them has waited; 0 for none."""
        since = next((since for number, (since, _) in self._graphs.items() if self._reserved[number].occupies), None)
        return 0.0 if since is None else self._clock() - since

    def put_aside(self, microbatch: int, graph: Graph) -> None:
        """The graph takes no memory any more; its place stays its own."""
        if self._graphs.get(microbatch, (0.0, None))[1] is graph:
            self._reserved[microbatch].release()

    def drop(self, microbatches: Iterable[int]) -> None:
        """Free what the client will never ask for."""
        for microbatch in microbatches:
            if self._graphs.pop(microbatch, None) is not None:
                self.settled(microbatch)

    def free_all(self, reason: str) -> None:
        """Free every graph; a later backward is answered with `reason`."""
        for microbatch in list(self._graphs):
            self._free(microbatch, reason)

    def close(self) -> None:
        """Free every graph, and what a forward or backward that was cut short had reserved."""
        self.free_all("its session is closed")
        for microbatch in list(self._reserved):
            self.settled(microbatch)

    def sweep(self) -> int:
        """Free what waited longer than its time; the number freed."""
        oldest = self._clock() - self.ttl_s
        late = [microbatch for microbatch, (since, _) in self._graphs.items() if since < oldest]
        for microbatch in late:
            self._free(microbatch, f"it was freed after waiting {self.ttl_s:g} s for its backward")
        return len(late)

    def _free(self, microbatch: int, reason: str) -> None:
        del self._graphs[microbatch]
        self.settled(microbatch)
        self._expired[microbatch] = reason
        while len(self._expired) > _REMEMBERED_GRAPHS:
            self._expired.popitem(last=False)


@dataclass(slots=True)
class Counters:
    """What went by. Tokens are those of forwards that need a gradient; bytes are serialised frames."""

    sessions: int = 0
    steps: int = 0
    tokens: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0

    def add(self, steps: int, tokens: int, received_bytes: int, sent_bytes: int) -> None:
        self.steps += steps
        self.tokens += tokens
        self.received_bytes += received_bytes
        self.sent_bytes += sent_bytes


@dataclass(frozen=True, slots=True)
class SeenSession:
    """What a session is and has done so far: `open_s` since its hello, `idle_s` since its client was last heard or
    answered, `pending` forwards that wait for their backward."""

    session_id: str
    client_id: str
    round_key: RoundKey | None
    open_s: float
    idle_s: float
    counters: Counters
    pending: int
    quiet: bool


@dataclass(slots=True, eq=False)
class Session(Generic[Adapter, Graph]):
    """One client's stream, from its hello to its close."""

    session_id: str
    client_id: str
    round_key: RoundKey | None
    base_sha256: str
    codecs: tuple[str, ...]
    adapter: Adapter
    pending: PendingGraphs[Graph]
    totals: Counters  # of the round, shared by its sessions
    account: Counters  # of the client, shared by its sessions
    clock: Clock
    dropout_key: str = ""
    quiet: bool = False
    autocast_dtype: str = ""
    ticket_use: TicketUse | None = None
    closed: bool = False  # by its client, in words
    counters: Counters = field(default_factory=Counters)
    opened_s: float = 0.0
    heard_s: float = 0.0
    _showed_life: float = float("-inf")

    def seed_of(self, microbatch: int) -> int:
        """What a microbatch's dropout is drawn from: the same wherever and beside whomever the session runs."""
        named = f"{self.dropout_key}/{self.base_sha256}/{microbatch}".encode()
        return int.from_bytes(hashlib.sha256(named).digest()[:7], "little")

    def count(self, *, steps: int = 0, tokens: int = 0, received_bytes: int = 0, sent_bytes: int = 0) -> None:
        """Add to this session's counters, its round's and its client's.

        Of a quiet session the round's only learn that it goes on, and the client's nothing.

        Raises TicketError where the session has a ticket that does not allow as much.
        """
        self.counters.add(steps, tokens, received_bytes, sent_bytes)
        self.heard_s = self.clock()
        if self.ticket_use is not None:
            self.ticket_use.spend(steps, received_bytes + sent_bytes)
        if not self.quiet:
            self.totals.add(steps, tokens, received_bytes, sent_bytes)
            self.account.add(steps, tokens, received_bytes, sent_bytes)
        elif self.heard_s - self._showed_life >= SIGN_OF_LIFE_S:
            self._showed_life = self.heard_s
            self.totals.add(1, 0, 0, 0)

    def seen(self) -> SeenSession:
        """The session as its trunk's operator may see it.

        What a quiet one counts follows from its client's text, and the moments of its frames do: of it no more is told
        than its round's progress tells.
        """
        now = self.clock()
        told = (self.session_id, self.client_id, self.round_key, now - self.opened_s)
        if self.quiet:
            return SeenSession(*told, now - max(self._showed_life, self.opened_s), Counters(), 0, True)
        return SeenSession(*told, now - self.heard_s, replace(self.counters), self.pending.reserved, False)


def _over(key: RoundKey) -> RoundError:
    return RoundError(
        f"round {key.round}, attempt {key.attempt} of run {key.run} is over: what is computed for it counts for nothing"
    )


class SessionTable(Generic[Adapter, Graph]):
    """The open sessions, at most `max_sessions`, and the totals of the last rounds."""

    def __init__(self, max_sessions: int, max_pending: int, pending_ttl_s: float, clock: Clock) -> None:
        self.max_sessions = max_sessions
        self._max_pending = max_pending
        self._pending_ttl_s = pending_ttl_s
        self._clock = clock
        self._taken = 0
        self._draining = False
        self.expired = 0  # graphs that waited too long, in all
        self._accounts: dict[str, Counters] = {}  # by client, of sessions that are not quiet
        self._named = NamedClients()
        self._open: set[Session[Adapter, Graph]] = set()
        self._rounds: OrderedDict[RoundKey, Counters] = OrderedDict()
        self._going_on: OrderedDict[str, tuple[int, int]] = OrderedDict()  # by run, its first round and attempt

    @property
    def taken(self) -> int:
        """Places that are taken, those of sessions whose hello is still being answered included."""
        return self._taken

    @property
    def admitting(self) -> bool:
        """Whether new sessions are taken, as far as there are places."""
        return not self._draining

    @property
    def pending_graphs(self) -> int:
        return sum(len(session.pending) for session in self._open)

    def counted(self) -> dict[str, Counters]:
        """By client, what all sessions have done that were not quiet, open ones included.

        Under no name what those did that are of no round, or of one client more than are counted by name.
        """
        return {client: replace(account) for client, account in self._accounts.items()}

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for a session. Raises CapacityError, or ConnectionFailedError when no more are admitted."""
        if self._draining:
            raise ConnectionFailedError("this trunk is shutting down and takes no new sessions")
        if self._taken >= self.max_sessions:
            raise CapacityError(f"all {self.max_sessions} sessions of this trunk are taken; try again later")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    def stop_admitting(self) -> None:
        self._draining = True

    def open(
        self,
        client_id: str,
        round_key: RoundKey | None,
        base_sha256: str,
        codecs: tuple[str, ...],
        adapter: Adapter,
        *,
        deterministic: bool = False,
        quiet: bool = False,
        autocast_dtype: str = "",
        ticket_use: TicketUse | None = None,
    ) -> Session[Adapter, Graph]:
        """Enter a session, inside of its place. What a `quiet` one does shows in no round's progress.

        What dropout draws in a `deterministic` one does not go by `client_id`, which Flower gives anew at each start.
        Raises RoundError as `require_going_on` does: its attempt may have ended since its hello.
        """
        self.require_going_on(round_key)
        totals = self._totals(round_key) if round_key is not None else Counters()
        totals.sessions += 1
        account = Counters() if quiet else self._account("" if round_key is None else client_id)
        account.sessions += 1
        pending: PendingGraphs[Graph] = PendingGraphs(self._max_pending, self._pending_ttl_s, self._clock)
        session = Session(
            secrets.token_hex(8),
            client_id,
            round_key,
            base_sha256,
            codecs,
            adapter,
            pending=pending,
            totals=totals,
            account=account,
            clock=self._clock,
            dropout_key="" if deterministic else client_id,
            quiet=quiet,
            autocast_dtype=autocast_dtype,
            opened_s=self._clock(),
            heard_s=self._clock(),
            ticket_use=ticket_use,
        )
        self._open.add(session)
        return session

    def end_before(self, key: RoundKey) -> list[tuple[Session[Adapter, Graph], RoundError]]:
        """The attempts of a run that come before `key` are over; the open sessions of theirs, and what each ends with.

        Of the last runs alone it is remembered. What was said last holds: a run whose database was restored from a
        backup goes on at a round that it had been through.
        """
        self._going_on[key.run] = (key.round, key.attempt)
        self._going_on.move_to_end(key.run)
        if len(self._going_on) > _REMEMBERED_RUNS:
            self._going_on.popitem(last=False)
        keys = [(session, session.round_key) for session in self._open]
        return [(session, _over(own)) for session, own in keys if own is not None and self._is_over(own)]

    def require_going_on(self, key: RoundKey | None) -> None:
        """Raise RoundError for an attempt that is over."""
        if key is not None and self._is_over(key):
            raise _over(key)

    def _is_over(self, key: RoundKey) -> bool:
        going_on = self._going_on.get(key.run, (0, 0))
        return key.attempt != OUTSIDE_ROUNDS and (key.round, key.attempt) < going_on

    def close(self, session: Session[Adapter, Graph]) -> None:
        """Forget a session and free its graphs."""
        self._open.discard(session)
        session.pending.close()

    def seen(self) -> list[SeenSession]:
        """The open sessions as their trunk's operator may see them, the oldest first."""
        return sorted((session.seen() for session in self._open), key=lambda one: (-one.open_s, one.session_id))

    def sweep(self) -> int:
        """Free the graphs that waited too long; the number freed."""
        freed = sum(session.pending.sweep() for session in self._open)
        self.expired += freed
        return freed

    def progress(self, key: RoundKey) -> RoundProgress:
        """What the round's sessions have done so far, closed ones included; zeros for an unknown round."""
        totals = self._rounds.get(key, Counters())
        return RoundProgress(totals.sessions, totals.steps, totals.tokens, totals.received_bytes, totals.sent_bytes)

    def _account(self, client_id: str) -> Counters:
        return self._accounts.setdefault(self._named.name(client_id), Counters())

    def _totals(self, key: RoundKey) -> Counters:
        totals = self._rounds.setdefault(key, Counters())
        self._rounds.move_to_end(key)
        if len(self._rounds) > _REMEMBERED_ROUNDS:  # never one that goes on, however many others are named meanwhile
            going_on = {key, *(session.round_key for session in self._open)}
            for old in [old for old in self._rounds if old not in going_on][: len(self._rounds) - _REMEMBERED_ROUNDS]:
                del self._rounds[old]
        return totals
